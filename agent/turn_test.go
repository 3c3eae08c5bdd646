package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// slow is a machine on which each read of one process takes its time, or does
// not end before it is let go.
type slow struct {
	*sim.Machine
	pid   int
	each  time.Duration
	hangs atomic.Bool
	deaf  atomic.Bool // listing does not end, either
	free  chan struct{}
	opens atomic.Int64 // of that process
}

func (s *slow) List(ctx context.Context) ([]target.Info, error) {
	if s.deaf.Load() {
		<-s.free
	}
	return s.Machine.List(ctx)
}

func (s *slow) Open(ctx context.Context, id target.ID) (target.Process, error) {
	p, err := s.Machine.Open(ctx, id)
	if err != nil || id.PID != s.pid {
		return p, err
	}
	s.opens.Add(1)
	return slowly{p, s}, nil
}

type slowly struct {
	target.Process
	s *slow
}

func (p slowly) ReadAt(b []byte, at target.Addr) (int, error) {
	if p.s.hangs.Load() {
		<-p.s.free
	}
	time.Sleep(p.s.each)
	return p.Process.ReadAt(b, at)
}

// many is a process that has mapped an image n times.
func many(t *testing.T, pid, n int) sim.Process {
	t.Helper()
	file, err := os.ReadFile(filepath.Join(fixtures, "demo/demo.dll"))
	must(t, err)
	p := sim.Process{PID: pid}
	for i := range n {
		p.Modules = append(p.Modules, sim.Module{File: fmt.Sprintf("copy%d.dll", i), Image: file})
	}
	return p
}

func patchedIn(r *rig, pid int) (patched int, codes map[string]int, err error) {
	doc, err := r.life.client.Processes(context.Background(), control.ProcessQuery{PID: pid})
	codes = map[string]int{}
	if err != nil {
		return 0, codes, err
	}
	for _, p := range doc.Processes {
		for _, im := range p.Images {
			if im.State == control.Patched {
				patched++
			}
			codes[im.ReasonCode]++
		}
	}
	return patched, codes, nil
}

const (
	greedy = 200 // the pid of a process that takes more than its share
	modest = 300
)

func slowRig(t *testing.T, n int) (*rig, *slow) {
	t.Helper()
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 3, Processes: []sim.Process{many(t, greedy, n), {PID: modest, Modules: []sim.Module{{File: "demo/demo.dll"}}}}})
	s := &slow{Machine: r.m, pid: greedy, free: make(chan struct{})}
	r.backend = s
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "D1", Product: "demo", Sequence: 1}, image{"demo/demo-1.dll"}))
	return r, s
}

// More images than anybody has are not patched, and said to be so; those of
// other processes are.
func TestTooManyImages(t *testing.T) {
	const extra = 10
	r, _ := slowRig(t, maxPatched+extra)
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	must(t, r.until(func() string {
		n, codes, err := patchedIn(r, greedy)
		m, _, _ := patchedIn(r, modest)
		if err != nil || n != maxPatched || codes["too-many"] != extra || m != 1 {
			return fmt.Sprintf("%d patched, %v, %d in the other process, %v", n, codes, m, err)
		}
		return ""
	}))
	ch, err := r.life.client.Rollback(context.Background(), control.RollbackRequest{}, nil)
	if err != nil || ch.Coverage.Patched != 0 {
		t.Errorf("rollback: %+v %v", ch.Coverage, err)
	}
}

// A process that takes more than its share of a pass has its turn again and
// again, and nobody waits for it: not another process, not an operator.
func TestShareOfAPass(t *testing.T) {
	const slowImages = 16
	r, s := slowRig(t, slowImages)
	s.each = time.Millisecond // some hundredths of a second for each image
	r.tune = func(a *Agent) { a.share = 200 * time.Millisecond }
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	used := func() (n int) {
		must(t, r.life.agent.call(context.Background(), func() {
			for id, p := range r.life.agent.procs {
				if id.PID == greedy {
					n = p.used
				}
			}
		}))
		return n
	}
	must(t, r.until(func() string {
		if n, _, err := patchedIn(r, modest); err != nil || n != 1 {
			return fmt.Sprintf("%d patched in the modest process, %v", n, err)
		}
		return ""
	}))
	if n, _, err := patchedIn(r, greedy); err != nil || n == slowImages {
		t.Errorf("%d images of the greedy process were done before, %v", n, err)
	}
	must(t, r.until(func() string {
		if used() == 0 {
			return "it has not used up its share"
		}
		return ""
	}))
	must(t, r.until(func() string { // it gets on, in several turns
		if n, codes, err := patchedIn(r, greedy); err != nil || n != slowImages {
			return fmt.Sprintf("%d patched in the greedy process, %v, %v", n, codes, err)
		}
		return ""
	}))
	must(t, r.until(func() string { // and is forgiven
		if n := used(); n != 0 {
			return fmt.Sprintf("used up %d times", n)
		}
		return ""
	}))
}

