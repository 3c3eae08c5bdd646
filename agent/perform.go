package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
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
	defer a.heart.pass()
	a.more = false
	if a.o.Now().Sub(a.factsAt) > factsEvery {
		a.heart.at("reading the facts of the device")
		a.readFacts(ctx)
	}
	a.collect()
	changed := a.scan(ctx)
	changed = a.recheck(ctx) || changed
	changed = changed || a.vigil.waits()
	if changed || a.dirty || forced != "" || a.due() {
		a.act(ctx, forced, progress)
	}
}

// act decides, performs and publishes.
func (a *Agent) act(ctx context.Context, forced string, progress progressFunc) {
	begin := beginMost
	if forced != "" {
		begin = beginForced
	}
	a.begins = time.Now().Add(begin)
	a.dirty = true // until a round finds nothing more to do
	a.takeSleep()
	a.guardTurn()
	for range maxRounds {
		if !a.round(ctx, forced, progress) {
			a.dirty = a.more
			break
		}
	}
	a.countLives(a.o.Now())
	a.heart.at("publishing how things are")
	a.publish()
}

// round decides once and carries it out; true if another one is called for.
// What memory says comes first: only when every patch of ours has its record is
// it known what is in force here, and then a release may come into force.
func (a *Agent) round(ctx context.Context, forced string, progress progressFunc) bool {
	a.heart.at("deciding what to do")
	a.noteTrials()
	v, w := a.view(forced)
	work := decide(v)
	if truth := kinds(work, DoRecover, DoAdopt); len(truth) > 0 {
		if a.perform(ctx, truth, own, progress) {
			return true
		}
		v, w = a.view(forced)
		work = decide(v)
	}
	a.heart.at("looking after files")
	a.tendBaselines(v, w)
	a.heart.at("bringing releases into force")
	if a.comeIntoForce(ctx, v, w, work) {
		v, w = a.view(forced)
		work = decide(v)
		a.tendBaselines(v, w) // what came into force may bring files
	}
	a.stopClocks(work)
	a.follow(work)
	return a.perform(ctx, kinds(work, DoUndo, DoApply), own, progress)
}

func kinds(all []Intent, wanted ...Kind) []Intent {
	var out []Intent
	for _, in := range all {
		if slices.Contains(wanted, in.Kind) {
			out = append(out, in)
		}
	}
	return out
}

// due tells whether time alone calls for another turn: something is to be
// tried again, metadata ended, a rollout or the policy's hours began.
func (a *Agent) due() bool {
	now := a.o.Now()
	return !a.again.IsZero() && !now.Before(a.again) || a.hourOf(now) != a.hour
}

// hour is what of a decision depends on time alone.
type hour struct {
	fresh, soon, closed bool
	begun               int // releases whose time has come, by rollout and deferral
}

func (a *Agent) hourOf(now time.Time) hour {
	h := hour{fresh: a.fresh(now), soon: !a.expires.IsZero() && a.expires.Sub(now) < expirySoon, closed: a.closed(now)}
	deferral := time.Duration(0)
	if a.policy != nil {
		deferral = a.policy.Defer
	}
	for _, o := range a.allOffers() {
		if !now.Before(opens(o, deferral)) {
			h.begun++
		}
	}
	return h
}

