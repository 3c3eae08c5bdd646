//go:build linux && amd64

package ptrace

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sort"
	"strconv"
	"strings"
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
	// maxCandidates bounds the threads tried in one round.
	maxCandidates = 16
)

// unfit is why one thread cannot make a call for us; others may.
type unfit string

func (u unfit) Error() string { return string(u) }

// candidate is a thread that could make a call, as seen while it runs.
type candidate struct {
	tid  int
	rank int // best first
	// A thread that waits in restart_syscall: the call that was once
	// interrupted, and by what to know that it still is the same.
	call          uint64
	rdi, rsi, rsp uint64
}

// before tells which of two threads is tried first; tests turn it round.
var before = func(a, b *candidate) bool { return a.rank < b.rank }

// candidates lists threads, those that wait in a plain system call first: they
// hold no lock of their own program and have nothing in flight.
func (p *process) candidates() ([]candidate, error) {
	tids, err := p.task.numbers(p.tids[:0], p.dirbuf)
	if err != nil {
		return nil, err
	}
	p.tids = tids
	var list []candidate
	line := make([]byte, 0, 256)
	for _, tid := range tids {
		path := taskPath(tid)
		b, err := p.dir.read(path+"syscall", line, 256)
		if err != nil {
			continue
		}
		c := candidate{tid: tid, rank: 2}
		wchan, _ := p.dir.read(path+"wchan", nil, 64)
		if p.unreachable(path, string(wchan)) {
			continue
		}
		if nr := firstNumber(string(b)); nr >= 0 {
			switch nr {
			case unix.SYS_READ, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_FUTEX, unix.SYS_POLL, unix.SYS_EPOLL_WAIT, unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_RECVFROM, unix.SYS_WAIT4:
				c.rank = 0
			case restartSyscall:
				c.restarted(p, string(wchan), string(b))
				c.rank = 1
			default:
				c.rank = 1
			}
		}
		list = append(list, c)
		if len(list) >= 8*maxCandidates {
			break
		}
	}
	sort.SliceStable(list, func(i, j int) bool { return before(&list[i], &list[j]) })
	return list[:min(len(list), maxCandidates)], nil
}

// unreachable tells whether a thread could not be stopped, or would not run on
// when it is let go: it waits uninterruptibly, or its control group is frozen. A
// thread of the first version of those is in such a wait; the second holds it
// where signals are taken, in which a stopped thread waits too, but in another state.
func (p *process) unreachable(path, wchan string) bool {
	var s stat
	if p.dir.stat(path, &s) != nil {
		return true
	}
	return s.state == 'D' || s.state == 'S' && (wchan == "get_signal" || strings.Contains(wchan, "freezer"))
}

// restarted finds out which call a thread waits in whose call number has become
// restart_syscall because it was interrupted before. Four calls have a restart
// block. Most programs set the number right before the instruction; else the
// place where the thread sleeps in the kernel tells them apart, and the first
// argument the two sleeps. syscall is a line of proc_pid_syscall(5).
func (c *candidate) restarted(p *process, wchan, syscall string) {
	fields := strings.Fields(syscall)
	if len(fields) != 9 {
		return
	}
	var pc uint64
	for _, f := range []struct {
		n int
		v *uint64
	}{{1, &c.rdi}, {2, &c.rsi}, {7, &c.rsp}, {8, &pc}} {
		var err error
		if *f.v, err = strconv.ParseUint(strings.TrimPrefix(fields[f.n], "0x"), 16, 64); err != nil {
			return
		}
	}
	var code [7]byte // mov $N,%eax; syscall
	if _, err := p.ReadAt(code[:], target.Addr(pc-7)); err == nil && code[0] == 0xb8 && code[5] == 0x0f && code[6] == 0x05 {
		switch nr := binary.LittleEndian.Uint32(code[1:]); nr {
		case unix.SYS_FUTEX, unix.SYS_POLL, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP:
			c.call = uint64(nr)
			return
		}
	}
	switch {
	case strings.Contains(wchan, "futex"):
		c.call = unix.SYS_FUTEX
	case strings.Contains(wchan, "poll"):
		c.call = unix.SYS_POLL
	case !strings.Contains(wchan, "syscall") && !strings.Contains(wchan, "nanosleep"):
		// The sleeps leave no trace of their own: their functions count as the scheduler's.
	case c.rdi < 16 || int32(c.rdi) < 0 && c.rdi>>32 == 0 || int64(c.rdi) < 0:
		c.call = unix.SYS_CLOCK_NANOSLEEP // a clock's number; negative ones are of processes
	case c.rdi >= 4096:
		c.call = unix.SYS_NANOSLEEP // a pointer
	}
}

