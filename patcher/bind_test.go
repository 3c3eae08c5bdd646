package patcher

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// library forges a module.
func library(name string, imports []pe.Import, exports ...pe.Export) sim.Module {
	slices.SortFunc(exports, func(a, b pe.Export) int { return strings.Compare(a.Name, b.Name) })
	f := &forge{name: name, text: []byte{0xc3, 0x90, 0xc3, 0x90, 0xc3, 0x90, 0xc3, 0x90}, exports: exports, imports: imports, data: make([]byte, 8)}
	return sim.Module{File: name, Image: f.bytes()}
}

func code(name string, at uint32) pe.Export { return pe.Export{Name: name, RVA: forgeText + at} }

// bindWorld has the base import A from dep.dll, which imports from deep.dll;
// loose.dll is loaded, nobody says why.
func bindWorld(t *testing.T, more ...sim.Module) *world {
	return newWorld(t, func(p *sim.Process, f *forge) {
		f.imports = []pe.Import{{DLL: "dep.dll", Name: "A"}}
		p.Modules = append(append([]sim.Module{
			library("deep.dll", nil, code("D", 0), pe.Export{RVA: forgeText + 2}),
			library("dep.dll", []pe.Import{{DLL: "deep.dll", Name: "D"}}, code("A", 0), code("B", 2),
				pe.Export{Name: "ToDeep", Forward: "deep.D"}, pe.Export{Name: "ToOrdinal", Forward: "deep.#1"},
				pe.Export{Name: "ToLoose", Forward: "loose.L"}, pe.Export{Name: "ToNowhere", Forward: "absent.X"},
				pe.Export{Name: "ToNothing", Forward: "deep.Absent"}, pe.Export{Name: "ToSet", Forward: "api-ms-win-core-x-l1-1-0.X"},
				pe.Export{Name: "ToItself", Forward: "dep.ToItself"}, pe.Export{Name: "OddNumber", Forward: "deep.#1x"},
				pe.Export{Name: "ToDotted", Forward: "kernel.core.dll.K"}),
			library("loose.dll", nil, code("L", 0)),
			library("kernel32.dll", nil, code("K", 0), pe.Export{Name: "KToBase", Forward: "kernelbase.KB"}, pe.Export{Name: "KToLoose", Forward: "loose.L"}),
			library("kernelbase.dll", nil, code("KB", 4)),
		}, more...), p.Modules...)
	})
}

func (w *world) module(name string) target.Addr {
	w.t.Helper()
	span, err := w.m.Module(pid, name)
	if err != nil {
		w.t.Fatal(err)
	}
	return span.Start
}

// Ordinary imports are bound to modules that stay as long as the base, and to
// no others.
func TestBindImports(t *testing.T) {
	for _, c := range []struct {
		dll, name string
		ordinal   uint16
		to        string // "module+offset"; else what the refusal says
	}{
		{"dep.dll", "A", 0, "dep.dll+0"},
		{"DEP.DLL", "B", 0, "dep.dll+2"},
		{"deep.dll", "D", 0, "deep.dll+0"}, // at any depth
		{"deep.dll", "", 1, "deep.dll+2"},  // sorts before D
		{"deep.dll", "", 2, "deep.dll+0"},
		{"kernel32.dll", "K", 0, "kernel32.dll+0"},
		{"kernelbase.dll", "KB", 0, "kernelbase.dll+4"},
		{"base.dll", "f", 0, "base.dll+400"},
		{"dep.dll", "ToDeep", 0, "deep.dll+0"},
		{"dep.dll", "ToOrdinal", 0, "deep.dll+2"},
		{"kernel32.dll", "KToBase", 0, "kernelbase.dll+4"},

		{"loose.dll", "L", 0, "could be unloaded before base.dll"},
		{"dep.dll", "ToLoose", 0, "loose.dll could be unloaded before base.dll"},
		{"kernel32.dll", "KToLoose", 0, "loose.dll could be unloaded before base.dll"},
		{"absent.dll", "X", 0, "has not loaded absent.dll"},
		{"dep.dll", "ToNowhere", 0, "has not loaded absent.dll"},
		{"dep.dll", "Absent", 0, "exports no such symbol"},
		{"dep.dll", "ToNothing", 0, "exports no such symbol"},
		{"dep.dll", "", 99, "exports no such symbol"},
		{"dep.dll", "ToItself", 0, "forwarded more than"},
		{"dep.dll", "OddNumber", 0, "makes no sense"},
		{"dep.dll", "ToDotted", 0, "has not loaded kernel.core.dll"},
		{"dep.dll", "ToSet", 0, "an API set and needs"},
		{"api-ms-win-core-x-l1-1-0.dll", "X", 0, "an API set and needs"},
		{"EXT-ms-win-x-l1-1-0.dll", "X", 0, "an API set and needs"},
	} {
		t.Run(fmt.Sprintf("%s!%s%d", c.dll, c.name, c.ordinal), func(t *testing.T) {
			w := bindWorld(t)
			p := release{sequence: 1, names: []string{"f"}, change: func(dll *forge, _ *pe.HotPatchSpec) {
				dll.imports = []pe.Import{{DLL: c.dll, Name: c.name, Ordinal: c.ordinal}}
			}}.patch(t, w.file)
			plan, err := Prepare(w.p, w.base, p)
			if module, off, ok := strings.Cut(c.to, "+"); ok {
				if err != nil {
					t.Fatal(err)
				}
				var o uint64
				fmt.Sscanf(off, "%x", &o)
				if want := uint64(w.module(module)) + forgeText + o; len(plan.Binds) != 1 || plan.Binds[0].Value != want || plan.Binds[0].Kind != "import" {
					t.Errorf("%+v, want %x", plan.Binds, want)
				}
				if _, err := w.x.Apply(t.Context(), w.p, plan); err != nil {
					t.Fatal(err)
				}
				b, err := w.m.Peek(pid, plan.Annex+target.Addr(plan.headRoom())+forgeSlots, 8)
				if want := cat(plan.Binds[0].Value); err != nil || string(b) != string(want) {
					t.Errorf("the slot holds % x, want % x (%v)", b, want, err)
				}
				w.sound()
				return
			}
			if r := refusal(t, err, Blocked, "import"); !strings.Contains(r.Text, c.to) || !strings.Contains(r.Text, c.dll) {
				t.Errorf("%q, want %q", r.Text, c.to)
			}
			if w.m.Count(sim.OpAlloc)+w.m.Count(sim.OpWrite) > 0 {
				t.Error("something was changed")
			}
		})
	}
}

