package patcher

import (
	"context"
	"errors"
	"slices"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// unwinding is a simulated process with an unwinder: it notes each call and
// what stood at the entries and in the table's place then.
type unwinding struct {
	target.Process
	w     *world
	calls []registration
	err   error
}

type registration struct {
	add, table, base target.Addr
	count            int
	first            pe.Span // of the table's first record
	old              bool    // no entry was changed yet
}

func (u *unwinding) Register(add, table target.Addr, count int, base target.Addr) error {
	b, err := read(u, table, 12)
	must(u.w.t, err)
	u.calls = append(u.calls, registration{add, table, base, count,
		pe.Span{Begin: le32(b), End: le32(b[4:])}, u.w.entry("f") == 0})
	return u.err
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entry is where a victim's entry leads to, 0 while it is as it was.
func (w *world) entry(name string) target.Addr {
	w.t.Helper()
	i := slices.IndexFunc(victims, func(v victim) bool { return v.name == name })
	b, err := read(w.p, w.base.Base+target.Addr(victims[i].rva), 5)
	must(w.t, err)
	if string(b) == string(victims[i].body[:5]) {
		return 0
	}
	return w.base.Base
}

func unwindWorld(t *testing.T) (*world, *unwinding, *Patch) {
	w := bindWorld(t, library("ntdll.dll", nil, code("RtlAddFunctionTable", 6)))
	u := &unwinding{Process: w.p, w: w}
	patch := release{sequence: 1, names: []string{"f"}, change: func(f *forge, _ *pe.HotPatchSpec) {
		f.records = []record{{forgeText, forgeText + 6, 0}, {forgeText + 0x20, forgeText + 0x26, 0}}
	}, origin: func(o *Origin) { o.Unwind = "required" }}.patch(t, w.file)
	return w, u, patch
}

// The table is registered once for the life of an annex: after it is filled,
// before the first entry leads there.
func TestUnwindTableIsRegistered(t *testing.T) {
	w, u, patch := unwindWorld(t)
	images, err := Images(u)
	must(t, err)
	base := images[slices.IndexFunc(images, func(l Loaded) bool { return l.Name == "base.dll" })]
	for round := range 3 {
		plan, err := Prepare(u, base, patch)
		must(t, err)
		rec, err := w.x.Apply(context.Background(), u, plan)
		must(t, err)
		if w.entry("f") == 0 {
			t.Fatal("not patched")
		}
		if len(u.calls) != 1 {
			t.Fatalf("round %d: registered %d times", round, len(u.calls))
		}
		if rec, err = w.x.Undo(context.Background(), u, rec); err != nil || rec.State != Undone {
			t.Fatalf("undo: %s, %v", rec.State, err)
		}
		c := u.calls[0]
		if want := w.module("ntdll.dll") + forgeText + 6; c.add != want {
			t.Errorf("called %s, RtlAddFunctionTable is at %s", c.add, want)
		}
		if !c.old {
			t.Error("an entry was changed before")
		}
		if c.count != 2 || c.first != (pe.Span{Begin: forgeText, End: forgeText + 6}) || c.table-c.base > target.Addr(patch.image.SizeOfImage) {
			t.Errorf("registered %+v", c)
		}
		if c.base < rec.Annex || c.base >= rec.AnnexEnd {
			t.Errorf("records count from %s, the annex is %s to %s", c.base, rec.Annex, rec.AnnexEnd)
		}
	}
}

// Without the table in force no entry is changed, and it is tried again.
func TestUnwindTableRefused(t *testing.T) {
	w, u, patch := unwindWorld(t)
	u.err = target.ErrBusy
	plan, err := Prepare(u, w.base, patch)
	must(t, err)
	rec, err := w.x.Apply(context.Background(), u, plan)
	var r *Refusal
	if !errors.As(err, &r) || r.Reason != Failed || r.Code != "unwind" || rec.State != Staged {
		t.Fatalf("%s, %v", rec.State, err)
	}
	if w.entry("f") != 0 {
		t.Fatal("an entry was changed")
	}
	u.err = nil
	plan, err = Prepare(u, w.base, patch)
	must(t, err)
	if !plan.Reused {
		t.Error("a second annex")
	}
	if rec, err = w.x.Apply(context.Background(), u, plan); err != nil || rec.State != Applied || len(u.calls) != 2 {
		t.Fatalf("%s, %v after %d calls", rec.State, err, len(u.calls))
	}
}

// No ntdll, no registration: refused by name before any effect. A backend
// without an unwinder refuses only who needs one.
func TestUnwindWithoutMeans(t *testing.T) {
	w, _, patch := unwindWorld(t)
	_, err := Prepare(w.p, w.base, patch)
	if r := asRefusal(err); r == nil || r.Code != "unwind" {
		t.Errorf("without an unwinder: %v", err)
	}
	w = bindWorld(t)
	u := &unwinding{Process: w.p, w: w}
	_, err = Prepare(u, w.base, patch)
	if r := asRefusal(err); r == nil || r.Code != "import" {
		t.Errorf("without ntdll: %v", err)
	}
}

func asRefusal(err error) *Refusal {
	var r *Refusal
	errors.As(err, &r)
	return r
}
