package patcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// victim is one function of the base image that worlds load.
type victim struct {
	name string
	rva  uint32
	body []byte
	kind string
}

// The functions of the base: a long jump over several instructions, a short
// jump into filler, a long jump behind a landing pad, a long jump over a
// relocated address.
var victims = []victim{
	{"f", 0x1400, plain, shapeLong},
	{"g", 0x1500, []byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0x90, 0x90, 0xc3}, shapeShort},
	{"h", 0x1600, append(bytes.Clone(endbr64), plain...), shapeLong},
	{"r", 0x1700, cat([]byte{0x48, 0xb8}, uint64(forgeBase+forgeData), []byte{0x8b, 0x00, 0xc3}), shapeLong},
}

const pid = 100

// baseImage forges the base.
func baseImage() *forge {
	f := &forge{name: "base.dll", rsds: true, text: bytes.Repeat([]byte{0xcc}, 0x2000), data: make([]byte, 64)}
	for _, v := range victims {
		copy(f.text[v.rva-forgeText:], v.body)
		if v.kind == shapeLong {
			copy(f.text[v.rva-forgeText-2:], []byte{0x90, 0xc3}) // no filler
		}
		f.exports = append(f.exports, pe.Export{Name: v.name, RVA: v.rva})
	}
	f.relocs = []uint32{0x1702}
	return f
}

func parseFile(t testing.TB, b []byte) *pe.Image {
	t.Helper()
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// release is what a patch is made of.
type release struct {
	id       string
	product  string
	sequence uint32
	names    []string // of victims, in this order
	change   func(dll *forge, spec *pe.HotPatchSpec)
	origin   func(*Origin)
}

// patch makes a verified hotpatch image for a base.
func (r release) patch(t testing.TB, base []byte) *Patch {
	t.Helper()
	im := parseFile(t, base)
	id, err := im.Identity()
	if err != nil {
		t.Fatal(err)
	}
	dll := &forge{text: bytes.Repeat([]byte{0xcc}, 0x400), name: "patch.dll", data: make([]byte, 64), rdata: []byte("constant")}
	spec := pe.HotPatchSpec{Sequence: r.sequence, BaseTimeDateStamp: im.TimeDateStamp, BaseCheckSum: im.CheckSum, Machine: im.Machine}
	for i, name := range r.names {
		k := slices.IndexFunc(victims, func(v victim) bool { return v.name == name })
		v := victims[k]
		to := uint32(forgeText + 0x20*i)
		copy(dll.text[to-forgeText:], cat([]byte{0xb8}, uint32(r.sequence)<<8|uint32(k), []byte{0xc3}))
		x := pe.FunctionExtra{Length: uint32(len(v.body)), SHA256: sha256.Sum256(v.body)}
		copy(x.Original[:], v.body)
		spec.Functions = append(spec.Functions, pe.FunctionSpec{Place: v.rva, Target: to, Extra: x})
	}
	if r.change != nil {
		r.change(dll, &spec)
	}
	file, err := pe.AddHotPatch(dll.bytes(), spec)
	if err != nil {
		t.Fatal(err)
	}
	o := Origin{Product: r.product, Release: r.id, Sequence: r.sequence, Image: "base.dll", Base: id, Consistency: "entry", Unwind: "none"}
	if o.Product == "" {
		o.Product = "test"
	}
	if o.Release == "" {
		o.Release = fmt.Sprintf("%s-%d", o.Product, r.sequence)
	}
	if r.origin != nil {
		r.origin(&o)
	}
	p, err := NewPatch(o, file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// world is a simulated machine with one process that has loaded the base, and
// a patcher that journals into it.
type world struct {
	t       testing.TB
	m       *sim.Machine
	file    []byte // of the base
	p       target.Process
	base    Loaded
	x       *Patcher
	log     []State // journaled
	durable Record  // journaled last
	refuse  int     // the journal fails at this call, from 1
	sleeps  int
	slept   func() // while waiting between attempts
}

func newWorld(t testing.TB, change ...func(*sim.Process, *forge)) *world {
	t.Helper()
	f := baseImage()
	spec := sim.Process{PID: pid, Modules: []sim.Module{{File: "base.dll"}}}
	for _, c := range change {
		c(&spec, f)
	}
	w := &world{t: t, file: f.bytes()}
	for i := range spec.Modules {
		if spec.Modules[i].File == "base.dll" {
			spec.Modules[i].Image = w.file
		}
	}
	var err error
	if w.m, err = sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 5, Processes: []sim.Process{spec}}, nil); err != nil {
		t.Fatal(err)
	}
	w.x = &Patcher{Attempts: 3, Sleep: func(context.Context, time.Duration) error {
		w.sleeps++
		if w.slept != nil {
			w.slept()
		}
		return nil
	}, Journal: func(r Record) error {
		w.log = append(w.log, r.State)
		if len(w.log) == w.refuse {
			return errors.New("disk full")
		}
		w.durable = r
		return nil
	}}
	w.open()
	return w
}

// open takes hold of the process, anew after a death of ours.
func (w *world) open() {
	w.t.Helper()
	list, err := w.m.List(context.Background())
	if err != nil || len(list) == 0 {
		w.t.Fatalf("list: %v, %d processes", err, len(list))
	}
	if w.p, err = w.m.Open(context.Background(), list[0].ID); err != nil {
		w.t.Fatal(err)
	}
	images, err := Images(w.p)
	if err != nil {
		w.t.Fatalf("images: %v", err)
	}
	i := slices.IndexFunc(images, func(l Loaded) bool { return l.Name == "base.dll" })
	if i < 0 {
		w.t.Fatalf("the base is not among %d images", len(images))
	}
	w.base = images[i]
}

func (w *world) patch(sequence uint32, names ...string) *Patch {
	w.t.Helper()
	key := fmt.Sprint(sequence, names, sha256.Sum256(w.file))
	if p, ok := patches.Load(key); ok {
		return p.(*Patch)
	}
	p := release{sequence: sequence, names: names}.patch(w.t, w.file)
	patches.Store(key, p)
	return p
}

// patches are those made already: sweeps want the same again and again.
var patches sync.Map

func (w *world) prepare(p *Patch) *Plan {
	w.t.Helper()
	plan, err := Prepare(w.p, w.base, p)
	if err != nil {
		w.t.Fatalf("prepare: %v", err)
	}
	return plan
}

func (w *world) apply(p *Patch) Record {
	w.t.Helper()
	rec, err := w.x.Apply(context.Background(), w.p, w.prepare(p))
	if err != nil || rec.State != Applied {
		w.t.Fatalf("apply: %s, %v", rec.State, err)
	}
	return rec
}

func (w *world) undo(rec Record) Record {
	w.t.Helper()
	rec, err := w.x.Undo(context.Background(), w.p, rec)
	if err != nil || rec.State != Undone {
		w.t.Fatalf("undo: %s, %v", rec.State, err)
	}
	return rec
}

// at is where a victim's code is executed: "base", or the sequence of the
// hotpatch image that it leads into.
func (w *world) runs(name string) string {
	w.t.Helper()
	i := slices.IndexFunc(victims, func(v victim) bool { return v.name == name })
	entry := w.base.Base + target.Addr(victims[i].rva)
	at, err := w.m.Executes(pid, entry)
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	if at == entry {
		return "base"
	}
	b, err := w.m.Fetch(pid, at, 5)
	if err != nil || b[0] != 0xb8 || int(b[1]) != i {
		w.t.Fatalf("%s leads to %s, where % x stands (%v)", name, at, b, err)
	}
	return fmt.Sprint(b[2])
}

// all is where each victim's code is executed, in one word: "11b2".
func (w *world) all() string {
	s := ""
	for _, v := range victims {
		s += w.runs(v.name)[:1]
	}
	return s
}

// sound checks what must hold whatever happened.
func (w *world) sound() {
	w.t.Helper()
	if err := w.m.Invariant(pid); err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			// An annex that was never finished may be stale: nothing leads there.
			if _, at, ok := strings.Cut(line, "cache is stale at "); ok {
				if n, err := strconv.ParseUint(at, 16, 64); err == nil && (target.Addr(n) < w.base.Base || target.Addr(n) >= w.base.End()) {
					continue
				}
			}
			w.t.Errorf("invariant: %s", line)
		}
	}
	if w.m.Stopped(pid) {
		w.t.Error("threads are held")
	}
}

