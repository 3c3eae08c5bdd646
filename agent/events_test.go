package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// counting counts the lists of all processes.
type counting struct {
	*sim.Machine
	lists atomic.Int64
}

func (c *counting) List(ctx context.Context) ([]target.Info, error) {
	c.lists.Add(1)
	return c.Machine.List(ctx)
}

// eventRig is a device on which nothing is looked at unless an event tells of
// it, with a release for app.dll in force and no process but one that has none.
func eventRig(t *testing.T, told bool) (*rig, *counting) {
	t.Helper()
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: 50}}})
	r.m.HideCode(!told)
	c := &counting{Machine: r.m}
	r.backend = c
	r.cfg.Backend.ScanEvery = longScan
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	t.Cleanup(func() { must(t, errors.Join(r.judge(), r.stop())) })
	must(t, r.until(func() string {
		if st, err := r.life.client.Status(context.Background()); err != nil || st.Release == nil {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	r.inLoop(func(*Agent) {}) // what that brought about is done
	return r, c
}

// bothWays runs a test where new code is told of, and where it is not.
func bothWays(t *testing.T, test func(t *testing.T, told bool)) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprintf("new code is told %v", told), func(t *testing.T) { test(t, told) })
	}
}

// inLoop asks the loop.
func (r *rig) inLoop(fn func(a *Agent)) {
	r.t.Helper()
	a := r.life.agent
	must(r.t, a.call(context.Background(), func() { fn(a) }))
}

// runs waits until app.dll of a process runs a release.
func (r *rig) runs(pid int, want string) {
	r.t.Helper()
	must(r.t, r.until(func() string {
		got, err := r.all(pid, "app.dll", "vuln")
		if err != nil || got != want {
			return fmt.Sprintf("%s %v", got, err)
		}
		return ""
	}))
}

// settled waits until no process is young.
func (r *rig) settled() {
	r.t.Helper()
	must(r.t, r.until(func() string {
		n := 0
		r.inLoop(func(a *Agent) { n = len(a.starts.young) })
		if n > 0 {
			return fmt.Sprintf("%d processes are young", n)
		}
		return ""
	}))
}

func (r *rig) begin(pid int, files ...string) {
	r.t.Helper()
	p := sim.Process{PID: pid}
	for _, f := range files {
		p.Modules = append(p.Modules, sim.Module{File: f})
	}
	_, err := r.m.Start(p)
	must(r.t, err)
}

// A process that starts is patched, whether its image is there at once or comes
// later, and no list of all processes is made for it.
func TestStartsAreFoundByTheirEvents(t *testing.T) { bothWays(t, startsAreFoundByTheirEvents) }

func startsAreFoundByTheirEvents(t *testing.T, told bool) {
	r, c := eventRig(t, told)
	before := c.lists.Load()
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	// One that may be on its way to its images: it is looked at for longest.
	_, err := r.m.Start(sim.Process{PID: 101, Regions: []sim.Region{{At: 0x10_0000, Size: target.PageSize, Prot: "r-x"}}})
	must(t, err)
	must(t, r.until(func() string { // it was looked into without the image
		found := false
		r.inLoop(func(a *Agent) { found = a.procs[a.lives[101]] != nil })
		if !found {
			return "not looked into"
		}
		return ""
	}))
	_, err = r.m.LoadModule(101, sim.Module{File: "mingw/app.dll"})
	must(t, err)
	r.runs(101, "R1")
	r.m.Exec(101, sim.Process{Modules: []sim.Module{{File: "mingw/app.dll"}}})
	r.runs(101, "R1")
	if n := c.lists.Load() - before; n != 0 {
		t.Errorf("%d lists of all processes", n)
	}
	r.settled()
}

// A child has its parent's images and is known at once; one of a process without
// any is not even looked at.
func TestForks(t *testing.T) { bothWays(t, forks) }

