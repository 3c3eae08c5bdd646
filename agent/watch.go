package agent

import (
	"context"
	"sync"
	"time"
)

// watch starts what looks after the loop, and what wakes it: the policy file, device management, the
// repository's turn and reports. All end with ctx.
func (a *Agent) watch(ctx context.Context, wg *sync.WaitGroup) {
	run := func(fn func()) {
		wg.Add(1)
		go func() { defer wg.Done(); fn() }()
	}
	if !a.unwatched {
		run(func() { WatchPolicy(ctx, a.o.Config.Policy.File, a.Reload) })
		run(func() { a.watchHeart(ctx) })
	}
	run(func() { a.watchManagement(ctx) })
	if w := a.o.HostEvents; w != nil {
		run(func() { w(ctx, a.woken) })
	}
	polls := a.pollsOf()
	run(func() { a.checkRegularly(ctx, polls) })
	if r := a.reporting; r != nil {
		run(func() { r.reporter.Run(ctx) })
	}
}

// checkRegularly asks the repository now and then. A failure is said by
// refresh; the next turn comes all the same, sooner after a failure.
func (a *Agent) checkRegularly(ctx context.Context, p polls) {
	if !a.polled() {
		return
	}
	first := time.Now().Add(p.first)
	a.outside.due.Store(&first)
	if !sleep(ctx, p.first) {
		return
	}
	const soonest = 5 * time.Second
	wait := soonest
	for {
		err := a.refresh(ctx)
		d := p.next(time.Now())
		if err != nil {
			d = min(d, afterFailure(wait))
			wait = min(2*wait, p.every)
		} else {
			wait = soonest
		}
		if !a.untilCheck(ctx, d) {
			return
		}
	}
}
