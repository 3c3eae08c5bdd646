package agent

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"hotpatchd/patcher/target"
)

// watch starts what wakes the loop: the policy file, process starts where the
// backend tells of them, and the repository's turn. All end with ctx.
func (a *Agent) watch(ctx context.Context, wg *sync.WaitGroup) {
	run := func(fn func()) {
		wg.Add(1)
		go func() { defer wg.Done(); fn() }()
	}
	run(func() { WatchPolicy(ctx, a.o.Config.Policy.File, a.Reload) })
	run(func() { a.watchManagement(ctx) })
	run(func() { a.checkRegularly(ctx) })
	if w, ok := a.o.Backend.(target.Watcher); ok {
		events, err := w.Watch(ctx)
		if err != nil {
			a.log.Warn("no news of process starts; the regular scan finds them", zap.Error(err))
			return
		}
		run(func() {
			for range events {
				a.Wake()
			}
		})
	}
}

// jitter spreads the checks of a fleet: each wait is 90 to 110 % of the interval.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// checkRegularly asks the repository now and then. A failure is said by
// refresh; the next turn comes all the same, sooner after a failure.
func (a *Agent) checkRegularly(ctx context.Context) {
	if a.client == nil {
		return
	}
	const soonest = 5 * time.Second
	wait := soonest
	for {
		err := a.refresh(ctx)
		d := jitter(a.o.Config.Repository.CheckEvery)
		if err != nil {
			d = min(d, jitter(wait))
			wait = min(2*wait, a.o.Config.Repository.CheckEvery)
		} else {
			wait = soonest
		}
		t := time.NewTimer(d)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}