// Of two modules by one name it cannot be told which one stays.
func TestBindAmbiguous(t *testing.T) {
	second := library("dep.dll", nil, code("A", 0))
	second.Name = "second"
	w := bindWorld(t, second)
	p := release{sequence: 1, names: []string{"f"}, change: func(dll *forge, _ *pe.HotPatchSpec) {
		dll.imports = []pe.Import{{DLL: "dep.dll", Name: "A"}}
	}}.patch(t, w.file)
	if r := refusal(t, errorOf(Prepare(w.p, w.base, p)), Blocked, "import"); !strings.Contains(r.Text, "more than one dep.dll") {
		t.Error(r)
	}
}

func errorOf[T any](_ T, err error) error { return err }

// Delayed imports of the hotpatch image would need code of the base's loader.
func TestBindDelayImport(t *testing.T) {
	w := bindWorld(t)
	p := w.patch(1, "f")
	b := binder{Look(t.Context(), w.p), w.base}
	if binds, err := b.bind(p); err != nil || len(binds) != 0 {
		t.Fatalf("%v, %v", binds, err)
	}
	dll := &forge{text: []byte{0xc3}, data: make([]byte, 64)}
	delayed(dll, "dep.dll", "A")
	p2 := &Patch{Origin: p.Origin, Functions: p.Functions, image: dll.image(t)}
	_, err := b.bind(p2)
	if r := refusal(t, err, Blocked, "import"); !strings.Contains(r.Text, "delay import") {
		t.Error(r)
	}
}

// delayed gives an image one delay import: attributes 1, name, handle, slots, lookup.
func delayed(f *forge, dll, name string) {
	f.rdata = lay(nil, 0, uint32(1), uint32(forgeRData+0x80), uint32(0), uint32(forgeData), uint32(forgeRData+0x40), make([]byte, 44))
	f.rdata = lay(f.rdata, 0x40, uint64(forgeRData+0x90), uint64(0))
	f.rdata = lay(f.rdata, 0x80, dll)
	f.rdata = lay(f.rdata, 0x90, uint16(0), name)
	f.dirs = map[int]pe.Directory{13: {RVA: forgeRData, Size: 64}}
}

// What the base imports delayed may go away before it.
func TestBindBehindDelayImport(t *testing.T) {
	w := newWorld(t, func(p *sim.Process, f *forge) {
		delayed(f, "loose.dll", "L")
		p.Modules = append([]sim.Module{library("loose.dll", nil, code("L", 0))}, p.Modules...)
	})
	p := release{sequence: 1, names: []string{"f"}, change: func(dll *forge, _ *pe.HotPatchSpec) {
		dll.imports = []pe.Import{{DLL: "loose.dll", Name: "L"}}
	}}.patch(t, w.file)
	if r := refusal(t, errorOf(Prepare(w.p, w.base, p)), Blocked, "import"); !strings.Contains(r.Text, "could be unloaded") {
		t.Error(r)
	}
}

