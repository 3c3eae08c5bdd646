package report

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A fleet comes evenly: no tenth of the interval has more than twice its share.
func TestPhaseSpreadsAFleet(t *testing.T) {
	const devices = 1000
	var tenths [10]int
	for i := range devices {
		tenths[Phase(fmt.Sprintf("device-%d", i), "check", time.Minute)*10/time.Minute]++
	}
	for n, count := range tenths {
		if count > 2*devices/10 || count < devices/20 {
			t.Errorf("%d devices in tenth %d: %v", count, n, tenths)
		}
	}
	if Phase("d", "check", time.Hour) == Phase("d", "report", time.Hour) {
		t.Error("one phase for two purposes")
	}
}

// A device's turns are one interval apart, each half to one and a half from now.
func TestNextTurn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		interval := time.Duration(rapid.Int64Range(int64(time.Millisecond), int64(24*time.Hour)).Draw(t, "interval"))
		device := rapid.String().Draw(t, "device")
		now := time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "now"), rapid.Int64Range(0, 999999999).Draw(t, "ns"))
		if p := Phase(device, "x", interval); p < 0 || p >= interval {
			t.Fatalf("phase %s of %s", p, interval)
		}
		turn := NextTurn(device, "x", interval, now)
		wait := turn.Sub(now)
		if wait < interval/2 || wait > interval/2+interval {
			t.Fatalf("a turn of %s comes after %s", interval, wait)
		}
		if next := NextTurn(device, "x", interval, turn); next.Sub(turn) != interval {
			t.Fatalf("the turn after that %s later, the interval is %s", next.Sub(turn), interval)
		}
	})
}

func TestPace(t *testing.T) {
	p := Pace{First: time.Second, Most: time.Minute, Asked: time.Hour}
	for _, x := range []struct {
		failures  int
		asked     time.Duration
		random    float64
		want, ust time.Duration // bounds
	}{
		{1, 0, 0, 500 * time.Millisecond, 500 * time.Millisecond},
		{1, 0, 0.999, 900 * time.Millisecond, time.Second},
		{3, 0, 0, 2 * time.Second, 2 * time.Second},
		{7, 0, 0.999, 50 * time.Second, time.Minute},
		{1 << 30, 0, 0.999, 50 * time.Second, time.Minute},
		{1, 10 * time.Minute, 0, 10 * time.Minute, 10 * time.Minute},
		{1, 10 * time.Minute, 0.999, 10 * time.Minute, 10*time.Minute + time.Second},
		{1, 1000 * time.Hour, 0, time.Hour, time.Hour},
		{9, time.Second, 0, 30 * time.Second, 30 * time.Second}, // asking for less than our own pace changes nothing
	} {
		if got := p.Wait(x.failures, x.asked, x.random); got < x.want || got > x.ust {
			t.Errorf("after %d failures, asked %s: %s, want %s to %s", x.failures, x.asked, got, x.want, x.ust)
		}
	}
}
