//go:build linux && amd64

package ptrace

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func BenchmarkList(b *testing.B) {
	k := newBackend(b)
	for range 200 {
		c := exec.Command("sleep", "1000")
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Process.Kill(); c.Wait() })
	}
	k.List(context.Background())
	n := 0
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		l, err := k.List(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		n = len(l)
	}
	b.ReportMetric(float64(n), "processes")
	b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

// cpu is the processor time this process has used: what a loaded machine does not distort.
func cpu() time.Duration {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
