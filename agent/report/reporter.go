package report

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Kind is how a try to deliver ended.
type Kind int

// The kinds.
const (
	Delivered Kind = iota
	Refused        // it will never be taken: there is no use in trying again
	Failed         // to be tried again
)

// Outcome is the end of one try.
type Outcome struct {
	Kind  Kind
	Err   error         // why, one line, without secrets; nil if delivered
	After time.Duration // the collector asks to be left alone for so long, 0: it does not
}

// Carrier delivers documents. Carry tries once, within a bound of its own or
// ctx's, and must not report Delivered before the other side has the document.
type Carrier interface {
	Carry(ctx context.Context, e Entry) Outcome
}

// Made is a document to be reported. Key is the same as long as nothing has
// changed that is worth a report before its time.
type Made struct {
	Document []byte
	Key      string
}

const (
	// settle lets the changes of one moment become one report.
	settle = time.Second
	// spreadMost bounds how long a device of a fleet waits for its place among
	// those to which the same happened at the same time.
	spreadMost = 30 * time.Second
	// gapMost bounds the least time between two reports of changes: a device that
	// flaps is told by its next report.
	gapMost = time.Minute
	// remake is when a document is tried again that could not be made or kept.
	remake = time.Minute
)

// Spread bounds a device's wait among those to which the same happened at the
// same time, for work that is done each interval.
func Spread(interval time.Duration) time.Duration { return min(interval/10, spreadMost) }

// Reporter makes a document after each change and each interval, and has all of
// them carried. Fill it, then call Run once.
type Reporter struct {
	Device  string        // its id, for its place in the interval
	Every   time.Duration // at the latest
	Make    func(context.Context) (Made, error)
	Spool   *Spool
	Carrier Carrier
	Pace    Pace // zero: Gentle
	Now     func() time.Time
	// Said is told of every end of a try, and of what went wrong here; nil: nobody.
	Said func(Outcome)

	once    sync.Once
	changed chan struct{}
}

func (r *Reporter) begin() {
	r.once.Do(func() { r.changed = make(chan struct{}, 1) })
}

// Changed says that something may have changed. It never waits.
func (r *Reporter) Changed() {
	r.begin()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Run reports until ctx ends. What is in the spool then stays there for the next life.
func (r *Reporter) Run(ctx context.Context) {
	r.begin()
	if r.Pace == (Pace{}) {
		r.Pace = Gentle
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() { defer wg.Done(); r.deliver(ctx) }()
	r.write(ctx)
	wg.Wait()
}

func (r *Reporter) said(o Outcome) {
	if r.Said != nil {
		r.Said(o)
	}
}

// write puts documents into the spool when it is time.
func (r *Reporter) write(ctx context.Context) {
	soon := settle + Phase(r.Device, "change", Spread(r.Every))
	gap := min(r.Every/4, gapMost)
	regular := r.Now().Add(soon) // a start is worth a report
	due, lastPut, key := regular, time.Time{}, ""
	for {
		// A clock that was set back must not silence the device: nothing lies
		// further ahead than an interval and a half.
		now := r.Now()
		if lastPut.After(now) {
			lastPut = now
		}
		if regular.Sub(now) > 2*r.Every {
			regular = now
		}
		if due.Sub(now) > 2*r.Every {
			due = regular
		}
		timer := time.NewTimer(max(0, due.Sub(now)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-r.changed:
			timer.Stop()
			at := r.Now().Add(soon)
			if least := lastPut.Add(gap); at.Before(least) {
				at = least
			}
			if at.Before(due) {
				due = at
			}
			continue
		case <-timer.C:
		}
		made, err := r.Make(ctx)
		now = r.Now()
		isTurn := !now.Before(regular)
		if err == nil && (isTurn || made.Key != key) {
			if _, err = r.Spool.Put(made.Document); err == nil {
				key, lastPut = made.Key, now
			}
		}
		if err != nil {
			if ctx.Err() == nil {
				r.said(Outcome{Kind: Failed, Err: fmt.Errorf("cannot report: %w", err)})
			}
			due = now.Add(min(remake, r.Every))
			continue
		}
		if isTurn {
			regular = NextTurn(r.Device, "report", r.Every, now)
		}
		due = regular
	}
}

// deliver carries what is in the spool, oldest first.
func (r *Reporter) deliver(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		e, ok, err := r.Spool.Oldest()
		if err == nil && !ok {
			select {
			case <-ctx.Done():
				return
			case <-r.Spool.put:
			}
			continue
		}
		o := Outcome{Kind: Failed, Err: err}
		if err == nil {
			o = r.Carrier.Carry(ctx, e)
		}
		if ctx.Err() != nil && o.Kind == Failed {
			return // we are leaving: not the collector's fault
		}
		failures++
		switch o.Kind {
		case Delivered:
			failures = 0
			err = r.Spool.failing(time.Time{})
			if e := r.Spool.Done(e); err == nil {
				err = e
			}
		case Refused:
			err = r.Spool.failing(r.Now())
			if e := r.Spool.Drop(e); err == nil {
				err = e
			}
		default:
			err = r.Spool.failing(r.Now())
		}
		r.said(o)
		if err != nil {
			// Delivered once more is better than at full speed for ever.
			r.said(Outcome{Kind: Failed, Err: err})
			failures = max(failures, 1)
		}
		if failures == 0 {
			continue
		}
		t := time.NewTimer(r.Pace.Wait(failures, o.After, rand.Float64()))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}
