package targettest

import (
	"context"
	"errors"
	"time"

	"hotpatchd/patcher/target"
)

var freezeCases = []testCase{
	{"freeze stops every thread", freezeStops},
	{"freeze stops threads that wait", freezeWaiting},
	{"thaw is idempotent", thawTwice},
	{"the pause is told", pause},
	{"nothing is mapped while frozen", frozenMapping},
	{"close thaws", closeThaws},
	{"the end of the context thaws", contextThaws},
	{"a context that is over stops nothing", contextOver},
	{"freeze under thread churn", freezeChurn},
	{"freeze again and again", freezeTorture},
	{"a thread on its signal stack", freezeAltStack},
	{"a thread that cannot be stopped", freezeUnstoppable},
	{"a frozen process is read and written", frozenMemory},
}

// threads checks what every list of stopped threads must keep to.
func (e *env) threads(v Victim, p target.Process, f target.Frozen) []target.Thread {
	e.Helper()
	list, err := f.Threads()
	if err != nil {
		e.Fatalf("Threads: %v", err)
	}
	regions := e.regions(p)
	seen := map[int]bool{}
	regs := map[target.Arch]int{target.AMD64: 16, target.ARM64: 31}[v.Arch()]
	for _, t := range list {
		if seen[t.ID] || t.ID == 0 {
			e.Errorf("thread %d is there twice, or has no id", t.ID)
		}
		seen[t.ID] = true
		if r, ok := region(regions, t.PC); !ok || r.Prot&target.Exec == 0 {
			e.Errorf("thread %d (%s) stands at %s, which is no code", t.ID, t.State, t.PC)
		}
		if r, ok := region(regions, t.SP); !ok || r.Prot&target.Write == 0 {
			e.Errorf("thread %d (%s) has its stack pointer at %s, which is no stack", t.ID, t.State, t.SP)
		} else if t.Stack.Start != t.SP || t.Stack.End < t.SP || t.Stack.End > r.End && !adjacent(regions, r.End, t.Stack.End) {
			e.Errorf("thread %d: stack %s-%s with the stack pointer at %s in %s-%s", t.ID, t.Stack.Start, t.Stack.End, t.SP, r.Start, r.End)
		}
		if regs != 0 && len(t.Regs) != regs {
			e.Errorf("thread %d has %d registers, want %d", t.ID, len(t.Regs), regs)
		}
		if v.Arch() == target.AMD64 && len(t.Regs) == 16 && t.Regs[4] != uint64(t.SP) {
			e.Errorf("thread %d: rsp %x, SP %s", t.ID, t.Regs[4], t.SP)
		}
		if t.State == "" {
			e.Errorf("thread %d has no state", t.ID)
		}
	}
	return list
}

// adjacent tells whether everything between two addresses is mapped.
func adjacent(list []target.Region, from, to target.Addr) bool {
	for from < to {
		r, ok := region(list, from)
		if !ok {
			return false
		}
		from = r.End
	}
	return true
}

func freezeStops(e *env) {
	v := e.start(Want{Threads: 4})
	p := e.open(v)
	f := e.freeze(p)
	list := e.threads(v, p, f)
	if len(list) != v.Threads() {
		e.Errorf("%d threads, the victim has %d", len(list), v.Threads())
	}
	e.standstill(v, p)
	again := e.threads(v, p, f)
	if len(again) != len(list) {
		e.Fatalf("%d threads, then %d", len(list), len(again))
	}
	for i := range list {
		if list[i].ID != again[i].ID || list[i].PC != again[i].PC || list[i].SP != again[i].SP {
			e.Errorf("thread %d moved from %s to %s while frozen", list[i].ID, list[i].PC, again[i].PC)
		}
	}
	e.thaw(f)
	if _, err := f.Threads(); err == nil {
		e.Error("threads that run are still told of")
	}
	e.runs(v)
}

