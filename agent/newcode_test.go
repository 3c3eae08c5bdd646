package agent

import (
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// An image that comes to a process which has long been there is patched when it
// is told of, with no list of all processes.
func TestLateImageIsTold(t *testing.T) {
	r, c := eventRig(t, true)
	must(t, r.pass())
	before := c.lists.Load()
	_, err := r.m.LoadModule(50, sim.Module{File: "mingw/app.dll"})
	must(t, err)
	r.runs(50, "R1")
	if n := c.lists.Load() - before; n != 0 {
		t.Errorf("%d lists of all processes", n)
	}
	r.settled()
}

// What starts and has no code but that of ELF files costs no look, and is
// forgotten when it is not young any more.
func TestStartWithoutNewCode(t *testing.T) {
	r, _ := eventRig(t, true)
	r.inLoop(func(a *Agent) {
		now := time.Now()
		begin := func(pid int) *young {
			a.takeEvent(target.Event{Kind: target.Forked, PID: pid, Parent: 50, At: now, Told: true}, now)
			a.takeEvent(target.Event{Kind: target.Forked, PID: pid, Parent: 4000, At: now, Told: true}, now)
			if a.starts.young[pid] != nil {
				t.Error("the child of one without images is young")
			}
			a.takeEvent(target.Event{Kind: target.Started, PID: pid, At: now, Told: true}, now)
			return a.starts.young[pid]
		}
		y := begin(9000)
		if y == nil || !y.next.IsZero() {
			t.Fatalf("%+v", y)
		}
		if _, ok := a.untilGlance(); ok {
			t.Error("somebody is to be looked at")
		}
		a.growUp(now.Add(youngFor))
		if a.starts.young[9000] == nil {
			t.Error("it is forgotten while it is young")
		}
		a.growUp(now.Add(youngFor + 1))
		if a.starts.young[9000] != nil {
			t.Error("it is young for ever")
		}
		// Losing news wakes those of whom it may have been.
		y = begin(9001)
		a.takeEvent(target.Event{Kind: target.Lost}, now)
		if _, ok := a.untilGlance(); !ok || y.next.IsZero() || y.told {
			t.Error("news was lost, and it is waited for")
		}
	})
	r.settled()
}

// A program that makes code as it runs has few looks to itself: in a minute of
// news every ten milliseconds, it is watched no more than the regular pass would.
func TestCodeThatIsNoImage(t *testing.T) {
	r, _ := eventRig(t, true)
	must(t, r.pass())
	r.inLoop(func(a *Agent) {
		a.o.Config.Backend.ScanEvery = 2 * time.Second
		defer func() { a.o.Config.Backend.ScanEvery = longScan }()
		began := time.Now()
		watches, watched := 0, time.Duration(0)
		var y *young
		var from time.Time
		for at := time.Duration(0); at < time.Minute; at += 10 * time.Millisecond {
			now := began.Add(at)
			a.heardOfCode(50, now, now)
			switch got := a.starts.young[50]; {
			case got != y && got != nil:
				watches++
				y, from = got, now
			case got != nil && now.Sub(got.since) >= youngFor:
				watched += now.Sub(from)
				a.endWatch(50, got, now)
				y = nil
			}
		}
		if watches < 20 || watches > 30 || watched > 20*time.Second {
			t.Errorf("%d watches, %v", watches, watched)
		}
		p := a.procs[a.lives[50]]
		if p.unheard < 5 || p.ignored.IsZero() {
			t.Errorf("%+v", p)
		}
		// What comes of it in the end is measured from the first news that was not heard.
		ignored := p.ignored
		a.heardOfCode(50, began.Add(2*time.Minute), began.Add(2*time.Minute))
		if y := a.starts.young[50]; y == nil || !y.first.Equal(ignored) {
			t.Errorf("%+v, ignored since %v", y, ignored)
		}
		p.images = append(p.images, &imageState{})
		a.endWatch(50, a.starts.young[50], began.Add(3*time.Minute))
		if p.unheard != 0 {
			t.Error("an image came, and news of it are not heard any better")
		}
		p.images = nil
		a.starts.at = time.Time{}
	})
}

// The start of a process may be told after its code.
func TestCodeBeforeStart(t *testing.T) {
	r, _ := eventRig(t, true)
	r.inLoop(func(a *Agent) {
		now := time.Now()
		a.takeEvent(target.Event{Kind: target.Mapped, PID: 9000, At: now}, now)
		a.takeEvent(target.Event{Kind: target.Started, PID: 9000, At: now.Add(-time.Millisecond), Told: true}, now)
		if y := a.starts.young[9000]; y == nil || y.next.IsZero() || y.start.IsZero() {
			t.Errorf("%+v", y)
		}
		// Code of long ago was another program's.
		a.takeEvent(target.Event{Kind: target.Started, PID: 9000, At: now.Add(time.Second), Told: true}, now.Add(time.Second))
		if y := a.starts.young[9000]; y == nil || !y.next.IsZero() {
			t.Errorf("%+v", y)
		}
		clear(a.starts.young)
	})
	r.settled()
}

// A program that made code, and news of it not heard, is not the one that the
// process executes next: whether its code is told before its start or after.
func TestCodeAfterExec(t *testing.T) {
	r, _ := eventRig(t, true)
	must(t, r.pass())
	r.inLoop(func(a *Agent) {
		now := time.Now()
		start := target.Event{Kind: target.Started, PID: 50, At: now, Told: true}
		code := target.Event{Kind: target.Mapped, PID: 50, At: now}
		for name, events := range map[string][]target.Event{"after": {start, code}, "before": {code, start}} {
			clear(a.starts.young)
			p := a.procs[a.lives[50]]
			p.deaf, p.ignored = now.Add(time.Minute), time.Time{}
			for _, e := range events {
				a.takeEvent(e, now)
			}
			if y := a.starts.young[50]; y == nil || y.next.IsZero() || y.first.IsZero() {
				t.Errorf("%s: %+v", name, y)
			}
		}
		clear(a.starts.young)
	})
	r.settled()
}

// What is told of an end after a list without the process has come is of that
// process still, but not what happened after the list.
func TestEndToldLate(t *testing.T) {
	for name, c := range map[string]struct {
		after  time.Duration // the list
		inside bool
	}{"before the list": {-time.Millisecond, true}, "after it": {time.Minute, false}} {
		t.Run(name, func(t *testing.T) {
			r, _ := eventRig(t, true)
			r.begin(100, "mingw/app.dll")
			r.runs(100, "R1")
			r.settled()
			var annex target.Addr
			r.inLoop(func(a *Agent) { annex = a.allRecords()[0].Annex })
			r.m.Deafen(true)
			must(t, r.m.ExitWith(100, 0, 11))
			must(t, r.pass())
			r.inLoop(func(a *Agent) {
				if len(a.allRecords()) != 0 || a.departed[100] == nil {
					t.Fatalf("%d records, departed %v", len(a.allRecords()), a.departed)
				}
				a.heardOfEnd(target.Event{Kind: target.Exited, PID: 100, Signal: 11, Faults: []target.Addr{annex}, At: a.departed[100].at.Add(c.after)})
				if l := a.vigil.byPID[100]; l == nil || l.ended.IsZero() || l.inside != c.inside {
					t.Errorf("%+v", l)
				}
			})
		})
	}
}
