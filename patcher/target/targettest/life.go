package targettest

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

var lifeCases = []testCase{
	{"the end of a process between any two calls", exitAnywhere},
	{"the end of a process while frozen", exitFrozen},
	{"exec is another life", execLife},
	{"fork is another life", forkLife},
	{"another tracer is named and respected", tracer},
	{"the change counter follows mappings", changeCounter},
}

// call is one step of a patcher's use of a process.
type call struct {
	name string
	do   func(s *session) error
}

type session struct {
	p        target.Process
	f        target.Frozen
	at, code target.Addr
	n        int
}

var calls = []call{
	{"Regions", func(s *session) error { _, err := s.p.Regions(); return err }},
	{"ReadAt", func(s *session) error { _, err := s.p.ReadAt(make([]byte, s.n), s.code); return err }},
	{"Alloc", func(s *session) error { return s.p.Alloc(s.at, pageSize, target.Read|target.Write) }},
	{"WriteAt", func(s *session) error { _, err := s.p.WriteAt([]byte{1, 2, 3}, s.at); return err }},
	{"Protect", func(s *session) error { return s.p.Protect(s.at, pageSize, target.Read) }},
	{"Freeze", func(s *session) (err error) { s.f, err = s.p.Freeze(context.Background()); return err }},
	{"Threads", func(s *session) error {
		if s.f == nil {
			return target.ErrGone
		}
		_, err := s.f.Threads()
		return err
	}},
	{"ReadAt while frozen", func(s *session) error { _, err := s.p.ReadAt(make([]byte, s.n), s.code); return err }},
	{"Thaw", func(s *session) error {
		if s.f == nil {
			return target.ErrGone
		}
		return s.f.Thaw()
	}},
	{"Free", func(s *session) error { return s.p.Free(s.at, pageSize) }},
}

func exitAnywhere(e *env) {
	for end := range calls {
		if calls[end].name == "Threads" || calls[end].name == "ReadAt while frozen" || calls[end].name == "Thaw" {
			continue // exitFrozen
		}
		e.endBefore(end, func(v Victim) { v.Exit() }, true)
	}
}

func exitFrozen(e *env) {
	for end := range calls {
		if calls[end].name == "Threads" || calls[end].name == "ReadAt while frozen" || calls[end].name == "Thaw" {
			// It may take until the thaw before its end is complete: no call
			// may hang or panic, but before the thaw it may succeed.
			e.endBefore(end, func(v Victim) { v.Kill() }, false)
		}
	}
}

// endBefore ends a victim before one of the calls. From then on every call
// answers ErrGone; a Thaw may say nil, because nobody is held.
func (e *env) endBefore(end int, how func(Victim), complete bool) {
	e.Helper()
	v := e.start(Want{Threads: 3})
	p, err := e.Backend.Open(context.Background(), e.info(v).ID)
	e.must("Open", err)
	s := &session{p: p}
	s.code, s.n = v.Code()
	s.at = e.gap(p, s.code, pageSize)
	for i, c := range calls {
		if i == end {
			how(v)
		}
		err := c.do(s)
		what := fmt.Sprintf("ended before %s: %s", calls[end].name, c.name)
		switch {
		case i < end:
			e.must(what, err)
		case c.name == "Thaw" || !complete && s.f != nil:
			if err != nil && !errors.Is(err, target.ErrGone) {
				e.Errorf("%s: %v, want nil or ErrGone", what, err)
			}
		default:
			e.wantErr(what, err, target.ErrGone)
		}
		if c.name == "Thaw" {
			v.Exit()
			complete, s.f = true, nil
		}
	}
	if err := p.Close(); err != nil && !errors.Is(err, target.ErrGone) {
		e.Errorf("ended before %s: Close: %v", calls[end].name, err)
	}
	if v.Alive() {
		e.Errorf("ended before %s: the victim is alive", calls[end].name)
	}
}

