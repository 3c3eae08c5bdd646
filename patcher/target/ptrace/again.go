//go:build linux && amd64

package ptrace

import "golang.org/x/sys/unix"

// enterExtArg is IORING_ENTER_EXT_ARG of linux/io_uring.h: a time limit may be given.
const enterExtArg = 1 << 3

// waitsAgain tells whether a thread was stopped in a call that reports every
// stop to its program as EINTR (signal(7)), though nothing happened to it, and
// in which it was to wait without a time limit. Such a call has had no effect
// yet, and made again it waits as before. With a time limit it would wait anew
// for the whole of it: that EINTR stays.
func waitsAgain(r *unix.PtraceRegs) bool {
	if int64(r.Rax) != -int64(unix.EINTR) {
		return false
	}
	switch int64(r.Orig_rax) {
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		return int32(r.R10) < 0
	case unix.SYS_EPOLL_PWAIT2, unix.SYS_SEMTIMEDOP:
		return r.R10 == 0
	case unix.SYS_SEMOP:
		return true
	case unix.SYS_RT_SIGTIMEDWAIT:
		return r.Rdx == 0
	case unix.SYS_IO_GETEVENTS:
		return r.R8 == 0
	case unix.SYS_IO_URING_ENTER:
		return r.R10&enterExtArg == 0
	}
	return false
}

// unnoticed reads the registers of a thread that has just stopped. If a program
// would take the stop for the end of its call, it has the kernel decide anew when
// the thread goes on, as it does for most calls: a handler that runs then gives
// the program its EINTR, and without one the call is made again. The kernel looks
// at the result only after the stop (arch/x86/kernel/signal.c,
// arch_do_signal_or_restart), so that our death right after this is harmless too.
// It must not be done in any other stop: only this one says that no signal was taken.
func (t *held) unnoticed(status int32) unix.Errno {
	e := getRegs(t.tid, &t.regs)
	if e != 0 || status != int32(unix.SIGTRAP)|eventStop<<8 || !waitsAgain(&t.regs) {
		return e
	}
	r := t.regs
	noHandler := int64(restartNoHand)
	r.Rax = uint64(noHandler)
	if e = setRegs(t.tid, &r); e == 0 {
		t.regs = r
	}
	return e
}