func forks(t *testing.T, told bool) {
	r, c := eventRig(t, told)
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	r.settled()
	before := c.lists.Load()
	id, err := r.m.Fork(100)
	must(t, err)
	must(t, r.until(func() string {
		row, err := r.row(id.PID)
		if err != nil || row == nil || row.State != control.Patched {
			return fmt.Sprintf("%+v %v", row, err)
		}
		return ""
	}))
	if n := c.lists.Load() - before; n != 0 {
		t.Errorf("%d lists of all processes", n)
	}
	r.settled()
	_, err = r.m.Fork(50)
	must(t, err)
	r.inLoop(func(a *Agent) {
		for len(a.starts.events) > 0 {
			a.takeEvents(<-a.starts.events)
		}
		if n := len(a.starts.young); n != 0 {
			t.Errorf("%d processes are looked at for a fork of one without images", n)
		}
	})
}

// Loss costs a pass over all processes if it is told, and nothing but time if
// it is not.
func TestLostEvents(t *testing.T) { bothWays(t, lostEvents) }

func lostEvents(t *testing.T, told bool) {
	r, _ := eventRig(t, told)
	r.m.Deafen(true)
	r.begin(100, "mingw/app.dll")
	r.m.Deafen(false)
	r.m.Tell(target.Event{Kind: target.Lost})
	r.runs(100, "R1")
	r.m.Deafen(true)
	r.begin(101, "mingw/app.dll")
	must(t, r.pass())
	r.runs(101, "R1")
}

// What has ended before it could be looked at is over; what took its pid is not
// taken for it, and an end that is told late ends nothing.
func TestEndsAndReuse(t *testing.T) { bothWays(t, endsAndReuse) }

