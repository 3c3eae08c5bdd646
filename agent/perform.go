package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// progressFunc is told of each image whose work has ended; may be nil.
type progressFunc func(control.Event)

// maxRounds bounds how often one pass decides anew: adopt, then take out or
// replace what was adopted, then look again.
const maxRounds = 4

// pass is one turn of the loop: look, decide, perform, publish. forced names a
// product that an operator works on just now.
func (a *Agent) pass(ctx context.Context, forced string, progress progressFunc) {
	if a.o.Now().Sub(a.factsAt) > factsEvery {
		a.readFacts(ctx)
	}
	changed := a.scan(ctx)
	if !changed && !a.dirty && forced == "" && !a.due() {
		return
	}
	a.dirty = false
	for range maxRounds {
		v, w := a.view(forced)
		a.comeIntoForce(ctx, v, w)
		work := decide(v)
		if !a.perform(ctx, work, own, progress) {
			break
		}
	}
	a.publish()
}

// due tells whether something is to be tried again.
func (a *Agent) due() bool {
	now := a.o.Now()
	for _, p := range a.procs {
		for _, im := range p.images {
			for _, t := range im.Tried {
				if !t.Next.IsZero() && !now.Before(t.Next) {
					return true
				}
			}
		}
	}
	return false
}

// comeIntoForce loads the releases that are wanted and notes, before the first
// process is touched, that they are in force here.
func (a *Agent) comeIntoForce(ctx context.Context, v View, w wishes) {
	for product, c := range v.Choices {
		if c.Want == nil {
			if w.InForce[product] != "" && c.Undo {
				a.setInForce(product, nil)
			}
			continue
		}
		l := a.want(ctx, *c.Want)
		if l == nil || l.problem.Code != "" || w.InForce[product] == c.Want.ID {
			continue
		}
		if !v.Eligible || v.Paused.Code != "" {
			continue
		}
		a.setInForce(product, c.Want)
	}
}

// setInForce notes the release of a product in force, with its sequence floor.
func (a *Agent) setInForce(product string, o *repository.Offer) {
	err := a.store.Update(func(tx *store.Tx) error {
		all := inForceIn(tx)
		e := control.HistoryEntry{Product: product}
		if o == nil {
			e.Action, e.Release, e.Text = "out-of-force", all[product].ID, all[product].ID+" is not in force any more"
			delete(all, product)
		} else {
			all[product] = inForce{ID: o.ID, Sequence: o.Sequence, Month: o.Month, Title: o.Title, Severity: o.Severity, CVEs: o.CVEs, Since: control.At(a.o.Now())}
			if err := tx.RaiseFloor(floorKey(*o), int64(o.Sequence)); err != nil {
				var low *store.FloorError
				if !errors.As(err, &low) {
					return err
				}
			}
			e.Action, e.Release, e.Text = "in-force", o.ID, fmt.Sprintf("%s, sequence %d, is in force", o.ID, o.Sequence)
		}
		if err := setting(tx, settingInForce, all); err != nil {
			return err
		}
		_, err := tx.Append(stamped(e, own, a))
		return err
	})
	if err != nil {
		a.notice("state", control.SeverityError, "the state cannot be written; nothing new is applied", err.Error())
		return
	}
	id := ""
	if o != nil {
		id = o.ID
	}
	a.log.Info("release in force", zap.String("product", product), zap.String("id", id))
	a.hub.send(control.Event{Type: control.EventRelease, Release: id, Text: "release in force: " + id, Scope: control.Scope{Public: true}})
}

// outcome is how one intent ended.
type outcome struct {
	intent Intent
	try    *Try // nil: done, or nothing to remember
	done   bool
	gone   bool
}

// perform carries the intents out: one at a time within a process, several
// processes side by side. It reports whether memory was changed.
func (a *Agent) perform(ctx context.Context, all []Intent, by control.Caller, progress progressFunc) bool {
	byLife := map[target.ID][]Intent{}
	var order []target.ID
	for _, in := range all {
		if in.Kind == DoNothing {
			continue
		}
		if in.Kind == DoApply {
			if l := a.releases[in.Offer.ID]; l == nil || l.problem.Code != "" {
				continue // being loaded, or refused: said by publish
			}
		}
		if byLife[in.Proc.Info.ID] == nil {
			order = append(order, in.Proc.Info.ID)
		}
		byLife[in.Proc.Info.ID] = append(byLife[in.Proc.Info.ID], in)
	}
	total := 0
	for _, l := range byLife {
		total += len(l)
	}
	results := make(chan []outcome)
	slots := make(chan struct{}, workers)
	var wg sync.WaitGroup
	for _, id := range order {
		wg.Add(1)
		go func(list []Intent) {
			defer wg.Done()
			slots <- struct{}{}
			defer func() { <-slots }()
			results <- a.work(ctx, list, by)
		}(byLife[id])
	}
	go func() { wg.Wait(); close(results) }()
	changed, done := false, 0
	for list := range results {
		for _, o := range list {
			done++
			changed = a.settle(o) || changed
			if progress != nil {
				progress(a.progressOf(o, done, total))
			}
		}
	}
	return changed
}

