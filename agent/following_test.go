package agent

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// closed is a machine that tells how a process ended to those only who followed
// it, as Windows does.
type closed struct {
	*sim.Machine

	mu      sync.Mutex
	ends    chan target.Event
	follows map[target.ID]bool
	refuses map[int]bool // pids
	ever    map[int]bool // pids that were followed
}

func (c *closed) Watch(context.Context) (<-chan target.Event, error) {
	return nil, target.ErrUnsupported
}

func (c *closed) Ends(ctx context.Context) (<-chan target.Event, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ends := make(chan target.Event, 100)
	c.ends, c.follows, c.ever = ends, map[target.ID]bool{}, map[int]bool{}
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ends = nil
		close(ends)
	})
	return ends, nil
}

func (c *closed) Follow(ids []target.ID) (followed []target.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.follows)
	for _, id := range ids {
		if !c.refuses[id.PID] {
			c.follows[id], c.ever[id.PID] = true, true
			followed = append(followed, id)
		}
	}
	return followed
}

// end ends a process by a status, which is told if it was followed.
func (c *closed) end(t *testing.T, r *rig, pid int, status uint32) {
	t.Helper()
	var id target.ID
	r.inLoop(func(a *Agent) { id = a.lives[pid] })
	c.mu.Lock() // a list without it must not come between
	defer c.mu.Unlock()
	must(t, r.m.Exit(pid))
	if c.follows[id] {
		c.ends <- target.Event{Kind: target.Exited, PID: pid, Start: id.Start, Code: status, Status: true, At: time.Now()}
	}
}

func closedRig(t *testing.T) (*rig, *closed) {
	t.Helper()
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: 50, Modules: []sim.Module{{File: "throw/throw.dll"}}}}})
	c := &closed{Machine: r.m, refuses: map[int]bool{}}
	r.backend = c
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	t.Cleanup(func() { must(t, errors.Join(r.judge(), r.stop())) })
	return r, c
}

// seen waits until the guard's accounts of a release are such.
func (r *rig) seen(release string, processes, crashes int) {
	r.t.Helper()
	must(r.t, r.until(func() string {
		n, m := 0, 0
		r.inLoop(func(a *Agent) {
			for key, tally := range a.vigil.with {
				if key.release == release {
					n, m = n+tally.Processes, m+tally.Crashes
				}
			}
		})
		if n != processes || m != crashes {
			return fmt.Sprintf("%d processes, %d crashes", n, m)
		}
		return ""
	}))
}

// Who runs what a release names is followed before anything is done to him, and
// nobody else; three crashes of followed processes take the release out.
func TestFollowedCrashes(t *testing.T) {
	r, c := closedRig(t)
	for pid := 100; pid < 105; pid++ {
		r.begin(pid, "mingw/app.dll")
		r.runs(pid, "R1")
	}
	c.mu.Lock()
	if len(c.follows) != 5 || c.ever[50] {
		t.Errorf("followed: %v, ever %v", c.follows, c.ever)
	}
	c.mu.Unlock()
	// A killed one, and the abort of a C runtime, by exit codes that mean something else on Linux.
	c.end(t, r, 100, 1)
	c.end(t, r, 101, 3)
	r.seen("R1", 2, 1)
	c.end(t, r, 102, 0xC0000005)
	r.seen("R1", 3, 2)
	c.end(t, r, 103, 0xC0000409)
	must(t, r.until(func() string {
		row, err := r.row(104)
		if err != nil || row == nil || row.State == control.Patched {
			return fmt.Sprintf("%+v %v", row, err)
		}
		return ""
	}))
	h, err := r.life.client.History(context.Background(), 100)
	must(t, err)
	if text := fmt.Sprint(h.Entries); !strings.Contains(text, "ended with status 0xc0000005") || !strings.Contains(text, "ended with exit code 3") {
		t.Errorf("not told: %s", text)
	}
}

// Who could not be followed counts for nothing: that nobody saw him crash is no
// sign that he did not.
func TestNotFollowed(t *testing.T) {
	r, c := closedRig(t)
	c.mu.Lock()
	c.refuses[100] = true
	c.mu.Unlock()
	r.begin(100, "mingw/app.dll")
	r.begin(101, "mingw/app.dll")
	r.runs(100, "R1")
	r.runs(101, "R1")
	must(t, r.pass())
	r.inLoop(func(a *Agent) {
		if a.vigil.byPID[100] != nil || a.vigil.byPID[101] == nil {
			t.Errorf("accounts are kept of %v", a.vigil.lives)
		}
	})
	c.end(t, r, 100, 0xC0000005)
	c.end(t, r, 101, 0)
	r.seen("R1", 1, 0)
	// The word on an old life comes when its pid is another's: it is the old one's.
	r.begin(102, "mingw/app.dll")
	r.runs(102, "R1")
	r.inLoop(func(a *Agent) {
		id := a.lives[102]
		a.takeEnd(target.Event{Kind: target.Exited, PID: 102, Start: id.Start + 1, Code: 0xC0000005, Status: true}, time.Now())
		if l := a.vigil.lives[id]; l == nil || !l.ended.IsZero() {
			t.Errorf("another life's end ended it: %+v", l)
		}
	})
}

