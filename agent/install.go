package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
)

// offerFor finds the release an operator names, or the one that would be
// installed if none is named.
func (a *Agent) offerFor(id string) (repository.Offer, *control.Error) {
	if id != "" {
		o, ok := a.offerOf(id)
		if !ok {
			return o, &control.Error{Code: control.CodeNotFound, Text: fmt.Sprintf("no verified metadata names a release %q", id), Hint: "hotpatch list shows what is offered; hotpatch check asks the repository again"}
		}
		return o, nil
	}
	w, d := a.wishes(), a.deviceFor()
	top := map[string]*repository.Offer{} // by product, the highest that nobody's word is against
	offers := a.allOffers()
	for i := range offers {
		o := &offers[i]
		if _, ok := installable(*o, d, w); ok && (top[o.Product] == nil || highest(*o, *top[o.Product]) < 0) {
			top[o.Product] = o
		}
	}
	var best *repository.Offer
	for _, product := range slices.Sorted(maps.Keys(top)) {
		if best == nil || sooner(*top[product], *best, w) {
			best = top[product]
		}
	}
	if best != nil {
		return *best, nil
	}
	e := &control.Error{Code: control.CodeNotFound, Text: "no release is offered for this device", Hint: "hotpatch list shows why not; hotpatch check asks the repository again"}
	if o, r, ok := a.keptOut(w, d); ok {
		e.Code, e.Text, e.Hint = control.CodeConflict, fmt.Sprintf("%s fits this device, but it is %s", o.ID, r.Text), a.liftHold(o.ID)
	}
	return repository.Offer{}, e
}

// keptOut is the most urgent release that nothing but a hold keeps out of force.
func (a *Agent) keptOut(w wishes, d device) (o repository.Offer, r reason, ok bool) {
	now := a.o.Now()
	choices := choose(a.allOffers(), d, w, now, a.fresh(now))
	for _, product := range slices.Sorted(maps.Keys(choices)) {
		if h := choices[product].Held; h != nil && (!ok || severityRank(h.Severity) < severityRank(o.Severity)) {
			o, ok = *h, true
		}
	}
	if ok {
		r, _ = w.Hold(o.ID)
	}
	return o, r, ok
}

// sooner tells whether a is to be installed before b: what is not in force yet, then the worse.
func sooner(a, b repository.Offer, w wishes) bool {
	if x, y := w.InForce[a.Product] == a.ID, w.InForce[b.Product] == b.ID; x != y {
		return y
	}
	return severityRank(a.Severity) < severityRank(b.Severity)
}

// Install brings a release into force now. It lifts a hold on it.
func (a *Agent) Install(ctx context.Context, c control.Caller, r control.InstallRequest, progress func(control.Event)) (*control.Change, error) {
	progress, over := whileAsked(progress)
	defer over()
	if r.File == nil {
		return a.install(ctx, c, r.ID, "signature, hash and freshness verified to the root of trust", progress)
	}
	ids, said, err := a.takeFile(ctx, c, r)
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		ch := &control.Change{Action: "install", Text: said, Results: []control.Process{}, Reopened: []string{}}
		return ch, a.call(ctx, func() {
			a.pass(a.runCtx(), "", progress) // a halt may take out
			ch.State = a.shown.Load().status.State
		})
	}
	var sum *control.Change
	for _, id := range ids {
		ch, err := a.install(ctx, c, id, "the file is the one that signed metadata names", progress)
		switch {
		case err != nil && sum == nil:
			return nil, err
		case err != nil: // what went before is done: that must not look like nothing
			sum.Text = strings.TrimPrefix(sum.Text+fmt.Sprintf(". %s is not installed: %v", id, err), ". ")
		case sum == nil:
			sum = ch
		default:
			joined(sum, ch)
		}
	}
	return sum, nil
}

// install is Install for one release that verified metadata names.
func (a *Agent) install(ctx context.Context, c control.Caller, id, verified string, progress func(control.Event)) (*control.Change, error) {
	var o repository.Offer
	var cerr *control.Error
	var busy *control.Error
	err := a.call(ctx, func() {
		if o, cerr = a.offerFor(id); cerr == nil && o.Kind == release.KindBaseline {
			busy = a.mayInstallFiles(o)
		} else if cerr == nil {
			busy = a.mayInstall(o)
		}
	})
	if err = errors.Join(err, orNil(cerr), orNil(busy)); err != nil {
		return nil, err
	}
	if o.Kind == release.KindBaseline {
		return a.installFiles(ctx, c, o, verified)
	}
	l := a.load(ctx, o)
	if l.problem.Code != "" {
		return nil, &control.Error{Code: control.CodeConflict, Text: l.problem.Text}
	}
	ch := &control.Change{Action: "install", Release: o.ID, Sequence: int64(o.Sequence), Product: o.Product, Verified: verified}
	err = a.call(ctx, func() {
		a.keep(l)
		before := a.shown.Load()
		lifted, serr := a.storeInstall(c, o)
		if serr != nil {
			cerr = control.Errorf(control.CodeInternal, "cannot install: %v", serr)
			return
		}
		ch.Lifted = lifted
		a.setInForceIfNew(o)
		a.dirty = true
		a.pass(a.runCtx(), o.Product, progress)
		a.fill(ch, before, o.Product)
		ch.Changed = ch.Changed || lifted
		if !ch.Changed && ch.Coverage.Open() == 0 {
			ch.Text = o.ID + " is already in force; nothing to do"
			if h, r, ok := a.keptOut(a.wishes(), a.deviceFor()); ok && r.Code != "" {
				ch.Text += fmt.Sprintf(". %s, sequence %d, is %s; %s", h.ID, h.Sequence, r.Text, a.liftHold(h.ID))
			}
		}
	})
	if err = errors.Join(err, orNil(cerr)); err != nil {
		return nil, err
	}
	return ch, nil
}

