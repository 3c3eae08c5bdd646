package patcher_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sort"
	"testing"
	"time"

	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// live opens a running host with the real Linux backend.
func live(t testing.TB, pid int) target.Process {
	t.Helper()
	b, err := ptrace.New()
	if err != nil {
		hosttest.Need(t, "ptrace: %v", err)
	}
	return openLive(t, b, pid)
}

func openLive(t testing.TB, b target.Backend, pid int) target.Process {
	t.Helper()
	list, err := b.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range list {
		if info.PID == pid {
			p, err := b.Open(context.Background(), info.ID)
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

func imageAt(t testing.TB, p target.Process, base uint64) patcher.Loaded {
	t.Helper()
	images, err := patcher.Images(p)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(images, func(l patcher.Loaded) bool { return uint64(l.Base) == base })
	if i < 0 {
		t.Fatalf("no image at %x among %d", base, len(images))
	}
	return images[i]
}

// cycle applies and takes out a patch once.
func cycle(t testing.TB, x *patcher.Patcher, p target.Process, base patcher.Loaded, patch *patcher.Patch, between func()) (apply, undo time.Duration) {
	t.Helper()
	plan, err := patcher.Prepare(p, base, patch)
	if err != nil {
		t.Fatalf("prepare: %v", err)
	}
	var rec patcher.Record
	for {
		rec, err = x.Apply(context.Background(), p, plan)
		var r *patcher.Refusal
		if err == nil || !errors.As(err, &r) || r.Reason != patcher.Busy {
			break
		}
		if plan, err = patcher.Prepare(p, base, patch); err != nil {
			t.Fatalf("prepare after busy: %v", err)
		}
	}
	if err != nil {
		t.Fatalf("apply: %v", err)
	}
	apply = rec.Pause
	between()
	for {
		rec, err = x.Undo(context.Background(), p, rec)
		var r *patcher.Refusal
		if err == nil || !errors.As(err, &r) || r.Reason != patcher.Busy {
			break
		}
	}
	if err != nil || rec.State != patcher.Undone {
		t.Fatalf("undo: %s, %v", rec.State, err)
	}
	return apply, rec.Pause
}

// Real images of two compilers, each with internal functions, globals and
// imports, at random bases, with both ways of mapping the headers.
func TestLiveImages(t *testing.T) {
	for _, c := range []struct{ image, hotpatch string }{
		{"mingw/app.dll", "mingw/app-ref-1.dll"},
		{"mingw/app.dll", "mingw/app-import-1.dll"},
		{"mingw/app.dll", "mingw/app-copy-1.dll"},
		{"clang/app.dll", "clang/app-ref-1.dll"},
		{"clang/app.dll", "clang/app-import-1.dll"},
		{"plain/app.dll", "plain/app-1.dll"},
	} {
		for _, mapping := range []string{"file", "anon"} {
			t.Run(c.hotpatch+"/"+mapping, func(t *testing.T) {
				h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, c.image), Call: "vuln", Arg: 0, Allow: []int{42, 43}, Map: mapping, Spin: 2, Sleep: 2, Block: 2})
				p := live(t, h.PID)
				base := imageAt(t, p, h.Base)
				if v := h.Value(); v != 42 {
					t.Fatalf("before: %d", v)
				}
				x := &patcher.Patcher{}
				cycle(t, x, p, base, patchOf(t, c.image, c.hotpatch), func() {
					if v := h.Value(); v != 43 {
						t.Errorf("patched: %d, want 43", v)
					}
					h.Runs()
				})
				if v := h.Value(); v != 42 {
					t.Errorf("after: %d, want 42", v)
				}
				h.Healthy()
			})
		}
	}
}

