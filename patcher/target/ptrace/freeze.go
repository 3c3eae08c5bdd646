//go:build linux && amd64

package ptrace

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// threadState is how far we are with one thread.
type threadState uint8

const (
	seized  threadState = iota // attached and asked to stop
	stopped                    // stands still
	gone                       // ended before or while it was asked
)

// held is one thread of a freeze.
type held struct {
	tid      int
	state    threadState
	attached bool // and so to be let go of
	signal   int  // what it was about to receive when it stopped; 0 if nothing
	regs     unix.PtraceRegs
}

// frozen implements target.Frozen, Interrupter and Pauser. The tracing thread
// owns what concerns the threads; others read it after told, and after done.
type frozen struct {
	p       *process
	threads []held
	index   map[int]int // tid → place in threads
	regions []target.Region
	sigret  []target.Addr
	list    []target.Thread // of Threads, made once
	reaper  reaper

	tracer int // tid of the tracing thread
	caller int // tid of the one that froze, and will thaw most likely
	began  time.Time
	pause  time.Duration
	clean  bool // nothing is attached any more
	left   bool // the tracing thread was left behind
	err    error

	wake, told event // to the tracing thread, and from it
	done       chan struct{}
	mu         sync.Mutex // for what follows; writes hold it, so that none goes on into running threads
	work       func()     // to be done by the tracing thread
	released   bool
	lapsed     bool // by the context's end
	over       bool // wake is not to be used any more
}

// Freeze stops every thread. What can be looked up before the first one stops
// is looked up before: mappings, trampolines, the list of threads.
func (p *process) Freeze(ctx context.Context) (target.Frozen, error) {
	if p.frozen != nil {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "it is frozen by us already")
	}
	if err := ctx.Err(); err != nil {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "%v", err)
	}
	if err := p.admit("freeze"); err != nil {
		return nil, err
	}
	if err := p.still("freeze"); err != nil {
		return nil, err
	}
	other, err := p.sharer()
	if err != nil {
		return nil, err
	}
	if other != 0 {
		return nil, p.refuse("freeze", 0, target.ErrBusy, "%s shares its memory (a vfork that goes on, or a clone)", processName(other))
	}
	regions, err := p.Regions()
	if err != nil {
		return nil, err
	}
	z := &frozen{p: p, regions: regions, sigret: p.trampolines.find(p, regions), done: make(chan struct{})}
	if p.tids, err = p.task.numbers(p.tids[:0], p.dirbuf); err != nil {
		return nil, p.fail("freeze", 0, err)
	}
	z.threads = make([]held, 0, len(p.tids)+len(p.tids)/4+16)
	z.index = make(map[int]int, cap(z.threads))
	if err := z.open(); err != nil {
		return nil, p.fail("freeze", 0, err)
	}
	z.caller = unix.Gettid()
	hurry(z.caller)
	// A thread in the middle of an exec from a file system that does not answer
	// makes a seize wait as long.
	limit := lookLimit + target.FreezePasses*target.FreezeLimit(len(p.tids))
	p.users.Add(1)
	onThread(func() bool {
		defer p.release()
		return z.trace(ctx)
	})
	if !z.told.within(limit) {
		z.end(true) // should it come to hold them yet
		return nil, z.leave("freeze", limit)
	}
	if z.err == nil {
		p.frozen = z
		return z, nil
	}
	<-z.done
	z.close()
	return nil, z.ended(z.err)
}

func (z *frozen) open() error {
	err := z.wake.open()
	if err == nil {
		if err = z.told.open(); err != nil {
			z.wake.close()
		}
	}
	return err
}

func (z *frozen) close() {
	z.p.b.calm(z.caller)
	z.wake.close()
	z.told.close()
}

// trace is the life of the tracing thread.
func (z *frozen) trace(ctx context.Context) (clean bool) {
	z.tracer = unix.Gettid()
	hurry(z.tracer)
	defer z.p.b.calm(z.tracer)
	unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // else every short sleep takes 50 µs more
	defer unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0)
	z.err = z.stop(ctx)
	failed := z.err != nil
	stop := func() bool { return true }
	if !failed {
		stop = context.AfterFunc(ctx, func() { z.end(true) })
		z.told.signal()
		z.hold()
	}
	z.letGo()
	clean = z.clean
	stop()
	z.mu.Lock()
	z.over = true
	z.mu.Unlock()
	if failed {
		z.told.signal()
	}
	close(z.done)
	return clean
}