// comeIntoForce loads the releases that are wanted and notes, before the first
// process is touched, that they are in force here. It reports whether that changed.
func (a *Agent) comeIntoForce(ctx context.Context, v View, w wishes, work []Intent) (changed bool) {
	for id := range w.Broken { // what could not be fetched may come yet
		if o, ok := a.offerOf(id); ok {
			a.want(ctx, o)
		}
	}
	taken := map[string]uint32{} // by product, the sequence that somebody's word takes out of a process
	unknown := map[string]bool{} // products of which patches are still looked into
	for _, in := range work {
		if rec, ok := in.Image.Records[in.Product]; ok && rec.Live() {
			if _, out := v.Word(rec.Release); out {
				taken[in.Product] = max(taken[in.Product], rec.Sequence)
			}
		}
		if in.Kind == DoAdopt || in.Kind == DoRecover {
			unknown[in.Product] = true
		}
	}
	products := map[string]bool{}
	for product := range v.Choices {
		products[product] = true
	}
	for product := range w.InForce {
		products[product] = true
	}
	for _, product := range slices.Sorted(maps.Keys(products)) {
		now, o := w.InForce[product], v.Choices[product].Want
		out := false
		var why reason
		if now != "" {
			if why, out = v.Word(now); !out {
				why = v.Choices[product].Never
			}
		}
		// Pause and eligibility hold back what is new, not the way back.
		gated := o != nil && (!v.Eligible || v.Paused.Code != "") && taken[product] <= o.Sequence && w.Before[product] != o.ID
		gated = gated || o != nil && v.Lost.Code != "" && !v.Chosen[o.ID]
		moved := false
		switch {
		case o == nil || gated:
			if out || o == nil && why.Code != "" || a.outgrown(product, now) {
				moved = a.setInForce(product, nil, why.Text)
			}
		case a.want(ctx, *o) == nil || !a.ready(o.ID) || now == o.ID || unknown[product]:
		default:
			moved = a.setInForce(product, o, why.Text)
		}
		if moved && out && why.Code == "halted" {
			a.noteTakenOut(now)
		}
		changed = changed || moved
	}
	return changed
}

// outgrown tells of a release in force that was for another baseline than the
// one whose files are in place now: it is in no process any more, and comes into none.
func (a *Agent) outgrown(product, id string) bool {
	o, ok := a.offerOf(id)
	if id == "" || !ok || o.Baseline == "" || o.Baseline == a.bases.standing[product].ID {
		return false
	}
	return !slices.ContainsFunc(a.allRecords(), func(r patcher.Record) bool { return r.Release == id && r.Live() })
}

// before is what goes on if id, which comes into force, is kept out before anybody has it.
func (a *Agent) before(w wishes, product, id string) string {
	now := w.InForce[product]
	if stays, ok := w.Before[product]; ok {
		now = stays
	} else if o, ok := a.offerOf(now); !ok || !w.had(o) {
		return ""
	}
	if _, out := w.word(now, a.allOffers()); out || now == id {
		return ""
	}
	return now
}

// setInForce notes the release of a product in force, with its sequence floor;
// nil: none. why is what takes the one before out, "" if nothing does. It reports
// whether that is on disk.
func (a *Agent) setInForce(product string, o *repository.Offer, why string) bool {
	w := a.wishes()
	err := a.update(func(tx *store.Tx) error {
		all := inForceIn(tx)
		e := control.HistoryEntry{Product: product}
		if o == nil {
			e.Action, e.Release, e.Text = "out-of-force", all[product].ID, all[product].ID+" is not in force any more"
			if why != "" {
				e.Text += ": " + why
			}
			delete(all, product)
		} else {
			before := all[product].ID
			all[product] = inForce{ID: o.ID, Sequence: o.Sequence, Month: o.Month, Title: o.Title, Severity: o.Severity, CVEs: o.CVEs, Since: control.At(a.o.Now()), Before: a.before(w, product, o.ID)}
			if err := tx.RaiseFloor(floorKey(*o), int64(o.Sequence)); err != nil {
				var low *store.FloorError
				if !errors.As(err, &low) {
					return err
				}
			}
			e.Action, e.Release, e.Text = "in-force", o.ID, fmt.Sprintf("%s, sequence %d, is in force", o.ID, o.Sequence)
			if why != "" && before != "" {
				e.Text += "; " + before + " is not any more: " + why
			}
		}
		if err := setting(tx, settingInForce, all); err != nil {
			return err
		}
		_, err := tx.Append(stamped(e, own, a))
		return err
	})
	if err != nil {
		return false // said by update
	}
	if o == nil {
		a.log.Info("no release in force", zap.String("product", product))
		a.hub.send(control.Event{Type: control.EventRelease, Text: "no release of " + product + " is in force any more", Scope: control.Scope{Public: true}})
		return true
	}
	a.log.Info("release in force", zap.String("product", product), zap.String("id", o.ID))
	a.hub.send(control.Event{Type: control.EventRelease, Release: o.ID, Text: "release in force: " + o.ID, Scope: control.Scope{Public: true}})
	return true
}

