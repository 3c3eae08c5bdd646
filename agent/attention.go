package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
)

// expirySoon is when the end of the metadata becomes something to act on.
const expirySoon = 3 * 24 * time.Hour

// attention lists what a person should know or do, worst first.
func (a *Agent) attention(v View, w wishes, s *snapshot, holds []control.Hold) []control.Attention {
	out := append(slices.Clone(a.notices), a.reportTrouble(v.Now)...)
	add := func(code, severity, text, remedy string, since control.Time, scope control.Scope) {
		out = append(out, control.Attention{Code: code, Severity: severity, Text: text, Remedy: remedy, Since: since, Scope: scope})
	}
	public := control.Scope{Public: true}
	now := control.At(v.Now)
	for _, p := range s.processes.Processes {
		for _, im := range p.Images {
			if im.State == control.Torn {
				add("torn", control.SeverityError, fmt.Sprintf("%s in %s %d could not be written back: restart that process", im.Name, p.Exe, p.PID),
					string(control.RemedyRestartProcess), im.Since, control.Scope{OfUser: true, UID: p.UID})
			}
		}
	}
	a.recMu.Lock()
	broken, since := a.stateErr, a.stateSince
	a.recMu.Unlock()
	if broken != nil {
		add("state", control.SeverityError, "the state cannot be written: nothing is begun without it", "make room in "+a.o.Config.StateDir, control.At(since), public)
	}
	if v.Lost.Code != "" {
		a.store.View(func(tx *store.Tx) error {
			why, _ := tx.Lost()
			add("state-damaged", control.SeverityError, "holds, installs and pause of the operator may be lost, so that nothing new is applied; what is patched stays. "+why, lostToDo, now, public)
			return nil
		})
	}
	if a.policyErr != nil {
		text := "the policy was refused, the last good one stays in force"
		if a.policy == nil {
			text = "the policy was refused, and there was none before: the device is not enrolled"
		}
		add("policy", control.SeverityError, text, "mend "+a.policyFault()+" (hotpatch policy shows the place, or hotpatchd check-config)", now, public)
		out[len(out)-1].About = sincePolicy
	}
	a.attendRepository(v.Now, add)
	if !a.expires.IsZero() && v.Now.After(a.expires) {
		add("expired", control.SeverityWarning, fmt.Sprintf("the repository's metadata ended %s: nothing new is applied", stamp(a.expires)), "the publisher has to sign it anew; or this clock is ahead", control.At(a.expires), public)
	} else if !a.expires.IsZero() && a.expires.Sub(v.Now) < expirySoon && a.astray(v.Now) {
		add("expires-soon", control.SeverityWarning, fmt.Sprintf("the repository's metadata ends %s, and it cannot be asked for newer", stamp(a.expires)), "mend the connection to the repository", now, public)
	}
	if a.denied > 0 {
		add("not-looked-into", control.SeverityWarning, fmt.Sprintf("processes that could not be looked into, because the system refuses access: %d", a.denied), "hotpatch eligibility, check rights; this daemon may reach: "+a.freeze, now, public)
		out[len(out)-1].About = "not-looked-into denied" // the count may change
	}
	if a.unread > 0 {
		add("not-looked-into", control.SeverityWarning, fmt.Sprintf("processes that have mapped too much to be looked into: %d", a.unread), "the log names them; end them, or leave them as they are", now, public)
		out[len(out)-1].About = "not-looked-into unread"
	}
	for id, j := range a.left {
		add("hangs", control.SeverityError, fmt.Sprintf("%s, process %d, does not let itself be read or stopped: %s it has not ended", lastElement(programOf(j.info)), id.PID, j.step),
			string(control.RemedyRestartProcess), control.At(v.Now.Add(-time.Since(j.since))), control.Scope{OfUser: true, UID: j.info.UID})
	}
	if a.scanErr != nil {
		add("scan", control.SeverityError, "the processes cannot be listed", "see the log", now, public)
	}
	for _, product := range slices.Sorted(maps.Keys(v.Choices)) {
		switch c := v.Choices[product]; {
		case c.Why.Code == "rollback":
			add("rollback", control.SeverityWarning, c.Latest.ID+": "+c.Why.Text, "hotpatch install "+c.Latest.ID, now, public)
		case c.Want != nil && blocks[c.Why.Code]:
			// What an older sequence fixes is fixed; the rest has no row to say so.
			add(c.Why.Code, control.SeverityWarning, fmt.Sprintf("%s cannot be used here, %s is: %s", c.Latest.ID, c.Want.ID, c.Why.Text), string(remedyFor(c.Why)), now, public)
		}
	}
	out = append(out, a.approvedInVain(v.Now, w)...)
	for _, x := range a.waiting(v, w) {
		if !slices.ContainsFunc(s.files.behind, func(b behind) bool { return x.About == sinceWaits+b.product+" "+b.baseline }) { // said with what needs it
			out = append(out, x)
		}
	}
	for _, h := range holds {
		if h.Decisive {
			since := h.Since
			if since.IsZero() { // the policy's: since it was first seen
				since = now
			}
			add("held", control.SeverityWarning, heldText(h), a.liftHold(h.ID), since, public)
			out[len(out)-1].Product, out[len(out)-1].About = h.Product, "held "+h.ID
		}
	}
	a.attendFiles(s.files, add)
	for owner, of := range a.harms {
		for id, h := range of {
			add("guard", control.SeverityError, fmt.Sprintf("the health guard keeps %s out of the processes of user %s: %s", id, owner, h.Text),
				"hotpatch release-hold "+id+" lets it in again", control.At(h.Since), control.Scope{})
		}
	}
	for _, o := range openStates(s.processes) {
		add(string(o.state), o.severity(), o.text(), string(o.remedy), now, public)
	}
	for i := range out {
		a.sinceWhen(&out[i], v.Now)
		if out[i].Remedy == "" {
			out[i].Remedy = "none"
		}
	}
	rank := map[string]int{control.SeverityError: 0, control.SeverityWarning: 1, control.SeverityInfo: 2}
	slices.SortStableFunc(out, func(x, y control.Attention) int { return cmp.Compare(rank[x.Severity], rank[y.Severity]) })
	return out
}

