//go:build linux && amd64

package ptrace

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

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
		if _, err := m.p.ReadAt(b, r.Start); err != nil {
			continue
		}
		// Never used, but by us before: the thread itself is the only one that could.
		if bytes.HasPrefix(b, footMark) || len(bytes.Trim(b, "\x00")) == 0 {
			if err := m.write(t, footMark, uint64(r.Start)); err != nil {
				return 0, err
			}
			return uint64(r.Start) + footRoom + need, nil
		}
	}
	return 0, unfit("it runs on a stack that the system does not know")
}

// footMark is put at the foot of a main stack where a frame of ours was, so that
// what is left of it is known again, by a later life of ours too.
var footMark = []byte("\x00hotpatchd was here\x00\xf1\x5e\x0a\x93\xc2\x77\x18")

// footRoom keeps the frame clear of the mark, bytes.
const footRoom = 64

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