// Who is not followed any more, for there are too many, has no account either.
func TestFollowedNoMore(t *testing.T) {
	r, c := closedRig(t)
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	must(t, r.pass())
	kept := func() (is bool) {
		r.inLoop(func(a *Agent) { is = a.vigil.byPID[100] != nil })
		return is
	}
	if !kept() {
		t.Fatal("no account is kept of one that is followed")
	}
	c.mu.Lock()
	c.refuses[100] = true
	c.mu.Unlock()
	must(t, r.pass())
	if kept() {
		t.Error("an account is kept of one whose end nobody will tell")
	}
}

// The word on a followed process may come after a list without it: one that
// crashed with new files begins their proof anew all the same.
func TestFilesOfOneThatIsGone(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("files are put into place at a restart: Windows does it itself while it starts")
	}
	s := &script{rig: newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1})}
	c := &closed{Machine: s.m, refuses: map[int]bool{}}
	s.backend = c
	s.write("policy.toml", goodPolicy+"guard = \"off\"\n")
	t.Cleanup(func() { must(t, errors.Join(s.judge(), s.stop())) })
	lines := func(all ...string) {
		t.Helper()
		for _, line := range all {
			if err := s.line(line); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
		}
	}
	lines("place app.dll mingw/app.dll", "baseline B1 app 2026-11 app.dll=mingw/app.dll:plain/app.dll", "start", "check", "history baseline-staged release=B1",
		"stop", "reboot", "start", "history baseline-activated release=B1", "run 101 plain/app.dll", "image 101 app.dll state=fixed")
	must(t, s.pass())
	c.mu.Lock()
	if !c.ever[101] {
		t.Error("it is not followed, for the guard is off")
	}
	c.mu.Unlock()
	var id target.ID
	s.inLoop(func(a *Agent) { id = a.lives[101] })
	lines("exit 101", "no-image 101")
	s.inLoop(func(a *Agent) {
		if _, there := a.lives[101]; there {
			t.Fatal("it is not gone")
		}
		a.takeEnd(target.Event{Kind: target.Exited, PID: 101, Start: id.Start, Code: 0xC0000005, Status: true, At: time.Now()}, time.Now())
		a.Wake()
	})
	lines("attention baseline-crash")
}

// Where lives are followed, how they end is told by those who have hold of them
// alone: what anybody can write is no crash of another one's process.
func TestEndsThatAreMadeUp(t *testing.T) {
	r, c := closedRig(t)
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	must(t, r.pass())
	r.inLoop(func(a *Agent) {
		id := a.lives[100]
		for _, start := range []uint64{id.Start, 0} {
			a.takeEvent(target.Event{Kind: target.Exited, PID: 100, Start: start, Code: 0xC0000005, Status: true, At: time.Now()}, time.Now())
			if l := a.vigil.lives[id]; l == nil || !l.ended.IsZero() {
				t.Errorf("anybody can end it: %+v", l)
			}
		}
	})
	c.end(t, r, 100, 0)
	r.seen("R1", 1, 0)
}

// deaf is a machine that tells nothing, as a container.
type deaf struct{ *sim.Machine }

func (deaf) Watch(context.Context) (<-chan target.Event, error) {
	return nil, target.ErrUnsupported
}

// Where nobody tells how processes end no accounts are kept: what is stored as a
// time without crashes would speak against a release when somebody does tell.
func TestNobodyTells(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: 50, Modules: []sim.Module{{File: "throw/throw.dll"}}}}})
	r.backend = deaf{r.m}
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	t.Cleanup(func() { must(t, errors.Join(r.judge(), r.stop())) })
	r.begin(100, "mingw/app.dll")
	r.runs(100, "R1")
	must(t, r.pass())
	r.inLoop(func(a *Agent) {
		if len(a.hosts) != 2 || len(a.vigil.lives) != 0 {
			t.Errorf("accounts of %d of %d processes", len(a.vigil.lives), len(a.hosts))
		}
	})
}