// outcome is how one intent ended.
type outcome struct {
	intent Intent
	try    *Try // nil: done, or nothing to remember
	done   bool
	gone   bool
}

// settle remembers how an intent ended; true if memory was changed or a record made.
func (a *Agent) settle(o outcome) bool {
	p := a.procs[o.intent.Proc.Info.ID]
	if p == nil {
		return false
	}
	if o.gone {
		a.dropProc(o.intent.Proc.Info.ID)
		return true
	}
	for _, im := range p.images {
		if im.Base != o.intent.Image.Base {
			continue
		}
		if o.done {
			delete(im.Tried, o.intent.Product)
			// A record stands for them now, or nothing does.
			im.Claims = slices.DeleteFunc(im.Claims, func(c patcher.Claim) bool { return c.Product == o.intent.Product })
			switch o.intent.Kind {
			case DoAdopt:
				a.adopted(*o.intent.Claim)
			case DoApply:
				a.patched(im)
			}
			return true
		}
		if o.try != nil {
			p.doubt = p.doubt || o.try.State != control.Busy
			old := im.Tried[o.intent.Product]
			if old.Release == o.try.Release && old.State == o.try.State && old.Reason.Code == o.try.Reason.Code {
				o.try.Since = old.Since
				o.try.Attempts += old.Attempts
			}
			o.try.Next = a.nextTry(*o.try)
			o.try.Soonest = a.o.Now().Add(min(changeMost, changeAgain*time.Duration(o.try.Attempts*o.try.Attempts)))
			o.try.Change = p.info.Change
			im.Tried[o.intent.Product] = *o.try
		}
	}
	return false
}

// adopted: a lost state has lost what is in force, too. What was adopted was
// vouched for by a verified release, and is in force as a matter of fact.
func (a *Agent) adopted(c patcher.Claim) {
	w := a.wishes()
	o, ok := a.offerOf(c.Release)
	if _, out := w.word(c.Release, a.allOffers()); ok && !out && w.InForce[c.Product] == "" {
		a.setInForce(c.Product, &o, "")
	}
}

// Waits before an image is tried again. Every one is bounded; none is zero.
const (
	busyAgain    = 200 * time.Millisecond // within the policy's busy budget
	guardAgain   = 5 * time.Second        // a tracer detaches, a page is bound; doubled each time
	guardMost    = 2 * time.Minute
	blockedAgain = 5 * time.Minute // nothing is expected to change but by a change of the process
	// A change of the process is a reason to try at once, but not for ever:
	// changeAgain, times the square of the attempts, up to changeMost.
	changeAgain = 50 * time.Millisecond
	changeMost  = 30 * time.Second
	failedFirst = time.Second // doubled with each failure
	failedMost  = 10 * time.Minute
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
	case control.Failed, control.Torn:
		return now.Add(min(failedMost, failedFirst<<min(t.Attempts, 10)))
	case control.Blocked:
		// Who shares memory is mostly a vfork child, and that is over soon.
		if t.Remedy == control.RemedyWait || t.Reason.Code == string(target.GuardShared) {
			return now.Add(min(guardMost, guardAgain<<min(t.Attempts-1, 10)))
		}
	}
	return now.Add(blockedAgain)
}

