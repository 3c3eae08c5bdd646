package calendar

import (
	"cmp"
	"slices"
	"time"
)

// Update is one published update of a track.
type Update struct {
	ID        string // "KB5068966", or a release's id; "" where it is not known
	Kind      Kind
	Month     Month     // to which it belongs
	Date      time.Time // of publication
	Builds    []int     // Windows build numbers it is for, such as 26100; empty: all
	UBR       int       // revision that it leads to; 0 where it is not known, or none exists
	OutOfBand bool      // besides the planned update of its month
	Baseline  string    // id of the baseline a hotpatch builds on; "": the newest one published before it
	Free      bool      // a hotpatch that needs no baseline: the builds of images decide
}

// Track is a line of updates that replace each other: of one Windows version,
// or of one product. Updates are in order of publication.
type Track struct {
	Name    string
	updates []Update
}

// NewTrack makes a track of what was published, in any order. Of updates of the
// same instant the one given later is the newer.
func NewTrack(name string, updates []Update) *Track {
	u := slices.Clone(updates)
	slices.SortStableFunc(u, func(a, b Update) int { return a.Date.Compare(b.Date) })
	return &Track{Name: name, updates: u}
}

// Published lists the updates of a month that are out at an instant, oldest first.
func (t *Track) Published(m Month, at time.Time) []Update {
	var out []Update
	for _, u := range t.updates {
		if u.Month == m && !u.Date.After(at) {
			out = append(out, u)
		}
	}
	return out
}

// Kind is what a month brings, as far as it is known at an instant: what is
// planned, or Baseline where an unplanned one has taken a hotpatch's place.
func (t *Track) Kind(m Month, at time.Time) Kind {
	for _, u := range t.Published(m, at) {
		if u.starts() {
			return Baseline
		}
	}
	return m.Planned()
}

// Next is the first planned release of a kind after an instant that is still
// to come: a hotpatch whose place an unplanned baseline has taken is not.
func (t *Track) Next(kind Kind, at time.Time) time.Time {
	for after := at; ; {
		next := Next(kind, after)
		if next.IsZero() || t.Kind(MonthOf(next), at) == kind {
			return next
		}
		after = next
	}
}

// starts tells whether hotpatches build on an update.
func (u Update) starts() bool { return u.Kind == Baseline && !u.OutOfBand }

// restarts tells whether an update takes a restart.
func (u Update) restarts() bool { return u.Kind != Hotpatch }

// line is the part of a track that a device can see at an instant.
type line struct {
	updates []Update
	base    int // the current baseline, -1 if it is older than the track
}

func (t *Track) line(build int, at time.Time) line {
	l := line{base: -1}
	for _, u := range t.updates {
		if u.Date.After(at) {
			break
		}
		if build != 0 && len(u.Builds) > 0 && !slices.Contains(u.Builds, build) {
			continue
		}
		if u.starts() {
			l.base = len(l.updates)
		}
		l.updates = append(l.updates, u)
	}
	return l
}

// builds is the index of the baseline that hotpatch i needs, -1 if that is not in the track.
func (l line) builds(i int) int {
	want := l.updates[i].Baseline
	for j := len(l.updates) - 1; j >= 0; j-- {
		u := l.updates[j]
		if u.starts() && (want == "" && j < i || want != "" && u.ID == want) {
			return j
		}
	}
	return -1
}

// last is the index of the newest update that ok takes, -1 if there is none.
func (l line) last(ok func(i int, u Update) bool) int {
	for i := len(l.updates) - 1; i >= 0; i-- {
		if ok(i, l.updates[i]) {
			return i
		}
	}
	return -1
}

// hotpatch is the index of the newest hotpatch of the current baseline, -1 if there is none.
func (l line) hotpatch() int {
	return l.last(func(i int, u Update) bool { return u.Kind == Hotpatch && l.builds(i) == l.base })
}

// find is where a device stands: the index of its update, or -1. unsure: it
// may stand at an update whose revision the track does not know.
func (l line) find(d Device) (at int, unsure bool) {
	if d.ID != "" || d.UBR == 0 {
		return l.last(func(_ int, u Update) bool { return d.ID != "" && u.ID == d.ID }), false
	}
	if i := l.last(func(_ int, u Update) bool { return u.UBR == d.UBR }); i >= 0 {
		return i, false
	}
	for i, u := range l.updates {
		if u.UBR == 0 && l.lower(i) < d.UBR && (l.upper(i) == 0 || d.UBR < l.upper(i)) {
			return -1, true
		}
	}
	return -1, false
}

// lower and upper are the revisions between which an update's unknown one must
// lie: above its own line's before it, below all of later months. upper 0: no bound.
func (l line) lower(i int) int {
	low := 0
	for _, u := range l.updates[:i] {
		if u.Kind != Standard && !u.OutOfBand {
			low = max(low, u.UBR)
		}
	}
	return low
}

func (l line) upper(i int) int {
	high := 0
	for _, u := range l.updates[i+1:] {
		if u.UBR > 0 && u.Month.Compare(l.updates[i].Month) > 0 && (high == 0 || u.UBR < high) {
			high = u.UBR
		}
	}
	return high
}

// newest is the highest revision known, 0 if none is.
func (l line) newest() int {
	top := 0
	for _, u := range l.updates {
		top = max(top, u.UBR)
	}
	return top
}

// name is an update in a sentence.
func (u Update) name() string {
	kind := map[Kind]string{Baseline: "baseline", Hotpatch: "hotpatch", Standard: "cumulative update"}[u.Kind]
	if u.OutOfBand {
		kind = "out-of-band " + kind
	} else if u.Kind == Baseline && u.Month.Planned() != Baseline {
		kind = "unplanned " + kind
	}
	if u.Month != (Month{}) {
		kind += " of " + u.Month.String()
	}
	return cmp.Or(u.ID+", the "+kind, kind)
}