// hold waits for the end of the freeze, and works for others meanwhile.
func (z *frozen) hold() {
	for {
		z.wake.wait()
		z.mu.Lock()
		work, released := z.work, z.released
		z.work = nil
		z.mu.Unlock()
		if work != nil {
			work()
			z.told.signal()
		}
		if released {
			return
		}
	}
}

// end has the tracing thread let go. A write that has begun ends before.
func (z *frozen) end(lapsed bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.released || z.over {
		return
	}
	z.released, z.lapsed = true, lapsed
	z.wake.signal()
}

// ended waits for the end of a tracing thread that could not let go otherwise.
func (z *frozen) ended(err error) error {
	if z.clean || awaitEnd(z.tracer) {
		return err
	}
	return z.p.refuse("thaw", 0, target.ErrBusy, "the tracing thread %d does not end (%v)", z.tracer, err)
}

// stop stops every thread or says why not. It runs on the tracing thread, and
// so does everything below.
func (z *frozen) stop(ctx context.Context) error {
	p := z.p
	z.began = time.Now()
	z.reaper.start()
	defer z.reaper.stop()
	for pass := 0; pass < target.FreezePasses; pass++ {
		deadline := z.began.Add(target.FreezeLimit(len(p.tids)))
		if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
			deadline = d
		}
		fresh := len(z.threads)
		for _, tid := range p.tids {
			if err := z.seize(tid); err != nil {
				return err
			}
		}
		if len(z.threads) == fresh {
			return z.believe()
		}
		for i := fresh; i < len(z.threads); i++ {
			if t := &z.threads[i]; t.state == seized && interrupt(t.tid) == unix.ESRCH {
				t.state = gone
			}
		}
		if err := z.await(ctx, deadline); err != nil {
			return err
		}
		var err error
		if p.tids, err = p.task.numbers(p.tids[:0], p.dirbuf); err != nil {
			return p.fail("freeze", 0, err)
		}
	}
	return p.refuse("freeze", 0, target.ErrBusy, "it started new threads in each of %d passes", target.FreezePasses)
}

// seize attaches to a thread that is not known yet.
func (z *frozen) seize(tid int) error {
	if _, known := z.index[tid]; known {
		return nil
	}
	z.reaper.begins()
	attached, err := z.p.attachTo("freeze", tid, 0)
	if attached && tid != z.p.life.id.PID {
		z.reaper.ended(tid)
	} else {
		z.reaper.ended(0)
	}
	if err != nil {
		return err
	}
	t := held{tid: tid, attached: attached}
	if !attached {
		t.state = gone
	}
	z.index[tid] = len(z.threads)
	z.threads = append(z.threads, t)
	return nil
}

// seizeTries bounds how often a refused seize is repeated: in the middle of an
// exec the kernel refuses as it does for good, and an exec is short.
const seizeTries = 20

// attachTo seizes a thread, or says why that is refused. It is false if the
// thread had ended, as a dead main thread has, for which the kernel says EPERM too.
func (p *process) attachTo(op string, tid int, options uintptr) (bool, error) {
	e := seize(tid, options)
	for try := 0; e != 0; try++ {
		var s stat
		if err := p.dir.stat(taskPath(tid), &s); e == unix.ESRCH || err != nil || s.dead() {
			return false, nil
		}
		if status, err := p.dir.read(taskPath(tid)+"status", nil, statusLimit); err == nil {
			switch pid := firstNumber(statusField(status, "TracerPid")); {
			case pid <= 0:
			case ours(pid):
				return false, p.refuse(op, 0, target.ErrBusy, "it is held by another handle of ours")
			default:
				return false, p.refuse(op, 0, target.ErrDenied, "traced by %s", processName(pid))
			}
		}
		if try == seizeTries {
			return false, p.refuse(op, 0, target.ErrDenied, "cannot attach to thread %d: %v", tid, e)
		}
		doze(50)
		e = seize(tid, options)
	}
	return true, nil
}

