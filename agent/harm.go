package agent

import (
	"encoding/json"
	"maps"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher/target"
)

// A release that harms the processes of one ordinary user is taken out of his
// processes only. Anybody may crash what is his, as often as he likes: he must not be
// able to take a fix away from others by it.

// harm is why a release is kept out of the processes of an owner.
type harm struct {
	Since time.Time `json:"since"`
	Text  string    `json:"text"`
}

// harms are all of them: owner → release.
type harms map[string]map[string]harm

const (
	settingHarms = "guard/owners" // JSON: harms
	// maxHarms bounds the owners that are remembered; more of them do not come by accident.
	maxHarms = 1000
	// ordinaryUsers is the first number of users who are people (login.defs(5), UID_MIN).
	ordinaryUsers = 1000
)

// services are the security identifiers of the system itself, of services and of
// application pools (learn.microsoft.com, well-known SIDs).
var services = []string{"S-1-5-18", "S-1-5-19", "S-1-5-20", "S-1-5-80-", "S-1-5-82-"}

// ownerOf is the ordinary user whose process it is, "" for the system's own.
func ownerOf(info target.Info) string {
	if info.SID != "" {
		for _, s := range services {
			if info.SID == s || strings.HasSuffix(s, "-") && strings.HasPrefix(info.SID, s) {
				return ""
			}
		}
		return info.SID
	}
	if info.UID >= ordinaryUsers {
		return strconv.Itoa(info.UID)
	}
	return ""
}

// harmed tells whether a release is kept out of a process by what the guard saw.
func (v View) harmed(info target.Info, release string) (reason, bool) {
	h, ok := v.Harms[ownerOf(info)][release]
	if !ok {
		return reason{}, false
	}
	return because("guard", "the health guard keeps %s out of the processes of %s since %s: %s", release, info.User, stamp(h.Since), h.Text), true
}

// takeFrom keeps a release out of an owner's processes from now on.
func (a *Agent) takeFrom(owner, release, product, why string) {
	next := a.harms.clone()
	if next[owner] == nil {
		if len(next) >= maxHarms {
			return
		}
		next[owner] = map[string]harm{}
	}
	if _, ok := next[owner][release]; ok {
		return
	}
	next[owner][release] = harm{a.o.Now(), why}
	text := release + " is taken out of the processes of user " + owner + ", and kept out: " + why
	err := a.update(func(tx *store.Tx) error {
		if err := setting(tx, settingHarms, next); err != nil {
			return err
		}
		_, err := tx.Append(stamped(control.HistoryEntry{Action: "guard", Product: product, Release: release, Text: text}, healthGuard, a))
		return err
	})
	if err == nil {
		a.harms, a.dirty = next, true
		a.log.Error(text, zap.String("release", release))
	}
}

// forgive lets a release into all processes again, by an operator's word about
// it; tx is the transaction of that word. What it returns is in force when that is written.
func (a *Agent) forgive(tx *store.Tx, release string) (next harms, found bool, err error) {
	next = a.harms.clone()
	for owner, of := range next {
		if _, ok := of[release]; !ok {
			continue
		}
		found = true
		if delete(of, release); len(of) == 0 {
			delete(next, owner)
		}
	}
	if found {
		err = setting(tx, settingHarms, next)
	}
	return next, found, err
}

func (h harms) clone() harms {
	out := harms{}
	for owner, of := range h {
		out[owner] = maps.Clone(of)
	}
	return out
}

// readHarms is for readState. What cannot be read is learned anew.
func readHarms(tx *store.Tx) harms {
	out := harms{}
	if b, ok := tx.Get(settingHarms); ok && json.Unmarshal(b, &out) != nil {
		return harms{}
	}
	return out
}
