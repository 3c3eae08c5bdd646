package agent

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// Trial is the policy's canary: a release comes into one process first, and into
// the others when it has run there for a while. The zero value is none.
type Trial struct {
	Length time.Duration
	Since  map[string]time.Time // release → when the first process was patched with it
	Out    map[string]bool      // releases that were tried, and came out of it
}

// over tells whether a release has been tried, and else when it will have been;
// zero if it has not begun.
func (t Trial) over(release string, now time.Time) (bool, time.Time) {
	since, begun := t.Since[release]
	switch {
	case t.Length == 0:
		return true, time.Time{}
	case !begun:
		return false, time.Time{}
	}
	ends := since.Add(t.Length)
	return !now.Before(ends), ends
}

// canaryFirst lets a release that is still on trial into one process only. The
// operator's own order, and the way back from what was taken out, wait for nothing.
func canaryFirst(v View, list []Intent) {
	runs := map[string]target.ID{} // release → the first process that runs it, or is about to
	also := map[string]map[target.ID]bool{}
	add := func(release string, id target.ID) {
		if also[release] == nil {
			also[release] = map[target.ID]bool{}
			runs[release] = id
		}
		also[release][id] = true
	}
	for _, in := range list {
		for _, r := range in.Image.Records {
			if r.Live() {
				add(r.Release, in.Proc.Info.ID)
			}
		}
	}
	// The same process whenever it is asked: that of the lowest number, and one of
	// the system's own before a user's, who may have it end whenever he likes.
	order := make([]int, len(list))
	for i := range order {
		order[i] = i
	}
	users := func(in Intent) int { return min(1, len(ownerOf(in.Proc.Info))) }
	slices.SortStableFunc(order, func(x, y int) int {
		return cmp.Or(cmp.Compare(users(list[x]), users(list[y])), cmp.Compare(list[x].Proc.Info.ID.PID, list[y].Proc.Info.ID.PID))
	})
	for _, i := range order {
		in := list[i]
		if in.Kind != DoApply || v.Forced == in.Product || v.Chosen[in.Offer.ID] {
			continue
		}
		wait := func(r reason, again time.Time) {
			list[i].Kind, list[i].State, list[i].Remedy, list[i].Try, list[i].Again = DoNothing, control.PendingImage, control.RemedyWait, nil, again
			list[i].Reason = r
		}
		if in.Offer.Rollout.Halt && !v.Trial.Out[in.Offer.ID] && !also[in.Offer.ID][in.Proc.Info.ID] {
			wait(halted(*in.Offer), time.Time{}) // while it was tried: it goes no further
			continue
		}
		over, ends := v.Trial.over(in.Offer.ID, v.Now)
		if rec := in.Image.Records[in.Product]; rec.Live() && !over {
			_, over = v.Word(rec.Release)
		}
		if over || also[in.Offer.ID][in.Proc.Info.ID] {
			continue
		}
		first, begun := runs[in.Offer.ID]
		if !begun {
			add(in.Offer.ID, in.Proc.Info.ID)
			continue
		}
		wait(because("canary", "%s is tried in process %d first%s", in.Offer.ID, first.PID, until(ends)), ends)
	}
}

func until(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return ", until " + stamp(t)
}

// trial is what the policy says of canaries, and how far they are.
func (a *Agent) trial() Trial {
	if a.policy == nil || a.policy.Guard == GuardOff {
		return Trial{Out: a.letOut}
	}
	return Trial{Length: a.policy.Canary, Since: a.trials, Out: a.letOut}
}

// settingTrials is JSON: release → when the first process was patched with it.
const settingTrials = "releases/trials"

// noteTrials remembers since when releases are on trial: a program that lives
// shorter than a trial must not begin it again and again. What is neither offered nor
// in any process any more is forgotten.
func (a *Agent) noteTrials() {
	now := map[string]time.Time{}
	for _, r := range a.allRecords() {
		if at, ok := now[r.Release]; r.Live() && r.State == patcher.Applied && (!ok || r.At.Before(at)) {
			now[r.Release] = r.At
		}
	}
	for id, at := range a.trials {
		_, offered := a.offerOf(id)
		if _, live := now[id]; live || offered {
			now[id] = at
		}
	}
	for id, at := range now {
		if t := a.o.Now(); at.After(t) { // the clock was set back: it is tried from now on
			now[id] = t
		}
	}
	a.setTrials(now)
	a.noteLetOut()
}

// noteLetOut remembers which releases came out of their trial before their
// publisher halted them: those go on.
func (a *Agent) noteLetOut() {
	now := map[string]bool{}
	for id := range a.trials {
		over, _ := a.trial().over(id, a.o.Now())
		o, offered := a.offerOf(id)
		if a.letOut[id] || over && offered && !o.Rollout.Halt {
			now[id] = true
		}
	}
	if maps.Equal(now, a.letOut) {
		return
	}
	if err := a.update(func(tx *store.Tx) error { return setting(tx, settingLetOut, now) }); err == nil {
		a.letOut = now
	}
}

// settingLetOut is JSON: release → true.
const settingLetOut = "releases/let-out"

// readLetOut is for readState. What cannot be read is noted anew.
func readLetOut(tx *store.Tx) map[string]bool {
	out := map[string]bool{}
	if b, ok := tx.Get(settingLetOut); ok && json.Unmarshal(b, &out) != nil {
		return map[string]bool{}
	}
	return out
}

func (a *Agent) setTrials(now map[string]time.Time) {
	if maps.EqualFunc(now, a.trials, time.Time.Equal) {
		return
	}
	if err := a.update(func(tx *store.Tx) error { return setting(tx, settingTrials, now) }); err == nil {
		a.trials = now
	}
}

// readTrials is for readState. What cannot be read makes a trial begin anew.
func readTrials(tx *store.Tx) map[string]time.Time {
	out := map[string]time.Time{}
	if b, ok := tx.Get(settingTrials); ok && json.Unmarshal(b, &out) != nil {
		return map[string]time.Time{}
	}
	return out
}
