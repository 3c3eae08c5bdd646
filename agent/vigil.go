package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"hotpatchd/agent/guard"
	"hotpatchd/patcher/target"
)

// vigil remembers how processes fare with a release and without one. It is told
// who lives, who runs what and who ended how, and does nothing by itself.
//
// The time of a life falls into parts: for the length of window after a release
// came in it is time with that release; all else is time without, that of a release which has
// stood its window too.
type vigil struct {
	window  time.Duration
	lives   map[target.ID]*vita
	byPID   map[int]*vita
	with    map[caseKey]*guard.Tally // of lives that are over
	inside  map[caseKey]int
	signs   map[caseKey][]string    // what was seen, for people; bounded
	without map[string]*guard.Tally // by habitOf, of lives that are over
	changed bool                    // of without, since it was stored
}

// caseKey is a program of one owner, and a release. Owners are kept apart: who
// crashes his own processes, or makes that their habit, must not move what is judged of others.
type caseKey struct{ owner, program, release string }

// habitOf names what is remembered of a program without a release.
func habitOf(owner, program string) string { return owner + "|" + program }

// vita is one life of a process that has images.
type vita struct {
	id      target.ID
	owner   string // "": the system
	program string
	seen    time.Time // first by us
	came    []coming  // releases, in the order they came in
	how     guard.Ending
	text    string    // how, for people
	inside  bool      // it ended inside our code
	ended   time.Time // zero until somebody tells
	missed  time.Time // since when it is not among the living
}

type coming struct {
	release string
	at      time.Time
	out     time.Time // taken out again, zero if it was not
}

const (
	// maxSigns bounds what is kept of a case for people.
	maxSigns = 8
	// unseenAfter is how long the word on how a process ended may come after the process is gone.
	unseenAfter = 2 * time.Second
	// maxPrograms bounds the programs that are remembered; beyond it those that ran
	// least go, and of cases those of whoever has most of them, see leastCase.
	maxPrograms = 500
	// maxRan is when what was seen of a program without a release is halved, so
	// that last year does not outweigh this week.
	maxRan = 30 * 24 * time.Hour
)

func newVigil() *vigil {
	return &vigil{lives: map[target.ID]*vita{}, byPID: map[int]*vita{}, with: map[caseKey]*guard.Tally{}, inside: map[caseKey]int{},
		signs: map[caseKey][]string{}, without: map[string]*guard.Tally{}}
}

// living tells that a process lives and what runs in it: release → since when.
func (v *vigil) living(id target.ID, owner, program string, runs map[string]time.Time, now time.Time) {
	l := v.lives[id]
	if l == nil {
		l = &vita{id: id, owner: owner, program: program, seen: now}
		v.lives[id], v.byPID[id.PID] = l, l
	}
	l.missed = time.Time{}
	for i := range l.came {
		if c := &l.came[i]; c.out.IsZero() && runs[c.release].IsZero() {
			c.out = now
		}
	}
	for _, release := range slices.Sorted(maps.Keys(runs)) {
		if !slices.ContainsFunc(l.came, func(c coming) bool { return c.release == release && c.out.IsZero() }) {
			at := runs[release]
			if at.After(now) { // the clock was set back
				at = now
			}
			l.came = append(l.came, coming{release: release, at: at})
		}
	}
	slices.SortStableFunc(l.came, func(a, b coming) int { return a.at.Compare(b.at) })
	if len(l.came) > 0 && l.came[0].at.Before(l.seen) { // patched by a daemon before us
		l.seen = l.came[0].at
	}
}

// leave forgets a life whose end will not be told.
func (v *vigil) leave(id target.ID) {
	if l := v.lives[id]; l != nil && v.byPID[id.PID] == l {
		delete(v.byPID, id.PID)
	}
	delete(v.lives, id)
}

// end tells how a process ended. It is over when it is not among the living any
// more: the main thread of a process may end before the others.
func (v *vigil) end(pid int, how guard.Ending, text string, inside bool, at time.Time) {
	v.endOf(v.byPID[pid], how, text, inside, at)
}

func (v *vigil) endOf(l *vita, how guard.Ending, text string, inside bool, at time.Time) {
	if l != nil && l.ended.IsZero() {
		l.how, l.text, l.inside, l.ended = how, text, inside, at
	}
}

// turn closes the accounts of lives that are over; alive tells who is not. It
// returns the cases in which something ended badly, in order.
func (v *vigil) turn(alive func(target.ID) bool, now time.Time) []caseKey {
	hurt := map[caseKey]bool{}
	for id, l := range v.lives {
		switch {
		case alive(id):
			continue
		case l.missed.IsZero():
			l.missed = now
		}
		if l.ended.IsZero() && now.Sub(l.missed) < unseenAfter {
			continue
		}
		if key, bad := v.close(l); bad {
			hurt[key] = true
		}
		delete(v.lives, id)
		if v.byPID[id.PID] == l {
			delete(v.byPID, id.PID)
		}
	}
	v.forget()
	return slices.SortedFunc(maps.Keys(hurt), func(a, b caseKey) int {
		return cmp.Or(cmp.Compare(a.release, b.release), cmp.Compare(a.owner, b.owner), cmp.Compare(a.program, b.program))
	})
}