func endsAndReuse(t *testing.T, told bool) {
	r, c := eventRig(t, told)
	before := c.lists.Load()
	for range 300 {
		r.begin(100, "mingw/app.dll")
		must(t, r.m.Exit(100))
	}
	r.settled()
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	var first target.ID
	r.inLoop(func(a *Agent) { first = a.lives[100] })
	must(t, r.m.Exit(100))
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	must(t, r.until(func() string {
		doc, err := r.life.client.Processes(context.Background(), control.ProcessQuery{})
		if err != nil || len(doc.Processes) != 1 || doc.Processes[0].Start == first.Start || doc.Coverage.Patched != 1 {
			return fmt.Sprintf("%+v %v", doc, err)
		}
		return ""
	}))
	if n := c.lists.Load() - before; n != 0 {
		t.Errorf("%d lists of all processes", n)
	}
	must(t, r.m.Exit(100))
	must(t, r.until(func() string {
		st, err := r.life.client.Status(context.Background())
		if err != nil || st.Coverage.Images != 0 {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	r.settled()
	r.inLoop(func(a *Agent) {
		now := time.Now()
		a.takeEvent(target.Event{Kind: target.Started, PID: 100, At: now}, now)
		a.takeEvent(target.Event{Kind: target.Exited, PID: 100, At: now.Add(-time.Millisecond)}, now)
		if a.starts.young[100] == nil {
			t.Error("the end of an older process ended the watch of a younger one")
		}
		a.takeEvent(target.Event{Kind: target.Exited, PID: 100, At: now.Add(time.Millisecond)}, now.Add(time.Millisecond))
		if a.starts.young[100] != nil {
			t.Error("a process that ended is watched")
		}
	})
	must(t, r.pass())
	if n := len(r.life.agent.allRecords()); n != 0 {
		t.Errorf("%d records of processes that are over", n)
	}
}

// However many events come, what is kept is bounded and the loop answers.
func TestFloodOfEvents(t *testing.T) {
	r, _ := eventRig(t, false)
	r.inLoop(func(a *Agent) {
		now := time.Now()
		for pid := range 3 * maxYoung {
			a.takeEvent(target.Event{Kind: target.Started, PID: 5000 + pid}, now)
		}
		if n := len(a.starts.young); n != maxYoung {
			t.Errorf("%d processes are watched, at most %d may be", n, maxYoung)
		}
	})
	for pid := range 20 * maxTaken {
		r.m.Tell(target.Event{Kind: target.EventKind(1 + pid%4), PID: 5000 + pid, Parent: pid})
	}
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	r.settled()
}

// The regular pass comes in its time, however busy the loop is with others.
func TestRegularPassIsNotPutOff(t *testing.T) {
	r, c := eventRig(t, false)
	must(t, r.stop())
	r.cfg.Backend.ScanEvery = 200 * time.Millisecond
	must(t, r.start())
	stop := make(chan struct{})
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for {
			select {
			case <-stop:
				return
			default:
				r.life.agent.call(context.Background(), func() {})
				r.m.Tell(target.Event{Kind: target.Started, PID: 50})
			}
		}
	}()
	before := c.lists.Load()
	err := r.until(func() string {
		if n := c.lists.Load() - before; n < 5 {
			return fmt.Sprintf("%d passes", n)
		}
		return ""
	})
	close(stop)
	<-asked
	must(t, err)
}

// What is measured is what the daemon made of a start by itself: not what was
// there before, and not what somebody kept waiting.
func TestLatencyIsMeasured(t *testing.T) { bothWays(t, latencyIsMeasured) }

func latencyIsMeasured(t *testing.T, told bool) {
	r, _ := eventRig(t, told)
	counts := func(starts, late int) {
		t.Helper()
		must(t, r.until(func() string {
			st, err := r.life.client.Status(context.Background())
			if err != nil {
				return err.Error()
			}
			l := st.Latency
			if l.Count != starts || l.Late.Count != late || l.Watch != control.WatchEvents || starts > 0 && (l.P50MS <= 0 || l.P99MS < l.P50MS) {
				return fmt.Sprintf("%+v", l)
			}
			return ""
		}))
	}
	counts(0, 0)
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	counts(1, 0)
	r.settled()
	must(t, r.pass())
	_, err := r.m.LoadModule(50, sim.Module{File: "mingw/app.dll"})
	must(t, err)
	must(t, r.pass())
	r.runs(50, "R1")
	counts(1, 1)
	// Paused: what waits for that is not measured.
	_, err = r.life.client.Pause(context.Background())
	must(t, err)
	r.begin(101, "mingw/app.dll")
	must(t, r.until(func() string {
		row, err := r.row(101)
		if err != nil || row == nil {
			return fmt.Sprint(row, err)
		}
		return ""
	}))
	_, err = r.life.client.Resume(context.Background())
	must(t, err)
	r.runs(101, "R1")
	counts(1, 1)
	m, err := r.life.agent.Metrics(context.Background())
	must(t, err)
	for _, want := range []string{"hotpatchd_start_to_patched_seconds_count 1\n", "hotpatchd_late_load_to_patched_seconds_count 1\n", `hotpatchd_start_to_patched_seconds{quantile="0.99"} 0.`} {
		if !strings.Contains(string(m), want) {
			t.Errorf("no %q in metrics:\n%s", want, m)
		}
	}
	// What was there when the daemon started says nothing.
	must(t, r.stop())
	_, err = r.m.Start(sim.Process{PID: 102, Modules: []sim.Module{{File: "mingw/app.dll"}}})
	must(t, err)
	must(t, r.start())
	r.runs(102, "R1")
	counts(0, 0)
}

func TestWindow(t *testing.T) {
	var w window
	if q := w.show(); q != (control.Quantiles{}) {
		t.Errorf("of nothing: %+v", q)
	}
	for i := range 100 {
		w.add(time.Duration(100-i) * time.Millisecond)
	}
	if q := w.show(); q.P50MS != 50 || q.P99MS != 99 || q.Count != 100 || q.SumMS != 5050 {
		t.Errorf("of 1 to 100 ms: %+v", q)
	}
	for range maxSamples {
		w.add(time.Millisecond)
	}
	if q := w.show(); q.P50MS != 1 || q.P99MS != 1 || q.Count != 100+maxSamples || len(w.last) != maxSamples {
		t.Errorf("after %d of 1 ms: %+v, %d kept", maxSamples, q, len(w.last))
	}
}
