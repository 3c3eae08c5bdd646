package agent

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

var _ control.Service = (*Agent)(nil)

// Status, Eligibility and Offers read the published snapshot.
func (a *Agent) Status(context.Context, control.Caller) (*control.Status, error) {
	s := a.asOfNow(a.shown.Load().status)
	return &s, nil
}

func (a *Agent) Eligibility(context.Context, control.Caller) (*control.Eligibility, error) {
	s := a.shown.Load().eligibility
	return &s, nil
}

func (a *Agent) Offers(context.Context, control.Caller) (*control.Offers, error) {
	s := a.shown.Load().offers
	return &s, nil
}

// Processes reads the published snapshot and narrows it.
func (a *Agent) Processes(_ context.Context, _ control.Caller, q control.ProcessQuery) (*control.Processes, error) {
	s := a.shown.Load().processes
	all := s.Processes
	s.Processes = []control.Process{}
	for _, p := range all {
		if q.PID != 0 && p.PID != q.PID {
			continue
		}
		if q.Vulnerable {
			p.Images = slices.DeleteFunc(slices.Clone(p.Images), func(im control.Image) bool { return !im.State.Open() })
			if len(p.Images) == 0 {
				continue
			}
		}
		s.Processes = append(s.Processes, p)
	}
	return &s, nil
}

// Check refreshes the repository now.
func (a *Agent) Check(ctx context.Context, c control.Caller) (*control.Status, error) {
	checked := a.refresh(ctx)
	// After a failure too: who asks for the status next must see it there.
	err := a.call(ctx, func() { a.dirty = true; a.pass(a.runCtx(), "", nil) })
	var re *repository.Error
	switch {
	case errors.As(checked, &re):
		return nil, &control.Error{Code: control.CodeConflict, Text: "repository: " + re.Text, Hint: re.Hint}
	case checked != nil:
		return nil, checked
	case err != nil:
		return nil, err
	}
	return a.Status(ctx, c)
}

// runCtx is for work that a caller began: the caller may go, the work is
// bounded by itself.
func (a *Agent) runCtx() context.Context { return context.Background() }

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
	verified := ""
	if r.File != nil {
		id, err := a.takeFile(ctx, c, r)
		if err != nil {
			return nil, err
		}
		r.ID, verified = id, "the file is the one that signed metadata names"
	}
	var o repository.Offer
	var cerr *control.Error
	var busy *control.Error
	err := a.call(ctx, func() {
		if o, cerr = a.offerFor(r.ID); cerr == nil {
			busy = a.mayInstall(o)
		}
	})
	if err = errors.Join(err, orNil(cerr), orNil(busy)); err != nil {
		return nil, err
	}
	l := a.load(ctx, o)
	if l.problem.Code != "" {
		return nil, &control.Error{Code: control.CodeConflict, Text: l.problem.Text}
	}
	ch := &control.Change{Action: "install", Release: o.ID, Sequence: int64(o.Sequence), Product: o.Product, Verified: verified}
	if verified == "" {
		ch.Verified = "signature, hash and freshness verified to the root of trust"
	}
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
		if other.Product == o.Product && w.InForce[o.Product] == other.ID && other.Sequence > o.Sequence {
			return &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("%s, sequence %d, is in force and newer", other.ID, other.Sequence), Hint: "hotpatch rollback " + other.ID}
		}
	}
	return nil
}

