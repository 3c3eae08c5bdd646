//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// held is one thread of a freeze.
type held struct {
	tid     int
	h       windows.Handle
	slot    *slot // the guardian's
	stopped bool  // suspended by us
	gone    bool  // ended before or while it was asked
	at      registers
	stack   target.Span
}

// frozen implements target.Frozen and Pauser.
type frozen struct {
	p      *process
	change windows.Handle // state change object, 0 under suspension
	began  time.Time

	mu       sync.Mutex // for what follows; writes hold it, so that none goes on into running threads
	threads  []held
	index    map[int]int // tid → place in threads
	current  int         // tid of the thread that is being asked
	changed  bool        // the state change is in force
	released bool
	lost     bool  // released because the guardian ended
	wrote    bool  // something was written while they stand
	failed   error // of the release
	pause    time.Duration
	code     []target.Span   // executable memory in which threads stand
	list     []target.Thread // of Threads, made once

	lapse   func() bool // undoes the wait for the context's end
	working chan struct{}
	closed  sync.Once
}

// Freeze stops every thread. What can be prepared before the first one stops
// is prepared before: rights, the guardian, a handle of every thread.
func (p *process) Freeze(ctx context.Context) (target.Frozen, error) {
	if p.frozen != nil {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "it is frozen by us already")
	}
	if err := ctx.Err(); err != nil {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "%v", err)
	}
	if p.over() {
		return nil, p.refuse("freeze", 0, target.ErrGone, "it has ended")
	}
	if p.id.PID == p.b.desc.self {
		return nil, p.refuse("freeze", 0, target.ErrDenied, "this is ourselves")
	}
	if asked(p.h).debugged() {
		return nil, p.refuse("freeze", 0, target.ErrDenied, "a debugger is attached")
	}
	if err := p.grant("freeze", rightsStop); err != nil {
		return nil, err
	}
	z := &frozen{p: p, index: map[int]int{}, working: make(chan struct{})}
	if !p.b.take(p.id, z) {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "it is held by another handle of ours")
	}
	if err := z.prepare(); err != nil {
		close(z.working)
		z.discard()
		return nil, err
	}
	return z.start(ctx)
}

// take notes who holds a life; nobody else can then.
func (b *backend) take(id target.ID, z *frozen) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held[id] != nil {
		return false
	}
	b.held[id] = z
	return true
}

// prepare stops nothing yet. Of a process that the system refuses a state
// change the threads are suspended one by one.
func (z *frozen) prepare() error {
	p := z.p
	if p.b.method == stateChange && !p.single {
		if h, err := p.b.kernel.newChange(p.h); err == nil {
			z.change = h
			return z.enumerate()
		}
		if p.over() {
			return p.refuse("freeze", 0, target.ErrGone, "it has ended")
		}
	}
	if err := p.b.guard.ready(p.b.kernel); errors.Is(err, errUnguarded) {
		return p.refuse("freeze", 0, target.ErrBusy, "the guardian: %v", err)
	} else if err != nil {
		return p.refuse("freeze", 0, target.ErrUnsupported, "without a guardian no thread is suspended: %v", err)
	}
	return z.enumerate()
}

// grace is how long a worker may be behind its own deadline before it is
// judged to hang inside a call.
const grace = 20 * time.Millisecond

// start has a thread of its own do the stopping: a call that does not come
// back must not keep others held.
func (z *frozen) start(ctx context.Context) (target.Frozen, error) {
	p := z.p
	result := make(chan error, 1)
	limit := time.NewTimer(target.FreezeLimit(len(z.threads)) + grace)
	defer limit.Stop()
	go func() {
		defer close(z.working)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer hurry()()
		result <- z.stop(ctx)
	}()
	var err error
	hangs := false
	select {
	case err = <-result:
	case <-ctx.Done():
		err, hangs = z.late(), true
	case <-limit.C:
		select {
		case err = <-result: // it has more threads than at first, or ended this very moment
		case <-time.After(target.FreezeLimit(0)):
			err, hangs = z.late(), true
		}
	}
	if err != nil {
		z.release()
		z.mu.Lock()
		if z.failed != nil {
			err = z.failed
		}
		z.mu.Unlock()
		if hangs { // the handles are closed when its call comes back
			go z.discard()
		} else {
			z.discard()
		}
		return nil, err
	}
	p.frozen = z
	z.lapse = context.AfterFunc(ctx, z.release)
	return z, nil
}

// stop stops every thread or says why not.
func (z *frozen) stop(ctx context.Context) error {
	p := z.p
	z.mu.Lock()
	z.began = time.Now()
	z.mu.Unlock()
	if z.change != 0 {
		if err := z.stopAll(); err != nil {
			return err
		}
	}
	for i := 0; i < len(z.threads) && z.change == 0; i++ {
		if err := z.suspend(i); err != nil {
			return err
		}
	}
	from := 0
	for range target.FreezePasses {
		n := len(z.threads) // nobody but us adds to them
		deadline := z.began.Add(target.FreezeLimit(n))
		if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
			deadline = d
		}
		for i := from; i < n; i++ {
			if err := z.believe(i); err != nil {
				return err
			}
			if time.Now().After(deadline) || ctx.Err() != nil {
				return z.late()
			}
		}
		fresh, err := z.rescan()
		if err != nil {
			return err
		}
		if fresh == 0 {
			return z.standing()
		}
		from = n
	}
	return p.refuse("freeze", 0, target.ErrBusy, "threads start faster than they can be counted")
}

