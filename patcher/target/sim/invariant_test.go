package sim_test

import (
	"context"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// rewrite writes code under a freeze, flushes it if told so, and thaws.
func rewrite(t *testing.T, p target.Process, at target.Addr, code []byte, flush bool) {
	t.Helper()
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(code, at); err != nil {
		t.Fatal(err)
	}
	if flush {
		if err := p.Flush(at, len(code)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
}

// pieces rewrites code with one write after the other.
func pieces(t *testing.T, p target.Process, at target.Addr, pieces ...[]byte) {
	t.Helper()
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range pieces {
		if _, err := p.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		if err := p.Flush(at, len(b)); err != nil {
			t.Fatal(err)
		}
		at += target.Addr(len(b))
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
}

// TestInvariant breaks each rule once.
func TestInvariant(t *testing.T) {
	jump := []byte{0xe9, 0xfb, 0, 0, 0} // to codeAt+0x100
	twoByte := []byte{0x90, 0x90, 0x90, 0x90, 0x90, 0x90}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, m *sim.Machine, p target.Process)
		says string // "" if nothing is broken
	}{
		{"nothing", func(t *testing.T, m *sim.Machine, p target.Process) {}, ""},
		{"held", func(t *testing.T, m *sim.Machine, p target.Process) {
			if _, err := p.Freeze(context.Background()); err != nil {
				t.Fatal(err)
			}
		}, "its threads are held"},
		{"live code written while threads run", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.WriteAt(oldCode, codeAt)
		}, "while threads run"},
		{"data written while threads run", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.WriteAt(oldCode, scratchAt)
		}, ""},
		{"our own code written while threads run", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.Alloc(codeAt+0x40000, 4096, target.Read|target.Exec)
			p.WriteAt(oldCode, codeAt+0x40000)
			p.Flush(codeAt+0x40000, len(oldCode))
		}, ""},
		{"not flushed", func(t *testing.T, m *sim.Machine, p target.Process) {
			rewrite(t, p, codeAt, newCode, false)
		}, "threads let go while the instruction cache is stale at 700000010001"},
		{"flushed", func(t *testing.T, m *sim.Machine, p target.Process) {
			rewrite(t, p, codeAt, newCode, true)
		}, ""},
		{"written back and not flushed", func(t *testing.T, m *sim.Machine, p target.Process) {
			rewrite(t, p, codeAt, oldCode, false)
		}, ""},
		{"pc at the end of what was rewritten", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.MoveThread(100, 100, codeAt+5)
			rewrite(t, p, codeAt, jump, true)
		}, ""},
		{"pc inside what was rewritten", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, twoByte)
			m.MoveThread(100, 100, codeAt+2)
			rewrite(t, p, codeAt, jump, true)
		}, "thread 100 (running) goes on at 700000010002"},
		{"pc inside one instruction that was rewritten", func(t *testing.T, m *sim.Machine, p target.Process) {
			// It cannot stand there: no instruction begins at this place.
			m.MoveThread(100, 100, codeAt+1)
			rewrite(t, p, codeAt, jump, true)
		}, ""},
		{"return address inside what was rewritten", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, twoByte)
			m.StartThread(100, sim.Thread{ID: 105, Stack: []any{0, codeAt + 3}})
			rewrite(t, p, codeAt, jump, true)
		}, "thread 105 (running) returns to 700000010003"},
		{"return address on the normal stack of a signal handler", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, twoByte)
			m.StartThread(100, sim.Thread{ID: 105, Stack: []any{0, codeAt + 3}, AltStack: &sim.Signal{Stack: []any{5}}})
			rewrite(t, p, codeAt, jump, true)
		}, "thread 105 (running) returns to 700000010003"},
		{"return address behind what was rewritten", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, twoByte)
			m.StartThread(100, sim.Thread{ID: 105, Stack: []any{0, codeAt + 5, codeAt}})
			rewrite(t, p, codeAt, jump, true)
		}, ""},
		{"at a jump right behind another one", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, append(twoByte, 0x90))
			m.MoveThread(100, 100, codeAt+5)
			pieces(t, p, codeAt, jump, []byte{0xeb, 0xf9})
		}, ""},
		{"inside a jump written in pieces", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Poke(100, codeAt, twoByte)
			m.MoveThread(100, 100, codeAt+2)
			pieces(t, p, codeAt, jump[:2], jump[2:])
		}, "thread 100 (running) goes on at 700000010002"},
		{"thread in no code", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.MoveThread(100, 0, scratchAt)
		}, "which is no code"},
		{"torn site", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Site(100, codeAt, oldCode, newCode)
			rewrite(t, p, codeAt, newCode[:1], true)
			rewrite(t, p, codeAt+1, []byte{44}, true)
		}, "site 700000010000 is torn: b8 2c"},
		{"whole site", func(t *testing.T, m *sim.Machine, p target.Process) {
			m.Site(100, codeAt, oldCode, newCode)
			rewrite(t, p, codeAt, newCode, true)
		}, ""},
		{"alloc while frozen", func(t *testing.T, m *sim.Machine, p target.Process) {
			f, _ := p.Freeze(context.Background())
			if err := p.Alloc(codeAt+0x40000, 4096, target.Read); err == nil {
				t.Error("it is not refused")
			}
			f.Thaw()
		}, "alloc while frozen"},
		{"freed under a thread", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.Alloc(codeAt+0x40000, 4096, target.Read|target.Exec)
			m.MoveThread(100, 0, codeAt+0x40010)
			p.Free(codeAt+0x40000, 4096)
		}, "in memory that is freed"},
		{"freed under a return address", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.Alloc(codeAt+0x40000, 4096, target.Read|target.Exec)
			m.StartThread(100, sim.Thread{Stack: []any{codeAt + 0x40010}})
			p.Free(codeAt+0x40000, 4096)
		}, "in memory that is freed"},
		{"freed when nobody is in it", func(t *testing.T, m *sim.Machine, p target.Process) {
			p.Alloc(codeAt+0x40000, 4096, target.Read|target.Exec)
			p.Free(codeAt+0x40000, 4096)
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, p := one(t)
			c.do(t, m, p)
			err := m.Invariant(100)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("invariant: %v, want %q", err, c.says)
			}
			m.Exit(100)
			if err := m.Invariant(100); err != nil {
				t.Errorf("after its end: %v", err)
			}
		})
	}
}