// A process that hangs in the middle of being read holds up itself alone, and
// is said to do so; when it goes on, so do we. Never two at work in it.
func TestProcessThatHangs(t *testing.T) {
	r, s := slowRig(t, 1)
	s.hangs.Store(true)
	r.tune = func(a *Agent) { a.patience = 100*time.Millisecond - lookMost }
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	ctx := context.Background()
	must(t, r.until(func() string {
		n, _, err := patchedIn(r, modest)
		st, serr := r.life.client.Status(ctx)
		if err != nil || serr != nil || n != 1 || !attends(st, "hangs") || st.State != control.Incomplete {
			return fmt.Sprintf("%d patched, %v %+v %v", n, err, st, serr)
		}
		return ""
	}))
	for range 3 {
		must(t, r.pass())
	}
	if n := s.opens.Load(); n != 1 {
		t.Errorf("it was opened %d times while it hung", n)
	}
	if ch, err := r.life.client.Rollback(ctx, control.RollbackRequest{}, nil); err != nil || !ch.Changed {
		t.Errorf("rollback beside it: %+v %v", ch, err)
	}
	if ch, err := r.life.client.Install(ctx, control.InstallRequest{ID: "D1"}, nil); err != nil || !ch.Changed {
		t.Errorf("install beside it: %+v %v", ch, err)
	}
	if _, err := r.life.client.Plan(ctx, control.PlanQuery{ID: "D1"}); err != nil {
		t.Errorf("plan beside it: %v", err)
	}
	s.hangs.Store(false)
	close(s.free)
	must(t, r.until(func() string {
		n, codes, err := patchedIn(r, greedy)
		st, serr := r.life.client.Status(ctx)
		if err != nil || serr != nil || n != 1 || attends(st, "hangs") {
			return fmt.Sprintf("%d patched, %v, %v %+v %v", n, codes, err, st, serr)
		}
		return ""
	}))
}

// One that begins to hang while it is patched does not keep the pass either.
func TestProcessThatHangsInWork(t *testing.T) {
	r, s := slowRig(t, 1)
	r.tune = func(a *Agent) { a.patience = 100*time.Millisecond - lookMost }
	var once atomic.Bool
	r.m.FailAt(1, sim.Fault{Times: -1, Do: sim.Hook, Op: sim.OpAlloc, PID: greedy, Then: func() {
		if once.CompareAndSwap(false, true) {
			s.hangs.Store(true)
		}
	}})
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	ctx := context.Background()
	must(t, r.until(func() string {
		n, _, err := patchedIn(r, modest)
		_, codes, _ := patchedIn(r, greedy)
		if err != nil || n != 1 || codes["hangs"] != 1 {
			return fmt.Sprintf("%d patched, %v, %v", n, codes, err)
		}
		return ""
	}))
	if ch, err := r.life.client.Rollback(ctx, control.RollbackRequest{}, nil); err != nil || !ch.Changed {
		t.Errorf("rollback beside it: %+v %v", ch, err)
	}
	if ch, err := r.life.client.Install(ctx, control.InstallRequest{ID: "D1"}, nil); err != nil || !ch.Changed {
		t.Errorf("install beside it: %+v %v", ch, err)
	}
	s.hangs.Store(false)
	close(s.free)
	must(t, r.until(func() string {
		if n, codes, err := patchedIn(r, greedy); err != nil || n != 1 {
			return fmt.Sprintf("%d patched, %v, %v", n, codes, err)
		}
		return ""
	}))
}

// overfull is a machine on which one process has mapped more than is looked at.
type overfull struct{ *sim.Machine }

func (o overfull) Open(ctx context.Context, id target.ID) (target.Process, error) {
	p, err := o.Machine.Open(ctx, id)
	if err != nil || id.PID != greedy {
		return p, err
	}
	return full{p}, nil
}

type full struct{ target.Process }

func (full) Regions() ([]target.Region, error) { return nil, patcher.ErrTooManyImages }

