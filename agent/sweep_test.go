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
	"hotpatchd/patcher"
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
	for _, rec := range r.life.agent.allRecords() {
		if rec.State != patcher.Applied && rec.State != patcher.Staged {
			return fmt.Errorf("a record is left %s", rec.State)
		}
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

func must(t testing.TB, err error) {
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
