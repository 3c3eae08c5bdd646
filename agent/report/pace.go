package report

import "time"

// Pace is how tries follow each other while a collector does not take anything.
type Pace struct {
	First time.Duration // after the first failure; doubled with each further one
	Most  time.Duration // never longer, unless the collector asks for it
	Asked time.Duration // what a collector asks for (Retry-After) counts up to this
}

// Gentle is the pace in use. A collector that is back is told within a quarter
// of an hour; one that asks for longer is left alone for an hour at most, as a
// wrong number must not silence a fleet.
var Gentle = Pace{First: 5 * time.Second, Most: 15 * time.Minute, Asked: time.Hour}

// Wait is the time until the next try after failures failures in a row (from
// 1), where the collector asked for at least asked. random in [0, 1) picks a
// time in the upper half, so that devices that failed together come apart.
func (p Pace) Wait(failures int, asked time.Duration, random float64) time.Duration {
	d := p.Most
	if shift := max(failures-1, 0); shift < 30 && p.First<<shift < p.Most {
		d = p.First << shift
	}
	d = d/2 + time.Duration(random*float64(d/2))
	if asked = min(asked, p.Asked); asked > d {
		d = asked + time.Duration(random*float64(p.First))
	}
	return d
}