// Under load: spinning, sleeping and blocked threads, 500 times in and out.
func TestLiveUnderLoad(t *testing.T) {
	cycles := 500
	if testing.Short() {
		cycles = 50
	}
	for _, c := range []struct{ image, hotpatch string }{
		{"mingw/app.dll", "mingw/app-ref-1.dll"},
		{"clang/app.dll", "clang/app-ref-1.dll"},
	} {
		t.Run(c.hotpatch, func(t *testing.T) {
			h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, c.image), Call: "vuln", Allow: []int{42, 43}, Spin: 2, Sleep: 8, Block: 4})
			p := live(t, h.PID)
			base := imageAt(t, p, h.Base)
			patch := patchOf(t, c.image, c.hotpatch)
			x := &patcher.Patcher{}
			var pauses []time.Duration
			for i := range cycles {
				a, u := cycle(t, x, p, base, patch, func() {
					if v := h.Value(); v != 43 {
						t.Fatalf("cycle %d: patched value %d", i, v)
					}
				})
				if v := h.Value(); v != 42 {
					t.Fatalf("cycle %d: undone value %d", i, v)
				}
				pauses = append(pauses, a, u)
			}
			h.Runs()
			h.Healthy()
			s := h.Stats()
			if s.Wrong != 0 || s.Faults != 0 {
				t.Errorf("%d wrong values, %d faults: %s", s.Wrong, s.Faults, s.Example)
			}
			sort.Slice(pauses, func(i, j int) bool { return pauses[i] < pauses[j] })
			t.Logf("%d cycles, %d calls, pause p50 %v, p99 %v", cycles, s.Calls, pauses[len(pauses)/2], pauses[len(pauses)*99/100])
		})
	}
}

// A fork child keeps the patched code: it is adopted from memory alone, and its
// undo does not reach the parent.
func TestLiveForkIsAdopted(t *testing.T) {
	h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, "mingw/app.dll"), Call: "vuln", Allow: []int{42, 43}, Spin: 1, Sleep: 1})
	patch := patchOf(t, "mingw/app.dll", "mingw/app-ref-1.dll")
	p := live(t, h.PID)
	x := &patcher.Patcher{}
	cycle(t, x, p, imageAt(t, p, h.Base), patch, func() {
		child := h.Fork()
		if v := child.Value(); v != 43 {
			t.Fatalf("child: %d", v)
		}
		cp := live(t, child.PID)
		rec, err := x.Adopt(context.Background(), cp, imageAt(t, cp, child.Base), patch)
		if err != nil || rec.State != patcher.Applied {
			t.Fatalf("adopt: %s, %v", rec.State, err)
		}
		if rec, err = x.Undo(context.Background(), cp, rec); err != nil || rec.State != patcher.Undone {
			t.Fatalf("undo in the child: %s, %v", rec.State, err)
		}
		if v := child.Value(); v != 42 {
			t.Errorf("child after undo: %d", v)
		}
		if v := h.Value(); v != 43 {
			t.Errorf("the child's undo reached the parent: %d", v)
		}
		child.Exit()
	})
	h.Healthy()
}

// Sequence 2 replaces 1 in one freeze: no call ever sees the old code between.
func TestLiveSequenceReplaces(t *testing.T) {
	h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, "demo/demo.dll"), Call: "answer", Allow: []int{42, 43, 44}, Spin: 2})
	p := live(t, h.PID)
	x := &patcher.Patcher{}
	base := imageAt(t, p, h.Base)
	for _, step := range []struct {
		hotpatch string
		value    int
	}{{"demo/demo-1.dll", 43}, {"demo/demo-2.dll", 44}, {"demo/demo-1.dll", 43}} {
		plan, err := patcher.Prepare(p, base, patchOf(t, "demo/demo.dll", step.hotpatch))
		if err != nil {
			t.Fatalf("%s: %v", step.hotpatch, err)
		}
		rec, err := x.Apply(context.Background(), p, plan)
		if err != nil {
			t.Fatalf("%s: %v", step.hotpatch, err)
		}
		if v := h.Value(); v != step.value {
			t.Fatalf("%s: value %d, want %d", step.hotpatch, v, step.value)
		}
		if bad, err := patcher.Verify(p, rec); err != nil || len(bad) > 0 {
			t.Fatalf("%s: verify: %v, %v", step.hotpatch, bad, err)
		}
	}
	h.Healthy()
}

// What somebody else has put at the entry is named and left alone.
func TestLiveHookedBySomebodyElse(t *testing.T) {
	h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, "plain/app.dll"), Call: "vuln", Spin: 1})
	p := live(t, h.PID)
	h.Do("hook vuln")
	before := make([]byte, 16)
	if _, err := p.ReadAt(before, target.Addr(h.Entry())); err != nil {
		t.Fatal(err)
	}
	_, err := patcher.Prepare(p, imageAt(t, p, h.Base), patchOf(t, "plain/app.dll", "plain/app-1.dll"))
	var r *patcher.Refusal
	if !errors.As(err, &r) || r.Reason != patcher.Drifted || r.Code != "hooked" || len(r.Have) == 0 {
		t.Fatalf("prepare: %v", err)
	}
	after := make([]byte, 16)
	if _, err := p.ReadAt(after, target.Addr(h.Entry())); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the hook was changed (%v)", err)
	}
}
