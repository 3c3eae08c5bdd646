package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// The fault sweep: while work is done on one process, operation 1, 2, 3, … goes
// wrong, or is the last one that this daemon does. Afterwards no process is
// harmed, all functions are old or all are new, and the records say which.

// work is one kind of work on a process that is brought from one release to another.
type work struct {
	name     string
	from, to string // "old" or the id of a release
	// begin is called under a running daemon, with the process as in from.
	begin func(context.Context, *control.Client) error
	// back brings the process to from again.
	back func(context.Context, *control.Client) error
}

func works() []work {
	hold := func(id string) func(context.Context, *control.Client) error {
		return func(ctx context.Context, c *control.Client) error {
			_, err := c.Hold(ctx, id, "")
			return err
		}
	}
	lift := func(id string) func(context.Context, *control.Client) error {
		return func(ctx context.Context, c *control.Client) error {
			_, err := c.ReleaseHold(ctx, id, "")
			return err
		}
	}
	return []work{
		{"apply", "old", "R1", lift("R1"), hold("R1")},
		{"undo", "R1", "old", hold("R1"), lift("R1")},
		{"replace", "R1", "R2", lift("R2"), hold("R2")},
		{"rollback", "R2", "R1", hold("R2"), lift("R2")},
	}
}

// stride is 1: every operation; a short run looks at some.
func stride() int {
	if testing.Short() {
		return 7
	}
	return 1
}

// sweepPID is the process that the sweeps work on.
const sweepPID = 100

// runsNow tells which release the process runs as a whole: sequence 1 has vuln and
// slow, sequence 2 vuln, recurse and parted.
func (r *rig) runsNow() (string, error) {
	found := map[string]string{}
	for _, f := range []string{"vuln", "slow", "recurse", "parted"} {
		w, err := r.where(sweepPID, "app.dll", f)
		if err != nil {
			return "", err
		}
		found[f] = w
	}
	for _, whole := range []map[string]string{
		{"vuln": "old", "slow": "old", "recurse": "old", "parted": "old"},
		{"vuln": "R1", "slow": "R1", "recurse": "old", "parted": "old"},
		{"vuln": "R2", "slow": "old", "recurse": "R2", "parted": "R2"},
	} {
		if fmt.Sprint(whole) == fmt.Sprint(found) {
			return whole["vuln"], nil
		}
	}
	return "", fmt.Errorf("a mix: %v", found)
}

// agree compares memory with what the daemon says of it: row, records, history.
func (r *rig) agree(want string) error {
	runs, err := r.runsNow()
	if err != nil {
		return err
	}
	if want != "" && runs != want {
		return fmt.Errorf("the process runs %s, wanted %s", runs, want)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	doc, err := r.life.client.Processes(ctx, control.ProcessQuery{PID: sweepPID})
	if err != nil {
		return err
	}
	for _, p := range doc.Processes {
		for _, im := range p.Images {
			says := "old"
			if im.State == control.Patched {
				says = im.Release
			}
			if says != runs {
				return fmt.Errorf("the process runs %s, and %s (%s: %s, %s) is said", runs, im.State, im.Release, im.Reason, im.Detail)
			}
		}
	}
	v, err := r.life.client.Verify(ctx)
	switch {
	case err != nil:
		return err
	case !v.OK:
		return fmt.Errorf("verify: %+v", v)
	case runs != "old" && v.Images != 1:
		return fmt.Errorf("the process runs %s, and %d images have a record", runs, v.Images)
	case runs == "old" && v.Images != 0:
		return fmt.Errorf("the process runs the original, and %d images have a record", v.Images)
	}
	return r.unharmed()
}

// sweepRig is a device with one process, in the state that a work begins with.
func sweepRig(t *testing.T, w work) *rig {
	t.Helper()
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 3, Processes: []sim.Process{{PID: sweepPID, Exe: "/opt/acme/acme-server",
		Modules: []sim.Module{{File: "kernel32.dll"}, {File: "mingw/app.dll"}}}}})
	// Passes come when something happens, so that operations can be counted.
	r.cfg.Backend.ScanEvery = longScan
	for n, id := range []string{"R1", "R2"} {
		err := r.publish(repository.PublishOptions{}, &release.Manifest{ID: id, Product: "app", Sequence: uint32(n + 1)}, image{fmt.Sprintf("mingw/app-ref-%d.dll", n+1)})
		if err != nil {
			t.Fatal(err)
		}
	}
	must(t, r.start())
	t.Cleanup(func() {
		if err := errors.Join(r.judge(), r.stop()); err != nil {
			t.Error(err)
		}
	})
	ctx := context.Background()
	if w.to != "R2" && w.from != "R2" {
		_, err := r.life.client.Hold(ctx, "R2", "")
		must(t, err)
	}
	must(t, w.back(ctx, r.life.client))
	_, err := r.life.client.Check(ctx)
	must(t, err)
	must(t, r.until(func() string { return said(r.agree(w.from)) }))
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func said(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// The daemon dies at every operation of every kind of work, in the middle of
// writes too, and starts again.
func TestDeathAtEveryOperation(t *testing.T) {
	for _, w := range works() {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			r := sweepRig(t, w)
			dead := 0
			for _, at := range []struct {
				op   sim.Op
				full bool
			}{{sim.OpAny, false}, {sim.OpWrite, true}} {
				for n := 1; ; n += stride() {
					died, err := r.dieIn(w, func() { r.dieAtOp(n, at.op, at.full) })
					if err != nil {
						t.Fatalf("death at %s operation %d (full %v): %v", at.op, n, at.full, err)
					}
					if !died {
						break
					}
					dead++
				}
			}
			t.Logf("died at %d operations", dead)
			if dead < 10/stride() {
				t.Errorf("only %d operations were swept", dead)
			}
		})
	}
}