func freezeWaiting(e *env) {
	v := e.start(Want{Threads: 2, Blocked: 3})
	p := e.open(v)
	for range 5 {
		f := e.freeze(p)
		list := e.threads(v, p, f)
		if len(list) != v.Threads() {
			e.Errorf("%d threads, the victim has %d", len(list), v.Threads())
		}
		waiting := 0
		for _, t := range list {
			if t.State != "running" {
				waiting++
			}
		}
		if waiting < 3 {
			e.Errorf("%d of %d threads wait, want at least 3", waiting, len(list))
		}
		e.thaw(f)
		e.runs(v)
	}
}

func thawTwice(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	f := e.freeze(p)
	e.thaw(f)
	e.thaw(f)
	e.runs(v)
	g := e.freeze(p)
	e.thaw(f) // of the freeze before: it must not let go of this one
	e.standstill(v, p)
	e.thaw(g)
	e.runs(v)
}

func pause(e *env) {
	v := e.start(Want{Threads: 2})
	p := e.open(v)
	f := e.freeze(p)
	w, ok := f.(target.Pauser)
	if !ok {
		e.thaw(f)
		e.leaveOut("the backend is no Pauser")
	}
	e.threads(v, p, f)
	e.thaw(f)
	if d := w.Pause(); d <= 0 || d > Patience {
		e.Errorf("a pause of %v", d)
	}
}

func frozenMapping(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at := e.alloc(v, p, 2*pageSize, target.Read|target.Write)
	f := e.freeze(p)
	if err := p.Alloc(at+2*pageSize, pageSize, target.Read); err == nil {
		e.Error("Alloc while frozen is not refused")
	}
	if err := p.Protect(at, pageSize, target.Read); err == nil {
		e.Error("Protect while frozen is not refused")
	}
	if err := p.Free(at, pageSize); err == nil {
		e.Error("Free while frozen is not refused")
	}
	e.standstill(v, p)
	e.thaw(f)
	list := e.regions(p)
	if r, ok := region(list, at); !ok || r.Prot != target.Read|target.Write {
		e.Errorf("a refused call changed the mapping: %+v", r)
	}
	if _, ok := region(list, at+2*pageSize); ok {
		e.Error("a refused Alloc mapped something")
	}
	e.must("Protect after the thaw", p.Protect(at, pageSize, target.Read))
	e.must("Free after the thaw", p.Free(at, 2*pageSize))
	e.runs(v)
}

func closeThaws(e *env) {
	v := e.start(Want{Threads: 3})
	p := e.open(v)
	f := e.freeze(p)
	e.standstill(v, p)
	e.must("Close", p.Close())
	e.runs(v)
	e.thaw(f)
	q := e.open(v)
	e.thaw(e.freeze(q))
	e.runs(v)
}

func contextThaws(e *env) {
	v := e.start(Want{Threads: 2})
	p := e.open(v)
	ctx, cancel := context.WithTimeout(context.Background(), 10*e.patience())
	defer cancel()
	f, err := p.Freeze(ctx)
	e.must("Freeze", err)
	e.standstill(v, p)
	cancel()
	e.runs(v)
	e.until("Threads fails once the context has ended", func() bool {
		_, err := f.Threads()
		return err != nil
	})
	e.thaw(f)
	e.thaw(e.freeze(p))
	e.runs(v)
}

func contextOver(e *env) {
	v := e.start(Want{Threads: 2})
	p := e.open(v)
	ctx, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer cancel()
	f, err := p.Freeze(ctx)
	if err == nil {
		f.Thaw()
		e.Fatal("Freeze succeeds after its deadline")
	}
	e.wantErr("Freeze", err, target.ErrBusy)
	e.runs(v)
	e.thaw(e.freeze(p))
	e.runs(v)
}

func freezeChurn(e *env) {
	v := e.start(Want{Threads: 3, Churn: true})
	p := e.open(v)
	done := 0
	for range 30 {
		// Busy is an honest answer to threads that start faster than they can
		// be counted; held threads and wrong lists are not.
		ctx, cancel := context.WithTimeout(context.Background(), e.patience())
		f, err := p.Freeze(ctx)
		if errors.Is(err, target.ErrBusy) {
			cancel()
			e.runs(v)
			continue
		}
		e.must("Freeze", err)
		done++
		if n := len(e.threads(v, p, f)); n < 3 {
			e.Errorf("%d threads, want at least 3", n)
		}
		if done <= 3 {
			e.standstill(v, p)
		}
		e.thaw(f)
		cancel()
		e.runs(v)
	}
	if done == 0 {
		e.Error("no freeze of 30 succeeded")
	}
}