// settles is how long something stands before that is worth a write to the disk:
// processes that may not be touched come and go, some of them every second.
const settles = time.Minute

// sinceWhen sets since when what has begun just now for all we know is so: what was said
// before stands since then, also before the daemon was started.
func (a *Agent) sinceWhen(x *control.Attention, now time.Time) {
	if !x.Since.IsZero() && !x.Since.Equal(now) {
		return
	}
	name, keep := x.About, x.Scope.Public
	switch {
	case name != "":
	case slices.Contains(control.ImageStates, control.ImageState(x.Code)): // a count may change
		name, keep = x.Code, true
	default:
		name = x.Code + " " + x.Text
	}
	at := a.sinces.of(name, now, false)
	x.Since = control.At(a.sinces.of(name, now, keep && now.Sub(at) >= settles))
}

// heldText says what a hold costs, not who set it: everybody may read it.
func heldText(h control.Hold) string {
	text := h.ID + " is held on this device"
	if len(h.CVEs) > 0 {
		text += "; open because of it: " + strings.Join(h.CVEs, " ")
	}
	return text
}

// operatorHolds: an operator, or the health guard, holds a release.
func (a *Agent) operatorHolds(id string) (is bool) {
	a.store.View(func(tx *store.Tx) error {
		all, err := tx.Holds()
		_, is = all[id]
		return err
	})
	return is
}

