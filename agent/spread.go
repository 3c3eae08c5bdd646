package agent

import (
	"context"
	"math/rand/v2"
	"time"

	"hotpatchd/agent/report"
)

// A fleet does not come to the repository at once. Each device has its own
// place in the interval, made from its id: a check comes at that place of the
// clock, whenever the daemon was started. Where many devices start in the same
// minute (power is back), what each of them knows already is good enough for
// some seconds more; a device that knows nothing yet asks at once.

// polls is how one device asks the repository.
type polls struct {
	device string
	every  time.Duration
	first  time.Duration // from the start to the first one
}

// pollsOf belongs to the loop.
func (a *Agent) pollsOf() polls {
	p := polls{device: a.device.ID, every: a.o.Config.Repository.CheckEvery}
	if a.verified && !a.promptly {
		p.first = report.Phase(p.device, "start", report.Spread(p.every))
	}
	return p
}

// next is the time from now to the device's next turn: half an interval to
// one and a half.
func (p polls) next(now time.Time) time.Duration {
	return report.NextTurn(p.device, "check", p.every, now).Sub(now)
}

// afterFailure is a time from the upper half of d: devices that failed together come apart.
func afterFailure(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// sleep waits; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
