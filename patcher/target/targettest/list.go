package targettest

import (
	"context"
	"sync"
	"time"

	"hotpatchd/patcher/target"
)

var listCases = []testCase{
	{"list finds the victim", listFinds},
	{"list leaves out what is over", listOver},
	{"list from several goroutines", listConcurrently},
	{"open refuses another life", openOther},
	{"open twice", openTwice},
	{"open what the system refuses", openDenied},
	{"a closed handle does nothing", closed},
	{"the watch tells", watchTells},
	{"list of some", listOfSome},
	{"the probe speaks", probe},
}

func listFinds(e *env) {
	v := e.start(Want{})
	i := e.info(v)
	if i.Arch != v.Arch() {
		e.Errorf("arch %q, want %q", i.Arch, v.Arch())
	}
	if i.User == "" {
		e.Error("no owner")
	}
	if i.Start == 0 {
		e.Error("the life has no start")
	}
	if i.Host == "" {
		e.Error("no host program")
	}
	if len(i.Guards) != 0 {
		e.Errorf("guards of a process like any other: %v", i.Guards)
	}
	if got := e.open(v).Info(); got.ID != i.ID || got.Arch != i.Arch || got.User != i.User {
		e.Errorf("Info of the handle %+v, List said %+v", got, i)
	}
}

func listOver(e *env) {
	v := e.start(Want{})
	id := e.info(v).ID
	v.Exit()
	if i, ok := e.listed(id.PID); ok && i.ID == id {
		e.Errorf("List tells of %s, which is over", id)
	}
}

func listConcurrently(e *env) {
	v := e.start(Want{})
	id := e.info(v).ID
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				list, err := e.Backend.List(context.Background())
				if err != nil {
					e.Errorf("List: %v", err)
					return
				}
				found := false
				for n, i := range list {
					found = found || i.ID == id
					for _, j := range list[:n] {
						if i.PID == j.PID {
							e.Errorf("List tells of process %d twice", i.PID)
						}
					}
				}
				if !found {
					e.Errorf("List of %d processes without %s", len(list), id)
				}
			}
		})
	}
	wg.Wait()
}

func openOther(e *env) {
	v := e.start(Want{})
	id := e.info(v).ID
	ctx := context.Background()
	_, err := e.Backend.Open(ctx, target.ID{PID: id.PID, Start: id.Start + 1})
	e.wantErr("Open of a later life", err, target.ErrGone)
	_, err = e.Backend.Open(ctx, target.ID{PID: id.PID})
	e.wantErr("Open of a life without start", err, target.ErrGone)
	v.Exit()
	_, err = e.Backend.Open(ctx, id)
	e.wantErr("Open of a life that is over", err, target.ErrGone)
}

func openTwice(e *env) {
	v := e.start(Want{})
	p, q := e.open(v), e.open(v)
	at, n := v.Code()
	b, c := make([]byte, n), make([]byte, n)
	if _, err := p.ReadAt(b, at); err != nil {
		e.Fatal(err)
	}
	e.must("Close", q.Close())
	if _, err := p.ReadAt(c, at); err != nil {
		e.Errorf("after the other handle was closed: %v", err)
	}
	if string(b) != string(c) {
		e.Error("the code reads differently")
	}
	q = e.open(v)
	f := e.freeze(p)
	if _, err := q.Freeze(e.Context()); err == nil {
		e.Error("a process that is held was frozen by another handle")
	}
	e.standstill(v, p)
	if _, err := q.ReadAt(c, at); err != nil {
		e.Errorf("read by another handle while frozen: %v", err)
	}
	e.must("Close", q.Close())
	e.standstill(v, p)
	e.thaw(f)
	e.runs(v)
}

func openDenied(e *env) {
	v := e.start(Want{Denied: true})
	i := e.info(v)
	if i.PID == 0 {
		return
	}
	p, err := e.Backend.Open(e.Context(), i.ID)
	if err == nil {
		// A system may refuse later than at Open, but nothing of the process then.
		defer p.Close()
		at, _ := v.Code()
		_, err = p.ReadAt(make([]byte, 1), at)
	}
	e.wantErr("Open or read", err, target.ErrDenied)
}

