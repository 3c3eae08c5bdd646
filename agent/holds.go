package agent

import (
	"context"
	"errors"
	"slices"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/store"
)

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
	out, product, cves, files := false, "", []string(nil), onDisk("")
	ch, err := a.simple(ctx, "hold", id, func() (bool, string, error) {
		w := a.wishes()
		if r, held := w.Hold(id); held {
			return false, id + " is " + r.Text, nil
		}
		product, _, cves = a.whatIs(id, a.shown.Load())
		out, files = a.inForceOrMemory(a.shown.Load(), id), a.phaseOf(id)
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
	if text := a.wentBackOnDisk(id, files); text != "" {
		ch.Text += "; " + text
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
		var forgiven harms
		err := a.update(func(tx *store.Tx) error {
			holds, err := tx.Holds()
			if err != nil {
				return err
			}
			var harmed bool
			if forgiven, harmed, err = a.forgive(tx, id); err != nil {
				return err
			}
			_, held := holds[id]
			if found = held || harmed; !found {
				return nil
			}
			if err := tx.DeleteHold(id); err != nil {
				return err
			}
			_, err = tx.Append(stamped(control.HistoryEntry{Action: "release-hold", Release: id, Text: why}, c, a))
			return err
		})
		if err != nil {
			return false, "", err
		}
		a.harms = forgiven
		switch {
		case a.policy != nil && a.policy.Held(id) && found:
			return true, "the operator's hold on " + id + " is lifted; the policy still holds it", nil
		case a.policy != nil && a.policy.Held(id):
			return false, id + " is still held by the policy: its owner lifts that", nil
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
		if !changed && err == nil {
			text = map[bool]string{true: "it was paused already; nothing to do", false: "it was not paused; nothing to do"}[paused]
		}
		if !paused && a.policy != nil && a.policy.Pause {
			text = map[bool]string{true: "resumed, but the policy still says pause", false: "the policy still says pause"}[changed]
		}
		if note != "" && err == nil {
			text += "; " + note
			a.notices = slices.DeleteFunc(a.notices, func(n control.Attention) bool { return n.Code == "state-damaged" })
		}
		return changed, text, err
	})
}
