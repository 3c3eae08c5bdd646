package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/release"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// Results of a check.
const (
	passed = "pass"
	failed = "fail"
	device = "device" // only a device can tell
)

// check is one answer about one image of a release.
type check struct {
	Image  string `json:"image"`
	Where  string `json:"where,omitempty"` // where the base was loaded, "" if that does not matter
	Check  string `json:"check"`
	Result string `json:"result"`
	Text   string `json:"text"`
}

// baseFile is a base image given by the author.
type baseFile struct {
	name     string
	data     []byte
	identity pe.Identity
	imports  []pe.Import
}

func readBases(names []string) ([]baseFile, error) {
	var list []baseFile
	for _, n := range names {
		b, err := readInput(n)
		if err != nil {
			return nil, err
		}
		im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", n, err)
		}
		f := baseFile{name: n, data: b}
		if f.identity, err = im.Identity(); err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", n, err)
		}
		if f.imports, err = im.Imports(); err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", n, err)
		}
		list = append(list, f)
	}
	return list, nil
}

// trial applies one image of a release to a simulated process and takes it out
// again, and tells of every check. It goes on after a failure as far as that makes sense.
type trial struct {
	release *release.Release
	n       int // index of the image
	bases   []baseFile
	where   string
	checks  []check
}

func (t *trial) say(name, result, format string, args ...any) bool {
	t.checks = append(t.checks, check{t.release.Images[t.n].Name, t.where, name, result, fmt.Sprintf(format, args...)})
	return result == passed
}

// verdict says pass, or fail with the error.
func (t *trial) verdict(name string, err error, format string, args ...any) bool {
	if err != nil {
		return t.say(name, failed, "%v", err)
	}
	return t.say(name, passed, format, args...)
}

// tryImage runs all checks of image n.
func tryImage(ctx context.Context, r *release.Release, n int, bases []baseFile) []check {
	t := &trial{release: r, n: n, bases: bases}
	base, err := t.findBase()
	if !t.verdict("base", err, "%s is the build the release names", base.name) {
		return t.checks
	}
	image := r.Images[n]
	patch, err := patcher.NewPatch(patcher.Origin{Product: r.Product, Release: r.ID, Sequence: r.Sequence, Image: image.Name,
		Base: image.Base, Consistency: r.Consistency, Unwind: release.UnwindNone}, r.ImageBytes(n))
	if err != nil {
		t.say("table", failed, "%v", err)
		return t.checks
	}
	t.say("table", passed, "sequence %d, %s", r.Sequence, plural(len(patch.Functions), "function", "functions"))
	if r.Unwind == release.UnwindRequired {
		t.say("unwind", device, "unwind tables must be registered in the process: a backend that cannot leaves it blocked")
	}
	for where, at := range map[string]uint64{"": image.Base.ImageBase, "relocated": 0} {
		t.where = where
		t.simulate(ctx, base, patch, at)
	}
	slices.SortStableFunc(t.checks, func(a, b check) int { return strings.Compare(a.Where, b.Where) })
	return t.checks
}

// findBase finds the file with the identity the release names. The checksum is
// not compared: signing changes it.
func (t *trial) findBase() (baseFile, error) {
	want := t.release.Images[t.n].Base
	for _, b := range t.bases {
		have := b.identity
		have.CheckSum, have.ImageBase = want.CheckSum, want.ImageBase
		if have == want {
			return b, nil
		}
	}
	if len(t.bases) == 0 {
		return baseFile{}, errors.New("no --base was given")
	}
	return baseFile{}, fmt.Errorf("no file given by --base, of %d, is the build the release names (stamp %x, text %.12s…)", len(t.bases), want.TimeDateStamp, want.TextSHA256)
}