func execLife(e *env) {
	v := e.start(Want{Threads: 2})
	x := able[Execer](e, v)
	id := e.info(v).ID
	p := e.open(v)
	at, _ := v.Code()
	if _, err := p.ReadAt(make([]byte, 1), at); err != nil {
		e.Fatal(err)
	}
	probe, err := x.Exec()
	e.absent(err)
	now := e.info(v)
	if now.ID == id {
		e.Fatalf("the new program has the life of the old one, %s", id)
	}
	write := probe
	if write == 0 {
		write = at
	}
	n, err := p.WriteAt(bytes.Repeat([]byte{0xcc}, 16), write)
	e.wantErr("WriteAt after exec", err, target.ErrGone)
	if n != 0 {
		e.Errorf("WriteAt after exec wrote %d bytes", n)
	}
	_, err = p.ReadAt(make([]byte, 1), at)
	e.wantErr("ReadAt after exec", err, target.ErrGone)
	_, err = p.Regions()
	e.wantErr("Regions after exec", err, target.ErrGone)
	f, err := p.Freeze(context.Background())
	e.wantErr("Freeze after exec", err, target.ErrGone)
	if err == nil {
		f.Thaw()
	}
	e.wantErr("Alloc after exec", p.Alloc(at&^(pageSize-1), pageSize, target.Read), target.ErrGone)
	_, err = e.Backend.Open(context.Background(), id)
	e.wantErr("Open of the old life", err, target.ErrGone)
	q := e.open(v)
	if probe != 0 {
		b := make([]byte, 16)
		if _, err := q.ReadAt(b, probe); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{0x5a}, 16)) {
			e.Errorf("the new program's memory is % x, %v", b, err)
		}
	}
	e.thaw(e.freeze(q))
}

func forkLife(e *env) {
	v := e.start(Want{})
	fk := able[Forker](e, v)
	p := e.open(v)
	at := e.alloc(v, p, pageSize, target.Read|target.Write)
	if _, err := p.WriteAt([]byte("parent"), at); err != nil {
		e.Fatal(err)
	}
	c, err := fk.Fork()
	e.absent(err)
	i := e.info(c)
	if i.ID == e.info(v).ID || i.PID == v.PID() {
		e.Fatalf("the child has its parent's life %s", i.ID)
	}
	q := e.open(c)
	b := make([]byte, 6)
	if _, err := q.ReadAt(b, at); err != nil || string(b) != "parent" {
		e.Errorf("the child does not have what was written before: %q, %v", b, err)
	}
	if _, err := q.WriteAt([]byte("child!"), at); err != nil {
		e.Errorf("WriteAt to the child: %v", err)
	}
	if _, err := p.ReadAt(b, at); err != nil || string(b) != "parent" {
		e.Errorf("a write to the child shows in the parent: %q, %v", b, err)
	}
	f := e.freeze(q)
	e.runs(v)
	e.standstill(c, q)
	e.thaw(f)
	e.runs(c)
	v.Exit()
	e.runs(c)
	if _, err := q.ReadAt(b, at); err != nil || string(b) != "child!" {
		e.Errorf("after its parent's end the child's memory is %q, %v", b, err)
	}
}

func tracer(e *env) {
	v := e.start(Want{Threads: 2})
	tr := able[Traceable](e, v)
	release, err := tr.Trace()
	e.absent(err)
	released := false
	defer func() {
		if !released {
			release()
		}
	}()
	guarded := func(i target.Info) bool {
		for _, g := range i.Guards {
			if g.Code == target.GuardTracer && g.Text != "" {
				return true
			}
		}
		return false
	}
	p, err := e.Backend.Open(context.Background(), e.info(v).ID)
	e.must("Open", err)
	defer p.Close()
	if !guarded(p.Info()) {
		e.Errorf("Guards do not name the tracer: %v", p.Info().Guards)
	}
	if f, err := p.Freeze(context.Background()); err == nil {
		f.Thaw()
		e.Error("a traced process was frozen")
	} else {
		e.wantErr("Freeze of a traced process", err, target.ErrDenied, target.ErrBusy)
	}
	e.runs(v)
	release()
	released = true
	e.must("Close", p.Close())
	p = e.open(v)
	if guarded(p.Info()) {
		e.Errorf("a tracer is named that is gone: %v", p.Info().Guards)
	}
	e.thaw(e.freeze(p))
	e.runs(v)
}

func changeCounter(e *env) {
	v := e.start(Want{})
	mp := able[Mapper](e, v)
	e.info(v) // a backend may need to see a process once before it can tell changes
	settled := uint64(0)
	e.until("the counter rests while nothing is mapped", func() bool {
		a := e.info(v).Change
		e.runs(v)
		settled = e.info(v).Change
		return a == settled
	})
	sp, err := mp.Map()
	e.absent(err)
	p := e.open(v)
	if _, ok := region(e.regions(p), sp.Start); !ok {
		e.Fatalf("the victim says it mapped a module at %s, but nothing is there", sp.Start)
	}
	mapped := e.info(v).Change
	if mapped == settled {
		e.Error("a module was mapped and the counter did not change")
	}
	e.must("Unmap", mp.Unmap())
	if e.info(v).Change == mapped {
		e.Error("a module was unmapped and the counter did not change")
	}
	if _, ok := region(e.regions(p), sp.Start); ok {
		e.Error("the module is still mapped")
	}
}