// settle remembers how an intent ended; true if memory was changed or a record made.
func (a *Agent) settle(o outcome) bool {
	p := a.procs[o.intent.Proc.Info.ID]
	if p == nil {
		return false
	}
	if o.gone {
		delete(a.procs, o.intent.Proc.Info.ID)
		return true
	}
	for _, im := range p.images {
		if im.Base != o.intent.Image.Base {
			continue
		}
		if o.done {
			delete(im.Tried, o.intent.Product)
			im.Claims = nil // a record stands for them now, or nothing does
			return true
		}
		if o.try != nil {
			old := im.Tried[o.intent.Product]
			if old.Release == o.try.Release && old.State == o.try.State && old.Reason.Code == o.try.Reason.Code {
				o.try.Since = old.Since
				o.try.Attempts += old.Attempts
			}
			o.try.Next = a.nextTry(*o.try)
			o.try.Change = p.info.Change
			im.Tried[o.intent.Product] = *o.try
		}
	}
	return false
}

// Waits before an image is tried again. Every one is bounded; none is zero.
const (
	busyAgain    = 200 * time.Millisecond // within the policy's busy budget
	guardAgain   = 5 * time.Second        // a tracer detaches, a page is bound
	blockedAgain = 5 * time.Minute        // nothing is expected to change but by a change of the process
	failedFirst  = time.Second            // doubled with each failure
	failedMost   = 10 * time.Minute
)

func (a *Agent) nextTry(t Try) time.Time {
	now := a.o.Now()
	switch t.State {
	case control.Busy:
		budget := busyBudget
		if a.policy != nil && a.policy.BusyBudget > 0 {
			budget = a.policy.BusyBudget
		}
		if now.Sub(t.Since) < budget {
			return now.Add(busyAgain)
		}
		return now.Add(max(a.o.Config.Backend.ScanEvery, busyAgain))
	case control.Failed:
		return now.Add(min(failedMost, failedFirst<<min(t.Attempts, 10)))
	case control.Blocked:
		if t.Remedy == control.RemedyWait {
			return now.Add(guardAgain)
		}
	}
	return now.Add(blockedAgain)
}

// work opens one process and does what was decided, one image at a time.
func (a *Agent) work(ctx context.Context, list []Intent, by control.Caller) []outcome {
	info := list[0].Proc.Info
	out := make([]outcome, 0, len(list))
	octx, cancel := context.WithTimeout(ctx, openTimeout)
	p, err := a.o.Backend.Open(octx, info.ID)
	cancel()
	if err != nil {
		for _, in := range list {
			out = append(out, a.failed(in, err))
		}
		return out
	}
	defer p.Close()
	x := a.patcherFor(info, by)
	for _, in := range list {
		var err error
		switch in.Kind {
		case DoApply:
			err = a.apply(ctx, x, p, in)
		case DoUndo:
			_, err = x.Undo(ctx, p, in.Image.Records[in.Product])
		case DoAdopt:
			err = a.adopt(ctx, x, p, in)
		}
		if err != nil {
			out = append(out, a.failed(in, err))
			continue
		}
		a.log.Info("done", zap.String("what", string(in.Kind)), zap.Int("pid", info.PID), zap.String("exe", programOf(info)),
			zap.String("image", in.Image.Name), zap.String("product", in.Product))
		out = append(out, outcome{intent: in, done: true})
	}
	return out
}

// apply tries the bases of the release whose headers agree; the code decides
// between builds with equal headers.
func (a *Agent) apply(ctx context.Context, x *patcher.Patcher, p target.Process, in Intent) error {
	l := a.releases[in.Offer.ID]
	base, err := loadedAt(p, in.Image.Base)
	if err != nil {
		return err
	}
	err = &patcher.Refusal{Reason: patcher.OtherBuild, Code: "identity", Remedy: patcher.Author, Text: "no base of the release is this build"}
	for _, patch := range l.patches {
		if !sameHeaders(patch.Base, in.Image.Identity) {
			continue
		}
		var plan *patcher.Plan
		if plan, err = patcher.Prepare(p, base, patch); err == nil {
			_, err = x.Apply(ctx, p, plan)
			return err
		}
		var already *patcher.AlreadyApplied
		if errors.As(err, &already) {
			_, err = x.Adopt(ctx, p, base, patch)
			return err
		}
		var r *patcher.Refusal
		if !errors.As(err, &r) || r.Reason != patcher.OtherBuild {
			return err
		}
	}
	return err
}

