package agent

import (
	"context"
	"fmt"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// The daemon dies at every operation of every kind of work, in the middle of
// writes too, and starts again.
func TestDeathAtEveryOperation(t *testing.T) {
	t.Parallel()
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
