package agent

import (
	"slices"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target"
)

// How long an image lay in memory before it was patched. When it was mapped is
// not known: it is later than the last look without it, or than the start of the
// program. So what is measured is the longest that it may have been. Measured is
// what the daemon could do at once: not an image that was there before it or
// before the release, and none that policy, hours or a canary kept waiting.

// maxSamples is how many of the last measurements are kept, of each kind.
const maxSamples = 512

// clocked is the measurement of one image that is under way.
type clocked struct {
	after time.Time // it was not mapped before; zero: nothing is measured
	late  bool      // the process had been there for longer
}

// clockedFrom begins to measure an image that is seen for the first time.
// old is what was known of its process.
func (a *Agent) clockedFrom(old *procState, info target.Info) clocked {
	y := a.starts.young[info.PID]
	told := func(t time.Time) time.Time { // not before there was news of it
		if y != nil && y.told && y.first.After(t) {
			return y.first
		}
		return t
	}
	switch {
	case old == nil && y != nil && !y.start.IsZero():
		return clocked{after: told(y.start)}
	case old == nil: // it was not in the last list
		return clocked{after: told(a.listedAt)}
	case old.err != nil:
		return clocked{} // the image may have been there all along
	}
	t := clocked{after: old.at, late: true}
	if a.listedAt.After(t.after) {
		t.after = a.listedAt
	}
	if y != nil {
		t.late = y.start.IsZero()
		if y.seen.After(t.after) {
			t.after = y.seen
		}
		t.after = told(t.after)
	}
	return t
}

// stopClocks ends the measurements of images that somebody keeps waiting, by
// what was decided.
func (a *Agent) stopClocks(work []Intent) {
	type place struct {
		id   target.ID
		base target.Addr
	}
	goesOn := map[place]bool{}
	for _, in := range work {
		if in.Kind == DoApply || in.Kind == DoRecover || in.Kind == DoNothing && in.Try != nil {
			goesOn[place{in.Proc.Info.ID, in.Image.Base}] = true
		}
	}
	for id, p := range a.hosts {
		for _, im := range p.images {
			if !im.after.IsZero() && !goesOn[place{id, im.Base}] {
				im.clocked = clocked{}
			}
		}
	}
}

// patched ends a measurement with its result.
func (a *Agent) patched(im *imageState) {
	if im.after.IsZero() {
		return
	}
	w := &a.latency.starts
	if im.late {
		w = &a.latency.late
	}
	w.add(time.Since(im.after))
	im.clocked = clocked{}
}

// latency is what was measured since the daemon started.
type latency struct{ starts, late window }

// window is the last measurements of one kind.
type window struct {
	last  []time.Duration // a ring
	at    int             // of the next one
	count int             // of all
	sum   time.Duration   // of all
}

func (w *window) add(d time.Duration) {
	w.count++
	w.sum += d
	if len(w.last) < maxSamples {
		w.last = append(w.last, d)
		return
	}
	w.last[w.at] = d
	w.at = (w.at + 1) % maxSamples
}

// show tells the quantiles of the last ones, by nearest rank.
func (w *window) show() control.Quantiles {
	q := control.Quantiles{Count: w.count, SumMS: milliseconds(w.sum)}
	if len(w.last) == 0 {
		return q
	}
	sorted := slices.Sorted(slices.Values(w.last))
	rank := func(percent int) float64 { return milliseconds(sorted[(len(sorted)*percent+99)/100-1]) }
	q.P50MS, q.P99MS = rank(50), rank(99)
	return q
}

// milliseconds with three digits: no clock here is better.
func milliseconds(d time.Duration) float64 { return float64(d.Round(time.Microsecond)) / 1e6 }

func (a *Agent) showLatency() control.Latency {
	l := control.Latency{Quantiles: a.latency.starts.show(), Late: a.latency.late.show(), Watch: control.WatchEvents, ScanEveryMS: a.o.Config.Backend.ScanEvery.Milliseconds()}
	if a.starts.deaf != "" {
		l.Watch, l.Why = control.WatchScan, a.starts.deaf
	}
	return l
}
