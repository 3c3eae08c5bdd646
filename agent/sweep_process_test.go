package agent

import (
	"context"
	"fmt"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/sim"
)

// The process ends, replaces its program or unloads the image at every
// operation: nothing is harmed, the others are served, and nothing is left over.
func TestProcessLeavesAtEveryOperation(t *testing.T) {
	for _, f := range []sim.Fault{{Do: sim.Exit}, {Do: sim.Exec}, {Do: sim.Unload, Module: "app.dll"}} {
		t.Run(string(f.Do), func(t *testing.T) {
			w := works()[0]
			r := sweepRig(t, w)
			_, err := r.life.client.ReleaseHold(context.Background(), "R1", "")
			must(t, err)
			must(t, r.until(func() string { return said(r.agree("R1")) })) // it is loaded
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
	must(t, r.until(func() string { return said(r.agree("R1")) })) // it is loaded
	mixes := 0
	for n := 1; ; n++ {
		pid := 200 + n
		writes := r.m.Count(sim.OpWrite)
		r.m.FailAt(n, sim.Fault{Do: sim.Fail, Op: sim.OpWrite, PID: pid, Times: -1})
		if n%2 == 0 { // the first freezes come too late, more than one attempt has
			r.m.FailAt(1, sim.Fault{Do: sim.Busy, Op: sim.OpFreeze, PID: pid, Times: 30})
		}
		_, err := r.m.Start(sim.Process{PID: pid, Modules: []sim.Module{{File: "mingw/app.dll"}}})
		must(t, err)
		// On a machine that is slow just now a freeze may come too late: such an
		// attempt is no answer, and the next one has its turn.
		struck := false
		var row *control.Image
		must(t, r.until(func() string {
			if err := r.pass(); err != nil {
				return err.Error()
			}
			struck = r.m.Count(sim.OpWrite) >= writes+n
			if row, err = r.row(pid); err != nil {
				return err.Error()
			}
			if struck || row != nil && row.State == control.Patched {
				return ""
			}
			r.clock.Add(int64(busyAgain))
			return fmt.Sprintf("write %d was not reached: %+v", n, row)
		}))
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

// A process forks at every operation of the work on it: the child is whole,
// patched or not, is found, and goes with its parent from then on.
func TestForkAtEveryOperation(t *testing.T) {
	for _, w := range works()[:2] {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			r := sweepRig(t, w)
			ctx := context.Background()
			swept := 0
			for n := 1; ; n += stride() {
				var child int
				r.m.FailAt(n, sim.Fault{Do: sim.Hook, Then: func() {
					if id, err := r.m.Fork(sweepPID); err == nil { // not while it is held
						child = id.PID
					}
				}})
				before := r.m.Ops()
				must(t, w.begin(ctx, r.life.client))
				struck := r.m.Ops() >= before+n
				r.m.ClearFaults()
				pids := []int{sweepPID}
				if child != 0 {
					pids = append(pids, child)
				}
				both := func(want string) func() string {
					return func() string {
						if err := r.pass(); err != nil {
							return err.Error()
						}
						for _, pid := range pids {
							row, err := r.row(pid)
							runs, mix := r.all(pid, "app.dll", "vuln", "slow")
							if err != nil || mix != nil || runs != want || row == nil || (row.State == control.Patched) != (runs == "R1") {
								return fmt.Sprintf("process %d runs %s %v, its row is %+v %v", pid, runs, mix, row, err)
							}
						}
						return said(r.unharmed())
					}
				}
				for _, step := range []struct {
					order func(context.Context, *control.Client) error
					want  string
				}{{nil, w.to}, {w.back, w.from}} {
					if step.order != nil {
						must(t, step.order(ctx, r.life.client))
					}
					if err := r.until(both(step.want)); err != nil {
						t.Fatalf("fork at operation %d, to %s: %v", n, step.want, err)
					}
				}
				if child != 0 {
					must(t, r.m.Exit(child))
					swept++
				}
				if !struck {
					break
				}
			}
			t.Logf("forked at %d operations", swept)
			if swept < 6/stride() { // an undo is some nine operations, and not all let fork
				t.Errorf("only %d forks", swept)
			}
		})
	}
}
