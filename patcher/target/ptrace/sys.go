//go:build linux && amd64

package ptrace

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of linux/ptrace.h and linux/elf.h that x/sys/unix does not name.
const (
	ptraceGetSigmask  = 0x420a // PTRACE_GETSIGMASK
	ptraceSetSigmask  = 0x420b // PTRACE_SETSIGMASK
	regsetXState      = 0x202  // NT_X86_XSTATE
	regsetShadowStack = 0x204  // NT_X86_SHSTK
	eventStop         = 128    // PTRACE_EVENT_STOP
	cldTrapped        = 4      // CLD_TRAPPED
)

// request is one ptrace call. It neither blocks nor tells the Go scheduler: a
// freeze makes hundreds of them and each takes about a microsecond.
func request(req, tid int, addr, data uintptr) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, data, 0, 0)
	return e
}

// seize waits while the program of the thread is in the middle of an exec, and
// is the only request that may wait long: the Go scheduler is told of it, or
// nothing of ours would go on meanwhile. Whoever holds other threads of the
// program needs a reaper.
func seize(tid int, options uintptr) unix.Errno {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, options, 0, 0)
	return e
}

func interrupt(tid int) unix.Errno { return request(unix.PTRACE_INTERRUPT, tid, 0, 0) }

// detach lets a stopped thread go on; a signal it was about to receive when it
// stopped is delivered now, with the siginfo it came with.
func detach(tid, signal int) unix.Errno {
	return request(unix.PTRACE_DETACH, tid, 0, uintptr(signal))
}

func getRegs(tid int, r *unix.PtraceRegs) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGS, uintptr(tid), 0, uintptr(unsafe.Pointer(r)), 0, 0)
	return e
}

func setRegs(tid int, r *unix.PtraceRegs) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGS, uintptr(tid), 0, uintptr(unsafe.Pointer(r)), 0, 0)
	return e
}

// getRegset fills b and returns how much of it the kernel filled.
func getRegset(tid int, kind uintptr, b []byte) (int, unix.Errno) {
	iov := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(tid), kind, uintptr(unsafe.Pointer(&iov)), 0, 0)
	return int(iov.Len), e
}

func getSigmask(tid int) (mask uint64, e unix.Errno) {
	_, _, e = unix.RawSyscall6(unix.SYS_PTRACE, ptraceGetSigmask, uintptr(tid), 8, uintptr(unsafe.Pointer(&mask)), 0, 0)
	return mask, e
}

func setSigmask(tid int, mask uint64) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, ptraceSetSigmask, uintptr(tid), 8, uintptr(unsafe.Pointer(&mask)), 0, 0)
	return e
}

// peek reads one word of a stopped thread's address space as it is now, unlike
// the memory descriptor, which stays with the address space it was opened on.
// It and poke may wait for a page, without end: the Go scheduler is told, and
// nobody waits for their thread without a limit.
func peek(tid int, at uint64) (word uint64, e unix.Errno) {
	_, _, e = unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_PEEKDATA, uintptr(tid), uintptr(at), uintptr(unsafe.Pointer(&word)), 0, 0)
	return word, e
}

func poke(tid int, at, word uint64) unix.Errno {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_POKEDATA, uintptr(tid), uintptr(at), uintptr(word), 0, 0)
	return e
}

// childInfo is the part of siginfo_t that waitid fills for a child (amd64).
type childInfo struct {
	signo, errno, code, _ int32
	pid, uid, status, _   int32
	_                     [96]byte
}

// wait asks once, without waiting, for a change of state of tid. none is true
// if there is nothing to report.
func wait(tid, options int, info *childInfo) (none bool, e unix.Errno) {
	info.pid = 0
	_, _, e = unix.RawSyscall6(unix.SYS_WAITID, unix.P_PID, uintptr(tid), uintptr(unsafe.Pointer(info)),
		uintptr(options|unix.WNOHANG|unix.WALL), 0, 0)
	return info.pid == 0, e
}

// yield gives the processor to whoever is to stop.
func yield() { unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// doze sleeps for some microseconds. The short ones do not tell the Go
// scheduler: getting a processor back from it can take longer.
func doze(us int64) {
	ts := unix.Timespec{Nsec: us * 1000}
	if us < 100 {
		unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
	} else {
		unix.Syscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
	}
}

// getDispatch reads struct ptrace_sud_config, getRseq struct
// ptrace_rseq_configuration; older kernels know neither.
func getDispatch(tid int, first *uint64, size uintptr) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, uintptr(tid), size, uintptr(unsafe.Pointer(first)), 0, 0)
	return e
}

func getRseq(tid int, first *uint64, size uintptr) unix.Errno {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_RSEQ_CONFIGURATION, uintptr(tid), size, uintptr(unsafe.Pointer(first)), 0, 0)
	return e
}
