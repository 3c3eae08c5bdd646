package agent

import (
	"context"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// What a device sleeps through, its timers sleep through, too: after eight
// hours in a bag the next check may be minutes away. And a network that has
// come is worth trying at once. Both are noticed by looking now and then, which
// needs no help of any one system; a look that is missed costs latency only.
const (
	hostLook  = 5 * time.Second // two clocks and a list of addresses: some 50 microseconds
	clockJump = 3 * time.Second // more than a clock that is being steered gains between two looks

	// wokenSpread keeps devices apart that one network, or one morning, wakes
	// together; wokenLeast is from one woken check to the next, where networks
	// come and go. Both are less where checks are more frequent.
	wokenSpread = 30 * time.Second
	wokenLeast  = time.Minute
)

// WatchHost tells, until ctx ends, when this machine has slept, its clock was
// set, or its addresses have changed. what is one sentence.
func WatchHost(ctx context.Context, tell func(what string)) {
	t := time.NewTicker(hostLook)
	defer t.Stop()
	began, seed := time.Now(), maphash.MakeSeed()
	var h hostView
	for {
		now := time.Now()
		if what := h.look(now.Round(0), now.Sub(began), addressSum(seed)); what != "" {
			tell(what)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// hostView is what was seen at the last look.
type hostView struct {
	seen  bool
	wall  time.Time     // by the clock that people set
	awake time.Duration // by the one that stands still while the machine sleeps
	sum   uint64        // of the addresses, 0 if they cannot be read
}

// look compares; "" if nothing happened.
func (h *hostView) look(wall time.Time, awake time.Duration, sum uint64) (what string) {
	was := *h
	*h = hostView{true, wall, awake, sum}
	if sum == 0 {
		h.sum = was.sum // not read is not changed
	}
	if !was.seen {
		return ""
	}
	switch jump := wall.Sub(was.wall) - (awake - was.awake); {
	case jump > clockJump:
		return fmt.Sprintf("this machine slept, or its clock was set: %s passed unseen", jump.Round(time.Second))
	case jump < -clockJump:
		return fmt.Sprintf("the clock was set back by %s", (-jump).Round(time.Second))
	case h.sum != was.sum && was.sum != 0:
		return "the addresses of this machine have changed"
	}
	return ""
}

// addressSum is a number that changes with the addresses by which the machine
// is on a network; 0 if they cannot be read. Addresses of one link only are
// left out: each container that starts brings some.
func addressSum(seed maphash.Seed) uint64 {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return 0
	}
	return sumOf(seed, all)
}

func sumOf(seed maphash.Seed, all []net.Addr) uint64 {
	var list []string
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			list = append(list, n.String())
		}
	}
	slices.Sort(list)
	var h maphash.Hash
	h.SetSeed(seed)
	for _, s := range list {
		h.WriteString(s)
		h.WriteByte(0)
	}
	return max(h.Sum64(), 1)
}

// woken is told of such an event: the loop looks again with a list of its own,
// and the repository is asked soon. It may be called from any goroutine.
func (a *Agent) woken(what string) {
	a.log.Info("woken", zap.String("by", what))
	a.post(func() { a.dirty = true; a.Wake() })
	select {
	case a.outside.soon <- struct{}{}:
	default:
	}
}

// untilCheck waits d for the next check of the repository, or less when
// something woke this machine; false: ctx has ended.
func (a *Agent) untilCheck(ctx context.Context, d time.Duration) bool {
	due := time.Now().Add(d)
	first := due
	a.outside.due.Store(&first)
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return true
		case <-a.outside.soon:
			now := time.Now()
			at := now.Add(rand.N(a.outside.spread + 1))
			if first := a.outside.woken.Add(a.outside.least); at.Before(first) {
				at = first
			}
			if at.Before(due) {
				due, a.outside.woken = at, at
				a.outside.due.Store(&at)
				t.Reset(at.Sub(now))
			}
		}
	}
}
