//go:build linux && amd64

package ptrace

import (
	"context"
	"errors"
	"sync"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// An exec of a program with many threads ends them and waits until their
// tracer has taken note, while it holds the lock that an attach to another of
// them waits for. Neither program may stand still then.
func TestExecOfManyThreads(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Block: 30}))
	pid := h.PID
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 110 {
			select {
			case <-stop:
				return
			default:
				h.Exec()
			}
		}
	})
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	tried, frozen := 0, 0
	for {
		select {
		case <-done:
			t.Logf("%d freezes, %d of them done", tried, frozen)
			h.Runs()
			h.Healthy()
			return
		default:
		}
		l, err := b.List(context.Background())
		must(t, "List", err)
		for _, i := range l {
			if i.PID != pid {
				continue
			}
			p, err := b.Open(context.Background(), i.ID)
			if err != nil {
				continue
			}
			for range 20 {
				tried++
				z, err := p.Freeze(context.Background())
				if err == nil {
					thaw(t, z)
					frozen++
				} else if !errors.Is(err, target.ErrGone) && !errors.Is(err, target.ErrBusy) {
					t.Errorf("Freeze: %v", err)
				}
				if err != nil {
					break
				}
			}
			p.Close()
		}
	}
}
