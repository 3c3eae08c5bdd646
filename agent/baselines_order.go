package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

// mayInstallFiles refuses what even an operator's word does not bring onto the disk.
func (a *Agent) mayInstallFiles(o repository.Offer) *control.Error {
	in := a.bases.standing[o.Product]
	if r, ok := fitsFiles(o, a.deviceFor(), in); !ok {
		return &control.Error{Code: control.CodeConflict, Text: fmt.Sprintf("%s cannot be installed: %s", o.ID, r.Text)}
	}
	if a.bases.area == nil {
		return &control.Error{Code: control.CodeConflict, Text: "what is staged cannot be read: " + a.bases.areaErr.Error()}
	}
	o.Kind, o.Sequence = release.KindHotpatch, math.MaxUint32 // no hotpatch is newer than a baseline
	return a.mayInstall(o)
}

// installFiles stages a baseline because an operator asked for it, and lifts a
// hold on it. It takes effect at the next restart, which is not ours to order.
func (a *Agent) installFiles(ctx context.Context, c control.Caller, o repository.Offer, verified string) (*control.Change, error) {
	ch := &control.Change{Action: "install", Release: o.ID, Sequence: int64(o.Sequence), Product: o.Product, Verified: verified}
	var cerr error
	var was onDisk
	ours := false // the loop may be at it
	err := a.call(ctx, func() {
		was = a.phaseOf(o.ID)
		if ch.Lifted, cerr = a.storeInstall(c, o); cerr != nil {
			return
		}
		delete(a.bases.refused, o.ID)
		a.dirty = true
		a.pass(a.runCtx(), "", nil) // begins
		ours = a.phaseOf(o.ID) == "" && !a.bases.busy[o.Product]
		a.bases.busy[o.Product] = a.bases.busy[o.Product] || ours
	})
	if err = errors.Join(err, cerr); err != nil {
		return nil, err
	}
	if ours {
		r, gone, serr := a.stageSet(ctx, o)
		err = a.call(ctx, func() { delete(a.bases.busy, o.Product); a.staged(o, r, gone, serr) })
	} else {
		err = a.waitStaged(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	err = a.call(ctx, func() {
		before := a.shown.Load()
		a.dirty = true
		a.pass(a.runCtx(), "", nil)
		a.fill(ch, before, o.Product)
		now := a.phaseOf(o.ID)
		ch.Changed = now != was || ch.Lifted
		switch why := a.bases.refused[o.ID].why; {
		case why.Code != "":
			cerr = &control.Error{Code: control.CodeConflict, Text: why.Text}
		case now == baseline.Staged:
			ch.Text = o.ID + " is staged: its files take effect at the next restart of the device, which hotpatchd does not do by itself"
		case now == baseline.Active || now == provedFiles:
			ch.Text = o.ID + " is in force"
		default:
			cerr = &control.Error{Code: control.CodeConflict, Text: o.ID + " is not staged", Hint: "hotpatch list says why"}
		}
	})
	if err = errors.Join(err, cerr); err != nil {
		return nil, err
	}
	return ch, nil
}

// stagedWait is how soon it is looked again whether the loop has staged a release.
const stagedWait = 50 * time.Millisecond

// waitStaged waits until the loop's own staging of a product has ended.
func (a *Agent) waitStaged(ctx context.Context, o repository.Offer) error {
	for {
		busy := false
		if err := a.call(ctx, func() { busy = a.bases.busy[o.Product] }); err != nil || !busy {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(stagedWait):
		}
	}
}

// onDisk is how far a release's files are: the phase of their set, "" if there
// is none, or provedFiles.
type onDisk = baseline.Phase

// provedFiles: the release's files are in force, and no old ones are kept.
const provedFiles onDisk = "proved"

// phaseOf is for the loop only.
func (a *Agent) phaseOf(id string) onDisk {
	if p := a.setOf(id).Phase; p != "" {
		return p
	}
	for _, s := range a.bases.standing {
		if s.ID == id {
			return provedFiles
		}
	}
	return ""
}

// inPlace tells whether a release's files are those on the disk.
func (a *Agent) inPlace(id string) bool {
	p := a.setOf(id).Phase
	return p == baseline.Active || p == baseline.Leaving || a.bases.inPlace[id]
}

// setOf is a release's set of files, the zero record if there is none.
func (a *Agent) setOf(id string) baseline.Record {
	if a.bases.area != nil {
		for _, r := range a.bases.area.Records() {
			if r.Release == id {
				return r
			}
		}
	}
	return baseline.Record{}
}

// productOfFiles finds the product of a release that is known by its files only.
func (a *Agent) productOfFiles(id string) string {
	for product, s := range a.bases.standing {
		if s.ID == id {
			return product
		}
	}
	return a.setOf(id).Product
}

// wentBackOnDisk says what became of a release's files when it was held; "" if it has none.
func (a *Agent) wentBackOnDisk(id string, was onDisk) string {
	switch now := a.setOf(id).Phase; {
	case was == baseline.Staged && now == "":
		return "its staged files are taken back: they do not take effect at the next restart"
	case was == baseline.Active && now == baseline.Leaving:
		return "its files stay until the next restart of the device; then those before it are in force again"
	case was == baseline.Leaving && now == baseline.Leaving:
		return "the files before it are in force again at the next restart of the device"
	case was == baseline.Active:
		return "the files before it cannot be brought back: hotpatch status says why"
	case was == provedFiles:
		return "its files stay: they have proved themselves, and those before them are removed"
	}
	return ""
}

// heldFiles: a hold alone keeps a baseline out that would come onto the disk.
func (a *Agent) heldFiles(o repository.Offer, now time.Time) bool {
	if o.Kind != release.KindBaseline || a.bases.standing[o.Product].ID == o.ID {
		return false
	}
	w, d := a.wishes(), a.deviceFor()
	if _, held := w.Hold(o.ID); !held {
		return false
	}
	w.Hold = func(string) (reason, bool) { return reason{}, false }
	_, ok := a.allowsFiles(o, d, w, now)
	return ok
}