// What is shared with the base is what its slots hold, once they hold something.
func TestBindRecords(t *testing.T) {
	indirect := func(slot uint32) func(dll *forge, spec *pe.HotPatchSpec) {
		return func(dll *forge, spec *pe.HotPatchSpec) {
			spec.Inverse = append(spec.Inverse, pe.HotPatchRecord{Type: pe.HotPatchIndirect, Place: forgeData, Target: slot},
				pe.HotPatchRecord{Type: pe.HotPatchAbsolute, Place: forgeData + 8, Target: 0x1234})
		}
	}
	w := bindWorld(t)
	if err := w.p.Alloc(0x10000, 0x4000, target.Read); err != nil {
		t.Fatal(err) // low memory, where RVAs could be addresses
	}
	p := release{sequence: 1, names: []string{"f"}, change: indirect(forgeSlots)}.patch(t, w.file)
	plan, err := Prepare(w.p, w.base, p)
	if err != nil {
		t.Fatal(err)
	}
	if v := uint64(w.module("dep.dll")) + forgeText; len(plan.Binds) != 2 || plan.Binds[0].Value != v || plan.Binds[1].Value != uint64(w.base.Base)+0x1234 {
		t.Errorf("%+v, want %x and base+1234", plan.Binds, v)
	}
	for _, v := range []uint64{0, 0xc123, 0x10123, 0x10, 1 << 62, uint64(w.base.Base) - 16} {
		if err := w.m.Poke(pid, w.base.Base+forgeSlots, cat(v)); err != nil {
			t.Fatal(err)
		}
		_, err := Prepare(w.p, w.base, p)
		if r := refusal(t, err, Blocked, "import"); r.Remedy != Wait || !strings.Contains(r.Text, "not bound yet") {
			t.Errorf("slot holds %x: %v", v, r)
		}
	}
	p = release{sequence: 1, names: []string{"f"}, change: indirect(0x7ffe0000)}.patch(t, w.file)
	refusal(t, errorOf(Prepare(w.p, w.base, p)), Blocked, "record")
	p = release{sequence: 1, names: []string{"f"}, change: indirect(w.base.Size - 7)}.patch(t, w.file)
	refusal(t, errorOf(Prepare(w.p, w.base, p)), Blocked, "record")
}

// An annex serves again only with the bindings it would get now.
func TestReuseNeedsSameBindings(t *testing.T) {
	w := bindWorld(t)
	p := release{sequence: 1, names: []string{"f"}, change: func(dll *forge, spec *pe.HotPatchSpec) {
		spec.Inverse = []pe.HotPatchRecord{{Type: pe.HotPatchIndirect, Place: forgeData, Target: forgeSlots}}
	}}.patch(t, w.file)
	first := w.undo(w.apply(p))
	if plan := w.prepare(p); !plan.Reused || plan.Annex != first.Annex {
		t.Errorf("reused %v", plan.Reused)
	}
	// The base was loaded anew, and what it imports lies elsewhere now.
	if err := w.m.Poke(pid, w.base.Base+forgeSlots, cat(uint64(w.module("loose.dll")+forgeText))); err != nil {
		t.Fatal(err)
	}
	plan := w.prepare(p)
	if plan.Reused || plan.Annex == first.Annex {
		t.Errorf("an annex bound to what was before is used again")
	}
	if _, err := w.x.Apply(t.Context(), w.p, plan); err != nil || w.all() != "1bbb" {
		t.Errorf("%v, %s", err, w.all())
	}
	w.sound()
}

// Nor with other code, constants or protections than it was given.
func TestReuseNeedsWhatWasLaid(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(w *world, plan *Plan)
	}{
		{"code", func(w *world, x *Plan) { w.poke(x.Annex+target.Addr(x.headRoom())+forgeText, []byte{0xcc}) }},
		{"constants", func(w *world, x *Plan) { w.poke(x.Annex+target.Addr(x.headRoom())+forgeRData, []byte("x")) }},
		{"slots", func(w *world, x *Plan) { w.poke(x.Sites[0].Slot+4, []byte{1}) }},
		{"protection", func(w *world, x *Plan) {
			if err := w.p.Protect(x.parts[1].Start, 4096, target.Read|target.Write); err != nil {
				w.t.Fatal(err)
			}
		}},
		{"part", func(w *world, x *Plan) {
			last := x.parts[len(x.parts)-1]
			if err := w.p.Free(last.Start, uint64(last.End-last.Start)); err != nil {
				w.t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			p := w.patch(1, "f", "g")
			plan := w.prepare(p)
			rec, err := w.x.Apply(t.Context(), w.p, plan)
			if err != nil {
				t.Fatal(err)
			}
			w.undo(rec)
			c.spoil(w, plan)
			again := w.prepare(p)
			if again.Reused {
				t.Fatal("used again")
			}
			if _, err := w.x.Apply(t.Context(), w.p, again); err != nil || w.all() != "11bb" {
				t.Errorf("%v, %s", err, w.all())
			}
			w.sound()
		})
	}
}