// TestStaleForNow: code that is stale is told of even when nobody was let go yet.
func TestStaleForNow(t *testing.T) {
	m, p := one(t)
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Thaw()
	p.WriteAt(newCode, codeAt)
	if err := m.Invariant(100); err == nil || !strings.Contains(err.Error(), "process 100: the instruction cache is stale at 700000010001") {
		t.Errorf("invariant: %v", err)
	}
	p.Flush(codeAt, len(newCode))
}

// TestExportsLeadSomewhere: a jump at an export into nothing, and the freeing
// of what an export runs.
func TestExportsLeadSomewhere(t *testing.T) {
	dll, err := os.ReadFile(demoDLL)
	if err != nil {
		t.Fatal(err)
	}
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 100, Modules: []sim.Module{{Name: "demo.dll", Image: dll, Base: 0x10000000}}}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := open(t, m, 100)
	entry, err := m.Export(100, "demo.dll", "answer")
	if err != nil {
		t.Fatal(err)
	}
	const annex target.Addr = 0x10100000
	if err := p.Alloc(annex, 4096, target.Read|target.Exec); err != nil {
		t.Fatal(err)
	}
	p.WriteAt(newCode, annex)
	p.Flush(annex, len(newCode))
	jump := binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(annex-entry-5))
	rewrite(t, p, entry, jump, true)
	if at, err := m.Executes(100, entry); err != nil || at != annex {
		t.Errorf("answer runs at %s, %v", at, err)
	}
	if err := m.Invariant(100); err != nil {
		t.Error(err)
	}
	if err := p.Free(annex, 4096); err != nil {
		t.Fatal(err)
	}
	err = m.Invariant(100)
	for _, says := range []string{"export demo.dll!answer leads nowhere", "export demo.dll!answer runs at 10100000, in memory that is freed"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("invariant: %v, want %q", err, says)
		}
	}
}
