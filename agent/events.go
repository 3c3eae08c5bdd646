package agent

import (
	"context"
	"time"

	"go.uber.org/zap"

	"hotpatchd/patcher/target"
)

// A program maps its images some milliseconds after it has started, or an hour.
// Where the backend tells of new code, that process is looked at again and again
// for a while: a loader is not done when it has mapped the first of an image.
// Elsewhere every process is that has just started. What comes later is found by
// the regular pass, and so is what no event told of: events make patching fast,
// they never make it right.
const (
	// youngFirst is how long a program is left to itself before the first look:
	// its loader is at work, and most that end at once have ended.
	youngFirst = 5 * time.Millisecond
	// youngTick is the least time between two looks, which are at all processes
	// whose turn it is, and youngRest the most within youngFor: an eighth of its
	// age in between, so that what shows late costs no more looks.
	youngTick = 20 * time.Millisecond
	youngRest = 30 * time.Millisecond
	youngFor  = 400 * time.Millisecond
	// A process with code that is not of ELF files may be Wine, which takes its
	// time: every slowRest until slowFor, where nobody tells of new code.
	slowRest = 100 * time.Millisecond
	slowFor  = 4 * time.Second
	// youngShare keeps the looks under a fifth of a core, whatever starts.
	youngShare = 4
	// glanceMost is the time of one look at those whose turn it is. Who does not
	// come in is next.
	glanceMost = 200 * time.Millisecond
	// maxYoung bounds the processes that are looked at like this. More of them
	// start only where somebody wants to keep us busy; the regular pass finds them.
	maxYoung = 4096
	// mapsFor is how long one watch may last, of a process that gets new code again
	// and again: it may be one that makes code as it runs. Each watch that brought
	// nothing doubles the time until news of new code are heard again, from
	// youngRest to the time between two passes.
	mapsFor = 4 * time.Second
	// startMost is how long before a start is told the code of the program may
	// have been mapped.
	startMost = 100 * time.Millisecond
	// maxTaken bounds how many events are taken before the loop turns to others.
	maxTaken = 1024
)

// young is a process that started a moment ago.
type young struct {
	since  time.Time // of this watch, or of the last news
	start  time.Time // it started; zero: it was there before, and something happened to it
	told   bool      // of its new code we are told
	first  time.Time // there was news of new code, for the first time in this watch
	images int       // that were known of it then
	next   time.Time // its turn; zero: not before there is news
	seen   time.Time // when it was last listed
}

// starts is what the loop knows of processes that started a moment ago.
type starts struct {
	events <-chan target.Event // nil: the backend tells nothing
	deaf   string              // why it does not
	young  map[int]*young      // by pid
	at     time.Time           // next look at any of them, zero: none
	rested time.Time           // no look before
}

// watchProcesses asks the backend for events.
func (a *Agent) watchProcesses(ctx context.Context) {
	w, ok := a.o.Backend.(target.Watcher)
	if !ok {
		a.starts.deaf = "this backend has no news of process starts"
		return
	}
	events, err := w.Watch(ctx)
	if err != nil {
		a.starts.deaf = err.Error()
		a.log.Warn("no news of process starts; the regular scan finds them", zap.Error(err))
		return
	}
	a.starts.events = events
}

// takeEvents notes an event, and those that have come with it.
func (a *Agent) takeEvents(e target.Event) {
	for n := 0; ; n++ {
		a.takeEvent(e, time.Now())
		if n == maxTaken {
			return
		}
		select {
		case next, ok := <-a.starts.events:
			if !ok {
				a.starts.events = nil
				return
			}
			e = next
		default:
			return
		}
	}
}

func (a *Agent) takeEvent(e target.Event, now time.Time) {
	at := e.At
	if at.IsZero() || at.After(now) {
		at = now
	}
	_, host := a.hosts[a.lives[e.PID]]
	switch e.Kind {
	case target.Lost:
		a.log.Info("news of process starts was lost; all processes are looked at")
		for _, y := range a.starts.young { // it may have been of them
			if y.told = false; y.next.IsZero() {
				a.turnAt(y, now)
			}
		}
		a.Wake()
	case target.Started:
		if old := a.starts.young[e.PID]; e.Told && old != nil && old.first.After(at.Add(-startMost)) {
			old.start = at // news of its code came first
			return
		}
		y := young{since: now, start: at, told: e.Told}
		if host || !e.Told {
			y.next = at.Add(youngFirst)
		}
		a.watchOver(e.PID, y)
		if p := a.procs[a.lives[e.PID]]; p != nil { // the program before made us deaf, not this one
			news := p.ignored
			p.deaf, p.ignored = time.Time{}, time.Time{}
			if e.Told && news.After(at.Add(-startMost)) {
				a.heardOfCode(e.PID, news, now)
			}
		}
	case target.Mapped:
		a.heardOfCode(e.PID, at, now)
	case target.Forked:
		// A child has the images of its parent. If that has none, nothing comes of
		// the child before it executes a program, which is told.
		parent, known := a.lives[e.Parent]
		_, hosts := a.hosts[parent]
		y := a.starts.young[e.Parent]
		if hosts || y != nil && !y.next.IsZero() || y == nil && !known && !e.Told {
			a.watchOver(e.PID, young{since: now, start: at, told: e.Told, next: now})
		}
	case target.Exited:
		// Where lives are followed nobody else is believed about how they end: on
		// Windows any process can write such events.
		if id := a.lives[e.PID]; a.followed == nil {
			a.heardOfEnd(e)
		} else if id.Start == e.Start && !a.followed[id] {
			a.endedWithFiles(a.procs[id], e)
		}
		// It may be the end of an older process with this pid.
		if y := a.starts.young[e.PID]; y != nil && !y.start.IsZero() && !at.Before(y.start) {
			delete(a.starts.young, e.PID)
		}
		if host { // what was shown of it is over
			a.watchOver(e.PID, young{since: now, next: now})
		}
	}
}

