package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
)

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
	out, files := a.inForceOrMemory(before, id), a.phaseOf(id)
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
	switch text := a.wentBackOnDisk(id, files); {
	case text != "":
		ch.Text = strings.TrimPrefix(ch.Text+"; "+text, "; ")
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
	if product == "" {
		product = a.productOfFiles(id)
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
