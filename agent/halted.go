package agent

import (
	"encoding/json"
	"time"

	"hotpatchd/agent/store"
)

// A publisher may halt and undo a release, and take that back. This device
// follows at once the first time. One that goes back and forth, by mistake or by
// a job that runs wild, would have every process stopped and swapped each time:
// the second return waits for returnFirst, each further one twice as long up to
// returnMost. Being taken out is never kept waiting, and an operator's install
// begins anew.
const (
	returnFirst = time.Hour
	returnMost  = 24 * time.Hour
	// returnForgets is how long after the last time the count begins anew.
	returnForgets = 7 * 24 * time.Hour
)

// settingHalts: JSON, release id → takenOut.
const settingHalts = "releases/halted"

// takenOut counts how often a release in force was taken out by its publisher's halt.
type takenOut struct {
	Times int       `json:"times"`
	Last  time.Time `json:"last"`
}

// returns is when the release may come back, the zero time if at once.
func (t takenOut) returns() time.Time {
	if t.Times < 2 {
		return time.Time{}
	}
	return t.Last.Add(min(returnMost, returnFirst<<min(t.Times-2, 10)))
}

func haltsIn(tx *store.Tx) map[string]takenOut {
	out := map[string]takenOut{}
	if b, ok := tx.Get(settingHalts); ok {
		if err := json.Unmarshal(b, &out); err != nil {
			return map[string]takenOut{} // it bounds a publisher's mistake only: counted anew
		}
	}
	return out
}

// mendHalts brings down to now what was counted while the clock was ahead: the
// release would come back only when that day has come.
func mendHalts(tx *store.Tx, now time.Time) error {
	all, ahead := haltsIn(tx), false
	for id, t := range all {
		if t.Last.After(now) {
			t.Last, ahead = now, true
			all[id] = t
		}
	}
	if !ahead {
		return nil
	}
	return setting(tx, settingHalts, all)
}

// noteTakenOut counts that id, in force until now, was taken out by its publisher.
func (a *Agent) noteTakenOut(id string) {
	_ = a.update(func(tx *store.Tx) error { // an error is said by update
		all := haltsIn(tx)
		for old := range all {
			if _, ok := a.offerOf(old); !ok { // nothing can bring it back; so that the list stays short
				delete(all, old)
			}
		}
		t, now := all[id], a.o.Now()
		if now.Sub(t.Last) > returnForgets {
			t.Times = 0
		}
		t.Times, t.Last = t.Times+1, now
		all[id] = t
		return setting(tx, settingHalts, all)
	})
}

// forgetTakenOut: an operator wants the release, whatever was before.
func forgetTakenOut(tx *store.Tx, id string) error {
	all := haltsIn(tx)
	if _, ok := all[id]; !ok {
		return nil
	}
	delete(all, id)
	return setting(tx, settingHalts, all)
}
