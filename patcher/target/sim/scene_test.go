package sim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

const fullScene = `
format = "hotpatchd-scene/1"
seed = 42

[[processes]]
pid = 100
exe = "/usr/lib/wine/wine64"
image = "demo.dll"
user = "alice"
uid = 1001
unit = "acme.service"
peb = 0x7ffd0000
guards = [{ code = "seccomp", text = "seccomp mode 2" }]
modules = [{ file = "demo.dll", base = 0x180000000 }, { file = "app.dll", header = "anonymous" }]
threads = [
  { id = 100, pc = "demo.dll!+0x1020", stack = ["demo.dll!+0x1025", 7, "0x10"], regs = { rbp = 5 } },
  { pc = "app.dll!+0x1000", state = "read", sp = 0x600000008000, altstack = { pc = "demo.dll!+0x1030" } },
]
regions = [
  { at = 0x190000000, size = 0x40000000, prot = "---" },
  { at = 0x10000, size = 0x1000, kind = "heap", words = ["demo.dll!+0x1020", 2] },
  { at = 0x20000, size = 0x2000, prot = "r--", shared = true, kind = "file", path = "/shared" },
  { at = 0x30000, size = 0x1000, prot = "r--", kind = "special", path = "[vvar]" },
]

[[processes]]
denied = true

[[faults]]
op = "write"
pid = 100
at = 2
do = "short"
bytes = 2
`

func load(t *testing.T, scene string) *sim.Machine {
	t.Helper()
	dir := t.TempDir()
	for _, f := range []string{"demo/demo.dll", "mingw/app.dll"} {
		b, err := os.ReadFile(filepath.Join("../../../testdata/fixtures", f))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(f)), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "scene.toml")
	if err := os.WriteFile(path, []byte(scene), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := sim.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func open(t *testing.T, m *sim.Machine, pid int) target.Process {
	t.Helper()
	list, err := m.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		if i.PID == pid {
			p, err := m.Open(context.Background(), i.ID)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			return p
		}
	}
	t.Fatalf("process %d is not listed", pid)
	return nil
}

func TestFullScene(t *testing.T) {
	m := load(t, fullScene)
	p := open(t, m, 100)
	i := p.Info()
	if i.Host != "wine64" || i.User != "alice" || i.UID != 1001 || i.Unit != "acme.service" || i.Arch != target.AMD64 ||
		i.PEB != 0x7ffd0000 || filepath.Base(i.Image) != "demo.dll" || len(i.Guards) != 1 || i.Guards[0].Code != target.GuardSeccomp {
		t.Errorf("info %+v", i)
	}
	list, err := p.Regions()
	if err != nil {
		t.Fatal(err)
	}
	at := func(a target.Addr) target.Region {
		for _, r := range list {
			if a >= r.Start && a < r.End {
				return r
			}
		}
		t.Fatalf("nothing is mapped at %s", a)
		return target.Region{}
	}
	if r := at(0x180000000); r.Path != i.Image || r.Inode == 0 || r.Offset != 0 || r.Prot != target.Read || r.Size() != 0x1000 {
		t.Errorf("header of demo.dll: %+v", r)
	}
	if r := at(0x180001000); r.Path != "" || r.Inode != 0 || r.Prot != target.Read|target.Exec {
		t.Errorf("code of demo.dll: %+v", r)
	}
	app, err := m.Module(100, "app.dll")
	if err != nil {
		t.Fatal(err)
	}
	if r := at(app.Start); r.Path != "" || r.Kind != target.Private || app.Start%0x10000 != 0 {
		t.Errorf("header of app.dll at %s: %+v", app.Start, r)
	}
	if r := at(0x190000000); r.Prot != 0 || r.Size() != 0x40000000 {
		t.Errorf("the gap that is taken: %+v", r)
	}
	if r := at(0x10000); r.Kind != target.Heap {
		t.Errorf("the heap: %+v", r)
	}
	if r := at(0x20000); !r.Shared || r.Path != "/shared" {
		t.Errorf("the shared file: %+v", r)
	}
	word := func(a target.Addr) uint64 {
		var b [8]byte
		if _, err := p.ReadAt(b[:], a); err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b[:])
	}
	if n, err := p.WriteAt([]byte{1}, 0x20000); n != 0 || err == nil {
		t.Errorf("a shared read-only file is written: %d, %v", n, err)
	}
	if n, err := p.ReadAt(make([]byte, 1), 0x20000); n != 1 || err != nil {
		t.Errorf("a shared file is read: %d, %v", n, err)
	}
	if n, err := p.ReadAt(make([]byte, 1), 0x30000); n != 0 || err == nil {
		t.Errorf("special memory is read: %d, %v", n, err)
	}
	if n, err := p.ReadAt(make([]byte, 1), 0x190000000); n != 0 || err == nil {
		t.Errorf("memory without protection is read: %d, %v", n, err)
	}
	if got := word(0x10000); got != 0x180001020 {
		t.Errorf("a word of the heap is %x", got)
	}
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Thaw()
	threads, err := f.Threads()
	if err != nil || len(threads) != 2 {
		t.Fatalf("threads %v, %v", threads, err)
	}
	a, b := threads[0], threads[1]
	if a.ID != 100 || a.PC != 0x180001020 || word(a.SP) != 0x180001025 || word(a.SP+8) != 7 || word(a.SP+16) != 16 || a.Regs[5] != 5 || a.State != "running" {
		t.Errorf("first thread %+v", a)
	}
	if r := at(a.SP); r.Kind != target.Stack {
		t.Errorf("the first thread's stack: %+v", r)
	}
	if b.ID != 101 || b.PC != 0x180001030 || b.State != "read" || b.Stack.Contains(0x600000008000) {
		t.Errorf("second thread %+v", b)
	}
	alt := make([]byte, b.Stack.End-b.Stack.Start)
	if _, err := p.ReadAt(alt, b.Stack.Start); err != nil {
		t.Fatal(err)
	}
	if got := f.(target.Interrupter).Interrupted(alt, b.Stack.Start); len(got) != 1 || got[0] != 0x600000008000 {
		t.Errorf("interrupted %v", got)
	}
	if n, err := p.WriteAt([]byte{1, 2, 3, 4}, 0x10008); n != 2 || !errors.Is(err, sim.ErrFault) {
		t.Errorf("the scene's fault: %d, %v", n, err)
	}
	other, _ := m.List(context.Background())
	if _, err := m.Open(context.Background(), other[1].ID); !errors.Is(err, target.ErrDenied) {
		t.Errorf("the denied process: %v", err)
	}
}

