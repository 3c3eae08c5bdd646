package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// No process may keep the others waiting, whatever its owner does in it: each
// has a share of a pass, what uses its share up goes to the end of the queue
// and waits longer each time, and what does not end is left to itself.
const (
	// workers bounds how many processes are worked on side by side.
	workers = 4
	// turnMost is the share of one process in one pass. Between two of its images
	// it is looked whether that is used up; a fix takes some milliseconds.
	turnMost = 2 * time.Second
	// restFirst is how long a process waits whose share was used up; doubled each
	// time that nothing came of it, up to restMost.
	restFirst = time.Second
	restMost  = 30 * time.Second
	// scanMost is the time of one pass for looking into processes that have
	// changed; who does not come in has his turn in the next one.
	scanMost = 2 * time.Second
	// lookMost bounds reading one process: real ones take some milliseconds.
	lookMost = 5 * time.Second
	// A process that is dear to look into, because it has mapped very much, is
	// looked into less often: dearLook is dear, and lookShare times what it cost
	// lies between two looks.
	dearLook  = 100 * time.Millisecond
	lookShare = 20
	// beginMost is how long a pass begins work on processes, and beginForced how
	// long one does that an operator waits for.
	beginMost   = 2 * time.Second
	beginForced = 20 * time.Second
	// stepMost bounds how long the loop waits for a step on one process, beyond
	// the time that step itself may take.
	stepMost = 5 * time.Second
	// mostLeft bounds the steps that were left to themselves: each keeps a thread.
	mostLeft = 32
	// closing is how long the end of the daemon waits for work that is under way.
	closing = 5 * time.Second
)

// job is work on one process beside the loop.
type job struct {
	info  target.Info
	step  string
	since time.Time
	done  chan struct{} // closed when it has ended
	list  []outcome     // of perform; read it after done
	used  bool          // its share of the pass was used up
	left  atomic.Bool   // the loop does not wait for it any more
}

// spawn runs fn beside the loop.
func (a *Agent) spawn(j *job, fn func()) {
	j.since, j.done = time.Now(), make(chan struct{})
	go func() {
		fn()
		a.heart.beats.Add(1)
		close(j.done)
		if j.left.Load() {
			a.Wake()
		}
	}()
}

// leave stops waiting for a job. Nothing else is done with its process until
// it ends: there is one writer, and what hung once hangs again.
func (a *Agent) leave(j *job) {
	j.left.Store(true)
	a.left[j.info.ID] = j
	a.log.Error("a step on a process does not end; it is left to itself", zap.String("step", j.step), zap.Int("pid", j.info.PID), zap.String("exe", programOf(j.info)))
	a.dirty = true
	select {
	case <-j.done: // just now
		a.Wake()
	default:
	}
}

// collect takes in what jobs that were left have come to.
func (a *Agent) collect() {
	for id, j := range a.left {
		select {
		case <-j.done:
		default:
			continue
		}
		delete(a.left, id)
		a.log.Info("a step on a process has ended after all", zap.String("step", j.step), zap.Int("pid", id.PID), zap.Duration("after", time.Since(j.since)))
		for _, o := range j.list {
			a.settle(o)
		}
		if p := a.procs[id]; p != nil {
			p.doubt = true
		}
		a.dirty = true
	}
}

// finish waits for what is under way when the daemon ends.
func (a *Agent) finish() {
	t := time.NewTimer(closing)
	defer t.Stop()
	for _, j := range a.left {
		select {
		case <-j.done:
		case <-t.C:
			return
		}
	}
}

// errLeft: a step on the process has not ended yet.
var errLeft = errors.New("work on the process does not end: it does not let itself be read or stopped")

// aside runs one step on a process beside the loop and waits for it, most and
// a little patience long. fn may not touch what belongs to the loop.
func aside[T any](ctx context.Context, a *Agent, info target.Info, step string, most time.Duration, fn func(context.Context) (T, error)) (T, error) {
	var none T
	if a.left[info.ID] != nil || len(a.left) >= mostLeft {
		return none, errLeft
	}
	a.heart.atProcess(step, info)
	var got T
	var err error
	j := &job{info: info, step: step}
	a.spawn(j, func() {
		ctx, cancel := context.WithTimeout(ctx, most)
		defer cancel()
		got, err = fn(ctx)
	})
	t := time.NewTimer(most + a.patience)
	defer t.Stop()
	select {
	case <-j.done:
		return got, err
	case <-t.C:
		a.leave(j)
		return none, errLeft
	}
}

