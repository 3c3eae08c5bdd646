package agent

import (
	"context"
	"hash/maphash"
	"net"
	"strings"
	"testing"
	"time"
)

func TestHostView(t *testing.T) {
	start := time.Date(2026, 11, 10, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name  string
		wall  time.Duration // that passed on the clock of people
		awake time.Duration // and on the other
		sum   uint64
		want  string
	}{
		{"nothing", hostLook, hostLook, 7, ""},
		{"a slow look", time.Minute, time.Minute, 7, ""},
		{"a clock that is steered", hostLook + time.Second, hostLook, 7, ""},
		{"slept", 8 * time.Hour, hostLook, 7, "slept"},
		{"slept a little", hostLook + 10*time.Second, hostLook, 7, "10s passed unseen"},
		{"set back", -time.Hour, hostLook, 7, "set back by 1h0m5s"},
		{"another network", hostLook, hostLook, 8, "addresses"},
		{"addresses that cannot be read", hostLook, hostLook, 0, ""},
	} {
		var h hostView
		if what := h.look(start, time.Hour, 7); what != "" {
			t.Errorf("the first look: %q", what)
		}
		what := h.look(start.Add(c.wall), time.Hour+c.awake, c.sum)
		if c.want == "" && what != "" || !strings.Contains(what, c.want) {
			t.Errorf("%s: %q, wanted %q", c.name, what, c.want)
		}
		if what := h.look(start.Add(c.wall+hostLook), time.Hour+c.awake+hostLook, h.sum); what != "" {
			t.Errorf("%s is told twice: %q", c.name, what)
		}
	}
}

// The addresses of links come and go with each container; those by which
// others reach the machine count, in any order.
func TestAddressSum(t *testing.T) {
	seed := maphash.MakeSeed()
	at := func(list ...string) []net.Addr {
		var out []net.Addr
		for _, s := range list {
			ip, n, err := net.ParseCIDR(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return out
	}
	home := sumOf(seed, at("127.0.0.1/8", "192.168.1.7/24", "2001:db8::7/64"))
	for _, same := range [][]net.Addr{
		at("2001:db8::7/64", "192.168.1.7/24", "::1/128"),
		at("192.168.1.7/24", "2001:db8::7/64", "fe80::1/64", "169.254.3.4/16"),
	} {
		if sumOf(seed, same) != home {
			t.Errorf("%v looks like another network", same)
		}
	}
	for _, other := range [][]net.Addr{at("192.168.1.8/24", "2001:db8::7/64"), at("192.168.1.7/24"), at("192.168.1.7/16", "2001:db8::7/64"), nil} {
		if sumOf(seed, other) == home {
			t.Errorf("%v looks like home", other)
		}
	}
}

func TestWatchHostEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); WatchHost(ctx, func(string) {}) }()
	cancel()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("it goes on")
	}
}

// BenchmarkHostLook is what one look costs; there is one each hostLook.
func BenchmarkHostLook(b *testing.B) {
	seed := maphash.MakeSeed()
	var h hostView
	for b.Loop() {
		now := time.Now()
		h.look(now.Round(0), 0, addressSum(seed))
	}
}
