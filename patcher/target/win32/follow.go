//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

const (
	// groupMost is how many lives one thread of ours waits for: what
	// WaitForMultipleObjects takes (MAXIMUM_WAIT_OBJECTS), but for the event that wakes it.
	groupMost = 63
	// maxGroups bounds the threads that wait, and so the lives that are followed.
	maxGroups = 16
	// endsBehind is how many ends may be told before they are taken. A group waits then.
	endsBehind = 256
)

// rightsFollow: to wait for its end and to read its exit code, nothing else.
const rightsFollow = windows.PROCESS_QUERY_LIMITED_INFORMATION | windows.SYNCHRONIZE

// follower holds one handle of each life whose end is to be told. While it is
// open the system gives the pid to nobody else, also after the end.
type follower struct {
	kernel kernel

	mu     sync.Mutex
	ends   chan target.Event // nil: nobody listens
	done   <-chan struct{}   // no more is told
	lives  map[target.ID]*followed
	groups []*group
	wait   sync.WaitGroup
}

// followed is one life. Its handle is closed by the group that waits for it.
type followed struct {
	id      target.ID
	h       windows.Handle
	told    bool // its end
	dropped bool
}

// group is what one thread waits for.
type group struct {
	wake  windows.Handle // an event, reset by the wait
	lives []*followed
}

// Ends tells how followed lives end, by their exit codes.
func (b *backend) Ends(ctx context.Context) (<-chan target.Event, error) {
	f := &b.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ends != nil {
		return nil, fmt.Errorf("cannot tell of ends: %w: somebody listens already", target.ErrBusy)
	}
	ends := make(chan target.Event, endsBehind)
	f.ends, f.done, f.lives = ends, ctx.Done(), map[target.ID]*followed{}
	go func() {
		<-ctx.Done()
		f.mu.Lock()
		for _, l := range f.lives {
			l.dropped = true
		}
		for _, g := range f.groups {
			windows.SetEvent(g.wake)
		}
		f.mu.Unlock()
		f.wait.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ends, f.lives = nil, nil
		close(ends)
	}()
	return ends, nil
}

// Follow implements target.Follower.
func (b *backend) Follow(ids []target.ID) []target.ID {
	f := &b.follow
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ends == nil || isDone(f.done) {
		return nil
	}
	ids = ids[:min(len(ids), maxGroups*groupMost)]
	keep := make(map[target.ID]bool, len(ids))
	for _, id := range ids {
		keep[id] = true
	}
	touched := map[*group]bool{}
	for _, g := range f.groups {
		for _, l := range g.lives {
			if !keep[l.id] && !l.dropped {
				f.drop(l)
				touched[g] = true
			}
		}
	}
	var list []target.ID
	for _, id := range ids {
		if f.lives[id] == nil {
			g := f.hold(id)
			if g == nil {
				continue
			}
			touched[g] = true
		}
		list = append(list, id)
	}
	for g := range touched {
		windows.SetEvent(g.wake)
	}
	return list
}

func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// hold takes hold of one life; nil if that cannot be.
func (f *follower) hold(id target.ID) *group {
	h, err := f.kernel.process(id.PID, rightsFollow)
	if err != nil {
		return nil
	}
	// The end of a life that is over already is told, if it is this one.
	if start, err := started(h); err != nil || start != id.Start {
		windows.CloseHandle(h)
		return nil
	}
	g := f.room()
	if g == nil {
		windows.CloseHandle(h)
		return nil
	}
	l := &followed{id: id, h: h}
	f.lives[id], g.lives = l, append(g.lives, l)
	return g
}

// room is a group that can take one more. Those that are dropped count until
// their handles are closed.
func (f *follower) room() *group {
	for _, g := range f.groups {
		if len(g.lives) < groupMost {
			return g
		}
	}
	if len(f.groups) == maxGroups {
		return nil
	}
	wake, err := windows.CreateEvent(nil, 0, 0, nil)
	if err != nil {
		return nil
	}
	g := &group{wake: wake}
	f.groups = append(f.groups, g)
	f.wait.Add(1)
	go f.watch(g, f.ends, f.done)
	return g
}

// watch waits for the lives of a group until it has none. The wait has no bound:
// who ends it is a life, or Follow.
func (f *follower) watch(g *group, ends chan<- target.Event, done <-chan struct{}) {
	defer f.wait.Done()
	for {
		waiting := f.tidy(g)
		if waiting == nil {
			return
		}
		handles := []windows.Handle{g.wake}
		for _, l := range waiting {
			handles = append(handles, l.h)
		}
		which, err := windows.WaitForMultipleObjects(handles, false, windows.INFINITE)
		n := int(which) - windows.WAIT_OBJECT_0
		switch {
		case err != nil || n < 0 || n >= len(handles):
			f.giveUp(g) // a later Follow takes hold of them anew
		case n > 0:
			select {
			case ends <- waiting[n-1].end():
			case <-done:
			}
			f.mu.Lock()
			waiting[n-1].told = true
			f.mu.Unlock()
		}
	}
}

// tidy closes the handles of those that were dropped, and returns those whose
// end is waited for; nil if the group is empty, and is none any more.
func (f *follower) tidy(g *group) []*followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	g.lives = slices.DeleteFunc(g.lives, func(l *followed) bool {
		if l.dropped {
			windows.CloseHandle(l.h)
		}
		return l.dropped
	})
	if len(g.lives) == 0 {
		windows.CloseHandle(g.wake)
		f.groups = slices.DeleteFunc(f.groups, func(x *group) bool { return x == g })
		return nil
	}
	waiting := make([]*followed, 0, len(g.lives))
	for _, l := range g.lives {
		if !l.told {
			waiting = append(waiting, l)
		}
	}
	return waiting
}

func (f *follower) giveUp(g *group) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range g.lives {
		f.drop(l)
	}
}

// drop has the handle of a life closed by the group that waits for it.
func (f *follower) drop(l *followed) {
	l.dropped = true
	if f.lives[l.id] == l {
		delete(f.lives, l.id)
	}
}

// end is how a life ended. Nothing but this handle tells.
func (l *followed) end() target.Event {
	e := target.Event{Kind: target.Exited, PID: l.id.PID, Start: l.id.Start, Status: true}
	if err := windows.GetExitCodeProcess(l.h, &e.Code); err != nil {
		return target.Event{Kind: target.Lost, At: time.Now()}
	}
	var created, exited, kernel, user windows.Filetime
	if windows.GetProcessTimes(l.h, &created, &exited, &kernel, &user) == nil && exited.HighDateTime != 0 {
		e.At = time.Unix(0, exited.Nanoseconds())
	}
	return e
}
