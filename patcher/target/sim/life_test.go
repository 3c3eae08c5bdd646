package sim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// TestForkCopies: the child has its parent's memory, code that is patched and
// not yet flushed included, and from then on its own.
func TestForkCopies(t *testing.T) {
	m, p := one(t)
	rewrite(t, p, codeAt, newCode, true)
	if err := p.Alloc(codeAt+0x40000, 4096, target.Read|target.Exec); err != nil {
		t.Fatal(err)
	}
	id, err := m.Fork(100)
	if err != nil {
		t.Fatal(err)
	}
	q := open(t, m, id.PID)
	if i := q.Info(); i.ID == p.Info().ID || i.Exe != p.Info().Exe || i.User != p.Info().User {
		t.Errorf("child %+v", i)
	}
	peek := func(pid int) []byte {
		b, err := m.Peek(pid, codeAt, len(newCode))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if !bytes.Equal(peek(id.PID), newCode) {
		t.Errorf("the child's code is % x", peek(id.PID))
	}
	rewrite(t, p, codeAt, oldCode, true)
	if !bytes.Equal(peek(id.PID), newCode) || !bytes.Equal(peek(100), oldCode) {
		t.Error("an undo in the parent reached the child")
	}
	rewrite(t, q, codeAt, oldCode, true)
	rewrite(t, q, codeAt, newCode, true)
	if !bytes.Equal(peek(100), oldCode) {
		t.Error("a change of the child reached the parent")
	}
	if err := q.Free(codeAt+0x40000, 4096); err != nil {
		t.Errorf("what we allocated before the fork cannot be freed in the child: %v", err)
	}
	if err := p.Protect(codeAt+0x40000, 4096, target.Read); err != nil {
		t.Errorf("freed in the child, gone in the parent: %v", err)
	}
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Fork(100); err == nil {
		t.Error("a frozen process forks")
	}
	f.Thaw()
	for _, pid := range []int{100, id.PID} {
		if err := m.Invariant(pid); err != nil {
			t.Error(err)
		}
	}
}

func TestExecIsAnotherLife(t *testing.T) {
	m, p := one(t)
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	old := p.Info().ID
	id, err := m.Exec(100, sim.Process{Exe: "/bin/new", Regions: []sim.Region{{At: codeAt, Size: 4096, Prot: "r-x"}}})
	if err != nil || id.PID != 100 || id == old {
		t.Fatalf("%v, %v", id, err)
	}
	if err := f.Thaw(); err != nil {
		t.Errorf("thaw of a life that is over: %v", err)
	}
	if _, err := f.Threads(); err == nil {
		t.Error("threads of a life that is over")
	}
	if n, err := p.WriteAt(newCode, codeAt); n != 0 || !errors.Is(err, target.ErrGone) {
		t.Errorf("the old handle writes %d bytes, %v", n, err)
	}
	if b, _ := m.Peek(100, codeAt, 6); !bytes.Equal(b, make([]byte, 6)) {
		t.Errorf("the new program's memory is % x", b)
	}
	// A program that cannot be started leaves the old one in place.
	if _, err := m.Exec(100, sim.Process{Image: "none.dll"}); err == nil {
		t.Error("exec of nothing succeeds")
	}
	if got := open(t, m, 100).Info().ID; got != id {
		t.Errorf("after a failed exec the life is %v, was %v", got, id)
	}
}

func TestPidsAreReused(t *testing.T) {
	m, p := one(t)
	old := p.Info().ID
	if err := m.Exit(100); err != nil {
		t.Fatal(err)
	}
	if m.Exit(100) == nil {
		t.Error("a process ends twice")
	}
	id, err := m.Start(small())
	if err != nil || id.PID != old.PID || id == old {
		t.Errorf("%v after %v, %v", id, old, err)
	}
	if _, err := m.Open(context.Background(), old); !errors.Is(err, target.ErrGone) {
		t.Errorf("the old life opens: %v", err)
	}
	if _, err := p.Regions(); !errors.Is(err, target.ErrGone) {
		t.Errorf("the old handle: %v", err)
	}
}

// TestImports: a slot holds the address of the export it names where that
// module is mapped, and else of code that is no module's.
func TestImports(t *testing.T) {
	read := func(name string) []byte {
		b, err := os.ReadFile("../../../testdata/fixtures/mingw/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// What it imports, app.dll does not export: give one the name of an export.
	fix := bytes.ReplaceAll(read("fix-import-1.dll"), []byte("helper\x00"), []byte("choose\x00"))
	im, err := pe.Parse(bytes.NewReader(fix), int64(len(fix)))
	if err != nil {
		t.Fatal(err)
	}
	imports, err := im.Imports()
	if err != nil || len(imports) == 0 {
		t.Fatalf("%d imports, %v", len(imports), err)
	}
	for _, withApp := range []bool{true, false} {
		p := sim.Process{PID: 100}
		if withApp {
			p.Modules = append(p.Modules, sim.Module{Name: "app.dll", Image: read("app.dll")})
		}
		p.Modules = append(p.Modules, sim.Module{Name: "fix.dll", Image: fix})
		m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{p}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		sp, _ := m.Module(100, "fix.dll")
		bound := 0
		for _, i := range imports {
			b, err := m.Peek(100, sp.Start+target.Addr(i.Slot), 8)
			if err != nil {
				t.Fatal(err)
			}
			to := target.Addr(binary.LittleEndian.Uint64(b))
			if withApp {
				if want, err := m.Export(100, "app.dll", i.Name); err == nil {
					bound++
					if to != want {
						t.Errorf("%s!%s is bound to %s, want %s", i.DLL, i.Name, to, want)
					}
					continue
				}
			}
			if _, err := m.Fetch(100, to, 1); err != nil || sp.Contains(to) {
				t.Errorf("%s!%s is bound to %s: %v", i.DLL, i.Name, to, err)
			}
		}
		if withApp && bound == 0 {
			t.Errorf("none of %v is an export of app.dll", imports)
		}
	}
}

func TestModulesComeAndGo(t *testing.T) {
	m := load(t, "format = \"hotpatchd-scene/1\"\n[[processes]]\npid = 100\nmodules = [{file = \"demo.dll\", base = 0x10000000}]\n")
	if _, err := m.LoadModule(100, sim.Module{File: "demo.dll"}); err == nil {
		t.Error("a module is mapped twice")
	}
	if err := m.UnloadModule(100, "demo.dll"); err != nil {
		t.Fatal(err)
	}
	if m.UnloadModule(100, "demo.dll") == nil {
		t.Error("a module goes twice")
	}
	// Another one at the same base.
	if at, err := m.LoadModule(100, sim.Module{File: "app.dll", Base: 0x10000000}); err != nil || at != 0x10000000 {
		t.Fatalf("%s, %v", at, err)
	}
	p := open(t, m, 100)
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if m.UnloadModule(100, "app.dll") == nil {
		t.Error("a frozen process unmaps a module")
	}
	if _, err := m.LoadModule(100, sim.Module{File: "demo.dll"}); err == nil {
		t.Error("a frozen process maps a module")
	}
	if m.MoveThread(100, 0, codeAt) == nil {
		t.Error("a frozen thread moves")
	}
	if m.EndThread(100, 100) == nil {
		t.Error("a frozen thread ends")
	}
	f.Thaw()
}

// TestChangeFollowsUs: what we map, protect and free is a change too, what we
// write is none.
func TestChangeFollowsUs(t *testing.T) {
	m, p := one(t)
	change := func() uint64 { return open(t, m, 100).Info().Change }
	for _, c := range []struct {
		name string
		do   func() error
		want bool
	}{
		{"nothing", func() error { return nil }, false},
		{"alloc", func() error { return p.Alloc(codeAt+0x40000, 4096, target.Read|target.Write) }, true},
		{"write", func() error { _, err := p.WriteAt(newCode, codeAt+0x40000); return err }, false},
		{"protect", func() error { return p.Protect(codeAt+0x40000, 4096, target.Read) }, true},
		{"freeze", func() error { rewrite(t, p, codeAt, newCode, true); return nil }, false},
		{"free", func() error { return p.Free(codeAt+0x40000, 4096) }, true},
	} {
		before := change()
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := change() != before; got != c.want {
			t.Errorf("%s: changed %v, want %v", c.name, got, c.want)
		}
	}
}

// TestFreeIsForOurs: a mistaken address must not unmap the program.
func TestFreeIsForOurs(t *testing.T) {
	m, p := one(t)
	if err := p.Free(codeAt, 4096); err == nil {
		t.Error("the program's own code is freed")
	}
	if _, err := m.Peek(100, codeAt, 1); err != nil {
		t.Error(err)
	}
}

// TestDieReleases: whatever is held is let go when we die, and nothing of an
// earlier life of ours works in a later one.
func TestDieReleases(t *testing.T) {
	m, p := one(t)
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m.Die()
	if m.Stopped(100) {
		t.Error("held after our death")
	}
	if _, err := m.List(context.Background()); !errors.Is(err, sim.ErrDied) {
		t.Errorf("List after our death: %v", err)
	}
	if err := f.Thaw(); err != nil {
		t.Errorf("thaw after our death: %v", err)
	}
	m.Revive()
	if _, err := f.Threads(); !errors.Is(err, sim.ErrDied) {
		t.Errorf("Threads of an earlier life: %v", err)
	}
	if _, err := p.Freeze(context.Background()); !errors.Is(err, sim.ErrDied) {
		t.Errorf("Freeze by a handle of an earlier life: %v", err)
	}
	q := open(t, m, 100)
	if _, err := q.ReadAt(make([]byte, 4), codeAt); err != nil {
		t.Errorf("a new handle: %v", err)
	}
}

func TestUnstoppableIsNamed(t *testing.T) {
	m, p := one(t)
	if _, err := m.StartThread(100, sim.Thread{ID: 133, State: "vfork", Unstoppable: true}); err != nil {
		t.Fatal(err)
	}
	_, err := p.Freeze(context.Background())
	if !errors.Is(err, target.ErrBusy) || !strings.Contains(err.Error(), "thread 133 (vfork)") || m.Stopped(100) {
		t.Errorf("%v", err)
	}
	if err := m.EndThread(100, 133); err != nil {
		t.Fatal(err)
	}
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	f.Thaw()
	if d := f.(target.Pauser).Pause(); d <= 0 {
		t.Errorf("pause %v", d)
	}
}

// TestManyProcesses: several goroutines work on many processes of one machine.
func TestManyProcesses(t *testing.T) {
	dll, err := os.ReadFile(demoDLL)
	if err != nil {
		t.Fatal(err)
	}
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 5}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const n = 300
	for range n {
		if _, err := m.Start(sim.Process{Modules: []sim.Module{{Name: "demo.dll", Image: dll}}}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := m.List(context.Background())
	if err != nil || len(list) != n {
		t.Fatalf("%d processes, %v", len(list), err)
	}
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			for i := k; i < n; i += 4 {
				if err := func() error {
					entry, err := m.Export(list[i].PID, "demo.dll", "answer")
					if err != nil {
						return err
					}
					p, err := m.Open(context.Background(), list[i].ID)
					if err != nil {
						return err
					}
					defer p.Close()
					f, err := p.Freeze(context.Background())
					if err != nil {
						return err
					}
					if _, err := p.WriteAt(newCode, entry+8); err != nil {
						return err
					}
					if err := p.Flush(entry+8, len(newCode)); err != nil {
						return err
					}
					return f.Thaw()
				}(); err != nil {
					t.Errorf("process %d: %v", list[i].PID, err)
				}
				if i%10 == 0 {
					m.Exit(list[i].PID)
				}
			}
		})
	}
	wg.Wait()
	left, _ := m.List(context.Background())
	if len(left) != n-n/10 {
		t.Errorf("%d processes are left", len(left))
	}
	for _, i := range left {
		if err := m.Invariant(i.PID); err != nil {
			t.Error(err)
		}
	}
}

func ExampleMachine_Executes() {
	m, _ := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 1,
		Regions: []sim.Region{{At: 0x10000, Size: 4096, Prot: "r-x"}}}}}, nil)
	m.Poke(1, 0x10000, []byte{0xe9, 0xfb, 0, 0, 0}) // jmp +0x100
	fmt.Println(m.Executes(1, 0x10000))
	// Output: 10100 <nil>
}
