package calendar

import (
	"fmt"
	"slices"
	"time"
)

// Device is where a device stands.
type Device struct {
	Build, UBR int    // Windows: 26100, 7092; 0 where there are none
	ID         string // else the id of the update that it has; "": none of the track
	// Enrolled: hotpatches are for it, it is eligible and its owner wants them.
	Enrolled bool
	// Upgraded is when it came to this version of Windows, zero if never or not known.
	Upgraded time.Time
}

// Code says why something is offered, or nothing.
type Code string

// The codes.
const (
	CodeHotpatch    Code = "hotpatch"     // on the track, a newer hotpatch is out
	CodeCurrent     Code = "current"      // on the track, and newest
	CodeBaseline    Code = "baseline"     // behind the baseline: no hotpatches until it has it
	CodeOffTrack    Code = "off-track"    // at an update that no hotpatch builds on: none until the next baseline
	CodeUpgraded    Code = "upgraded"     // version upgrade in a hotpatch month: none until the next baseline
	CodeNotEnrolled Code = "not-enrolled" // gets ordinary updates with a restart
	CodeAhead       Code = "ahead"        // newer than all that the track knows
	CodeLevel       Code = "level"        // where it stands cannot be told
	CodeNoUpdates   Code = "no-updates"   // nothing was published for it
)

// Decision is what a device is offered on a day, and why.
type Decision struct {
	Kind    Kind
	Update  Update // zero if Kind is Nothing
	Restart bool   // the update takes a restart
	Code    Code
	Text    string // one sentence
	// OnTrack: hotpatches are for this device. If not, Until is the planned
	// baseline that brings it back, zero if the Update does so itself, or nothing does.
	OnTrack bool
	Until   time.Time
}

// Offered decides what a device is offered at an instant, from what was
// published by then. Where the track cannot tell, nothing is offered and Code says so.
func Offered(t *Track, d Device, at time.Time) Decision {
	l := t.line(d.Build, at)
	if len(l.updates) == 0 {
		return Decision{Kind: Nothing, Code: CodeNoUpdates, OnTrack: d.Enrolled, Text: "nothing was published for this device"}
	}
	has, unsure := l.find(d)
	switch {
	case unsure:
		return Decision{Kind: Nothing, Code: CodeLevel, Text: fmt.Sprintf("revision %d may be that of an update whose revision is not known here", d.UBR)}
	case has < 0 && d.UBR > l.newest() && d.UBR > 0 && d.ID == "":
		return Decision{Kind: Nothing, Code: CodeAhead, Text: fmt.Sprintf("revision %d is newer than all that is known here", d.UBR)}
	case !d.Enrolled:
		return l.ordinary(has, d, CodeNotEnrolled, "hotpatches are not for this device: it gets ordinary updates", time.Time{})
	}
	if i := l.last(func(_ int, u Update) bool { return u.Kind == Hotpatch && u.Free }); i > has {
		return hotpatched(l.updates[i], "it needs no baseline")
	}
	until := t.Next(Baseline, at)
	if m, off := l.upgraded(d); off {
		return l.ordinary(has, d, CodeUpgraded, fmt.Sprintf("this device was upgraded in %s, a hotpatch month, and gets no hotpatches before the next baseline", m), until)
	}
	switch {
	case l.onTrack(has):
		if i := l.hotpatch(); i > has {
			return hotpatched(l.updates[i], "this device has "+l.updates[has].name())
		}
		return Decision{Kind: Nothing, Code: CodeCurrent, OnTrack: true, Text: "this device has " + l.updates[has].name() + ", and nothing newer is out for it"}
	case l.base < 0 && l.last(func(_ int, u Update) bool { return u.restarts() }) < 0:
		if i := l.last(func(_ int, u Update) bool { return u.Baseline != "" }); i >= 0 {
			return Decision{Kind: Nothing, Code: CodeBaseline, Until: until,
				Text: fmt.Sprintf("%s is for devices with %s, which was not published here", l.updates[i].name(), l.updates[i].Baseline)}
		}
		return Decision{Kind: Nothing, Code: CodeLevel, Text: "which baseline this device has cannot be told from what is known here", Until: until}
	case has > l.base && l.updates[has].restarts(), has < 0 && d.UBR > l.revision(l.base):
		what := "an update that is no hotpatch"
		if has >= 0 {
			what = l.updates[has].name()
		}
		return l.ordinary(has, d, CodeOffTrack, "this device has "+what+", on which no hotpatch builds, and gets none before the next baseline", until)
	}
	why := "this device gets no hotpatches without it"
	if i := l.last(func(_ int, u Update) bool { return u.restarts() }); i != l.base {
		why = "this device is behind the newest baseline, and gets no hotpatches before the next one"
	}
	return l.ordinary(has, d, CodeBaseline, why, until)
}

func hotpatched(u Update, why string) Decision {
	return Decision{Kind: Hotpatch, Update: u, Code: CodeHotpatch, OnTrack: true, Text: fmt.Sprintf("%s, without a restart: %s", u.name(), why)}
}

// ordinary is the newest update with a restart, or nothing if the device has
// it. One that starts the track anew ends the waiting.
func (l line) ordinary(has int, d Device, code Code, why string, until time.Time) Decision {
	i := l.last(func(_ int, u Update) bool { return u.restarts() })
	out := Decision{Kind: Nothing, Code: code, Until: until, Text: why + "; it has the newest"}
	if i < 0 {
		out.Text = why + "; none is out"
		return out
	}
	u := l.updates[i]
	late := has >= 0 && l.updates[has].Kind == Hotpatch && l.builds(has) < l.base // a hotpatch for those who have not got the baseline yet
	if i <= has && !late || has < 0 && d.UBR > 0 && u.UBR > 0 && d.UBR >= u.UBR {
		return out
	}
	out.Kind, out.Update, out.Restart = u.Kind, u, true
	out.Text = fmt.Sprintf("%s, with a restart: %s", u.name(), why)
	if u.starts() {
		out.Until = time.Time{}
	}
	return out
}

// onTrack tells whether hotpatches of the current baseline are for who has update i.
func (l line) onTrack(i int) bool {
	if i < 0 {
		return false
	}
	return i == l.base || l.updates[i].Kind == Hotpatch && l.builds(i) == l.base
}

// revision is that of update i, 0 if it is not known.
func (l line) revision(i int) int {
	if i < 0 {
		return 0
	}
	return l.updates[i].UBR
}

// upgraded tells whether a version upgrade keeps hotpatches away: it was in a
// month without a baseline, and none came since.
func (l line) upgraded(d Device) (Month, bool) {
	m := MonthOf(d.Upgraded)
	if d.Upgraded.IsZero() || m.Planned() == Baseline {
		return m, false
	}
	return m, !slices.ContainsFunc(l.updates, func(u Update) bool {
		return u.starts() && (u.Month == m || u.Date.After(d.Upgraded))
	})
}