func TestSameSeedSameMachine(t *testing.T) {
	scene := "format = \"hotpatchd-scene/1\"\nseed = %SEED\n[[processes]]\npid = 7\nimage = \"demo.dll\"\n"
	base := map[string]target.Addr{}
	for _, seed := range []string{"1", "1", "2"} {
		sp, err := load(t, strings.ReplaceAll(scene, "%SEED", seed)).Module(7, "demo.dll")
		if err != nil {
			t.Fatal(err)
		}
		if old, ok := base[seed]; ok && old != sp.Start {
			t.Errorf("seed %s: base %s and %s", seed, old, sp.Start)
		}
		base[seed] = sp.Start
	}
	if base["1"] == base["2"] {
		t.Error("different seeds, same base")
	}
}

func TestSceneRefuses(t *testing.T) {
	const ok = "format = \"hotpatchd-scene/1\"\n"
	for _, c := range []struct{ name, scene, says string }{
		{"no format", "", "format is \"\""},
		{"another format", "format = \"hotpatchd-scene/2\"\n", "hotpatchd-scene/2"},
		{"unknown key", ok + "[[processes]]\npid = 1\n  colour = 3\n", "line 4, column 3: unknown key \"processes.colour\""},
		{"no TOML", ok + "[[processes]\n", "line 2"},
		{"wrong type", ok + "seed = \"x\"\n", "line 2"},
		{"unknown guard", ok + "[[processes]]\nguards = [{code = \"x\"}]\n", "unknown guard"},
		{"unknown arch", ok + "[[processes]]\narch = \"mips\"\n", "unknown arch"},
		{"negative pid", ok + "[[processes]]\npid = -1\n", "out of range"},
		{"unknown effect", ok + "[[faults]]\ndo = \"explode\"\n", "unknown effect"},
		{"unknown op", ok + "[[faults]]\ndo = \"fail\"\nop = \"jump\"\n", "unknown op"},
		{"hook in a file", ok + "[[faults]]\ndo = \"hook\"\n", "hook needs"},
		{"unload without module", ok + "[[faults]]\ndo = \"unload\"\n", "needs a module"},
		{"enter without pc", ok + "[[faults]]\ndo = \"enter\"\n", "needs a pc"},
		{"too long a stack", ok + "[[processes]]\nthreads = [{stack = [" + strings.Repeat("0,", 9000) + "]}]\n", "words on its stack"},
		{"too large", ok + "#" + strings.Repeat("x", 1<<20), "bytes, more than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := sim.ParseScene([]byte(c.scene))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

func TestMachineRefuses(t *testing.T) {
	dll, err := os.ReadFile(demoDLL)
	if err != nil {
		t.Fatal(err)
	}
	fsys := fstest.MapFS{"demo.dll": {Data: dll}, "text": {Data: make([]byte, 4096)}, "cut.dll": {Data: dll[:len(dll)/8]}}
	for _, c := range []struct {
		name, says string
		p          sim.Process
	}{
		{"no such file", "file does not exist", sim.Process{Image: "none.dll"}},
		{"no PE image", "no MZ", sim.Process{Image: "text"}},
		{"a cut image", "", sim.Process{Image: "cut.dll"}},
		{"base that is taken", "taken", sim.Process{Modules: []sim.Module{{File: "demo.dll", Base: 0x10000000}, {File: "demo.dll", Name: "b", Base: 0x10001000}}}},
		{"misaligned base", "page-aligned", sim.Process{Modules: []sim.Module{{File: "demo.dll", Base: 0x10000010}}}},
		{"base outside", "outside", sim.Process{Modules: []sim.Module{{File: "demo.dll", Base: uint64(0xffff_8000_0000_0000)}}}},
		{"module twice", "mapped already", sim.Process{Modules: []sim.Module{{File: "demo.dll"}, {File: "demo.dll"}}}},
		{"unknown header", "unknown header", sim.Process{Modules: []sim.Module{{File: "demo.dll", Header: "x"}}}},
		{"word of no module", "no module", sim.Process{Threads: []sim.Thread{{PC: "x.dll!+1"}}}},
		{"word that is none", "neither", sim.Process{Threads: []sim.Thread{{PC: "here"}}}},
		{"word of a wrong type", "neither", sim.Process{Threads: []sim.Thread{{PC: 1.5}}}},
		{"unknown register", "no register", sim.Process{Threads: []sim.Thread{{Regs: map[string]any{"rsp": 1}}}}},
		{"thread twice", "twice", sim.Process{Threads: []sim.Thread{{ID: 5}, {ID: 5}}}},
		{"write and execute", "write and execute", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 4096, Prot: "rwx"}}}},
		{"unknown protection", "unknown protection", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 4096, Prot: "x"}}}},
		{"unknown kind", "unknown kind", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 4096, Kind: "x"}}}},
		{"words that do not fit", "do not fit", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 4096, Words: make([]any, 513)}}}},
		{"regions that overlap", "taken", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 8192}, {At: 0x11000, Size: 4096}}}},
		{"no full page", "page size", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: 100}}}},
		{"size that wraps around", "more than", sim.Process{Regions: []sim.Region{{At: 0x10000, Size: ^uint64(0xfff)}}}},
		{"pid twice", "there is one already", sim.Process{PID: 77}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 77}}}, fsys)
			if err != nil {
				t.Fatal(err)
			}
			_, err = m.Start(c.p)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
			if list, _ := m.List(context.Background()); len(list) != 1 {
				t.Errorf("%d processes after the refusal", len(list))
			}
		})
	}
	if _, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{Image: "demo.dll"}}}, nil); err == nil {
		t.Error("an image out of no file system is not refused")
	}
}

