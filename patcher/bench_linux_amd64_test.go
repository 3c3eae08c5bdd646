package patcher_test

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// benchRounds is how often each pause is measured; each round measures the
// bare cost of stopping the same threads as well, in turn.
const benchRounds = 200

func report(name string, value float64, unit string) {
	fmt.Printf("bench: %s %.4g %s\n", name, value, unit)
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Nanoseconds()) / 1e6
}

// BenchmarkPause measures how long all threads stand, first seize to last
// detach, when a patch goes in: 1, 10 and 100 threads, and 10 threads with a
// hundred functions. It reports; it judges nothing.
func BenchmarkPause(b *testing.B) {
	for _, c := range []struct {
		name, image, hotpatch, call string
		threads                     int
	}{
		{"pause_1_thread", "mingw/app.dll", "mingw/app-ref-1.dll", "vuln", 1},
		{"pause_10_threads", "mingw/app.dll", "mingw/app-ref-1.dll", "vuln", 10},
		{"pause_100_threads", "mingw/app.dll", "mingw/app-ref-1.dll", "vuln", 100},
		{"pause_10_threads_100_functions", "many/many.dll", "many/many-1.dll", "f00", 10},
	} {
		h := hosttest.Start(b, hosttest.Options{DLL: hosttest.Fixture(b, c.image), Call: c.call, Sleep: c.threads - 1})
		p := live(b, h.PID)
		base := imageAt(b, p, h.Base)
		patch := patchOf(b, c.image, c.hotpatch)
		x := &patcher.Patcher{}
		var pauses, bare []time.Duration
		threads := 0
		for range benchRounds {
			apply, _ := cycle(b, x, p, base, patch, func() {})
			pauses = append(pauses, apply)
			f, err := p.Freeze(context.Background())
			if err != nil {
				continue // a thread was being born or was late; the next round measures
			}
			if list, err := f.Threads(); err == nil {
				threads = len(list)
			}
			if err := f.Thaw(); err != nil {
				b.Fatal(err)
			}
			bare = append(bare, f.(target.Pauser).Pause())
		}
		p50, seize := median(pauses), median(bare)
		report(c.name+"_p50", p50, "ms")
		report(c.name+"_bare_seize_p50", seize, "ms")
		report(c.name+"_ratio", p50/seize, "x")
		report(c.name+"_stopped", float64(threads), "threads")
		h.Healthy()
		h.Exit()
	}
}
