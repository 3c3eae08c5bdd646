package patcher_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

const fixtures = "../testdata/fixtures/"

// rig is a simulated machine with one process that has loaded one base image.
type rig struct {
	t    *testing.T
	m    *sim.Machine
	p    target.Process
	base patcher.Loaded
	file *pe.Image
	x    *patcher.Patcher
	log  []patcher.State
	last patcher.Record
}

func newRig(t *testing.T, image string, change ...func(*sim.Process)) *rig {
	t.Helper()
	b := readFile(t, image)
	proc := sim.Process{PID: 100, Modules: []sim.Module{{File: filepath.Base(image), Image: b}}}
	for _, f := range change {
		f(&proc)
	}
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 7, Processes: []sim.Process{proc}}, os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, m: m, file: im}
	r.x = &patcher.Patcher{Attempts: 2, Journal: func(rec patcher.Record) error {
		r.log, r.last = append(r.log, rec.State), rec
		return nil
	}}
	r.open()
	t.Cleanup(func() {
		if err := m.Invariant(100); err != nil && !errors.Is(err, target.ErrGone) {
			t.Errorf("invariant: %v", err)
		}
	})
	return r
}

func (r *rig) open() {
	r.t.Helper()
	list, err := r.m.List(context.Background())
	if err != nil || len(list) == 0 {
		r.t.Fatalf("list: %v, %d processes", err, len(list))
	}
	if r.p, err = r.m.Open(context.Background(), list[0].ID); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { r.p.Close() })
	images, err := patcher.Images(r.p)
	if err != nil || len(images) != 1 {
		r.t.Fatalf("images: %v, %d of them", err, len(images))
	}
	r.base = images[0]
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(fixtures + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// patchOf reads a hotpatch image of the fixtures as a release would carry it.
func patchOf(t testing.TB, image, hotpatch string) *patcher.Patch {
	t.Helper()
	file := readFile(t, hotpatch)
	var base struct {
		Format, Name, Unwind string
		pe.Identity
	}
	if err := json.Unmarshal(readFile(t, hotpatch+".base.json"), &base); err != nil {
		t.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	info, err := im.HotPatch()
	if err != nil {
		t.Fatal(err)
	}
	p, err := patcher.NewPatch(patcher.Origin{Product: "test", Release: "T-" + filepath.Base(hotpatch), Sequence: info.SequenceNumber,
		Image: filepath.Base(image), Base: base.Identity, Consistency: "entry", Unwind: "none"}, file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// executes tells where a call of an exported function ends up.
func (r *rig) executes(name string) target.Addr {
	r.t.Helper()
	exports, err := r.file.Exports()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range exports {
		if e.Name == name {
			at, err := r.m.Executes(100, r.base.Base+target.Addr(e.RVA))
			if err != nil {
				r.t.Fatal(err)
			}
			return at
		}
	}
	r.t.Fatalf("no export %s", name)
	return 0
}

func (r *rig) isOld(name string) bool {
	at := r.executes(name)
	return at >= r.base.Base && at < r.base.End()
}

func (r *rig) apply(patch *patcher.Patch) patcher.Record {
	r.t.Helper()
	plan, err := patcher.Prepare(r.p, r.base, patch)
	if err != nil {
		r.t.Fatalf("prepare: %v", err)
	}
	rec, err := r.x.Apply(context.Background(), r.p, plan)
	if err != nil {
		r.t.Fatalf("apply: %v", err)
	}
	if rec.State != patcher.Applied {
		r.t.Fatalf("state %s after apply", rec.State)
	}
	return rec
}

func TestApplyAndUndo(t *testing.T) {
	for _, c := range []struct{ image, hotpatch, function string }{
		{"demo/demo.dll", "demo/demo-1.dll", "answer"},
		{"demo-clang/demo.dll", "demo-clang/demo-1.dll", "answer"},
		{"mingw/app.dll", "mingw/app-ref-1.dll", "vuln"},
		{"mingw/app.dll", "mingw/app-import-1.dll", "vuln"},
		{"mingw/app.dll", "mingw/app-copy-1.dll", "vuln"},
		{"clang/app.dll", "clang/app-ref-1.dll", "vuln"},
		{"clang/app.dll", "clang/app-import-1.dll", "vuln"},
		{"many/many.dll", "many/many-1.dll", "f42"},
	} {
		t.Run(c.hotpatch, func(t *testing.T) {
			r := newRig(t, c.image)
			if !r.isOld(c.function) {
				t.Fatal("not old before")
			}
			rec := r.apply(patchOf(t, c.image, c.hotpatch))
			if at := r.executes(c.function); at < rec.Annex || at >= rec.AnnexEnd {
				t.Fatalf("%s leads to %s, not into the annex at %s", c.function, at, rec.Annex)
			}
			_, err := patcher.Prepare(r.p, r.base, patchOf(t, c.image, c.hotpatch))
			var already *patcher.AlreadyApplied
			if !errors.As(err, &already) {
				t.Fatalf("prepare again: %v", err)
			}
			rec, err = r.x.Undo(context.Background(), r.p, rec)
			if err != nil || rec.State != patcher.Undone {
				t.Fatalf("undo: %s, %v", rec.State, err)
			}
			if !r.isOld(c.function) {
				t.Fatal("not old after undo")
			}
			again := r.apply(patchOf(t, c.image, c.hotpatch))
			if again.Annex != rec.Annex {
				t.Errorf("a second annex at %s, the first at %s was not used again", again.Annex, rec.Annex)
			}
		})
	}
}