// A process that has mapped more than is looked at is not called well.
func TestProcessThatIsNotLookedInto(t *testing.T) {
	r, s := slowRig(t, 1)
	r.backend = overfull{s.Machine}
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	must(t, r.until(func() string {
		st, err := r.life.client.Status(context.Background())
		if err != nil || st.Coverage.Patched != 1 || st.State != control.Incomplete || st.Unseen != 1 || !attends(st, "not-looked-into") {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
}

func attends(st *control.Status, code string) bool {
	for _, a := range st.Attention {
		if a.Code == code {
			return true
		}
	}
	return false
}

// A loop that is dead does not look alive: status says so, naming what it is
// at, requests that need it end with that, and the watchdog is not fed.
func TestStalledLoop(t *testing.T) {
	r, _ := slowRig(t, 1)
	const bound = 2 * time.Second
	r.tune = func(a *Agent) { a.heart.bound = bound }
	must(t, r.start())
	a, ctx := r.life.agent, context.Background()
	well := func() string {
		st, err := r.life.client.Status(ctx)
		if err != nil || st.State != control.Hotpatched || attends(st, "stalled") {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}
	must(t, r.until(well))
	hold := make(chan struct{})
	a.post(func() {
		a.heart.atProcess("looking into", target.Info{ID: target.ID{PID: 4711}, Image: `C:\acme\server.exe`})
		<-hold
	})
	must(t, r.until(func() string {
		st, err := r.life.client.Status(ctx)
		if err != nil || st.State != control.Incomplete || !attends(st, "stalled") {
			return fmt.Sprintf("%+v %v", st, err)
		}
		s := st.Attention[0]
		if s.Code != "stalled" || s.Severity != control.SeverityError || !strings.Contains(s.Text, "server.exe, process 4711") || s.Remedy == "" || s.Since.IsZero() {
			t.Errorf("%+v", s)
		}
		return ""
	}))
	for name, fn := range map[string]func(context.Context) error{
		"install": func(ctx context.Context) error {
			_, err := r.life.client.Install(ctx, control.InstallRequest{ID: "D1"}, nil)
			return err
		},
		"rollback": func(ctx context.Context) error {
			_, err := r.life.client.Rollback(ctx, control.RollbackRequest{}, nil)
			return err
		},
		"pause":  func(ctx context.Context) error { _, err := r.life.client.Pause(ctx); return err },
		"check":  func(ctx context.Context) error { _, err := r.life.client.Check(ctx); return err },
		"verify": func(ctx context.Context) error { _, err := r.life.client.Verify(ctx); return err },
	} {
		ctx, cancel := context.WithTimeout(ctx, patience)
		if err := fn(ctx); err == nil || !strings.Contains(err.Error(), "has not ended a pass") || !strings.Contains(err.Error(), "4711") {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
	actx, cancel := context.WithTimeout(ctx, 3*bound)
	defer cancel()
	if err := a.Alive(actx); err == nil {
		t.Error("the watchdog is fed by a dead loop")
	}
	close(hold)
	must(t, r.until(well))
	must(t, a.Alive(ctx))
	must(t, errors.Join(r.judge(), r.stop()))
}

// A long pass that gets on is no dead loop: the watchdog is fed.
func TestAliveWhileItGetsOn(t *testing.T) {
	r, _ := slowRig(t, 1)
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	a, hold := r.life.agent, make(chan struct{})
	steps, inside := make(chan struct{}), make(chan struct{})
	a.post(func() {
		close(inside)
		for {
			select {
			case <-hold:
				return
			case <-steps:
				a.heart.beats.Add(1)
			}
		}
	})
	<-inside
	alive := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	go func() { alive <- a.Alive(ctx) }()
	must(t, r.until(func() string {
		select {
		case steps <- struct{}{}:
		default:
		}
		select {
		case err := <-alive:
			return said(err)
		default:
			return "no answer"
		}
	}))
	close(hold)
}

// A list that does not end is not waited for: what is known stays known, and
// all is well when it ends.
func TestListThatHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("needs the time that a list is given")
	}
	t.Parallel()
	r, s := slowRig(t, 1)
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	ctx := context.Background()
	well := func() string {
		st, err := r.life.client.Status(ctx)
		if err != nil || st.State != control.Hotpatched || st.Coverage.Patched != 2 || attends(st, "scan") {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}
	must(t, r.until(well))
	s.deaf.Store(true)
	must(t, r.until(func() string {
		st, err := r.life.client.Status(ctx)
		if err != nil || !attends(st, "scan") || st.Coverage.Patched != 2 {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	s.deaf.Store(false)
	close(s.free)
	must(t, r.until(well))
}

// What decides about turns, without a machine.
func TestDecideTurns(t *testing.T) {
	r1 := offer("R1", 1, fixing(1))
	blockedOnce := func(v *View, attempts int) {
		v.Procs[0].Images[0].Tried = map[string]Try{"app": {Release: "R1", State: control.Blocked, Reason: because("import", "text"), Change: 7,
			Since: noon.Add(-time.Minute), Attempts: attempts, Next: noon.Add(time.Minute), Soonest: noon.Add(time.Second)}}
	}
	for _, c := range []struct {
		name   string
		change func(*View)
		kind   Kind
		state  control.ImageState
		code   string
		again  time.Time
	}{
		{"rests", func(v *View) { v.Procs[0].Rest = noon.Add(time.Second) }, DoNothing, control.PendingImage, "share", noon.Add(time.Second)},
		{"has rested", func(v *View) { v.Procs[0].Rest = noon }, DoApply, control.PendingImage, "", time.Time{}},
		{"rests, and an operator waits", func(v *View) { v.Procs[0].Rest, v.Forced = noon.Add(time.Second), "app" }, DoApply, control.PendingImage, "", time.Time{}},
		{"hangs", func(v *View) { v.Procs[0].Left, v.Forced = true, "app" }, DoNothing, control.Busy, "hangs", time.Time{}},
		{"hangs, in force", func(v *View) { v.Procs[0].Left = true; v.has("R1", 1, patcher.Applied) }, DoNothing, control.Patched, "", time.Time{}},
		{"blocked, unchanged", func(v *View) { blockedOnce(v, 1) }, DoNothing, control.Blocked, "import", noon.Add(time.Minute)},
		{"blocked, changed too soon", func(v *View) { blockedOnce(v, 9); v.Procs[0].Info.Change = 8 }, DoNothing, control.Blocked, "import", noon.Add(time.Second)},
		{"blocked, changed", func(v *View) { blockedOnce(v, 9); v.Procs[0].Info.Change, v.Now = 8, noon.Add(time.Second) }, DoApply, control.Blocked, "import", time.Time{}},
		{"blocked, changed, rests", func(v *View) {
			blockedOnce(v, 9)
			v.Procs[0].Info.Change, v.Now, v.Procs[0].Rest = 8, noon.Add(time.Second), noon.Add(time.Hour)
		}, DoNothing, control.Blocked, "import", noon.Add(time.Hour)},
	} {
		v := quiet()
		v.wants(r1)
		c.change(&v)
		in := decide(v)
		if len(in) != 1 || in[0].Kind != c.kind || in[0].State != c.state || in[0].Reason.Code != c.code || !in[0].Again.Equal(c.again) {
			t.Errorf("%s: %+v", c.name, in)
		}
	}
}

// Of too many images those that are patched count and stay, and those that
// wait for another try keep their place.
func TestDecideTooMany(t *testing.T) {
	v := quiet()
	r2 := offer("R2", 2, fixing(1))
	v.wants(r2)
	const live, tried, n = 10, 5, maxPatched + 20
	v.Procs[0].Images = nil
	for i := range n {
		im := ImageView{Name: "app.dll", Identity: build(1), Base: target.Addr(i) << 20}
		switch {
		case i < tried:
			im.Tried = map[string]Try{"app": {Release: "R2", State: control.Blocked, Reason: because("import", "text"), Change: 7, Next: noon.Add(time.Minute)}}
		case i >= n-live:
			im.Records = map[string]patcher.Record{"app": {Product: "app", Release: "R1", Sequence: 1, State: patcher.Applied}}
		}
		v.Procs[0].Images = append(v.Procs[0].Images, im)
	}
	got := map[string]int{}
	for _, in := range decide(v) {
		got[string(in.Kind)+" "+string(in.State)+" "+in.Reason.Code]++
	}
	want := map[string]int{" blocked import": tried, "apply pending ": maxPatched - tried, " blocked too-many": n - maxPatched}
	for k, x := range want {
		if got[k] != x {
			t.Errorf("%q: %d, want %d (%v)", k, got[k], x, got)
		}
	}
}

// Waits grow, and end at some minutes.
func TestNextTryGrows(t *testing.T) {
	a := &Agent{o: Options{Now: func() time.Time { return noon }, Config: DefaultConfig()}}
	last := time.Duration(0)
	for n := 1; n < 70; n++ {
		d := a.nextTry(Try{State: control.Blocked, Remedy: control.RemedyWait, Attempts: n}).Sub(noon)
		if d < last || d < guardAgain || d > guardMost || n == 4 && d <= guardAgain {
			t.Fatalf("%s after %d attempts, %s before", d, n, last)
		}
		last = d
	}
	if last != guardMost {
		t.Errorf("it ends at %s", last)
	}
}

// Who had its share and used it up comes last, and what is new comes first.
func TestOrderOfTurns(t *testing.T) {
	a := &Agent{}
	var all []Intent
	for i, p := range []Proc{{Used: 2}, {}, {Used: 1}, {}} {
		p.Info.ID = target.ID{PID: i}
		in := Intent{Kind: DoRecover, Proc: &p, Image: &ImageView{}}
		if i == 1 {
			in.Try = &Try{}
		}
		all = append(all, in, in)
	}
	queue, total := a.turns(context.Background(), all)
	got := ""
	for _, list := range queue {
		got += fmt.Sprint(list[0].Proc.Info.PID, "x", len(list), " ")
	}
	if got != "3x2 1x2 2x2 0x2 " || total != 8 {
		t.Errorf("%s, %d", got, total)
	}
}
