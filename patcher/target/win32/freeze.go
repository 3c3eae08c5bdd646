//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
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

// prepare stops nothing yet.
func (z *frozen) prepare() error {
	p := z.p
	if p.b.method == stateChange {
		var err error
		if z.change, err = p.b.kernel.newChange(p.h); err != nil {
			return p.fail("freeze", 0, err)
		}
	} else if err := p.b.guard.ready(p.b.kernel); err != nil {
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
		return z.p.fail("freeze", 0, err)
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

// looks bounds how often a thread is asked anew that stands where no thread can be.
const looks = 4

// believe reads the registers, which the system answers of a thread that
// stands. They are believed if they can be true: the program counter in code,
// the stack pointer in memory. A thread elsewhere is between two worlds (a
// debugger's or an emulator's entry): it goes on a little and is asked again.
func (z *frozen) believe(i int) error {
	for look := 1; ; look++ {
		z.mu.Lock()
		t := z.threads[i]
		z.current = t.tid
		z.mu.Unlock()
		if t.gone {
			return nil
		}
		err := z.p.b.kernel.registers(t.h, &t.at) // may take long: not under the lock
		if err == nil {
			t.stack = z.p.stack(t.at.sp)
		}
		z.mu.Lock()
		switch {
		case z.released:
			err = z.tooLate()
		case err != nil && z.p.b.kernel.ended(t.h):
			z.threads[i].gone = true
			err = nil
		case err != nil:
			err = z.cannot(&t, "read the registers of", err)
		case t.stack.End == 0 || !z.inCode(t.at.pc):
			if look < looks {
				err = z.nudge(i)
				z.mu.Unlock()
				if err != nil {
					return err
				}
				continue
			}
			err = z.p.refuse("freeze", 0, target.ErrBusy, "thread %d stands at %s with its stack pointer at %s, where no thread can be", t.tid, t.at.pc, t.at.sp)
		default:
			z.threads[i].at, z.threads[i].stack = t.at, t.stack
		}
		z.mu.Unlock()
		return err
	}
}

// nudge lets one thread go on for a moment. A state change holds all alike.
func (z *frozen) nudge(i int) error {
	t := &z.threads[i]
	if z.change != 0 {
		return nil
	}
	t.slot.releasing()
	if _, err := z.p.b.kernel.resume(t.h); err != nil {
		return z.cannot(t, "resume", err)
	}
	t.stopped = false
	windows.SleepEx(0, false)
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

// inCode tells whether an address is in executable memory.
func (z *frozen) inCode(pc target.Addr) bool {
	for _, s := range z.code {
		if s.Contains(pc) {
			return true
		}
	}
	found := false
	walk(z.p.h, pc&^(target.PageSize-1), pc+1, func(i *windows.MemoryBasicInformation) bool {
		if found = i.State == windows.MEM_COMMIT && protOf(i.Protect)&target.Exec != 0; found {
			z.code = append(z.code, target.Span{Start: target.Addr(i.BaseAddress), End: target.Addr(i.BaseAddress + i.RegionSize)})
		}
		return false
	})
	return found
}

// standing makes sure that a process remains to be held, and under a state
// change that no thread began after it.
func (z *frozen) standing() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.released {
		return z.tooLate()
	}
	alive := 0
	for i := range z.threads {
		t := &z.threads[i]
		if t.gone || z.p.b.kernel.ended(t.h) {
			t.gone = true
			continue
		}
		alive++
		if z.change == 0 {
			continue
		}
		if n, err := z.p.b.kernel.count(t.h); err == nil && n == 0 {
			return z.p.refuse("freeze", 0, target.ErrBusy, "thread %d started meanwhile", t.tid)
		}
	}
	if alive == 0 || z.p.over() {
		return z.p.refuse("freeze", 0, target.ErrGone, "no thread is left")
	}
	return nil
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