// spins is how often the threads are asked in turn before we sleep between
// rounds: one that sleeps or runs elsewhere stops within microseconds. One that
// has no processor needs ours.
const spins = 5

// pauseBetween rounds, in microseconds: first short, then not to be a burden.
func pauseBetween(round int) {
	switch {
	case round < spins:
		yield()
	case round < 100:
		doze(20)
	default:
		doze(200)
	}
}

// await waits until every seized thread stands still or is gone.
func (z *frozen) await(ctx context.Context, deadline time.Time) error {
	late := false // asked once more then: we may have been without a processor ourselves
	for round := 0; ; round++ {
		waiting := 0
		for i := range z.threads {
			t := &z.threads[i]
			if t.state != seized {
				continue
			}
			if z.look(t, round); t.state == seized {
				waiting++
			}
		}
		if waiting == 0 {
			return nil
		}
		if late {
			return z.late()
		}
		late = round&7 == 7 && (ctx.Err() != nil || time.Now().After(deadline))
		if !late {
			pauseBetween(round)
		}
	}
}

// look asks once whether a thread has stopped or ended.
func (z *frozen) look(t *held, round int) {
	status, change := z.p.changeOf(t)
	switch {
	case change == stops:
		if status>>8 == 0 {
			t.signal = int(status & 0x7f)
		}
		t.unnoticed(status) // fails of one that was killed, which is found out later
	case change == nothing && t.tid == z.p.life.id.PID && round&7 == 3:
		// Until the last thread ends the kernel does not report a dead main thread.
		var s stat
		if err := z.p.dir.stat(taskPath(t.tid), &s); err != nil || s.dead() {
			t.state = gone
		}
	}
}

// late names the first thread that does not stand still.
func (z *frozen) late() error {
	for i := range z.threads {
		if t := &z.threads[i]; t.state == seized {
			return z.p.refuse("freeze", 0, target.ErrBusy, "thread %d does not stop: %s", t.tid, z.p.waitsIn(t.tid))
		}
	}
	return z.p.refuse("freeze", 0, target.ErrBusy, "out of time")
}

// waitsIn tells what a thread does that is not stopped.
func (p *process) waitsIn(tid int) string {
	what := "running"
	if b, err := p.read(taskPath(tid)+"syscall", 256); err == nil {
		if nr := firstNumber(string(b)); nr >= 0 {
			what = "waits in " + syscallName(nr)
		}
	}
	if b, err := p.dir.read(taskPath(tid)+"wchan", nil, 64); err == nil && len(b) > 1 {
		what += " (" + string(b) + ")"
	}
	var s stat
	if p.dir.stat(taskPath(tid), &s) == nil {
		what += ", state " + string(rune(s.state))
	}
	return what
}

// believe reads the registers of every thread, which the kernel allows of
// stopped ones only, and makes sure that they are still in the life that was opened.
func (z *frozen) believe() error {
	alive := -1
	for i := range z.threads {
		t := &z.threads[i]
		if t.state != stopped {
			continue
		}
		if e := getRegs(t.tid, &t.regs); e != 0 {
			if e != unix.ESRCH {
				return z.p.refuse("freeze", 0, target.ErrDenied, "cannot read the registers of thread %d: %v", t.tid, e)
			}
			t.state = gone // killed while it stood
			continue
		}
		alive = i
	}
	if alive < 0 || !z.p.life.running(z.threads[alive].tid) {
		return z.p.fail("freeze", 0, target.ErrGone)
	}
	return nil
}

// letGo detaches from every thread, with the signal it was about to receive.
// What cannot be detached from because it runs or has ended is let go of by
// the end of this thread.
func (z *frozen) letGo() {
	z.clean = true
	for i := range z.threads {
		t := &z.threads[i]
		if t.state == seized {
			z.look(t, 0)
		}
		if t.state == stopped && detach(t.tid, t.signal) == 0 {
			t.attached = false
		}
		if t.attached {
			z.clean = false
		}
	}
	z.pause = time.Since(z.began)
}