// waits tells whether somebody is gone of whom it is not known how he ended.
func (v *vigil) waits() bool {
	for _, l := range v.lives {
		if !l.missed.IsZero() {
			return true
		}
	}
	return false
}

// part is a time with a release, or without.
type part struct {
	release string // "": without
	ran     time.Duration
	last    bool
}

// parts takes a life up to an instant apart.
func (v *vigil) parts(l *vita, until time.Time) []part {
	var out []part
	at := l.seen
	upTo := func(release string, t time.Time) {
		if t.After(until) {
			t = until
		}
		if t.After(at) {
			out = append(out, part{release: release, ran: t.Sub(at)})
			at = t
		}
	}
	for i, c := range l.came {
		upTo("", c.at)
		stands := c.at.Add(v.window)
		if i+1 < len(l.came) && l.came[i+1].at.Before(stands) {
			stands = l.came[i+1].at
		}
		if !c.out.IsZero() && c.out.Before(stands) {
			stands = c.out
		}
		if until.After(c.at) {
			upTo(c.release, stands)
		}
	}
	upTo("", until)
	if len(out) == 0 { // it ended in the moment it was seen
		p := part{}
		if n := len(l.came); n > 0 {
			p.release = l.came[n-1].release
		}
		out = append(out, p)
	}
	out[len(out)-1].last = true
	return out
}

// close brings a life to account.
func (v *vigil) close(l *vita) (hurt caseKey, bad bool) {
	end := l.ended
	if end.IsZero() {
		end = l.missed
	}
	for _, p := range v.parts(l, end) {
		v.tally(caseKey{l.owner, l.program, p.release}).Add(p.ran, p.last, l.how)
		if p.release == "" {
			v.changed = true
			continue
		}
		if p.last && (l.how == guard.Crash || l.how == guard.Failure) {
			hurt, bad = caseKey{l.owner, l.program, p.release}, true
			if l.inside && l.how == guard.Crash {
				v.inside[hurt]++
			}
			if len(v.signs[hurt]) < maxSigns {
				v.signs[hurt] = append(v.signs[hurt], fmt.Sprintf("process %d %s after %s", l.id.PID, l.text, p.ran.Round(time.Millisecond)))
			}
		}
	}
	return hurt, bad
}

func (v *vigil) tally(key caseKey) *guard.Tally {
	if key.release != "" {
		if v.with[key] == nil {
			v.with[key] = &guard.Tally{}
		}
		return v.with[key]
	}
	habit := habitOf(key.owner, key.program)
	t := v.without[habit]
	if t == nil {
		t = &guard.Tally{}
		v.without[habit] = t
	}
	if t.Ran > maxRan {
		t.Halve()
	}
	return t
}

// caseOf is all that is known of a program and a release: of those that are over
// and of those that live.
func (v *vigil) caseOf(key caseKey, now time.Time) guard.Case {
	c := guard.Case{Program: lastElement(key.program), Release: key.release, Inside: v.inside[key]}
	if t := v.with[key]; t != nil {
		c.With = *t
	}
	if t := v.without[habitOf(key.owner, key.program)]; t != nil {
		c.Without = *t
	}
	for _, l := range v.lives {
		if l.program != key.program || l.owner != key.owner {
			continue
		}
		for _, p := range v.parts(l, now) {
			switch p.release {
			case "":
				c.Without.Add(p.ran, false, guard.Unseen)
			case key.release:
				c.With.Add(p.ran, false, guard.Unseen)
			}
		}
	}
	return c
}

// drop forgets cases that were decided, of one owner or with "" of all: if the
// release comes back by an operator's word it is judged anew.
func (v *vigil) drop(owner, release string) {
	for key := range v.with {
		if key.release == release && (owner == "" || owner == key.owner) {
			delete(v.with, key)
			delete(v.inside, key)
			delete(v.signs, key)
		}
	}
}

// forget keeps memory bounded, whatever runs here.
func (v *vigil) forget() {
	for len(v.without) > maxPrograms {
		least := ""
		for program, t := range v.without {
			if least == "" || t.Ran < v.without[least].Ran || t.Ran == v.without[least].Ran && program < least {
				least = program
			}
		}
		delete(v.without, least)
	}
	for len(v.with) > maxPrograms {
		key := v.leastCase()
		delete(v.with, key)
		delete(v.inside, key)
		delete(v.signs, key)
	}
}

// leastCase is the case that is forgotten first: of the owner who has the most, so
// that nobody drives out those of others, one that ended badly least often, and of
// those the one that ran least.
func (v *vigil) leastCase() caseKey {
	has := map[string]int{}
	for key := range v.with {
		has[key.owner]++
	}
	return slices.MinFunc(slices.Collect(maps.Keys(v.with)), func(a, b caseKey) int {
		x, y := v.with[a], v.with[b]
		return cmp.Or(cmp.Compare(has[b.owner], has[a.owner]), cmp.Compare(x.Crashes+x.Failures, y.Crashes+y.Failures), cmp.Compare(x.Ran, y.Ran),
			cmp.Compare(a.owner, b.owner), cmp.Compare(a.release, b.release), cmp.Compare(a.program, b.program))
	})
}