// The same at every transaction of the state: just before it is on disk, and just after.
func TestDeathAtEveryTransaction(t *testing.T) {
	for _, w := range works() {
		t.Run(w.name, func(t *testing.T) {
			r := sweepRig(t, w)
			dead := 0
			for n := int64(1); ; n++ {
				died := false
				for _, after := range []int64{1, 0} {
					d, err := r.dieIn(w, func() { r.dieOnTx.Store(2*(r.updates.Load()+n) - after) })
					if err != nil {
						t.Fatalf("death at transaction %d (before it: %v): %v", n, after == 1, err)
					}
					died = died || d
				}
				if !died {
					break
				}
				dead++
			}
			t.Logf("died at %d transactions", dead)
			if dead < 3 {
				t.Errorf("only %d transactions were swept", dead)
			}
		})
	}
}

// dieIn has the daemon die somewhere in a work, starts it again and lets it
// finish; then it brings the process back to where the work begins. died is
// false if the work was done first.
func (r *rig) dieIn(w work, arm func()) (died bool, err error) {
	life := r.life
	ordered := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	arm()
	go func() { ordered <- w.begin(ctx, life.client) }()
	err = r.until(func() string {
		if r.isDead() {
			return ""
		}
		if runs, err := r.runsNow(); err == nil && runs == w.to && len(ordered) > 0 {
			return ""
		}
		return "neither dead nor done"
	})
	if err != nil {
		return false, err
	}
	died = r.isDead()
	r.m.ClearFaults()
	if died {
		err = r.kill()
	} else {
		err = r.stop()
	}
	<-ordered // whatever it says: a dead daemon answers nobody
	if err != nil {
		return died, err
	}
	r.coherent(sweepPID)
	if v := r.m.Violations(sweepPID); r.m.Stopped(sweepPID) || len(v) > 0 {
		return died, fmt.Errorf("while we are dead: held %v, %v", r.m.Stopped(sweepPID), v)
	}
	// Back again, nothing new allowed: only recovery, and words that take out.
	r.write("policy.toml", goodPolicy+"pause = true\n")
	if err := r.start(); err != nil {
		return died, err
	}
	if err := r.until(func() string { return said(r.agree("")) }); err != nil {
		return died, fmt.Errorf("after recovery: %w", err)
	}
	r.write("policy.toml", goodPolicy)
	r.life.agent.Reload()
	// The order may not have been heard: it is given again.
	if err := w.begin(ctx, r.life.client); err != nil {
		return died, err
	}
	if err := r.until(func() string { return said(r.agree(w.to)) }); err != nil {
		return died, fmt.Errorf("after the work went on: %w", err)
	}
	if err := w.back(ctx, r.life.client); err != nil {
		return died, err
	}
	if err := r.until(func() string { return said(r.agree(w.from)) }); err != nil {
		return died, fmt.Errorf("on the way back: %w", err)
	}
	return died, nil
}