// refusal demands a Refusal.
func refusal(t testing.TB, err error, reason Reason, code string) *Refusal {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) {
		t.Fatalf("%v, want %s %q", err, reason, code)
	}
	if r.Reason != reason || code != "" && r.Code != code {
		t.Fatalf("%s %q (%v), want %s %q", r.Reason, r.Code, err, reason, code)
	}
	return r
}

// The world itself: shapes are as its functions say, and a patch goes in, is
// replaced, goes back and out again.
func TestWorld(t *testing.T) {
	w := newWorld(t)
	plan := w.prepare(w.patch(1, "f", "g", "h", "r"))
	for i, v := range victims {
		if s := plan.Sites[i]; s.Kind != v.kind {
			t.Errorf("%s: %s", v.name, s.Kind)
		}
	}
	if w.all() != "bbbb" {
		t.Fatal(w.all())
	}
	w.apply(w.patch(1, "f", "g", "h", "r"))
	if w.all() != "1111" {
		t.Fatal(w.all())
	}
	rec := w.apply(w.patch(2, "f", "g"))
	if w.all() != "22bb" {
		t.Fatalf("sequence 2 names f and g alone: %s", w.all())
	}
	rec = w.apply(w.patch(3, "f", "g", "h", "r"))
	if w.all() != "3333" {
		t.Fatal(w.all())
	}
	w.undo(rec)
	if w.all() != "bbbb" {
		t.Fatal(w.all())
	}
	w.apply(w.patch(2, "g", "h"))
	if w.all() != "b22b" {
		t.Fatal(w.all())
	}
	w.sound()
}