// stopAll uses the state change object.
func (z *frozen) stopAll() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.released {
		return z.tooLate()
	}
	if err := z.p.b.kernel.change(z.change, z.p.h, true); err != nil {
		if z.p.over() {
			return z.p.refuse("freeze", 0, target.ErrGone, "it has ended")
		}
		z.p.single = true
		return z.p.refuse("freeze", 0, target.ErrBusy, "the system refuses it a state change (%v): the next try suspends its threads one by one", err)
	}
	z.changed = true
	return nil
}

// suspend stops one thread. The guardian has its handle since before.
func (z *frozen) suspend(i int) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	t := &z.threads[i]
	z.current = t.tid
	if z.released {
		return z.tooLate()
	}
	before, err := z.p.b.kernel.suspend(t.h)
	if err != nil {
		if z.p.b.kernel.ended(t.h) {
			t.gone = true
			return nil
		}
		return z.cannot(t, "suspend", err)
	}
	t.slot.suspended(before)
	t.stopped = true
	return nil
}

// cannot is the refusal of one thread. One that is ending refuses everything
// and is gone the next time.
func (z *frozen) cannot(t *held, what string, err error) error {
	if z.p.over() {
		return z.p.refuse("freeze", 0, target.ErrGone, "it has ended")
	}
	if err == statusThreadIsTerminating || err == windows.ERROR_ACCESS_DENIED || err == windows.ERROR_GEN_FAILURE {
		return z.p.refuse("freeze", 0, target.ErrBusy, "cannot %s thread %d, which may be ending: %v", what, t.tid, err)
	}
	return z.p.refuse("freeze", 0, target.ErrBusy, "cannot %s thread %d: %v", what, t.tid, err)
}

// enumerate opens the threads there are before anything is stopped. Those that
// start or end meanwhile are for rescan.
func (z *frozen) enumerate() error {
	k := z.p.b.kernel
	tids, err := k.threads(z.p.id)
	if err != nil {
		return z.p.fail("freeze", 0, err)
	}
	for _, tid := range tids {
		h, err := k.open(tid)
		if err != nil {
			continue
		}
		// The thread may have ended and its id be another process's by now.
		if pid, _, err := k.id(h); err != nil || pid != z.p.id.PID || k.ended(h) {
			k.close(h)
			continue
		}
		if err := z.add(tid, h); err != nil {
			k.close(h)
			return err
		}
	}
	return nil
}

// add makes a thread known, to the guardian first.
func (z *frozen) add(tid int, h windows.Handle) error {
	t := held{tid: tid, h: h}
	if z.change == 0 {
		var err error
		if t.slot, err = z.p.b.guard.arm(z.p.b.kernel, h); err != nil {
			if z.p.b.guard.over() {
				return z.p.refuse("freeze", 0, target.ErrBusy, "the guardian has ended: %v", err)
			}
			return z.p.fail("freeze", 0, err)
		}
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.index[tid] = len(z.threads)
	z.threads = append(z.threads, t)
	return nil
}

// rescan looks for threads that are not known yet, stops them as it finds them
// and tells how many there were.
func (z *frozen) rescan() (fresh int, err error) {
	k := z.p.b.kernel
	for last, known := windows.Handle(0), true; ; {
		h, err := k.next(z.p.h, last)
		if !known {
			k.close(last)
		}
		if err == statusNoMoreEntries {
			return fresh, nil
		}
		if err != nil {
			return fresh, z.p.fail("freeze", 0, err)
		}
		last, known = h, false
		_, tid, err := k.id(h)
		if err != nil {
			continue
		}
		z.mu.Lock()
		released := z.released
		_, seen := z.index[tid]
		z.mu.Unlock()
		if released {
			k.close(h)
			return fresh, z.tooLate()
		}
		if seen || k.ended(h) {
			continue
		}
		if err := z.add(tid, h); err != nil {
			k.close(h)
			return fresh, err
		}
		known = true
		fresh++
		if z.change == 0 {
			if err := z.suspend(len(z.threads) - 1); err != nil {
				return fresh, err
			}
		}
	}
}

func (z *frozen) tooLate() error {
	if z.lost {
		return z.p.refuse("freeze", 0, target.ErrBusy, "the guardian has ended")
	}
	if z.current == 0 {
		return z.p.refuse("freeze", 0, target.ErrBusy, "out of time before the first thread stood")
	}
	return z.p.refuse("freeze", 0, target.ErrBusy, "thread %d does not stop in time", z.current)
}

func (z *frozen) late() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.tooLate()
}

// priorityTimeCritical is THREAD_PRIORITY_TIME_CRITICAL: while others stand
// still we wait for no processor.
const priorityTimeCritical = 15

// hurry raises the priority of this thread, and its result puts it back.
func hurry() func() {
	const current = ^uintptr(1) // GetCurrentThread()
	win(setThreadPriority, current, priorityTimeCritical)
	return func() { win(setThreadPriority, current, 0) }
}
