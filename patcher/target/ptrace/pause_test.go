//go:build linux && amd64

package ptrace

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// openHost opens a running host, to be closed with the test.
func openHost(t testing.TB, b *backend, h *hosttest.Host) *process {
	t.Helper()
	p, err := b.Open(context.Background(), idOf(t, b, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p.(*process)
}

func idOf(t testing.TB, b *backend, pid int) target.ID { return infoOf(t, b, pid).ID }

func infoOf(t testing.TB, b *backend, pid int) target.Info {
	t.Helper()
	l, err := b.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(l, func(i target.Info) bool { return i.PID == pid })
	if i < 0 {
		t.Fatalf("List does not tell of process %d", pid)
	}
	return l[i]
}

// demo are the options of a host that runs the smallest base image.
func demo(t testing.TB, o hosttest.Options) hosttest.Options {
	t.Helper()
	o.DLL, o.Call, o.Allow = hosttest.Unnamed(t, "demo/demo.dll"), "answer", []int{42}
	return o
}

// BenchmarkPause tells how long threads stand for a freeze that does nothing.
func BenchmarkPause(b *testing.B) {
	for _, n := range []int{2, 10, 100} {
		b.Run(fmt.Sprintf("threads=%d", n), func(b *testing.B) {
			block := n - 3
			if block < 0 {
				block = 0
			}
			k := newBackend(b)
			p := openHost(b, k, hosttest.Start(b, demo(b, hosttest.Options{Block: block})))
			var pauses []time.Duration
			for b.Loop() {
				z := freeze(b, p)
				thaw(b, z)
				pauses = append(pauses, z.(target.Pauser).Pause())
			}
			slices.Sort(pauses)
			b.ReportMetric(float64(pauses[len(pauses)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(pauses[len(pauses)*95/100].Microseconds()), "p95-µs")
		})
	}
}
