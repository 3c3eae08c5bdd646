package agent

import (
	"maps"
	"time"
)

// sleptLeast is the shortest sleep that is taken off: two clocks that are read
// one after the other differ by less.
const sleptLeast = time.Second

// takeSleep takes what the machine has slept through since the last call off all
// that is measured in time that programs run: a release that came in just before
// the lid was closed has not been tried, nor watched, for a night. It belongs to
// the loop, and comes before what is decided by such times.
func (a *Agent) takeSleep() {
	if a.o.Slept == nil {
		return
	}
	total, now := a.o.Slept(), a.o.Now()
	d := total - a.slept
	if d < sleptLeast {
		return
	}
	a.slept = total
	later := func(at time.Time) time.Time {
		if at = at.Add(d); at.After(now) {
			return now
		}
		return at
	}
	trials := maps.Clone(a.trials)
	for id, at := range trials {
		if over, _ := a.trial().over(id, now.Add(-d)); !over {
			trials[id] = later(at)
		}
	}
	a.setTrials(trials)
	a.vigil.sleep(later)
	for id, at := range a.bases.seen {
		a.bases.seen[id] = later(at)
	}
}

// sleep moves what is known of those that live past a time in which nobody ran.
func (v *vigil) sleep(later func(time.Time) time.Time) {
	for _, l := range v.lives {
		if !l.ended.IsZero() || !l.missed.IsZero() { // before it
			continue
		}
		l.seen = later(l.seen)
		for i := range l.came {
			c := &l.came[i]
			c.at = later(c.at)
			if !c.out.IsZero() {
				c.out = later(c.out)
			}
		}
	}
}