func (a *Agent) storeInstall(c control.Caller, o repository.Offer) (lifted bool, err error) {
	err = a.update(func(tx *store.Tx) error {
		holds, err := tx.Holds()
		if err != nil {
			return err
		}
		if _, lifted = holds[o.ID]; lifted {
			if err := tx.DeleteHold(o.ID); err != nil {
				return err
			}
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
	return lifted, err
}

func (a *Agent) setInForceIfNew(o repository.Offer) {
	if a.wishes().InForce[o.Product] != o.ID {
		a.setInForce(o.Product, &o)
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

// takeFile verifies a release that came as a file: named by the metadata we
// trust, or by metadata beside it that verifies to our root.
func (a *Agent) takeFile(ctx context.Context, c control.Caller, r control.InstallRequest) (string, error) {
	var o repository.Offer
	err := errors.New("no trusted metadata names it")
	if a.client != nil {
		o, err = a.client.VerifyFile(r.File)
	}
	own := false
	if err != nil && len(r.Metadata) > 0 {
		root, rerr := ReadRoot(a.o.Config.Repository.Root)
		if rerr != nil {
			return "", &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("cannot read the root of trust: %v", rerr)}
		}
		var floors repository.Floors
		if a.client != nil {
			floors = a.client.Floors()
		}
		o, err = repository.VerifyWithMetadata(root, fileMap(r.Metadata), r.File, floors, a.o.Now())
		own = true
	}
	if err != nil {
		e := &control.Error{Code: control.CodeConflict, Text: "the file is refused: " + err.Error(), Hint: "put the repository's metadata folder beside the file, or run hotpatch check first"}
		var re *repository.Error
		if errors.As(err, &re) {
			e.Text = "the file is refused: " + re.Text
		}
		return "", e
	}
	if _, err := release.Open(r.File); err != nil {
		return "", &control.Error{Code: control.CodeConflict, Text: "the file is refused: " + err.Error()}
	}
	if err := a.keepLocal(o.ID, r.File); err != nil {
		return "", control.Errorf(control.CodeInternal, "the release cannot be stored: %v", err)
	}
	var serr error
	err = a.call(ctx, func() {
		a.verified = true
		if !own {
			return
		}
		local := map[string]repository.Offer{}
		for k, v := range a.local {
			local[k] = v
		}
		local[o.ID] = o
		if serr = a.update(func(tx *store.Tx) error { return setting(tx, settingLocal, local) }); serr == nil {
			a.local = local
		}
	})
	return o.ID, errors.Join(err, serr)
}

// Rollback takes a release out, back to the one before, and holds it.
func (a *Agent) Rollback(ctx context.Context, c control.Caller, r control.RollbackRequest, progress func(control.Event)) (*control.Change, error) {
	progress, over := whileAsked(progress)
	defer over()
	ch := &control.Change{Action: "rollback"}
	var cerr *control.Error
	err := a.call(ctx, func() { cerr = a.rollback(c, r.ID, ch, progress) })
	if err = errors.Join(err, orNil(cerr)); err != nil {
		return nil, err
	}
	return ch, nil
}

func (a *Agent) rollback(c control.Caller, id string, ch *control.Change, progress func(control.Event)) *control.Error {
	before := a.shown.Load()
	if id == "" {
		if before.status.Release == nil {
			return &control.Error{Code: control.CodeNotFound, Text: "no release is in force", Hint: "hotpatch status"}
		}
		id = before.status.Release.ID
	}
	product, seq, cves := a.whatIs(id, before)
	if product == "" {
		return &control.Error{Code: control.CodeNotFound, Text: fmt.Sprintf("no release %q is known here", id), Hint: "hotpatch list"}
	}
	ch.Release, ch.Product, ch.Sequence = id, product, seq
	out := a.inForceOrMemory(before, id)
	held, err := a.hold(c, id, product, "rolled back", "rollback")
	if err != nil {
		return control.Errorf(control.CodeInternal, "cannot roll back: %v", err)
	}
	a.dirty = true
	a.preload(product)
	a.pass(a.runCtx(), product, progress)
	a.fill(ch, before, product)
	a.wentBack(ch, cves, out)
	ch.Changed = ch.Changed || held
	switch {
	case !ch.Changed:
		ch.Text = id + " is out already and held"
	case !out:
		ch.Text = id + " is not in force here, so that nothing is taken out; it is held from now on"
		if ch.Previous != "" {
			ch.Text += ". In force stays " + ch.Previous
		}
	}
	return nil
}

// whatIs finds a release by id, wherever it is known: offered, in force, or in
// a process only. product is "" if it is not known at all.
func (a *Agent) whatIs(id string, s *snapshot) (product string, sequence int64, cves []string) {
	if o, ok := a.offerOf(id); ok {
		product, sequence, cves = o.Product, int64(o.Sequence), o.CVEs
	}
	for _, rel := range s.status.Releases {
		if rel.ID == id {
			product, sequence, cves = rel.Product, rel.Sequence, rel.CVEs
		}
	}
	for _, r := range a.allRecords() {
		if r.Release == id && product == "" {
			product, sequence = r.Product, int64(r.Sequence)
		}
	}
	return product, sequence, cves
}

// inForceOrMemory tells whether a release is in force, or still in some process.
func (a *Agent) inForceOrMemory(s *snapshot, id string) bool {
	return slices.ContainsFunc(s.status.Releases, func(r control.ActiveRelease) bool { return r.ID == id }) ||
		slices.ContainsFunc(a.allRecords(), func(r patcher.Record) bool { return r.Release == id && r.Live() })
}

// wentBack tells which release of the product is in force now, and which CVEs
// are open again if one was taken out.
func (a *Agent) wentBack(ch *control.Change, cves []string, out bool) {
	fixed := map[string]bool{}
	for _, r := range a.shown.Load().status.Releases {
		if r.Product == ch.Product {
			ch.Previous = r.ID
			for _, x := range r.CVEs {
				fixed[x] = true
			}
		}
	}
	for _, x := range cves {
		if out && !fixed[x] && !slices.Contains(ch.Reopened, x) {
			ch.Reopened = append(ch.Reopened, x)
		}
	}
}

// preload makes the release that will be in force after a rollback ready, so
// that the pass can swap from one to the other in one freeze.
func (a *Agent) preload(product string) {
	v, _ := a.view(product)
	c, ok := v.Choices[product]
	if !ok || c.Want == nil {
		return
	}
	if l := a.releases[c.Want.ID]; l == nil || l.problem.Code != "" {
		ctx, cancel := context.WithTimeout(a.runCtx(), openTimeout)
		defer cancel()
		a.keep(a.load(ctx, *c.Want))
	}
}

// hold stores the operator's "not this release"; false if it was held already.
func (a *Agent) hold(c control.Caller, id, product, why, action string) (held bool, err error) {
	err = a.update(func(tx *store.Tx) error {
		holds, err := tx.Holds()
		if err != nil {
			return err
		}
		if _, held := holds[id]; held {
			return nil
		}
		if err := tx.PutHold(store.Hold{ID: id, Product: product, By: c.User, Since: a.o.Now(), Reason: why}); err != nil {
			return err
		}
		if err := tx.DeleteInstalled(id); err != nil {
			return err
		}
		held = true
		_, err = tx.Append(stamped(control.HistoryEntry{Action: action, Product: product, Release: id, Text: why}, c, a))
		return err
	})
	return held && err == nil, err
}

// simple runs a small change in the loop and tells what it came to.
func (a *Agent) simple(ctx context.Context, action, id string, fn func() (changed bool, text string, err error)) (*control.Change, error) {
	ch := &control.Change{Action: action, Release: id, Results: []control.Process{}, Reopened: []string{}}
	var ferr error
	err := a.call(ctx, func() {
		var changed bool
		before := a.shown.Load()
		if id != "" {
			ch.Product, ch.Sequence, _ = a.whatIs(id, before)
		}
		if changed, ch.Text, ferr = fn(); ferr != nil {
			return
		}
		a.dirty = true
		a.pass(a.runCtx(), "", nil)
		if ch.Product != "" {
			a.fill(ch, before, ch.Product)
		}
		ch.Changed, ch.State = changed, a.shown.Load().status.State
	})
	if err = errors.Join(err, ferr); err != nil {
		return nil, err
	}
	return ch, nil
}

// Hold says no to a release. One that is in force is taken out.
func (a *Agent) Hold(ctx context.Context, c control.Caller, id, why string) (*control.Change, error) {
	if !release.ValidID(id) {
		return nil, control.Errorf(control.CodeUsage, "%q is not the id of a release", id)
	}
	out, product, cves := false, "", []string(nil)
	ch, err := a.simple(ctx, "hold", id, func() (bool, string, error) {
		w := a.wishes()
		if r, held := w.Hold(id); held {
			return false, id + " is " + r.Text, nil
		}
		product, _, cves = a.whatIs(id, a.shown.Load())
		out = a.inForceOrMemory(a.shown.Load(), id)
		if _, err := a.hold(c, id, product, why, "hold"); err != nil {
			return false, "", err
		}
		if product != "" {
			a.preload(product)
		}
		return true, id + " is held until: hotpatch release-hold " + id, nil
	})
	if err != nil || !ch.Changed {
		return ch, err
	}
	switch {
	case out:
		a.wentBack(ch, cves, out)
		ch.Text = id + " was in force and is taken out, " + backTo(ch.Previous) + ". It is held until: hotpatch release-hold " + id
	case product == "":
		ch.Text += ". No release of that id is known here: the hold counts if one comes; if the id is misspelt, hotpatch list has the right one"
	}
	return ch, nil
}

// backTo says what is in force after a release was taken out.
func backTo(previous string) string {
	if previous == "" {
		return "no release of this product is in force now"
	}
	return "back to " + previous
}

// ReleaseHold lifts a hold of the operator; one of the policy is the policy's to lift.
func (a *Agent) ReleaseHold(ctx context.Context, c control.Caller, id, why string) (*control.Change, error) {
	return a.simple(ctx, "release-hold", id, func() (bool, string, error) {
		found := false
		err := a.update(func(tx *store.Tx) error {
			holds, err := tx.Holds()
			if err != nil {
				return err
			}
			if _, found = holds[id]; !found {
				return nil
			}
			if err := tx.DeleteHold(id); err != nil {
				return err
			}
			_, err = tx.Append(stamped(control.HistoryEntry{Action: "release-hold", Release: id, Text: why}, c, a))
			return err
		})
		switch {
		case err != nil:
			return false, "", err
		case a.policy != nil && a.policy.Held(id):
			return found, id + " is still held by the policy", nil
		case !found:
			return false, id + " is not held", nil
		}
		return true, id + " is not held any more", nil
	})
}

// Pause stops new work; what is applied stays.
func (a *Agent) Pause(ctx context.Context, c control.Caller) (*control.Change, error) {
	return a.setPaused(ctx, c, true)
}

// Resume ends a pause of the operator.
func (a *Agent) Resume(ctx context.Context, c control.Caller) (*control.Change, error) {
	return a.setPaused(ctx, c, false)
}

func (a *Agent) setPaused(ctx context.Context, c control.Caller, paused bool) (*control.Change, error) {
	action := map[bool]string{true: "pause", false: "resume"}[paused]
	return a.simple(ctx, action, "", func() (bool, string, error) {
		changed := false
		note := ""
		err := a.update(func(tx *store.Tx) error {
			_, lost := tx.Lost()
			accept := lost && !paused // the operator has looked at what the damage may have cost
			if changed = tx.Paused() != paused || accept; !changed {
				return nil
			}
			if accept {
				note = "the loss of the damaged state is accepted"
				if err := tx.AcceptLoss(); err != nil {
					return err
				}
			}
			if err := tx.SetPaused(paused); err != nil {
				return err
			}
			_, err := tx.Append(stamped(control.HistoryEntry{Action: action, Text: note}, c, a))
			return err
		})
		text := map[bool]string{true: "paused: nothing new is applied, what is applied stays", false: "resumed"}[paused]
		if !paused && a.policy != nil && a.policy.Pause {
			text = "the policy still says pause"
		}
		if note != "" && err == nil {
			text += "; " + note
			a.notices = slices.DeleteFunc(a.notices, func(n control.Attention) bool { return n.Code == "state-damaged" })
		}
		return changed, text, err
	})
}

// Verify reads every site again from memory and compares it with the records.
func (a *Agent) Verify(ctx context.Context, c control.Caller) (*control.Verify, error) {
	doc := &control.Verify{OK: true, Mismatches: []control.Mismatch{}, Unread: []control.Mismatch{}}
	err := a.call(ctx, func() {
		lives := map[target.ID]bool{}
		for _, r := range a.allRecords() {
			if !r.Live() {
				continue
			}
			exe := ""
			if p := a.procs[r.ID]; p != nil {
				exe = programOf(p.info)
			}
			bad, err := a.verifyOne(ctx, r)
			if errors.Is(err, target.ErrGone) {
				continue
			}
			lives[r.ID] = true
			doc.Images++
			doc.Sites += len(r.Sites)
			m := control.Mismatch{PID: r.ID.PID, Start: r.ID.Start, Exe: exe, Image: r.Image}
			if err != nil {
				m.Text = err.Error()
				doc.Unread = append(doc.Unread, m)
			}
			for _, x := range bad {
				m.Function, m.Address, m.RVA = x.Function, control.Addr(x.At), control.Addr(x.At-r.Base)
				m.Expected, m.Found = hex.EncodeToString(x.Want), hex.EncodeToString(x.Have)
				doc.Mismatches = append(doc.Mismatches, m)
			}
		}
		doc.Processes = len(lives)
		a.store.View(func(tx *store.Tx) error {
			if err := tx.VerifyHistory(); err != nil {
				doc.History = err.Error()
			}
			return nil
		})
	})
	doc.OK = len(doc.Mismatches) == 0 && len(doc.Unread) == 0 && doc.History == ""
	return doc, err
}

func (a *Agent) verifyOne(ctx context.Context, r patcher.Record) ([]patcher.Mismatch, error) {
	return aside(ctx, a, target.Info{ID: r.ID, Image: r.Image}, "verifying", openTimeout, func(ctx context.Context) ([]patcher.Mismatch, error) {
		p, err := a.o.Backend.Open(ctx, r.ID)
		if err != nil {
			return nil, err
		}
		defer p.Close()
		return patcher.Verify(p, r)
	})
}

// History returns what was done, newest first.
func (a *Agent) History(_ context.Context, _ control.Caller, limit int) (*control.History, error) {
	doc := &control.History{Entries: []control.HistoryEntry{}}
	err := a.store.View(func(tx *store.Tx) error {
		e, err := tx.History(limit)
		if err != nil {
			return err
		}
		doc.Entries = append(doc.Entries, e...)
		if err := tx.VerifyHistory(); err != nil {
			doc.Broken = err.Error()
		}
		return nil
	})
	return doc, err
}

// Explain tells what lies at an address: so that a crash can be told from a fix.
func (a *Agent) Explain(ctx context.Context, _ control.Caller, pid int, address uint64) (*control.Explain, error) {
	doc := &control.Explain{PID: pid, Address: control.Addr(address), Kind: "elsewhere", Text: "nothing of ours lies there"}
	found := false
	err := a.call(ctx, func() {
		for id, p := range a.procs {
			if id.PID != pid {
				continue
			}
			found = true
			doc.Start, doc.Exe = id.Start, programOf(p.info)
			for _, im := range p.images {
				end := im.Base + target.Addr(im.Identity.SizeOfImage)
				if at := target.Addr(address); at >= im.Base && at < end {
					doc.Kind, doc.Image, doc.Offset = "image", im.Name, uint64(at-im.Base)
					doc.Text = fmt.Sprintf("in %s, %x bytes from its base", im.Name, doc.Offset)
				}
			}
		}
		for _, r := range a.allRecords() {
			if r.ID.PID == pid {
				explain(doc, r, target.Addr(address))
			}
		}
	})
	if err == nil && !found {
		err = &control.Error{Code: control.CodeNotFound, Text: fmt.Sprintf("no process %d", pid)}
	}
	return doc, err
}

func explain(doc *control.Explain, r patcher.Record, at target.Addr) {
	set := func(kind, function string, offset target.Addr, text string) {
		doc.Kind, doc.Function, doc.Offset, doc.Image, doc.Release = kind, function, uint64(offset), r.Image, r.Release
		doc.Text = text
	}
	if at >= r.Annex && at < r.AnnexEnd {
		set("annex", "", at-r.Annex, fmt.Sprintf("in the memory that %s keeps near %s", r.Release, r.Image))
	}
	var nearest *patcher.Site
	for i := range r.Sites {
		s := &r.Sites[i]
		entry := r.Base + target.Addr(s.RVA)
		switch {
		case s.Pad != nil && at >= s.Pad.At && at < s.Pad.At+target.Addr(len(s.Pad.New)):
			set("pad", s.Function, at-s.Pad.At, "the long jump before "+s.Function)
		case at >= s.At && at < s.At+target.Addr(len(s.New)):
			set("site", s.Function, at-entry, "the redirected entry of "+s.Function)
		case at >= entry && at < entry+target.Addr(s.Length):
			set("old-function", s.Function, at-entry, "the old body of "+s.Function+", which old callers may still be in")
		case s.Slot != 0 && at >= s.Slot && at < s.Slot+8:
			set("slot", s.Function, at-s.Slot, "the jump slot of "+s.Function)
		case s.Target != 0 && at >= s.Target && at < r.AnnexEnd && (nearest == nil || s.Target > nearest.Target):
			nearest = s
		}
	}
	if doc.Kind == "annex" && nearest != nil {
		set("new-function", nearest.Function, at-nearest.Target, fmt.Sprintf("in or behind the new %s of %s", nearest.Function, r.Release))
	}
}

// maxDiagnoseHistory bounds the history in a support file.
const maxDiagnoseHistory = 1000

// Diagnose packs what a support request needs; no memory of any process.
func (a *Agent) Diagnose(ctx context.Context, c control.Caller) ([]byte, error) {
	s := a.shown.Load()
	h, err := a.History(ctx, c, maxDiagnoseHistory)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	z := zip.NewWriter(&buf)
	put := func(name string, v any) error {
		f, err := z.Create(name)
		if err != nil {
			return err
		}
		e := json.NewEncoder(f)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	recs := a.allRecords()
	err = errors.Join(put("status.json", s.status), put("eligibility.json", s.eligibility), put("list.json", s.offers),
		put("processes.json", s.processes), put("records.json", recs), put("history.json", h))
	err = errors.Join(err, z.Close()) // before the bytes are taken: Close writes the directory
	return buf.Bytes(), err
}

// Subscribe streams what happens until ctx ends.
func (a *Agent) Subscribe(ctx context.Context, _ control.Caller) (<-chan control.Event, error) {
	ch := a.hub.subscribe()
	go func() {
		select {
		case <-ctx.Done():
		case <-a.done:
		}
		a.hub.leave(ch)
	}()
	return ch, nil
}

// textfileTemp is the suffix of a metrics file being written.
const textfileTemp = ".tmp"

// WriteMetrics replaces the textfile of a collector as a whole.
func (a *Agent) WriteMetrics(ctx context.Context, path string) error {
	b, err := a.Metrics(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+textfileTemp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(path+textfileTemp, filepath.Clean(path))
}
