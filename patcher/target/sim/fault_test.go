package sim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// one makes a machine with one simple process, 100, and opens it.
func one(t *testing.T) (*sim.Machine, target.Process) {
	t.Helper()
	p := small()
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 3, Processes: []sim.Process{p}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m, open(t, m, 100)
}

// small has the function of the suite's victim, a thread that runs it and
// one that waits.
func small() sim.Process {
	return sim.Process{PID: 100, Regions: []sim.Region{
		{At: codeAt, Size: target.PageSize, Prot: "r-x", Kind: "file", Path: "/usr/bin/victim", Words: codeWords},
		{At: scratchAt, Size: target.PageSize},
	}, Threads: []sim.Thread{{PC: codeAt}, {State: "read"}}}
}

var (
	oldCode = []byte{0xb8, 42, 0, 0, 0, 0xc3}
	newCode = []byte{0xb8, 43, 0, 0, 0, 0xc3}
)

// operate carries out one operation of each kind, in an order that makes sense.
var operate = []struct {
	op sim.Op
	do func(p target.Process, f *target.Frozen) error
}{
	{sim.OpRegions, func(p target.Process, _ *target.Frozen) error { _, err := p.Regions(); return err }},
	{sim.OpRead, func(p target.Process, _ *target.Frozen) error {
		_, err := p.ReadAt(make([]byte, 6), codeAt)
		return err
	}},
	{sim.OpAlloc, func(p target.Process, _ *target.Frozen) error {
		return p.Alloc(codeAt+0x40000, 4096, target.Read|target.Write)
	}},
	{sim.OpWrite, func(p target.Process, _ *target.Frozen) error {
		_, err := p.WriteAt(newCode, codeAt+0x40000)
		return err
	}},
	{sim.OpProtect, func(p target.Process, _ *target.Frozen) error {
		return p.Protect(codeAt+0x40000, 4096, target.Read|target.Exec)
	}},
	{sim.OpFlush, func(p target.Process, _ *target.Frozen) error { return p.Flush(codeAt+0x40000, 6) }},
	{sim.OpFree, func(p target.Process, _ *target.Frozen) error { return p.Free(codeAt+0x40000, 4096) }},
	{sim.OpFreeze, func(p target.Process, f *target.Frozen) (err error) {
		*f, err = p.Freeze(context.Background())
		return err
	}},
	{sim.OpThreads, func(p target.Process, f *target.Frozen) error { _, err := (*f).Threads(); return err }},
	{sim.OpThaw, func(p target.Process, f *target.Frozen) error { return (*f).Thaw() }},
	{sim.OpClose, func(p target.Process, _ *target.Frozen) error { return p.Close() }},
}

func TestEffects(t *testing.T) {
	for _, c := range []struct {
		do   sim.Effect
		want error // of the operation it strikes
	}{
		{sim.Fail, sim.ErrFault}, {sim.Deny, target.ErrDenied}, {sim.DenyRest, target.ErrDenied}, {sim.Busy, target.ErrBusy},
		{sim.Taken, target.ErrTaken}, {sim.Exit, target.ErrGone}, {sim.Exec, target.ErrGone}, {sim.Die, sim.ErrDied},
		{sim.Short, sim.ErrFault}, {sim.Torn, sim.ErrFault},
	} {
		for k, o := range operate {
			t.Run(fmt.Sprintf("%s at %s", c.do, o.op), func(t *testing.T) {
				m, p := one(t)
				var f target.Frozen
				for _, before := range operate[:k] {
					if err := before.do(p, &f); err != nil {
						t.Fatalf("%s: %v", before.op, err)
					}
				}
				m.FailAt(1, sim.Fault{Op: o.op, PID: 100, Do: c.do})
				err := o.do(p, &f)
				want := c.want
				if o.op == sim.OpThaw && want == target.ErrGone {
					want = nil // nobody is left to be held
				}
				if !errors.Is(err, want) || (want == nil) != (err == nil) {
					t.Fatalf("error %v, want %v", err, want)
				}
				var te *target.Error
				if err != nil && (!errors.As(err, &te) || te.ID.PID != 100) {
					t.Errorf("error %v does not say where", err)
				}
				_, err = p.ReadAt(make([]byte, 1), codeAt)
				switch {
				case o.op == sim.OpClose:
				case c.do == sim.DenyRest:
					if !errors.Is(err, target.ErrDenied) {
						t.Errorf("afterwards: %v, want ErrDenied", err)
					}
				case want == nil || errors.Is(want, target.ErrGone):
					if !errors.Is(err, target.ErrGone) {
						t.Errorf("afterwards: %v, want ErrGone", err)
					}
				case c.do == sim.Die:
					if !errors.Is(err, sim.ErrDied) {
						t.Errorf("afterwards: %v, want ErrDied", err)
					}
					m.Revive()
					if _, err := p.ReadAt(make([]byte, 1), codeAt); !errors.Is(err, sim.ErrDied) {
						t.Errorf("a handle outlives us: %v", err)
					}
				case err != nil:
					t.Errorf("afterwards: %v", err)
				}
				held := m.Stopped(100)
				wantHeld := (o.op == sim.OpThreads || o.op == sim.OpThaw) && slices.Contains([]sim.Effect{sim.Fail, sim.Deny, sim.DenyRest, sim.Busy, sim.Taken, sim.Short, sim.Torn}, c.do)
				if held != wantHeld {
					t.Errorf("held %v, want %v", held, wantHeld)
				}
				// Whatever happened, letting go of the handle lets go of the threads.
				p.Close()
				if m.Stopped(100) {
					t.Error("held after Close")
				}
			})
		}
	}
}