// orNil keeps a nil *control.Error from becoming a non-nil error.
func orNil(e *control.Error) error {
	if e == nil {
		return nil
	}
	return e
}

// mayInstall refuses what even an operator's word does not bring into force.
func (a *Agent) mayInstall(o repository.Offer) *control.Error {
	w := a.wishes()
	delete(w.Broken, o.ID) // its load, which follows, has the last word
	switch r, ok := installable(o, a.deviceFor(), w); {
	case r.Code == "held" && a.policy != nil && a.policy.Held(o.ID):
		return &control.Error{Code: control.CodeConflict, Text: o.ID + " is held by the policy", Hint: "the owner of the policy decides: " + a.o.Config.Policy.File}
	case !ok && r.Code != "held": // an operator's hold is what install lifts
		return &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("%s cannot be installed: %s", o.ID, r.Text)}
	case !a.verdict.Eligible:
		return &control.Error{Code: control.CodeNotEligible, Text: "the device is not eligible: " + strings.Join(openChecks(a.verdict), ", "), Hint: "hotpatch eligibility says what to do"}
	case !a.fresh(a.o.Now()) && w.InForce[o.Product] != o.ID && a.local[o.ID].ID == "":
		return &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("the repository's metadata ended %s: nothing new is applied", stamp(a.expires)), Hint: "hotpatch check; is the clock right?"}
	}
	if p := a.paused(); p.Code != "" {
		hint := "hotpatch resume"
		if p.Text == pausedByPolicy {
			hint = "the owner of the policy decides: pause in " + a.o.Config.Policy.File
		}
		return &control.Error{Code: control.CodeConflict, Text: p.Text, Hint: hint}
	}
	for _, other := range a.allOffers() {
		if other.Product == o.Product && w.InForce[o.Product] == other.ID && other.Baseline == o.Baseline && other.Sequence > o.Sequence {
			return &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("%s, sequence %d, is in force and newer", other.ID, other.Sequence), Hint: "hotpatch rollback " + other.ID}
		}
	}
	return nil
}

func (a *Agent) storeInstall(c control.Caller, o repository.Offer) (lifted bool, err error) {
	var forgiven harms
	err = a.update(func(tx *store.Tx) error {
		holds, err := tx.Holds()
		if err != nil {
			return err
		}
		if forgiven, _, err = a.forgive(tx, o.ID); err != nil {
			return err
		}
		if _, lifted = holds[o.ID]; lifted {
			if err := tx.DeleteHold(o.ID); err != nil {
				return err
			}
		}
		if err := forgetTakenOut(tx, o.ID); err != nil {
			return err
		}
		if err := tx.PutInstalled(store.Install{ID: o.ID, Product: o.Product, By: c.User, Since: a.o.Now()}); err != nil {
			return err
		}
		text := "install " + o.ID
		if lifted {
			text += ", its hold is lifted"
		}
		_, err = tx.Append(stamped(control.HistoryEntry{Action: "install", Product: o.Product, Release: o.ID, Text: text}, c, a))
		return err
	})
	if err == nil {
		a.harms = forgiven
	}
	return lifted, err
}

func (a *Agent) setInForceIfNew(o repository.Offer) {
	if a.wishes().InForce[o.Product] != o.ID {
		a.setInForce(o.Product, &o, "")
	}
}

// fill completes a change from what is published now.
func (a *Agent) fill(ch *control.Change, before *snapshot, product string) {
	now := a.shown.Load()
	ch.State, ch.Results, ch.Reopened = now.status.State, []control.Process{}, []string{}
	for _, p := range now.processes.Processes {
		mine := slices.DeleteFunc(slices.Clone(p.Images), func(im control.Image) bool { return im.Product != product })
		if len(mine) == 0 {
			continue
		}
		p.Images = mine
		ch.Results = append(ch.Results, p)
		ch.Coverage.Processes++
		for _, im := range mine {
			ch.Coverage.Add(im.State)
		}
	}
	ch.Changed = changedFor(before, now, product)
}

// changedFor compares releases in force and image states of a product.
func changedFor(before, now *snapshot, product string) bool {
	sum := func(s *snapshot) string {
		var b bytes.Buffer
		for _, r := range s.status.Releases {
			if r.Product == product {
				fmt.Fprintln(&b, r.ID)
			}
		}
		for _, p := range s.processes.Processes {
			for _, im := range p.Images {
				if im.Product == product {
					fmt.Fprintln(&b, p.PID, p.Start, im.Base, im.Release, im.State)
				}
			}
		}
		return b.String()
	}
	return sum(before) != sum(now)
}