// simulate loads the base into a new simulated process at an address (0: any
// other than its own) and goes through plan, busy thread, apply and rollback.
func (t *trial) simulate(ctx context.Context, base baseFile, patch *patcher.Patch, at uint64) {
	s, err := t.start(ctx, base, patch, at)
	if err != nil {
		t.say("simulation", failed, "%v", err)
		return
	}
	defer s.p.Close()
	s.run()
	t.verdict("invariants", s.m.Invariant(s.p.Info().PID), "no thread held or let go inside written bytes, no code unflushed, nothing torn")
}

func (t *trial) start(ctx context.Context, base baseFile, patch *patcher.Patch, at uint64) (*simulation, error) {
	machine, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 1}, nil)
	if err != nil {
		return nil, err
	}
	image := t.release.Images[t.n]
	modules := append(t.modules(base), sim.Module{Name: image.Name, Path: image.Name, Image: base.data, Base: at})
	id, err := machine.Start(sim.Process{Exe: "/usr/bin/trial", Arch: target.Arch(image.Arch), Modules: modules})
	if err != nil {
		return nil, fmt.Errorf("cannot load the base: %w", err)
	}
	span, err := machine.Module(id.PID, image.Name)
	if err != nil {
		return nil, err
	}
	p, err := machine.Open(ctx, id)
	if err != nil {
		return nil, err
	}
	x := &patcher.Patcher{Attempts: 1, Sleep: func(context.Context, time.Duration) error { return nil }}
	return &simulation{t: t, ctx: ctx, m: machine, p: p, base: span.Start, patch: patch, x: x}, nil
}

// modules stand in for what the base and the hotpatch image import: the other
// files given, else an image that exports what is asked for.
func (t *trial) modules(base baseFile) []sim.Module {
	var list []sim.Module
	wanted := map[string][]string{}
	fix, err := pe.Parse(bytes.NewReader(t.release.ImageBytes(t.n)), t.release.Images[t.n].Size)
	if err == nil {
		if imports, err := fix.Imports(); err == nil {
			for _, i := range append(imports, base.imports...) {
				wanted[strings.ToLower(i.DLL)] = append(wanted[strings.ToLower(i.DLL)], i.Name)
			}
		}
	}
	for _, b := range t.bases {
		if name := fileName(b.name); !bytes.Equal(b.data, base.data) && wanted[strings.ToLower(name)] != nil {
			list = append(list, sim.Module{Name: name, Path: name, Image: b.data})
			delete(wanted, strings.ToLower(name))
		}
	}
	names := make([]string, 0, len(wanted))
	for dll := range wanted {
		names = append(names, dll)
	}
	slices.Sort(names)
	for _, dll := range names {
		exports := slices.DeleteFunc(wanted[dll], func(s string) bool { return s == "" })
		list = append(list, sim.Module{Name: dll, Path: dll, Image: stubDLL(dll, t.release.Images[t.n].Base.Machine, exports)})
	}
	return list
}