func closed(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at, _ := v.Code()
	e.must("Close", p.Close())
	if err := p.Close(); err != nil {
		e.Errorf("second Close: %v", err)
	}
	if _, err := p.ReadAt(make([]byte, 1), at); err == nil {
		e.Error("ReadAt of a closed handle succeeds")
	}
	if f, err := p.Freeze(e.Context()); err == nil {
		e.Error("Freeze of a closed handle succeeds")
		f.Thaw()
	}
	if err := p.Alloc(at&^(pageSize-1), pageSize, target.Read); err == nil {
		e.Error("Alloc of a closed handle succeeds")
	}
	e.runs(v)
}

// settle is how long no news is no news: more than a backend gathers them.
const settle = 200 * time.Millisecond

func watchTells(e *env) {
	w, ok := e.Backend.(target.Watcher)
	if !ok {
		e.leaveOut("the backend is no Watcher")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c, err := w.Watch(ctx)
	if err != nil {
		e.leaveOut("needs a way to watch process starts: %v", err)
	}
	next := func(what string, wanted func(target.Event) bool) {
		e.until(what, func() bool {
			for {
				select {
				case x, open := <-c:
					if !open {
						e.Fatal("the channel was closed before ctx ended")
					}
					if wanted(x) {
						return true
					}
				default:
					return false
				}
			}
		})
	}
	v := e.start(Want{})
	told := false // of its code, too
	next("a start is told", func(x target.Event) bool {
		if x.Kind == target.Started && x.PID == v.PID() {
			told = x.Told
			return true
		}
		return false
	})
	mapped := func(x target.Event) bool { return x.Kind == target.Mapped && x.PID == v.PID() }
	if told {
		next("its code is told", mapped)
	}
	if m, ok := v.(Mapper); ok && told {
		for quiet := false; !quiet; { // what is still told of the start
			time.Sleep(settle)
			for quiet = true; len(c) > 0; {
				quiet = quiet && !mapped(<-c)
			}
		}
		_, err := m.Map()
		e.absent(err)
		next("a module is told", mapped)
	}
	if f, ok := v.(Forker); ok {
		child, err := f.Fork()
		e.absent(err)
		next("a fork is told", func(x target.Event) bool {
			return x.Kind == target.Forked && x.PID == child.PID() && (x.Parent == v.PID() || x.Parent == 0)
		})
	}
	v.Exit()
	next("an exit is told", func(x target.Event) bool { return x.Kind == target.Exited && x.PID == v.PID() })
	cancel()
	e.until("the channel is closed when ctx ends", func() bool {
		select {
		case _, open := <-c:
			return !open
		default:
			return false
		}
	})
}

func listOfSome(e *env) {
	w, ok := e.Backend.(target.Watcher)
	if !ok {
		e.leaveOut("the backend is no Watcher")
	}
	v, other := e.start(Want{}), e.start(Want{})
	of := func(pids ...int) map[int]target.Info {
		list, err := w.ListOf(e.Context(), pids)
		if err != nil {
			e.Fatalf("ListOf: %v", err)
		}
		m := map[int]target.Info{}
		for _, i := range list {
			m[i.PID] = i
		}
		if len(m) != len(list) {
			e.Errorf("ListOf of %v tells of a process twice", pids)
		}
		return m
	}
	// Asked for first, before any List: it needs none.
	got := of(v.PID())
	if i, ok := got[v.PID()]; !ok || len(got) != 1 || i.Start == 0 || i.Host == "" || i.Bare {
		e.Fatalf("ListOf of %d: %+v", v.PID(), got)
	}
	if i := e.info(v); i.ID != got[v.PID()].ID || i.Change != got[v.PID()].Change {
		e.Errorf("List %+v, ListOf %+v", i, got[v.PID()])
	}
	if got = of(v.PID(), other.PID()); len(got) != 2 {
		e.Errorf("ListOf of two: %+v", got)
	}
	if m, ok := v.(Mapper); ok {
		before := got[v.PID()].Change
		_, err := m.Map()
		e.absent(err)
		if after := of(v.PID())[v.PID()].Change; after == before {
			e.Error("a module was mapped, and Change is the same")
		}
	}
	v.Exit()
	if got = of(v.PID(), other.PID()); len(got) != 1 || got[other.PID()].PID == 0 {
		e.Errorf("ListOf of one that is over and one that is not: %+v", got)
	}
}

func probe(e *env) {
	p, ok := e.Backend.(target.Prober)
	if !ok {
		e.leaveOut("the backend is no Prober")
	}
	s, err := p.Probe(e.Context())
	if err != nil || s == "" {
		e.Errorf("Probe: %q, %v", s, err)
	}
}