// adopt takes over a patch of ours that has no record.
func (a *Agent) adopt(ctx context.Context, x *patcher.Patcher, p target.Process, in Intent) error {
	l := a.releases[in.Claim.Release]
	if l == nil || l.problem.Code != "" {
		o, ok := a.offerOf(in.Claim.Release)
		if !ok {
			return &patcher.Refusal{Reason: patcher.Blocked, Code: "unknown-release", Remedy: patcher.Wait,
				Text: "patched by " + in.Claim.Release + ", which no verified metadata names"}
		}
		if l = a.load(ctx, o); l.problem.Code != "" {
			return &patcher.Refusal{Reason: patcher.Blocked, Code: l.problem.Code, Remedy: patcher.Wait, Text: l.problem.Text}
		}
	}
	base, err := loadedAt(p, in.Image.Base)
	if err != nil {
		return err
	}
	err = patcher.ErrNotOurs
	for _, patch := range l.patches {
		if !sameHeaders(patch.Base, in.Image.Identity) {
			continue
		}
		if _, err = x.Adopt(ctx, p, base, patch); err == nil {
			return nil
		}
	}
	if errors.Is(err, patcher.ErrNotOurs) {
		return &patcher.Refusal{Reason: patcher.Drifted, Code: "claim", Remedy: patcher.RestartProcess,
			Text: "something claims to be " + in.Claim.Release + " and is not"}
	}
	return err
}

// loadedAt finds the image at base, as it is now.
func loadedAt(p target.Process, base target.Addr) (patcher.Loaded, error) {
	images, err := patcher.Images(p)
	if err != nil {
		return patcher.Loaded{}, err
	}
	for _, l := range images {
		if l.Base == base {
			return l, nil
		}
	}
	return patcher.Loaded{}, errUnloaded
}

var errUnloaded = errors.New("the image was unloaded")

// failed turns an error into what is remembered and shown.
func (a *Agent) failed(in Intent, err error) outcome {
	o := outcome{intent: in}
	if errors.Is(err, target.ErrGone) {
		o.gone = true
		return o
	}
	t := Try{State: control.Failed, Since: a.o.Now(), Attempts: 1, Remedy: control.RemedyWait, Reason: because("failed", "could not be done; nothing was changed"), Detail: err.Error()}
	if in.Offer != nil {
		t.Release = in.Offer.ID
	}
	switch in.Kind {
	case DoUndo:
		t.Release = "undo " + in.Image.Records[in.Product].Release
	case DoAdopt:
		t.Release = "adopt " + in.Claim.Release
	}
	var r *patcher.Refusal
	switch {
	case errors.As(err, &r):
		t.State, t.Remedy = control.ImageState(r.Reason), control.Remedy(r.Remedy)
		t.Reason = reason{r.Code, r.Text}
	case errors.Is(err, target.ErrDenied):
		t.State, t.Remedy, t.Reason = control.Blocked, control.RemedyPolicy, because("denied", "the system refuses access to the process")
	case errors.Is(err, target.ErrBusy):
		t.State, t.Reason = control.Busy, because("freeze", "a thread could not be stopped in time")
	case errors.Is(err, errUnloaded):
		t.State, t.Reason = control.Failed, because("unloaded", "the image was unloaded meanwhile")
	}
	a.log.Info("not done", zap.String("what", string(in.Kind)), zap.Int("pid", in.Proc.Info.PID), zap.String("image", in.Image.Name),
		zap.String("state", string(t.State)), zap.String("code", t.Reason.Code), zap.String("text", t.Reason.Text), zap.String("detail", t.Detail))
	o.try = &t
	return o
}

func (a *Agent) progressOf(o outcome, done, total int) control.Event {
	in := o.intent
	e := control.Event{Type: control.EventProgress, Time: control.At(a.o.Now()), PID: in.Proc.Info.PID, Exe: programOf(in.Proc.Info),
		Image: in.Image.Name, Done: done, Total: total, State: string(control.Patched), Scope: control.Scope{OfUser: true, UID: in.Proc.Info.UID}}
	if in.Kind == DoUndo {
		e.State = string(control.Unpatched)
	}
	if in.Offer != nil {
		e.Release = in.Offer.ID
	}
	if o.try != nil {
		e.State, e.Reason = string(o.try.State), o.try.Reason.Text
	}
	if o.gone {
		e.State, e.Reason = "", "the process is over"
	}
	e.Text = fmt.Sprintf("%s %d, %s: %s", lastElement(e.Exe), e.PID, e.Image, e.State)
	if e.Reason != "" {
		e.Text += " (" + e.Reason + ")"
	}
	return e
}

// recoverAll brings every record together with memory, before anything else.
func (a *Agent) recoverAll(ctx context.Context) {
	for _, r := range a.allRecords() {
		if a.o.Boot != "" && r.Boot != "" && r.Boot != a.o.Boot {
			a.forget(r, "the device was restarted")
			continue
		}
		if err := a.recoverOne(ctx, r); err != nil {
			a.log.Warn("record not settled yet", zap.Int("pid", r.ID.PID), zap.String("image", r.Image), zap.Error(err))
		}
	}
}

func (a *Agent) recoverOne(ctx context.Context, r patcher.Record) error {
	octx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	p, err := a.o.Backend.Open(octx, r.ID)
	if errors.Is(err, target.ErrGone) {
		a.forget(r, "the process is over")
		return nil
	}
	if err != nil {
		return err
	}
	defer p.Close()
	before := r.State
	r, err = a.patcherFor(p.Info(), own).Recover(ctx, p, r)
	a.log.Info("record recovered", zap.Int("pid", r.ID.PID), zap.String("image", r.Image), zap.String("was", string(before)), zap.String("is", string(r.State)), zap.Error(err))
	return err
}