func freezeTorture(e *env) {
	v := e.start(Want{Threads: 4, Blocked: 4})
	for range 20 {
		p := e.open(v)
		for range 10 {
			f := e.freeze(p)
			if n := len(e.threads(v, p, f)); n != v.Threads() {
				e.Fatalf("%d threads, the victim has %d", n, v.Threads())
			}
			e.thaw(f)
		}
		e.must("Close", p.Close())
	}
	e.runs(v)
}

func freezeAltStack(e *env) {
	v := e.start(Want{AltStack: true})
	id, sp := able[Interruptible](e, v).Normal()
	p := e.open(v)
	f := e.freeze(p)
	in, ok := f.(target.Interrupter)
	if !ok {
		e.thaw(f)
		e.leaveOut("the backend is no Interrupter")
	}
	found := false
	for _, t := range e.threads(v, p, f) {
		b := make([]byte, min(t.Stack.End-t.Stack.Start, 1<<20))
		if _, err := p.ReadAt(b, t.Stack.Start); err != nil {
			e.Errorf("the stack of thread %d is not readable: %v", t.ID, err)
		}
		for _, a := range in.Interrupted(b, t.Stack.Start) {
			if t.ID == id && a == sp {
				found = true
			}
		}
		if t.ID == id && t.Stack.Contains(sp) {
			e.Error("the victim's normal stack is its signal stack")
		}
	}
	if !found {
		e.Errorf("no signal frame of thread %d leads back to %s", id, sp)
	}
	if got := in.Interrupted(make([]byte, 4096), 0x1000); len(got) != 0 {
		e.Errorf("signal frames in zeros: %v", got)
	}
	if got := in.Interrupted(nil, 0x1001); len(got) != 0 {
		e.Errorf("signal frames in nothing: %v", got)
	}
	e.thaw(f)
	e.runs(v)
}

func freezeUnstoppable(e *env) {
	v := e.start(Want{Threads: 2, Unstoppable: true})
	p := e.open(v)
	ctx, cancel := context.WithTimeout(context.Background(), target.FreezeLimit(v.Threads()))
	defer cancel()
	f, err := p.Freeze(ctx)
	if err == nil {
		f.Thaw()
		e.Fatal("Freeze succeeds")
	}
	e.wantErr("Freeze", err, target.ErrBusy)
	var te *target.Error
	if !errors.As(err, &te) || te.Note == "" {
		e.Errorf("the error does not name the thread: %v", err)
	}
	e.runs(v)
}

func frozenMemory(e *env) {
	v := e.start(Want{Threads: 2})
	p := e.open(v)
	at := e.alloc(v, p, 2*pageSize, target.Read|target.Exec)
	f := e.freeze(p)
	b := pattern(100, 5)
	if n, err := p.WriteAt(b, at+pageSize-50); n != 100 || err != nil {
		e.Errorf("WriteAt while frozen: %d, %v", n, err)
	}
	e.must("Flush while frozen", p.Flush(at+pageSize-50, 100))
	got := make([]byte, 100)
	if n, err := p.ReadAt(got, at+pageSize-50); n != 100 || err != nil || string(got) != string(b) {
		e.Errorf("ReadAt while frozen: %d, %v, equal %v", n, err, string(got) == string(b))
	}
	if n, err := p.WriteAt(b, at+2*pageSize-50); n != 50 || err == nil {
		e.Errorf("WriteAt beyond what is mapped, while frozen: %d, %v", n, err)
	}
	e.must("Flush while frozen", p.Flush(at+2*pageSize-50, 50))
	e.thaw(f)
	e.must("Free", p.Free(at, 2*pageSize))
	e.runs(v)
}