// again is the number of the call that a stopped thread was interrupted in.
func (c *candidate) again(r *unix.PtraceRegs) (call uint64, ok bool) {
	if r.Orig_rax != restartSyscall {
		return r.Orig_rax, true
	}
	return c.call, c.call != 0 && r.Rdi == c.rdi && r.Rsi == c.rsi && r.Rsp == c.rsp
}

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
	result := make(chan error, 1)
	tracer, clean := 0, true
	onThread(func() bool {
		tracer = unix.Gettid()
		t := held{tid: tid}
		err := p.attach(op, &t)
		if err == nil {
			err = f(&t)
		}
		if t.state == stopped && detach(tid, t.signal) == 0 {
			t.attached = false
		}
		clean = !t.attached
		result <- err
		return clean
	})
	err := <-result
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
		if round < spins {
			yield()
		} else {
			doze(100)
		}
	}
}

// call makes a system call in one thread of the process and returns its result
// as the kernel gives it (negative: an errno).
func (p *process) call(op string, at target.Addr, nr int, args ...uint64) (int64, error) {
	if p.frozen != nil {
		return 0, p.refuse(op, at, target.ErrBusy, "no system call may be made in it while it is frozen")
	}
	if !p.life.same(p.dir) {
		p.b.forget(p.life.id.PID)
		return 0, p.fail(op, at, target.ErrGone)
	}
	regions, err := p.Regions()
	if err != nil {
		return 0, err
	}
	p.trampolines.find(p, regions)
	syscallAt, sigreturnAt, err := p.trampolines.pair(p)
	if err != nil {
		if !p.life.same(p.dir) {
			return 0, p.fail(op, at, target.ErrGone)
		}
		return 0, p.refuse(op, at, target.ErrUnsupported, "%v", err)
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
				result, err = m.run(t, nr, args)
				return err
			})
			if _, next := why.(unfit); !next {
				return result, why
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

// moment is a place in a remote call at which our death must be harmless.
type moment uint8

const (
	seizedOne moment = iota
	frameWritten
	registersSet
	signalsBlocked
	resumed
	atEntry
	resumedAgain
	atExit
	maskRestored
	registersRestored
	moments
)

// passing is told of each moment; tests die there.
var passing = func(moment) {}

// injection is one system call to be made by a stopped thread.
type injection struct {
	p                  *process
	op                 string
	at                 target.Addr
	regions            []target.Region
	syscall, sigreturn uint64
	known              candidate
}

// run makes the call. The order is what keeps our death harmless: the frame is
// complete before the registers change, signals are blocked after that, since
// the frame gives back the mask, and the mask is given back before the registers.
func (m *injection) run(t *held, nr int, args []uint64) (int64, error) {
	p := m.p
	passing(seizedOne)
	var c threadContext
	if err := m.fit(t, &c); err != nil {
		return 0, err
	}
	top, err := m.room(t, &c)
	if err != nil {
		return 0, err
	}
	frame, sp := c.frame(top, m.sigreturn)
	if err := m.write(t, frame, sp); err != nil {
		return 0, err
	}
	passing(frameWritten)

	r := c.regs
	r.Rip, r.Rsp, r.Rax = m.syscall, sp, uint64(nr)
	r.Orig_rax = ^uint64(0) // nothing to be restarted
	r.Eflags &^= 0x400      // direction flag: as a function expects it
	for i, reg := range []*uint64{&r.Rdi, &r.Rsi, &r.Rdx, &r.R10, &r.R8, &r.R9} {
		*reg = 0
		if i < len(args) {
			*reg = args[i]
		}
	}
	if e := setRegs(t.tid, &r); e != 0 {
		return 0, p.fail(m.op, m.at, e)
	}
	// From here to the last setRegs the thread stands on the frame.
	passing(registersSet)
	setSigmask(t.tid, ^uint64(0))
	passing(signalsBlocked)
	result, err := m.step(t)
	if t.state != stopped {
		return 0, err // it finishes by itself, or is over
	}
	passing(atExit)
	e1 := setSigmask(t.tid, c.mask)
	passing(maskRestored)
	e2 := setRegs(t.tid, &c.regs)
	passing(registersRestored)
	if e1 != 0 || e2 != 0 {
		return 0, p.fail(m.op, m.at, target.ErrGone) // killed: nothing else makes these fail
	}
	return result, err
}

// step lets the thread run to the end of the call.
func (m *injection) step(t *held) (int64, error) {
	p := m.p
	for stops := 0; stops < 2; { // entry and exit
		if e := request(unix.PTRACE_SYSCALL, t.tid, 0, 0); e != 0 {
			return 0, p.fail(m.op, m.at, target.ErrGone)
		}
		passing(resumed + 2*moment(stops))
		status, err := p.awaitStop(t, callLimit)
		switch {
		case t.state == gone:
			return 0, p.fail(m.op, m.at, target.ErrGone)
		case err != nil:
			return 0, p.refuse(m.op, m.at, target.ErrBusy, "%v; it may finish the call later", err)
		case status == int32(unix.SIGTRAP)|0x80:
			if stops++; stops == 1 {
				passing(atEntry)
			}
		case status>>8 == 0:
			t.signal = int(status & 0x7f) // only SIGSTOP cannot be blocked; it gets it when we leave
		}
	}
	var r unix.PtraceRegs
	if e := getRegs(t.tid, &r); e != 0 {
		return 0, p.fail(m.op, m.at, target.ErrGone)
	}
	if r.Rip != m.syscall+2 {
		return 0, p.refuse(m.op, m.at, target.ErrBusy, "thread %d stands at %x after the call, not at %x", t.tid, r.Rip, m.syscall+2)
	}
	return int64(r.Rax), nil
}

// fit reads the thread's context and refuses what could go wrong, before any effect.
func (m *injection) fit(t *held, c *threadContext) error {
	p := m.p
	if e := getRegs(t.tid, &c.regs); e != 0 {
		return unfit("it ended")
	}
	r := &c.regs
	switch {
	case r.Cs != 0x33:
		return unfit("it runs 32-bit code")
	case r.Eflags&0x100 != 0:
		return unfit("it single-steps")
	}
	if c.interrupted() {
		var ok bool
		if c.call, ok = m.known.again(r); !ok {
			return unfit("it waits in a call that was restarted and cannot be told")
		}
	}
	var err error
	if int64(r.Orig_rax) < 0 {
		if err = p.inCriticalSection(t.tid); err != nil {
			return err
		}
	}
	if err = p.lawful(m.op, m.at, t.tid); err != nil {
		return err
	}
	var e unix.Errno
	if c.mask, e = getSigmask(t.tid); e != 0 {
		return p.fail(m.op, m.at, e)
	}
	x := make([]byte, xsaveMax)
	n, e := getRegset(t.tid, regsetXState, x)
	if e != 0 || n < xsaveLegacy || n >= xsaveMax {
		return p.refuse(m.op, m.at, target.ErrUnsupported, "its XSAVE state is not understood (%d bytes, %v)", n, e)
	}
	c.xstate = x[:n]
	return nil
}

// lawful refuses a thread whose calls the kernel would turn into something else.
func (p *process) lawful(op string, at target.Addr, tid int) error {
	status, err := p.dir.read(taskPath(tid)+"status", nil, statusLimit)
	if err != nil {
		return unfit("it ended")
	}
	if mode := firstNumber(statusField(status, "Seccomp")); mode > 0 {
		return p.refuse(op, at, target.ErrDenied, "thread %d is under seccomp (mode %d), which could kill it for our call", tid, mode)
	}
	var dispatch struct{ mode, selector, offset, length uint64 }
	if e := getDispatch(tid, &dispatch.mode, 32); e == 0 && dispatch.mode != 0 {
		return p.refuse(op, at, target.ErrDenied, "thread %d is under syscall user dispatch, which would turn our call into a signal", tid)
	}
	var ssp [8]byte
	if _, e := getRegset(tid, regsetShadowStack, ssp[:]); e == 0 {
		return p.refuse(op, at, target.ErrUnsupported, "thread %d has a shadow stack, which our return would break", tid)
	}
	return nil
}

// inCriticalSection keeps away from restartable sequences (rseq(2)): the kernel
// would take our detour for their end, and not start them anew.
func (p *process) inCriticalSection(tid int) error {
	var c struct {
		area            uint64
		size, signature uint32
		flags, pad      uint32
	}
	if e := getRseq(tid, &c.area, 24); e != 0 || c.area == 0 {
		return nil
	}
	const sectionOffset = 8 // rseq_cs of struct rseq
	if v, e := peek(tid, c.area+sectionOffset); e == 0 && v != 0 {
		return unfit("it is in a restartable sequence")
	}
	return nil
}

// room finds where the frame may end: below the red zone of the thread's own
// stack, or at the foot of the main stack for a main thread that stands elsewhere.
func (m *injection) room(t *held, c *threadContext) (uint64, error) {
	need := c.frameRoom()
	sp := c.regs.Rsp
	own := regionAt(m.regions, target.Addr(sp-redZone))
	if own == nil || own.Prot&(target.Read|target.Write) != target.Read|target.Write || own.Shared {
		return 0, unfit("its stack pointer is in no writable memory")
	}
	if own.Kind == target.Stack && t.tid == m.p.life.id.PID || m.ownStack(own, &c.regs) {
		if err := m.notNested(own, sp); err != nil {
			return 0, err
		}
		if top := sp - redZone; top-uint64(own.Start) > need {
			return top, nil
		}
		return 0, unfit("its stack is nearly full")
	}
	if t.tid != m.p.life.id.PID {
		return 0, unfit("it runs on a stack that the system does not know")
	}
	for i := range m.regions {
		r := &m.regions[i]
		if r.Kind != target.Stack || r.Size() < 2*need {
			continue
		}
		b := make([]byte, need)
		if _, err := m.p.ReadAt(b, r.Start); err == nil && len(bytes.Trim(b, "\x00")) == 0 {
			return uint64(r.Start) + need, nil // never used: the thread itself is the only one that could
		}
	}
	return 0, unfit("it runs on a stack that the system does not know")
}

// ownStack tells a thread's stack, below whose pointer nothing is anybody's,
// from a piece of memory that a program's own scheduler uses as a stack: there,
// what lies below may be another stack or live data, and the frame would
// destroy it. An inaccessible page below a mapping proves nothing: an arena of
// a garbage collector may have one. What proves it is the thread's control
// block: the C libraries put it at the top of the stack they made for the
// thread, and %fs:0 holds its own address (x86-64 psABI, TLS variant II).
func (m *injection) ownStack(r *target.Region, regs *unix.PtraceRegs) bool {
	fs := target.Addr(regs.Fs_base)
	if r.Kind != target.Private || fs <= target.Addr(regs.Rsp) || fs < r.Start || fs >= r.End-16 {
		return false
	}
	below := regionAt(m.regions, r.Start-1)
	if below == nil || below.Prot != 0 || below.Kind != target.Private {
		return false
	}
	var self [8]byte
	if _, err := m.p.ReadAt(self[:], fs); err != nil {
		return false
	}
	return target.Addr(binary.LittleEndian.Uint64(self[:])) == fs
}

// nestedScan is how far above the stack pointer signal frames are looked for, bytes.
const nestedScan = 256 << 10

// notNested refuses a thread that handles a signal on an alternate stack which
// lies inside its own: below the pointer stand the frames it interrupted.
func (m *injection) notNested(own *target.Region, sp uint64) error {
	b := make([]byte, min(uint64(own.End)-sp, nestedScan))
	if _, err := m.p.ReadAt(b, target.Addr(sp)); err != nil {
		return unfit("its stack cannot be read")
	}
	for _, was := range interrupted(m.p.trampolines.sigreturn, b, target.Addr(sp)) {
		if was >= own.Start && was < target.Addr(sp) {
			return unfit("it handles a signal on a stack inside its own")
		}
	}
	return nil
}

func (m *injection) write(t *held, b []byte, at uint64) error {
	n, err := m.p.writeMem(b, target.Addr(at))
	if err == nil && n < len(b) {
		n, err = m.p.pokeThrough(t.tid, b, target.Addr(at))
	}
	if err != nil {
		return err
	}
	back := make([]byte, len(b))
	if _, err := m.p.ReadAt(back, target.Addr(at)); err != nil {
		return err
	}
	if !bytes.Equal(b, back) {
		return unfit("its stack changes under us")
	}
	return nil
}
