//go:build linux && amd64

package ptrace

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

const (
	// stopLimit bounds the stop of one thread for a call: longer than a loaded
	// machine needs to schedule it, shorter than anybody notices.
	stopLimit = 100 * time.Millisecond
	// callLimit bounds a remote system call. mmap and munmap wait for nothing
	// but the lock of the address space; whoever holds that longer is in trouble.
	callLimit = 2 * time.Second
	// callRounds is how often the threads are gone through in search of one that
	// can make the call, callPause apart: a thread that was just receiving a
	// signal, or computing, will soon be somewhere better.
	callRounds = 20
	callPause  = 2 * time.Millisecond
	// searchLimit bounds that search, however long each stop takes.
	searchLimit = time.Second
	// oneLimit bounds everything we do with one stopped thread: a call has two
	// stops. Attaching waits for the end of an exec, which may not come.
	oneLimit = lookLimit + 2*callLimit
	// maxCandidates bounds the threads tried in one round.
	maxCandidates = 16
)

// unfit is why one thread cannot make a call for us; others may.
type unfit string

func (u unfit) Error() string { return string(u) }

// withThread stops one thread for f, lets it go and returns. f runs on the
// tracing thread.
func (p *process) withThread(op string, f func(t *held) error) error {
	list, err := p.candidates()
	if err != nil {
		return p.fail(op, 0, err)
	}
	why := error(unfit("it has no thread"))
	for _, c := range list {
		why = p.stopOne(op, c.tid, f)
		if _, next := why.(unfit); !next {
			return why
		}
	}
	return p.refuse(op, 0, target.ErrBusy, "%v", why)
}

// stopOne stops thread tid, runs f and lets it go, on a thread of our own that
// ends if the other one cannot be let go of otherwise. An unfit error means
// that another thread may do.
func (p *process) stopOne(op string, tid int, f func(t *held) error) error {
	result, done := make(chan error, 1), make(chan struct{})
	tracer, clean := 0, true
	var left atomic.Bool
	p.users.Add(1)
	onThread(func() bool {
		defer p.release()
		defer close(done)
		tracer = unix.Gettid()
		t := held{tid: tid}
		err := p.attach(op, &t)
		if err == nil && !left.Load() {
			err = f(&t)
		}
		if t.state == stopped && detach(tid, t.signal) == 0 {
			t.attached = false
		}
		clean = !t.attached
		result <- err
		return clean
	})
	limit := time.NewTimer(oneLimit)
	defer limit.Stop()
	var err error
	select {
	case err = <-result:
	case <-limit.C:
		left.Store(true)
		return p.lateness(op, p.b.late.leave(p.life.lifetime(), op, oneLimit, done))
	}
	if !clean && !awaitEnd(tracer) {
		return p.refuse(op, 0, target.ErrBusy, "the tracing thread %d does not end", tracer)
	}
	return err
}

// attach stops a thread outside of any signal.
func (p *process) attach(op string, t *held) error {
	attached, err := p.attachTo(op, t.tid, unix.PTRACE_O_TRACESYSGOOD)
	if err != nil {
		return err
	}
	if !attached {
		return unfit("it ended")
	}
	t.attached = true
	interrupt(t.tid)
	status, err := p.awaitStop(t, stopLimit)
	if err != nil {
		return err
	}
	if status>>8 == 0 {
		t.signal = int(status & 0x7f)
		return unfit("it is receiving a signal")
	}
	if e := t.unnoticed(status); e != 0 {
		return unfit("it ended")
	}
	if !p.life.running(t.tid) {
		return p.fail(op, 0, target.ErrGone)
	}
	return nil
}

// awaitStop waits for the next stop of a thread and returns its status.
func (p *process) awaitStop(t *held, limit time.Duration) (status int32, err error) {
	t.state = seized
	deadline := time.Now().Add(limit)
	for round := 0; ; round++ {
		switch status, change := p.changeOf(t); change {
		case stops:
			return status, nil
		case ends:
			return 0, unfit("it ended")
		}
		if round&7 == 7 {
			var s stat
			if p.dir.stat(taskPath(t.tid), &s) != nil || s.dead() {
				t.state = gone
				return 0, unfit("it ended")
			}
			if time.Now().After(deadline) {
				return 0, unfit(fmt.Sprintf("thread %d does not stop: %s", t.tid, p.waitsIn(t.tid)))
			}
		}
		pauseBetween(round)
	}
}

// call makes a system call in one thread of the process and returns its result
// as the kernel gives it (negative: an errno).
func (p *process) call(op string, at target.Addr, nr int, args ...uint64) (int64, error) {
	if p.frozen != nil {
		return 0, p.refuse(op, at, target.ErrBusy, "no system call may be made in it while it is frozen")
	}
	if err := p.admit(op); err != nil {
		return 0, err
	}
	if err := p.still(op); err != nil {
		return 0, err
	}
	regions, err := p.Regions()
	if err != nil {
		return 0, err
	}
	p.trampolines.find(p, regions)
	syscallAt, sigreturnAt, err := p.trampolines.pair(p)
	if err != nil {
		if err := p.still(op); err != nil {
			return 0, err
		}
		return 0, p.refuse(op, at, target.ErrUnsupported, "%v", err)
	}
	if group := p.frozenGroup(); group != "" {
		return 0, p.refuse(op, at, target.ErrBusy, "its control group %s is frozen", group)
	}
	why := error(unfit("it has no thread"))
	end := time.Now().Add(searchLimit)
	for round := 0; round < callRounds && time.Now().Before(end); round++ {
		list, err := p.candidates()
		if err != nil {
			return 0, p.fail(op, at, err)
		}
		if len(list) == 0 {
			why = unfit("every thread waits uninterruptibly or is stopped by its control group")
		}
		for _, c := range list {
			var result int64
			why = p.stopOne(op, c.tid, func(t *held) (err error) {
				m := injection{p: p, op: op, at: at, regions: regions, syscall: syscallAt, sigreturn: sigreturnAt, known: c}
				result, err = m.run(t, nr, args) // read only if it came back
				return err
			})
			if why == nil {
				return result, nil
			}
			if _, next := why.(unfit); !next {
				return 0, why
			}
		}
		time.Sleep(callPause)
	}
	return 0, p.refuse(op, at, target.ErrBusy, "no thread can make the call: %v", why)
}

// pair are a system call instruction and a return from signals, read anew.
func (t *trampolines) pair(p *process) (call, sigreturn uint64, err error) {
	is := func(at target.Addr, code []byte) bool {
		b := make([]byte, len(code))
		_, err := p.ReadAt(b, at)
		return err == nil && bytes.Equal(b, code)
	}
	for _, at := range t.syscall {
		if is(at, syscallCode) || is(at, wrapperCode) {
			call = uint64(at)
			break
		}
	}
	for _, at := range t.sigreturn {
		if is(at, sigreturnCode) {
			sigreturn = uint64(at)
			break
		}
	}
	if call == 0 {
		return 0, 0, fmt.Errorf("its code holds no system call that returns at once")
	}
	if sigreturn == 0 {
		return 0, 0, fmt.Errorf("its code holds no return from signals")
	}
	return call, sigreturn, nil
}