// liftHold is what ends a hold.
func (a *Agent) liftHold(id string) string {
	if a.policy != nil && a.policy.Held(id) {
		todo := "the owner of the policy decides: take it out of hold in " + a.o.Config.Policy.File
		if a.operatorHolds(id) {
			todo += ", then hotpatch release-hold " + id
		}
		return todo
	}
	if o, ok := a.offerOf(id); ok && o.Rollout.Halt { // install would refuse it
		return "hotpatch release-hold " + id + " lifts the hold; its publisher has halted it, too"
	}
	return "hotpatch install " + id + " lifts the hold"
}

// toDo is what a person can do about an image, where more can be said of it than
// its remedy does; "" elsewhere.
func (a *Agent) toDo(in Intent) string {
	if !in.State.Open() {
		return ""
	}
	id := ""
	if in.Offer != nil {
		id = in.Offer.ID
	}
	switch in.Reason.Code {
	case "held":
		if in.State == control.Unpatched {
			return a.liftHold(id)
		}
	case "manual", "rollback":
		return "hotpatch install " + id
	case "not-approved":
		return "list it under approve in " + a.o.Config.Policy.File + "; or hotpatch install " + id
	case "not-before", "deferred", "returns", "ring", "hours", "canary":
		if in.Offer != nil && in.Offer.Rollout.Halt { // install would refuse it
			return "nothing: it comes by itself, since it is in force; its publisher has halted it"
		}
		return "nothing: it comes by itself; now: hotpatch install " + id
	case "expired":
		return "hotpatch check; the publisher has to sign the metadata anew, or this clock is ahead"
	case "halted":
		return "nothing: its publisher decides"
	case "paused":
		if in.Reason.Text == pausedByPolicy {
			return "set pause = false in " + a.o.Config.Policy.File
		}
		return "hotpatch resume"
	case "state-lost":
		return lostToDo
	case "not-eligible":
		return "hotpatch eligibility says what to do"
	case "out-of-scope":
		return "widen [repository] products or images in the configuration, then restart the daemon"
	case "os-hotpatch":
		return "install Windows' own updates: they bring the fix"
	case "denied":
		if in.Try != nil { // the system's word, not the policy's
			return deniedToDo
		}
		return "change deny in " + a.o.Config.Policy.File + ", or leave it so"
	}
	return ""
}

// lostToDo is what ends the wait after a damage of the state.
const lostToDo = "hotpatch list: hold what must stay out, then hotpatch resume; or hotpatch install ID for one release"

// deniedToDo is for processes that the system does not let us into.
const deniedToDo = "let the daemon reach it: hotpatch eligibility, check rights"

// openState counts the images of one state that is not well.
type openState struct {
	state     control.ImageState
	images    int
	processes int
	remedy    control.Remedy // the first one's; "" if they differ
}

// openStates counts what is not well, worst first: a document of counts says it
// to everybody, the rows say which. Torn images are told one by one.
func openStates(d control.Processes) []openState {
	var out []openState
	for _, state := range control.ImageStates {
		o := openState{state: state}
		for _, p := range d.Processes {
			before := o.images
			for _, im := range p.Images {
				if im.State != state {
					continue
				}
				switch o.images++; {
				case o.images == 1:
					o.remedy = im.Remedy
				case o.remedy != im.Remedy:
					o.remedy = control.RemedyNone
				}
			}
			if o.images > before {
				o.processes++
			}
		}
		well := state == control.Patched || state == control.Fixed || state == control.PendingImage || state == control.Torn
		if o.images > 0 && !well {
			out = append(out, o)
		}
	}
	return out
}

func (o openState) severity() string {
	switch o.state {
	case control.Failed, control.Drifted:
		return control.SeverityError
	case control.OtherBuild:
		return control.SeverityInfo
	}
	return control.SeverityWarning
}

func (o openState) text() string {
	verb := "are"
	if o.images == 1 {
		verb = "is"
	}
	return fmt.Sprintf("%s in %s %s %s", counted(o.images, "image", "images"), counted(o.processes, "process", "processes"), verb, o.state)
}

// stamp writes a time in a sentence. Screens put it in the reader's own zone.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// counted is "1 image" or "2 images".
func counted(n int, one, several string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, several)
}