func TestPartialTransfers(t *testing.T) {
	m, p := one(t)
	peek := func() []byte {
		b, err := m.Peek(100, scratchAt, 6)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	m.FailAt(1, sim.Fault{Op: sim.OpWrite, Do: sim.Short, Bytes: 2})
	if n, err := p.WriteAt([]byte("abcdef"), scratchAt); n != 2 || err == nil || string(peek()) != "ab\x00\x00\x00\x00" {
		t.Errorf("short write: %d, %v, %q", n, err, peek())
	}
	m.FailAt(1, sim.Fault{Op: sim.OpWrite, Do: sim.Torn, Bytes: 3})
	if n, err := p.WriteAt([]byte("ABCDEF"), scratchAt); n != 0 || err == nil || string(peek()) != "ABC\x00\x00\x00" {
		t.Errorf("torn write: %d, %v, %q", n, err, peek())
	}
	m.FailAt(1, sim.Fault{Op: sim.OpWrite, Do: sim.LieWrite})
	if n, err := p.WriteAt([]byte("xxxxxx"), scratchAt); n != 6 || err != nil || string(peek()) != "ABC\x00\x00\x00" {
		t.Errorf("lying write: %d, %v, %q", n, err, peek())
	}
	var b [3]byte
	m.FailAt(1, sim.Fault{Op: sim.OpRead, Do: sim.LieRead})
	if n, err := p.ReadAt(b[:], scratchAt); n != 3 || err != nil || !bytes.Equal(b[:], []byte{^byte('A'), ^byte('B'), ^byte('C')}) {
		t.Errorf("lying read: %d, %v, % x", n, err, b)
	}
	m.FailAt(1, sim.Fault{Op: sim.OpRead, Do: sim.Short, Bytes: 1})
	if n, err := p.ReadAt(b[:], scratchAt); n != 1 || err == nil || b[0] != 'A' {
		t.Errorf("short read: %d, %v, % x", n, err, b)
	}
	m.FailAt(1, sim.Fault{Op: sim.OpWrite, Do: sim.Die, Bytes: 1})
	if _, err := p.WriteAt([]byte("zzz"), scratchAt); !errors.Is(err, sim.ErrDied) || string(peek()) != "zBC\x00\x00\x00" {
		t.Errorf("death in a write: %v, %q", err, peek())
	}
}

func TestFaultClock(t *testing.T) {
	m, p := one(t)
	read := func() error { _, err := p.ReadAt(make([]byte, 1), codeAt); return err }
	failed := func(n int) (at []int) {
		for i := 1; i <= n; i++ {
			if err := read(); err != nil {
				at = append(at, i)
			}
		}
		return at
	}
	for _, c := range []struct {
		at    int
		f     sim.Fault
		wants []int
	}{
		{3, sim.Fault{Do: sim.Fail}, []int{3}},
		{0, sim.Fault{Do: sim.Fail}, []int{1}},
		{2, sim.Fault{Do: sim.Fail, Times: 2, Op: sim.OpRead}, []int{2, 3}},
		{4, sim.Fault{Do: sim.Fail, Times: -1, PID: 100}, []int{4, 5, 6}},
		{1, sim.Fault{Do: sim.Fail, Op: sim.OpWrite}, nil},
		{1, sim.Fault{Do: sim.Fail, PID: 101}, nil},
		{1, sim.Fault{Do: sim.Fail, Op: "any"}, []int{1}},
	} {
		m.FailAt(c.at, c.f)
		if got := failed(6); !slices.Equal(got, c.wants) {
			t.Errorf("%+v: reads %v failed, want %v", c.f, got, c.wants)
		}
		m.ClearFaults()
	}
	ops, reads, now := m.Ops(), m.Count(sim.OpRead), m.Now()
	failed(5)
	if m.Ops() != ops+5 || m.Count(sim.OpRead) != reads+5 || m.Count(sim.OpAny) != m.Ops() || m.Now() <= now {
		t.Errorf("%d operations, %d reads, %v", m.Ops()-ops, m.Count(sim.OpRead)-reads, m.Now()-now)
	}
}

func TestWorldChanges(t *testing.T) {
	t.Run("a thread enters", func(t *testing.T) {
		m, p := one(t)
		m.FailAt(1, sim.Fault{Op: sim.OpFreeze, Do: sim.Enter, PC: codeAt + 5})
		f, err := p.Freeze(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Thaw()
		if list, err := f.Threads(); err != nil || list[0].PC != codeAt+5 {
			t.Errorf("threads %v, %v", list, err)
		}
	})
	t.Run("a module goes", func(t *testing.T) {
		m := load(t, "format = \"hotpatchd-scene/1\"\n[[processes]]\npid = 100\nimage = \"demo.dll\"\n")
		p := open(t, m, 100)
		sp, _ := m.Module(100, "demo.dll")
		m.FailAt(1, sim.Fault{Op: sim.OpRead, Do: sim.Unload, Module: "demo.dll"})
		if _, err := p.ReadAt(make([]byte, 1), sp.Start); err == nil {
			t.Error("an unloaded module is readable")
		}
		if err := m.Invariant(100); err != nil {
			t.Errorf("invariant: %v", err)
		}
	})
	t.Run("a hook runs", func(t *testing.T) {
		m, p := one(t)
		ran := 0
		m.FailAt(2, sim.Fault{Op: sim.OpRead, Do: sim.Hook, Then: func() { ran++; m.Exit(100) }})
		_, first := p.ReadAt(make([]byte, 1), codeAt)
		_, second := p.ReadAt(make([]byte, 1), codeAt)
		if ran != 1 || first != nil || !errors.Is(second, target.ErrGone) {
			t.Errorf("ran %d times; %v, %v", ran, first, second)
		}
	})
	t.Run("a fault that cannot happen is no silence", func(t *testing.T) {
		m, p := one(t)
		m.FailAt(1, sim.Fault{Do: sim.Unload, Module: "none.dll"})
		p.ReadAt(make([]byte, 1), codeAt)
		if err := m.Invariant(100); err == nil || !strings.Contains(err.Error(), "none.dll") {
			t.Errorf("invariant: %v", err)
		}
	})
}

// swap is a patcher in small: it writes the new code under a freeze, reads it
// back, and writes the old code back when anything fails.
func swap(p target.Process) (err error) {
	f, err := p.Freeze(context.Background())
	if err != nil {
		return err
	}
	defer func() {
		for range 3 {
			if f.Thaw() == nil {
				return
			}
		}
	}()
	put := func(code []byte) error {
		if _, err := p.WriteAt(code, codeAt); err != nil {
			return err
		}
		if err := p.Flush(codeAt, len(code)); err != nil {
			return err
		}
		got := make([]byte, len(code))
		if _, err := p.ReadAt(got, codeAt); err != nil {
			return err
		}
		if !bytes.Equal(got, code) {
			return errors.New("it reads back differently")
		}
		return nil
	}
	if err := put(newCode); err != nil {
		for range 3 {
			if put(oldCode) == nil {
				break
			}
		}
		return err
	}
	return nil
}

// TestSweep strikes each operation of a swap with each effect in turn: after
// every single fault the process runs one code or the other, whole.
func TestSweep(t *testing.T) {
	m, p := one(t)
	before := m.Ops()
	if err := swap(p); err != nil {
		t.Fatal(err)
	}
	steps := m.Ops() - before
	if steps < 5 {
		t.Fatalf("a swap of %d operations", steps)
	}
	for _, do := range []sim.Effect{sim.Fail, sim.Deny, sim.Busy, sim.Short, sim.Torn, sim.LieWrite, sim.LieRead, sim.Exit, sim.Exec, sim.Die, sim.DenyRest} {
		for n := 1; n <= steps; n++ {
			for _, k := range []int{0, 1, 3} {
				m, p := one(t)
				if err := m.Site(100, codeAt, oldCode, newCode); err != nil {
					t.Fatal(err)
				}
				m.FailAt(n, sim.Fault{PID: 100, Do: do, Bytes: k})
				err := swap(p)
				p.Close()
				if m.Stopped(100) {
					t.Errorf("%s (%d bytes) at operation %d: held (%v)", do, k, n, err)
				}
				inv := m.Invariant(100)
				// Nobody can mend what was torn when we died or lost all rights
				// in the middle, nor flush it.
				// A flush that lies leaves no trace to find.
				excused := (do == sim.Die || do == sim.DenyRest) && n > 1 || do == sim.LieWrite && n == 3
				if inv != nil && !excused {
					t.Errorf("%s (%d bytes) at operation %d: %v (swap: %v)", do, k, n, inv, err)
				}
			}
		}
	}
}
