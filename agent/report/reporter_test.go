package report

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// carried is a Carrier whose answers a test decides.
type carried struct {
	mu     sync.Mutex
	docs   []string
	at     []time.Time // of every try
	answer func(doc string) Outcome
}

func (c *carried) Carry(_ context.Context, e Entry) Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = append(c.at, time.Now())
	o := Outcome{}
	if c.answer != nil {
		o = c.answer(string(e.Document))
	}
	if o.Kind == Delivered {
		c.docs = append(c.docs, string(e.Document))
	}
	return o
}

func (c *carried) tries() []time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.at)
}

func (c *carried) delivered() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.docs)
}

// told is a device in the hands of a test.
type told struct {
	*Reporter
	c    *carried
	mu   sync.Mutex
	key  string
	said []Outcome
	made int
	err  error
}

func newTold(t *testing.T, every time.Duration) *told {
	t.Helper()
	d := &told{c: &carried{}, key: "k"}
	d.Reporter = &Reporter{Device: "device", Every: every, Spool: open(t, t.TempDir(), 0, 0), Carrier: d.c, Now: time.Now,
		Make: func(context.Context) (Made, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.made++
			return Made{Document: fmt.Appendf(nil, "%s %d", d.key, d.made), Key: d.key}, d.err
		},
		Said: func(o Outcome) { d.mu.Lock(); defer d.mu.Unlock(); d.said = append(d.said, o) }}
	return d
}

func (d *told) set(key string) {
	d.mu.Lock()
	d.key = key
	d.mu.Unlock()
	d.Changed()
}

func (d *told) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { d.Run(ctx); close(ended) }()
	return func() { cancel(); <-ended }
}

// keys are what was delivered, without numbers.
func (d *told) keys() string {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	var out []string
	for _, doc := range d.c.docs {
		k, _, _ := strings.Cut(doc, " ")
		out = append(out, k)
	}
	return strings.Join(out, "")
}

// A report comes after the start, after each change, and once an interval; what
// has not changed is no change, however often it is said.
func TestReporterReportsChangesAndRegularly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		defer d.run()()
		time.Sleep(time.Minute)
		if d.keys() != "k" {
			t.Fatalf("after the start: %q", d.keys())
		}
		for range 100 {
			d.Changed()
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(3 * time.Minute)
		if d.keys() != "k" {
			t.Errorf("nothing changed: %q", d.keys())
		}
		d.set("a")
		time.Sleep(2 * time.Minute)
		if d.keys() != "ka" {
			t.Errorf("a change: %q", d.keys())
		}
		before := len(d.keys())
		time.Sleep(24 * time.Hour)
		if n := len(d.keys()) - before; n < 23 || n > 25 {
			t.Errorf("%d reports in a day", n)
		}
		// A device that flaps sends one a minute at most.
		before = len(d.c.delivered())
		for i := range 3600 {
			d.set(fmt.Sprint("x", i))
			time.Sleep(time.Second)
		}
		if n := len(d.c.delivered()) - before; n < 30 || n > 62 {
			t.Errorf("%d reports of a device that flaps for an hour", n)
		}
	})
}

// Two devices that are changed at once report at their own times, and so they do each interval.
func TestReportersComeApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, y := newTold(t, time.Hour), newTold(t, time.Hour)
		y.Device = "another"
		defer x.run()()
		defer y.run()()
		time.Sleep(10 * time.Hour)
		for i := range min(len(x.c.tries()), len(y.c.tries())) {
			if x.c.tries()[i].Sub(y.c.tries()[i]).Abs() < time.Second {
				t.Errorf("report %d of both at %s", i, x.c.tries()[i])
			}
		}
		for i := 2; i < len(x.c.tries()); i++ {
			if x.c.tries()[i].Sub(x.c.tries()[i-1]) != time.Hour {
				t.Errorf("a report %s after the last", x.c.tries()[i].Sub(x.c.tries()[i-1]))
			}
		}
	})
}