// turns orders work by process: first what had its share and did not use it up,
// and among those what is new.
func (a *Agent) turns(ctx context.Context, all []Intent) (queue [][]Intent, total int) {
	at := map[target.ID]int{}
	for _, in := range all {
		if in.Kind == DoAdopt && !a.known(ctx, in.Claim.Release) {
			continue // being loaded: its end wakes the loop
		}
		id := in.Proc.Info.ID
		i, ok := at[id]
		if !ok {
			i = len(queue)
			at[id] = i
			queue = append(queue, nil)
		}
		switch in.Kind { // workers read nothing that belongs to the loop
		case DoApply:
			in.release = a.releases[in.Offer.ID]
		case DoAdopt:
			in.release = a.releases[in.Claim.Release]
		}
		queue[i] = append(queue[i], in)
		total++
	}
	again := func(list []Intent) int {
		for _, in := range list {
			if in.Try == nil {
				return 0
			}
		}
		return 1
	}
	slices.SortStableFunc(queue, func(x, y []Intent) int {
		return cmp.Or(cmp.Compare(x[0].Proc.Used, y[0].Proc.Used), cmp.Compare(again(x), again(y)))
	})
	return queue, total
}

// perform carries the intents out: one at a time within a process, several
// processes side by side. It begins none after the pass's time for that, and
// does not wait for those that take longer than all others. It reports whether
// memory was changed.
func (a *Agent) perform(ctx context.Context, all []Intent, by control.Caller, progress progressFunc) (changed bool) {
	queue, total := a.turns(ctx, all)
	a.heart.at("at work on " + counted(len(queue), "process", "processes"))
	ended := make(chan *job, workers)
	running := map[*job]bool{}
	done := 0
	end := time.NewTimer(time.Until(a.begins) + a.share + a.patience)
	defer end.Stop()
	for {
		for len(queue) > 0 && len(running) < workers {
			if len(a.left) >= mostLeft {
				break // until one of them ends
			}
			if ctx.Err() != nil || !time.Now().Before(a.begins) {
				a.more = true
				break
			}
			list := queue[0]
			queue = queue[1:]
			j := &job{info: list[0].Proc.Info, step: "patching"}
			running[j] = true
			a.spawn(j, func() { j.list, j.used = a.work(ctx, list, by); ended <- j })
		}
		if len(running) == 0 {
			return changed
		}
		select {
		case j := <-ended:
			delete(running, j)
			a.turnOver(j)
			for _, o := range j.list {
				done++
				changed = a.settle(o) || changed
				if progress != nil {
					progress(a.progressOf(o, done, total))
				}
			}
		case <-end.C:
			for j := range running {
				a.leave(j)
			}
			a.more = a.more || len(queue) > 0 && len(a.left) < mostLeft
			return changed
		}
	}
}

// turnOver sees to it that a process which has used up its share comes after
// the others the next time, and later each time.
func (a *Agent) turnOver(j *job) {
	p := a.procs[j.info.ID]
	if p == nil {
		return
	}
	if !j.used {
		p.used, p.vain, p.rest = 0, 0, time.Time{}
		return
	}
	p.used++
	if slices.ContainsFunc(j.list, func(o outcome) bool { return o.done }) {
		p.vain = 0 // it is slow, and gets on
	} else {
		p.vain++
	}
	p.rest = a.o.Now().Add(min(restMost, restFirst<<min(p.vain, 10)))
	a.log.Info("a process has used up its share of a pass; the others come first", zap.Int("pid", j.info.PID), zap.String("exe", programOf(j.info)),
		zap.Int("times", p.used), zap.Int("images done", len(j.list)))
}

// work opens one process and does what was decided, one image at a time, as
// long as its share of the pass lasts; used: it did not last.
func (a *Agent) work(ctx context.Context, list []Intent, by control.Caller) (out []outcome, used bool) {
	info := list[0].Proc.Info
	began := time.Now()
	octx, cancel := context.WithTimeout(ctx, openTimeout)
	p, err := a.o.Backend.Open(octx, info.ID)
	cancel()
	if err != nil {
		for _, in := range list {
			out = append(out, a.failed(in, err))
		}
		return out, false
	}
	defer p.Close()
	x := a.patcherFor(info, by)
	sctx, cancel := context.WithTimeout(ctx, a.share)
	defer cancel()
	s := patcher.Look(sctx, p)
	for _, in := range list {
		if time.Since(began) > a.share {
			return out, true
		}
		a.heart.beats.Add(1)
		var err error
		switch in.Kind {
		case DoApply:
			err = a.apply(ctx, x, s, p, in)
		case DoRecover:
			_, err = x.Recover(ctx, p, in.Image.Records[in.Product])
		case DoUndo:
			_, err = x.Undo(ctx, p, in.Image.Records[in.Product])
		case DoAdopt:
			err = a.adopt(x, s, in)
		}
		if err != nil && sctx.Err() != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
			if len(out) > 0 {
				return out, true
			}
			// Not even the first one: said of it, so that it is not the first again.
			err = &patcher.Refusal{Reason: patcher.Busy, Code: "share", Remedy: patcher.Wait, Err: err,
				Text: fmt.Sprintf("the process has mapped so much that %s are not enough to plan", a.share)}
			return append(out, a.failed(in, err)), true
		}
		if err != nil {
			out = append(out, a.failed(in, err))
			continue
		}
		a.log.Info("done", zap.String("what", string(in.Kind)), zap.Int("pid", info.PID), zap.String("exe", programOf(info)),
			zap.String("image", in.Image.Name), zap.String("product", in.Product))
		out = append(out, outcome{intent: in, done: true})
	}
	return out, false
}