// coherent lets the instruction cache of a process see what was written before
// we died, as x86-64 does by itself.
func (r *rig) coherent(pid int) {
	span, err := r.m.Module(pid, "app.dll")
	if err != nil {
		return
	}
	for at := span.Start; at < span.End; at += target.PageSize {
		if b, err := r.m.Peek(pid, at, target.PageSize); err == nil {
			_ = r.m.Poke(pid, at, b) // the same bytes
		}
	}
}

// Every operation fails once, in every way, and the work is done all the same;
// or it fails from there on, and nothing is half done.
func TestFaultAtEveryOperation(t *testing.T) {
	some := []sim.Fault{
		{Do: sim.Fail}, {Do: sim.Busy, Op: sim.OpFreeze}, {Do: sim.Taken, Op: sim.OpAlloc}, {Do: sim.Fail, Op: sim.OpThaw, Times: 2},
		{Do: sim.Short, Op: sim.OpWrite, Bytes: 1}, {Do: sim.Torn, Op: sim.OpWrite, Bytes: 1}, {Do: sim.Torn, Op: sim.OpWrite, Bytes: 3},
		{Do: sim.LieWrite, Op: sim.OpWrite},
	}
	all := append(some, sim.Fault{Do: sim.Deny}, sim.Fault{Do: sim.LieRead, Op: sim.OpRead}, sim.Fault{Do: sim.Short, Op: sim.OpRead}, sim.Fault{Do: sim.Fail, Times: 2})
	for _, w := range works() {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			swept, faults := 0, all
			if w.to == "R2" || w.from == "R2" {
				faults = some // the rest is as for sequence 1
			}
			for _, f := range faults {
				r := sweepRig(t, w)
				for n := 1; ; n += stride() {
					struck, err := r.faultIn(w, n, f)
					if err != nil {
						t.Fatalf("%s %s %d (times %d, bytes %d): %v", f.Do, f.Op, n, f.Times, f.Bytes, err)
					}
					if !struck {
						break
					}
					swept++
				}
			}
			t.Logf("%d faults", swept)
			if swept < 50/stride() {
				t.Errorf("only %d faults were swept", swept)
			}
		})
	}
}

// faultIn does a work and has its n-th operation go wrong, then brings the
// process back. struck is false if the work has fewer operations.
func (r *rig) faultIn(w work, n int, f sim.Fault) (struck bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	before := r.m.Count(f.Op)
	r.m.FailAt(n, f)
	if err := w.begin(ctx, r.life.client); err != nil {
		return false, err
	}
	struck = r.m.Count(f.Op) >= before+n
	r.m.ClearFaults()
	if err := r.unharmed(); err != nil {
		return struck, fmt.Errorf("after the fault: %w", err)
	}
	err = r.until(func() string {
		if err := r.agree(w.to); err == nil {
			return ""
		} else {
			r.clock.Add(int64(failedMost)) // whatever waits for time need not
			return said(errors.Join(err, r.pass()))
		}
	})
	if err != nil {
		return struck, fmt.Errorf("the work was not done: %w", err)
	}
	if err := w.back(ctx, r.life.client); err != nil {
		return struck, err
	}
	return struck, r.until(func() string { return said(r.agree(w.from)) })
}

