package agent

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/eligibility"
)

const (
	settingSinces = "status/since"       // JSON: what → since when it is so
	settingChecks = "eligibility/checks" // JSON: check → checkStands

	// maxSinces bounds what is kept of times, and maxSinceKey one name among them.
	maxSinces   = 256
	maxSinceKey = 160
)

// sinces remembers since when things are as they are, over restarts of the
// daemon: who asks wants to know how long a device has been in trouble, not how
// long somebody has been looking. A thing that is not asked for in a whole round
// has ended.
type sinces struct {
	at     map[string]time.Time
	asked  map[string]bool // in this round; true: to be kept over our end
	stored map[string]time.Time
}

func newSinces(stored map[string]time.Time) sinces {
	s := sinces{at: map[string]time.Time{}, asked: map[string]bool{}, stored: stored}
	maps.Copy(s.at, stored)
	return s
}

// of is since when what is named so is so: now, if it was not so in the round
// before, or if the clock was ahead when it began.
func (s *sinces) of(name string, now time.Time, keep bool) time.Time {
	name = name[:min(len(name), maxSinceKey)]
	at, ok := s.at[name]
	if !ok && len(s.at) >= maxSinces {
		return now
	}
	if !ok || at.After(now) {
		s.at[name] = now
	}
	s.asked[name] = s.asked[name] || keep
	return s.at[name]
}

// end ends a round: what is to be stored now, and whether that is news. Before
// all is known of this device, early, nothing is taken to have ended.
func (s *sinces) end(early bool) (keep map[string]time.Time, news bool) {
	keep = map[string]time.Time{}
	for name, at := range s.at {
		kept, asked := s.asked[name]
		_, was := s.stored[name]
		switch {
		case !asked && !early:
			delete(s.at, name)
		case kept, !asked && was:
			keep[name] = at
		}
	}
	s.asked = map[string]bool{}
	return keep, !maps.EqualFunc(keep, s.stored, time.Time.Equal)
}

// sinceOf asks for a thing that is worth keeping.
func (a *Agent) sinceOf(name string) time.Time { return a.sinces.of(name, a.o.Now(), true) }

// endSinces ends the round of a publication.
func (a *Agent) endSinces() {
	keep, news := a.sinces.end(a.scannedAt.IsZero())
	if news && a.update(func(tx *store.Tx) error { return setting(tx, settingSinces, keep) }) == nil {
		a.sinces.stored = keep
	}
}

// Names of things that stand since some time, where no Attention tells of them alone.
const (
	sincePolicy = "policy" // refused
	sinceGood   = "policy in force "
	sincePaused = "paused "
	sinceBehind = "baseline-required "
	sinceWaits  = "waiting "
	sinceConfig = "repository configuration"
)

// readTimes is for readState. What cannot be read begins anew.
func readTimes(tx *store.Tx) map[string]time.Time {
	out := map[string]time.Time{}
	if b, ok := tx.Get(settingSinces); ok && json.Unmarshal(b, &out) != nil {
		return map[string]time.Time{}
	}
	return out
}

// checkStands is how a requirement stands.
type checkStands struct {
	Result eligibility.Result `json:"result"`
	Waived bool               `json:"waived"`
	Since  time.Time          `json:"since"` // of the two
	Open   time.Time          `json:"open"`  // since when it stands in the way, zero if it does not
}

// readChecks is for readState. What cannot be read begins anew.
func readChecks(tx *store.Tx) map[eligibility.ID]checkStands {
	out := map[eligibility.ID]checkStands{}
	if b, ok := tx.Get(settingChecks); ok && json.Unmarshal(b, &out) != nil {
		return map[eligibility.ID]checkStands{}
	}
	return out
}