// apply tries the bases of the release whose headers agree; the code decides
// between builds with equal headers.
func (a *Agent) apply(ctx context.Context, x *patcher.Patcher, s *patcher.Survey, p target.Process, in Intent) error {
	l := in.release
	base, err := s.At(in.Image.Base)
	if err != nil {
		return err
	}
	err = &patcher.Refusal{Reason: patcher.OtherBuild, Code: "identity", Remedy: patcher.Author, Text: "no base of the release is this build"}
	for _, patch := range l.patches {
		if !sameHeaders(patch.Base, in.Image.Identity) {
			continue
		}
		var plan *patcher.Plan
		if plan, err = s.Prepare(base, patch); err == nil {
			_, err = x.Apply(ctx, p, plan)
			return err
		}
		var already *patcher.AlreadyApplied
		if errors.As(err, &already) {
			_, err = x.AdoptSeen(s, base, patch)
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
func (a *Agent) adopt(x *patcher.Patcher, s *patcher.Survey, in Intent) error {
	l := in.release
	if l == nil {
		return &patcher.Refusal{Reason: patcher.Blocked, Code: "unknown-release", Remedy: patcher.Wait,
			Text: "patched by " + in.Claim.Release + ", which no verified metadata names"}
	}
	if l.problem.Code != "" {
		return &patcher.Refusal{Reason: patcher.Blocked, Code: l.problem.Code, Remedy: patcher.Wait, Text: l.problem.Text}
	}
	base, err := s.At(in.Image.Base)
	if err != nil {
		return err
	}
	err = patcher.ErrNotOurs
	for _, patch := range l.patches {
		if !sameHeaders(patch.Base, in.Image.Identity) {
			continue
		}
		if _, err = x.AdoptSeen(s, base, patch); err == nil {
			return nil
		}
	}
	if errors.Is(err, patcher.ErrNotOurs) {
		return &patcher.Refusal{Reason: patcher.Drifted, Code: "claim", Remedy: patcher.RestartProcess,
			Text: "something claims to be " + in.Claim.Release + " and is not"}
	}
	return err
}

// failed turns an error into what is remembered and shown.
func (a *Agent) failed(in Intent, err error) outcome {
	o := outcome{intent: in}
	if errors.Is(err, target.ErrGone) {
		o.gone = true
		return o
	}
	t := Try{State: control.Failed, Since: a.o.Now(), Attempts: 1, Remedy: control.RemedyWait, Reason: because("failed", "could not be done%s; nothing was changed", inBrackets(err)), Detail: err.Error()}
	if in.Kind != DoNothing {
		t.Release = in.what()
	}
	var r *patcher.Refusal
	switch {
	case errors.As(err, &r):
		t.State, t.Remedy = control.ImageState(r.Reason), control.Remedy(r.Remedy)
		t.Reason = reason{r.Code, r.Text}
	case errors.Is(err, errState):
		t.Reason = because("state", "the state cannot be written%s: nothing is begun without it", inBrackets(err))
	case errors.Is(err, target.ErrDenied):
		t.State, t.Remedy, t.Reason = control.Blocked, control.RemedyPolicy, because("denied", "the system refuses access to the process")
	case errors.Is(err, target.ErrBusy):
		t.State, t.Reason = control.Busy, because("freeze", "a thread could not be stopped in time")
	case errors.Is(err, patcher.ErrUnloaded):
		t.Reason = because("unloaded", "the image was unloaded meanwhile")
	}
	a.log.Info("not done", zap.String("what", string(in.Kind)), zap.Int("pid", in.Proc.Info.PID), zap.String("image", in.Image.Name),
		zap.String("state", string(t.State)), zap.String("code", t.Reason.Code), zap.String("text", t.Reason.Text), zap.String("detail", t.Detail))
	o.try = &t
	return o
}

// inBrackets is what the system said, for a person, without the addresses that
// a whole error may hold; "" where the system is not the cause.
func inBrackets(err error) string {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return " (" + errno.Error() + ")"
	case errors.Is(err, context.DeadlineExceeded):
		return " (it took too long)"
	}
	return ""
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
	_, err := aside(ctx, a, target.Info{ID: r.ID, Image: r.Image}, "recovering", openTimeout, func(octx context.Context) (bool, error) {
		p, err := a.o.Backend.Open(octx, r.ID)
		if errors.Is(err, target.ErrGone) {
			a.forget(r, "the process is over")
			return false, nil
		}
		if err != nil {
			return false, err
		}
		defer p.Close()
		got, err := a.patcherFor(p.Info(), own).Recover(ctx, p, r)
		a.log.Info("record recovered", zap.Int("pid", r.ID.PID), zap.String("image", r.Image), zap.String("was", string(r.State)), zap.String("is", string(got.State)), zap.Error(err))
		return true, err
	})
	return err
}