// A collector that is away for a week gets everything, in order, and is not
// asked in a hurry.
func TestReporterWaitsForCollector(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		back := time.Now().Add(7 * 24 * time.Hour)
		d.c.answer = func(string) Outcome {
			if time.Now().Before(back) {
				return Outcome{Kind: Failed, Err: errors.New("away")}
			}
			return Outcome{}
		}
		started := time.Now()
		defer d.run()()
		time.Sleep(7*24*time.Hour - time.Second)
		st := d.Spool.Standing()
		if st.Waiting < 7*24-1 || st.Dropped != 0 || st.FailingSince.Sub(started) > time.Minute || st.FailingSince.IsZero() {
			t.Errorf("%+v", st)
		}
		if n := len(d.c.tries()); n > 7*24*8+20 || n < 7*24*4 { // each 7.5 to 15 minutes
			t.Errorf("%d tries in a week", n)
		}
		time.Sleep(20 * time.Minute)
		st = d.Spool.Standing()
		if st.Waiting != 0 || !st.FailingSince.IsZero() {
			t.Errorf("%+v", st)
		}
		sorted := slices.IsSortedFunc(d.c.delivered(), func(x, y string) int {
			var a, b int
			fmt.Sscanf(x, "k %d", &a)
			fmt.Sscanf(y, "k %d", &b)
			return a - b
		})
		if len(d.c.delivered()) < 7*24 || !sorted {
			t.Errorf("%d delivered, in order: %v", len(d.c.delivered()), sorted)
		}
	})
}

// What is refused is dropped, counted and said, and does not hold up the rest.
func TestReporterDropsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		d.c.answer = func(doc string) Outcome {
			if strings.HasPrefix(doc, "bad") {
				return Outcome{Kind: Refused, Err: errors.New("the collector answers 400")}
			}
			return Outcome{}
		}
		defer d.run()()
		time.Sleep(2 * time.Minute)
		for _, k := range []string{"bad", "good"} {
			d.set(k)
			time.Sleep(5 * time.Minute)
		}
		if st := d.Spool.Standing(); d.keys() != "kgood" || st.Dropped != 1 || st.Waiting != 0 || !st.FailingSince.IsZero() {
			t.Errorf("%q, %+v", d.keys(), st)
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if !slices.ContainsFunc(d.said, func(o Outcome) bool { return o.Kind == Refused }) {
			t.Error("it was not said")
		}
	})
}

// A collector that asks for time gets it, up to an hour.
func TestReporterHeedsRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for asked, want := range map[time.Duration]time.Duration{20 * time.Minute: 20 * time.Minute, 1000 * time.Hour: time.Hour} {
			d := newTold(t, 24*time.Hour)
			d.c.answer = func(string) Outcome { return Outcome{Kind: Failed, Err: errors.New("429"), After: asked} }
			stop := d.run()
			time.Sleep(5 * time.Hour)
			stop()
			for i := 1; i < len(d.c.tries()); i++ {
				if gap := d.c.tries()[i].Sub(d.c.tries()[i-1]); gap < want || gap > want+Gentle.First {
					t.Errorf("asked for %s, tried again after %s", asked, gap)
				}
			}
			if len(d.c.tries()) < 4 {
				t.Errorf("%d tries", len(d.c.tries()))
			}
		}
	})
}

// A life that ends leaves what was not delivered to the next one.
func TestReporterNextLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		d.c.answer = func(string) Outcome { return Outcome{Kind: Failed, Err: errors.New("away")} }
		stop := d.run()
		time.Sleep(3 * time.Hour)
		stop()
		waiting := d.Spool.Standing().Waiting
		next := newTold(t, time.Hour)
		next.Spool = d.Spool
		defer next.run()()
		time.Sleep(time.Minute)
		if n := len(next.c.delivered()); waiting < 3 || n != waiting+1 {
			t.Errorf("%d waited, %d delivered", waiting, n)
		}
	})
}

// A clock that is set back does not silence a device, nor does one set ahead
// make it shout.
func TestReporterWithAWrongClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		var off time.Duration
		var mu sync.Mutex
		d.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(off).Round(0) } // wall clock only
		defer d.run()()
		for _, jump := range []time.Duration{0, -365 * 24 * time.Hour, 3 * 365 * 24 * time.Hour} {
			mu.Lock()
			off = jump
			mu.Unlock()
			before := len(d.keys())
			time.Sleep(12 * time.Hour)
			if n := len(d.keys()) - before; n < 10 || n > 14 {
				t.Errorf("%d reports in 12 hours with a clock off by %s", n, jump)
			}
		}
	})
}

// What cannot be made is tried again.
func TestReporterMakesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newTold(t, time.Hour)
		d.err = errors.New("not yet")
		defer d.run()()
		time.Sleep(10 * time.Minute)
		d.mu.Lock()
		tries := d.made
		d.err = nil
		d.mu.Unlock()
		time.Sleep(2 * time.Minute)
		if d.keys() != "k" || tries > 11 {
			t.Errorf("%q after %d tries", d.keys(), tries)
		}
	})
}