// The process ends, replaces its program or unloads the image at every
// operation: nothing is harmed, the others are served, and nothing is left over.
func TestProcessLeavesAtEveryOperation(t *testing.T) {
	for _, f := range []sim.Fault{{Do: sim.Exit}, {Do: sim.Exec}, {Do: sim.Unload, Module: "app.dll"}} {
		t.Run(string(f.Do), func(t *testing.T) {
			w := works()[0]
			r := sweepRig(t, w)
			if _, err := r.life.client.ReleaseHold(context.Background(), "R1", ""); err != nil {
				t.Fatal(err)
			}
			swept := 0
			for n := 1; ; n++ {
				pid := 200 + n
				f.PID = pid
				r.m.ClearFaults()
				ops := r.m.Ops()
				r.m.FailAt(n, f)
				_, err := r.m.Start(sim.Process{PID: pid, Modules: []sim.Module{{File: "mingw/app.dll"}}})
				must(t, err)
				left := false
				err = r.until(func() string {
					if err := r.pass(); err != nil {
						return err.Error()
					}
					row, err := r.row(pid)
					if err != nil {
						return err.Error()
					}
					runs, where := r.where(pid, "app.dll", "vuln")
					left = where != nil // no process, or no such module
					if left && row == nil || !left && runs == "R1" && row != nil && row.State == control.Patched {
						return ""
					}
					return fmt.Sprintf("it runs %s %v, its row is %+v", runs, where, row)
				})
				if err != nil {
					t.Fatalf("%s at operation %d: %v", f.Do, n, err)
				}
				if err := r.unharmed(); err != nil {
					t.Fatalf("%s at operation %d: %v", f.Do, n, err)
				}
				struck := left || f.Do == sim.Exec && r.m.Ops() >= ops+n
				_ = r.m.Exit(pid)
				if !struck {
					break
				}
				swept++
				if swept > 1000 {
					t.Fatal("there is no end")
				}
			}
			t.Logf("left at %d operations", swept)
			if swept < 10 {
				t.Errorf("only %d operations were swept", swept)
			}
		})
	}
}

// From some write on, all fail for good: what was written cannot be written
// back. A process that runs a mix is said to be torn, first of all, and is mended
// as soon as writing works again.
func TestWritesFailForGood(t *testing.T) {
	r := sweepRig(t, works()[0])
	_, err := r.life.client.ReleaseHold(context.Background(), "R1", "")
	must(t, err)
	mixes := 0
	for n := 1; ; n++ {
		pid := 200 + n
		writes := r.m.Count(sim.OpWrite)
		r.m.FailAt(n, sim.Fault{Do: sim.Fail, Op: sim.OpWrite, PID: pid, Times: -1})
		_, err := r.m.Start(sim.Process{PID: pid, Modules: []sim.Module{{File: "mingw/app.dll"}}})
		must(t, err)
		must(t, r.pass())
		struck := r.m.Count(sim.OpWrite) >= writes+n
		row, err := r.row(pid)
		must(t, err)
		runs, mix := r.all(pid, "app.dll", "vuln", "slow")
		if row == nil {
			t.Fatalf("write %d: no row", n)
		}
		switch {
		case mix != nil && row.State != control.Torn, runs == "R1" && row.State != control.Patched, runs == "old" && row.State == control.Patched:
			t.Errorf("write %d: it runs %s %v and is said to be %s", n, runs, mix, row.State)
		case row.State == control.Torn && row.Remedy != control.RemedyRestartProcess:
			t.Errorf("write %d: torn, and the remedy is %s", n, row.Remedy)
		}
		if mix != nil {
			mixes++
			st, err := r.life.client.Status(context.Background())
			must(t, err)
			if st.State != control.Incomplete || len(st.Attention) == 0 || st.Attention[0].Code != "torn" {
				t.Errorf("a torn image, and the device is %s, %+v", st.State, st.Attention)
			}
		}
		must(t, r.unharmed())
		r.m.ClearFaults()
		must(t, r.until(func() string {
			r.clock.Add(int64(failedMost))
			if err := r.pass(); err != nil {
				return err.Error()
			}
			if row, err := r.row(pid); err != nil || row == nil || row.State != control.Patched {
				return fmt.Sprintf("%+v %v", row, err)
			}
			_, err := r.all(pid, "app.dll", "vuln", "slow")
			return said(err)
		}))
		must(t, r.m.Exit(pid))
		if !struck {
			break
		}
	}
	if mixes == 0 {
		t.Error("nothing was torn")
	}
}

// row is what is said of app.dll in a process, nil if nothing.
func (r *rig) row(pid int) (*control.Image, error) {
	doc, err := r.life.client.Processes(context.Background(), control.ProcessQuery{PID: pid})
	if err != nil {
		return nil, err
	}
	for _, p := range doc.Processes {
		for i := range p.Images {
			if strings.EqualFold(p.Images[i].Name, "app.dll") {
				return &p.Images[i], nil
			}
		}
	}
	return nil, nil
}