func FuzzScene(f *testing.F) {
	f.Add([]byte(fullScene))
	f.Add([]byte("format = \"hotpatchd-scene/1\"\n[[processes]]\nregions = [{at = \"0xfffffffffffff000\", size = 4096}]\n"))
	dll, err := os.ReadFile(demoDLL)
	if err != nil {
		f.Fatal(err)
	}
	files := fstest.MapFS{"demo.dll": {Data: dll}}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := sim.ParseScene(b)
		if err != nil {
			return
		}
		m, err := sim.New(s, files)
		if err != nil {
			return
		}
		list, err := m.List(context.Background())
		if err != nil {
			return // a fault of the scene
		}
		for _, i := range list {
			p, err := m.Open(context.Background(), i.ID)
			if err != nil {
				continue
			}
			regions, _ := p.Regions()
			for k, r := range regions {
				if r.Start >= r.End || k > 0 && r.Start < regions[k-1].End {
					t.Errorf("regions %v", regions)
				}
			}
			if fr, err := p.Freeze(context.Background()); err == nil {
				fr.Threads()
				fr.Thaw()
			}
			p.Close()
		}
	})
}

// TestImageHeader: the image as Windows shows it, all of it backed by the file.
func TestImageHeader(t *testing.T) {
	dll, err := os.ReadFile(demoDLL)
	if err != nil {
		t.Fatal(err)
	}
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 9,
		Modules: []sim.Module{{Name: "demo.dll", Path: `C:\acme\demo.dll`, Header: "image", Image: dll}}}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	sp, err := m.Module(9, "demo.dll")
	if err != nil {
		t.Fatal(err)
	}
	p := open(t, m, 9)
	// A protection that splits a mapping keeps the file offsets right.
	if err := p.Protect(sp.Start+0x2000, 0x1000, target.Read|target.Write); err != nil {
		t.Fatal(err)
	}
	regions, err := p.Regions()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range regions {
		if sp.Contains(r.Start) && (r.Path != `C:\acme\demo.dll` || r.Kind != target.File || r.Offset != uint64(r.Start-sp.Start)) {
			t.Errorf("region %+v", r)
		}
	}
	b, err := m.Peek(9, sp.Start, 2)
	if err != nil || !bytes.Equal(b, []byte("MZ")) {
		t.Errorf("%q, %v", b, err)
	}
}