// heardOfCode has a process looked at that got code which may be an image's.
func (a *Agent) heardOfCode(pid int, at, now time.Time) {
	p := a.procs[a.lives[pid]]
	y := a.starts.young[pid]
	switch {
	case p != nil && neverTouched(p.info):
	case p != nil && now.Before(p.deaf):
		if p.ignored.IsZero() {
			p.ignored = at
		}
	case y == nil || y.next.IsZero():
		next := young{since: now, told: true, first: at, next: at.Add(youngFirst)}
		if y != nil {
			next.start = y.start
		}
		if p != nil {
			next.images = len(p.images)
			if !p.ignored.IsZero() {
				next.first = p.ignored
			}
		}
		a.watchOver(pid, next)
	case y.first.IsZero():
		y.first, y.since = at, now
	case now.Sub(y.first) < mapsFor:
		y.since = now
	}
}

// endWatch ends the looks at a process that is there. If it was for new code,
// and that was no image's, news of it are not heard for a while.
func (a *Agent) endWatch(pid int, y *young, now time.Time) {
	delete(a.starts.young, pid)
	p := a.procs[a.lives[pid]]
	switch {
	case p == nil || y.first.IsZero():
	case len(p.images) > y.images:
		p.unheard = 0
	default:
		p.deaf = now.Add(min(youngRest<<p.unheard, a.o.Config.Backend.ScanEvery))
		p.unheard = min(p.unheard+1, 16)
	}
}

// watchOver has a process looked at for a while.
func (a *Agent) watchOver(pid int, y young) {
	s := &a.starts
	if old := s.young[pid]; old == nil && len(s.young) >= maxYoung {
		a.Wake()
		return
	}
	s.young[pid] = &y
	if !y.next.IsZero() {
		a.turnAt(&y, y.next)
	}
}

// turnAt sets when it is the turn of a young process.
func (a *Agent) turnAt(y *young, at time.Time) {
	y.next = at
	if s := &a.starts; s.at.IsZero() || at.Before(s.at) {
		s.at = at
	}
}

// growUp forgets processes that started a while ago and that there is no news of.
func (a *Agent) growUp(now time.Time) {
	for pid, y := range a.starts.young {
		if y.next.IsZero() && now.Sub(y.since) > youngFor {
			delete(a.starts.young, pid)
		}
	}
}

// untilGlance is how long it is until somebody's turn; false if nobody is young.
func (a *Agent) untilGlance() (time.Duration, bool) {
	if a.starts.at.IsZero() {
		return 0, false
	}
	at := a.starts.at
	if at.Before(a.starts.rested) {
		at = a.starts.rested
	}
	return max(0, time.Until(at)), true
}

// glance looks at the young processes whose turn it is, and acts on what it
// finds. It costs what they cost, however many others there are.
func (a *Agent) glance(ctx context.Context) {
	began := time.Now()
	var pids []int
	for pid, y := range a.starts.young {
		if !y.next.IsZero() && !began.Before(y.next) {
			pids = append(pids, pid)
		}
	}
	changed := len(pids) > 0 && a.glanceAt(ctx, pids, began)
	cost := time.Since(began)
	a.starts.rested = began.Add(max(youngTick, (1+youngShare)*cost))
	a.starts.at = time.Time{}
	for pid, y := range a.starts.young {
		switch {
		case y.next.IsZero():
		case began.Sub(y.since) > slowFor:
			delete(a.starts.young, pid)
		default:
			a.turnAt(y, y.next)
		}
	}
	if changed {
		a.countUnseen()
		a.act(ctx, "", nil)
	}
}

// glanceAt looks at some young processes; true if anything is to be done or shown anew.
func (a *Agent) glanceAt(ctx context.Context, pids []int, began time.Time) (changed bool) {
	w := a.o.Backend.(target.Watcher) // it has told of them
	infos, err := a.listWith("listing processes that have started", func() ([]target.Info, error) { return w.ListOf(ctx, pids) })
	if err != nil {
		clear(a.starts.young) // the regular pass finds them
		a.Wake()
		return false
	}
	there := make(map[int]bool, len(infos))
	late := map[int]bool{} // those that did not come in
	lives := a.recordedLives()
	for i := range infos {
		info := &infos[i]
		there[info.PID] = true
		if id, ok := a.lives[info.PID]; ok && id != info.ID {
			changed = a.endLife(id) || changed
		}
		if !a.isDue(info) {
			continue
		}
		if i > 0 && time.Since(began) > glanceMost {
			late[info.PID] = true
			continue
		}
		changed = a.lookOrPass(ctx, *info, lives) || changed
	}
	now := time.Now()
	for _, pid := range pids {
		y := a.starts.young[pid]
		switch age := now.Sub(y.since); {
		case !there[pid]:
			delete(a.starts.young, pid)
			if id, ok := a.lives[pid]; ok {
				changed = a.endLife(id) || changed
			}
		case late[pid]:
		case age < youngFor:
			y.seen, y.next = began, now.Add(min(max(age/8, youngTick), youngRest))
		case !y.told && a.mayBeSlow(pid):
			y.seen, y.next = began, now.Add(slowRest)
		default:
			a.endWatch(pid, y, now)
		}
	}
	return changed
}

// mayBeSlow tells of a process that may still be on its way to its images.
func (a *Agent) mayBeSlow(pid int) bool {
	p := a.procs[a.lives[pid]]
	return p != nil && !p.info.Bare && !neverTouched(p.info)
}