// fileName is the last element of a path of either system.
func fileName(path string) string {
	return path[strings.LastIndexAny(path, `/\`)+1:]
}

// simulation is one process with the base in it.
type simulation struct {
	t     *trial
	ctx   context.Context
	m     *sim.Machine
	p     target.Process
	base  target.Addr
	patch *patcher.Patch
	x     *patcher.Patcher
}

func (s *simulation) prepare() (*patcher.Plan, error) {
	images, err := patcher.Images(s.p)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(images, func(l patcher.Loaded) bool { return l.Base == s.base })
	if i < 0 {
		return nil, errors.New("the base is not found in the simulated process")
	}
	return patcher.Prepare(s.p, images[i], s.patch)
}

func (s *simulation) run() {
	plan, err := s.prepare()
	if err != nil {
		s.t.say("plan", failed, "%v", err)
		return
	}
	kinds := map[string]int{}
	for _, site := range plan.Sites {
		kinds[site.Kind]++
	}
	var words []string
	for kind, n := range kinds {
		words = append(words, fmt.Sprintf("%d by %s", n, kind))
	}
	slices.Sort(words)
	s.t.say("plan", passed, "%s (%s), %s bound", plural(len(plan.Sites), "entry", "entries"), strings.Join(words, ", "), plural(len(plan.Binds), "slot", "slots"))
	before, err := s.code(plan)
	if err != nil {
		s.t.say("plan", failed, "%v", err)
		return
	}
	if plan = s.busy(plan, before); plan == nil {
		return
	}
	record, err := s.x.Apply(s.ctx, s.p, plan)
	if err == nil {
		err = s.applied(record)
	}
	if !s.t.verdict("apply", err, "every entry leads to its new function") {
		return
	}
	var already *patcher.AlreadyApplied
	if _, err := s.prepare(); !errors.As(err, &already) {
		s.t.say("again", failed, "a second plan should say that the release is in force, but: %v", err)
		return
	}
	s.t.say("again", passed, "a second plan finds the release in force")
	record, err = s.x.Undo(s.ctx, s.p, record)
	if err == nil && record.State != patcher.Undone {
		err = fmt.Errorf("the record is %s", record.State)
	}
	if err == nil {
		err = s.unchanged(plan, before)
	}
	s.t.verdict("rollback", err, "the code is as it was, byte for byte")
}

// busy puts a thread inside the first bytes of a function: nothing may be
// written then. It returns a fresh plan, nil if the check failed.
func (s *simulation) busy(plan *patcher.Plan, before []byte) *patcher.Plan {
	i := slices.IndexFunc(plan.Sites, func(x patcher.Site) bool { return len(x.Interior) > 0 })
	if i < 0 {
		s.t.say("busy", passed, "no entry has an inside where a thread could stand")
		return plan
	}
	site := plan.Sites[i]
	pid := s.p.Info().PID
	thread, err := s.m.StartThread(pid, sim.Thread{PC: site.Interior[0]})
	if err != nil {
		s.t.say("busy", failed, "%v", err)
		return nil
	}
	var refusal *patcher.Refusal
	_, err = s.x.Apply(s.ctx, s.p, plan)
	if !errors.As(err, &refusal) || refusal.Reason != patcher.Busy {
		s.t.say("busy", failed, "with a thread inside the first bytes of %s it should be busy, but: %v", site.Function, err)
		return nil
	}
	err = s.unchanged(plan, before)
	if err == nil {
		err = s.m.EndThread(pid, thread)
	}
	if err == nil {
		plan, err = s.prepare()
	}
	if !s.t.verdict("busy", err, "a thread inside the first bytes of %s is found, and nothing is written", site.Function) {
		return nil
	}
	return plan
}

func (s *simulation) applied(r patcher.Record) error {
	if r.State != patcher.Applied {
		return fmt.Errorf("the record is %s", r.State)
	}
	wrong, err := patcher.Verify(s.p, r)
	if err != nil {
		return err
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%s holds other bytes than were planned", wrong[0].Function)
	}
	for _, site := range r.Sites {
		got, err := s.m.Executes(s.p.Info().PID, s.base+target.Addr(site.RVA))
		if err != nil {
			return err
		}
		want, err := s.m.Executes(s.p.Info().PID, site.Target)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%s leads to %s, not to its new function at %s", site.Function, got, want)
		}
	}
	return nil
}

// code reads the base's pages that hold sites and pads.
func (s *simulation) code(plan *patcher.Plan) ([]byte, error) {
	var b []byte
	for _, site := range plan.Sites {
		part := make([]byte, site.Length)
		if _, err := s.p.ReadAt(part, s.base+target.Addr(site.RVA)); err != nil {
			return nil, err
		}
		b = append(b, part...)
	}
	return b, nil
}

func (s *simulation) unchanged(plan *patcher.Plan, before []byte) error {
	after, err := s.code(plan)
	if err != nil {
		return err
	}
	if !bytes.Equal(before, after) {
		return errors.New("the bytes of a function are not as they were")
	}
	return nil
}