// noteChecks compares the requirements with how they stood, in this life or the
// one before, and writes down which stands in the way now, and which no longer.
func (a *Agent) noteChecks() {
	now := a.o.Now().UTC().Round(0)
	next, opened, ended := standings(a.requirements, a.verdict, now)
	if maps.Equal(next, a.requirements) {
		return
	}
	first := len(a.requirements) == 0
	was := !first && !slices.ContainsFunc(slices.Collect(maps.Values(a.requirements)), func(s checkStands) bool { return !s.Open.IsZero() })
	e := control.HistoryEntry{Action: "eligibility", Detail: map[string]string{}}
	var words []string
	for _, c := range opened {
		text := standsInTheWay(c)
		if c.Wanted != "" && c.Result == eligibility.Fail {
			text += ", wanted " + c.Wanted
		}
		words = append(words, text)
	}
	for _, c := range ended {
		words = append(words, standsNoLonger(c, now.Sub(a.requirements[c.ID].Open)))
	}
	switch {
	case !a.verdict.Eligible && was:
		words = append(words, "the device is not eligible any more; what is applied stays")
	case !a.verdict.Eligible:
		words = append(words, "the device is not eligible: "+strings.Join(openChecks(a.verdict), ", "))
	case len(ended) > 0:
		words = append(words, "the device is eligible again")
	}
	e.Text = strings.Join(words, "; ")
	for key, list := range map[string][]eligibility.Check{"failed": opened, "recovered": ended} {
		if len(list) > 0 {
			e.Detail[key] = idsOfChecks(list)
		}
	}
	err := a.update(func(tx *store.Tx) error {
		if err := setting(tx, settingChecks, next); err != nil {
			return err
		}
		if len(opened)+len(ended) == 0 {
			return nil
		}
		_, err := tx.Append(stamped(e, own, a))
		return err
	})
	if err != nil {
		a.log.Error("cannot note the requirements", zap.Error(err))
	}
	a.requirements = next
	if len(opened)+len(ended) > 0 {
		a.log.Info("eligibility changed", zap.Bool("eligible", a.verdict.Eligible), zap.String("text", e.Text))
	}
}

// standings is pure: how the requirements of a verdict stand, which of them stand
// in the way and did not, and which no longer do.
func standings(old map[eligibility.ID]checkStands, v eligibility.Verdict, now time.Time) (next map[eligibility.ID]checkStands, opened, ended []eligibility.Check) {
	next = map[eligibility.ID]checkStands{}
	for _, c := range v.Checks {
		was, s := old[c.ID], checkStands{Result: c.Result, Waived: c.Waived, Since: now}
		if was.Result == s.Result && was.Waived == s.Waived && !was.Since.After(now) {
			s.Since = was.Since
		}
		switch {
		case c.Open() && was.Open.IsZero():
			s.Open, opened = now, append(opened, c)
		case c.Open():
			s.Open = was.Open
			if s.Open.After(now) { // the clock was ahead
				s.Open = now
			}
		case !was.Open.IsZero():
			ended = append(ended, c)
		}
		next[c.ID] = s
	}
	return next, opened, ended
}

func idsOfChecks(list []eligibility.Check) string {
	var ids []string
	for _, c := range list {
		ids = append(ids, string(c.ID))
	}
	return strings.Join(ids, ",")
}

// standsInTheWay says what a requirement was found to be.
func standsInTheWay(c eligibility.Check) string {
	found := cmp.Or(c.Found, "nothing")
	switch {
	case strings.HasPrefix(found, "could not be read"):
		return fmt.Sprintf("%s %s", c.ID, found)
	case c.Result == eligibility.Unknown:
		return fmt.Sprintf("%s is unknown: %s", c.ID, found)
	}
	return fmt.Sprintf("%s fails: found %s", c.ID, found)
}

func standsNoLonger(c eligibility.Check, after time.Duration) string {
	word := "passes"
	switch {
	case c.Waived:
		word = "is waived by the policy"
	case c.Result == eligibility.NotApplicable:
		word = "is not asked for any more"
	}
	return fmt.Sprintf("%s %s, after it stood in the way for %s", c.ID, word, control.Span(after))
}
