package guard

// Signals of Linux by which a fault or an abort ends a process (signal(7)): the
// numbers are the same on amd64 and arm64.
var faults = map[int]bool{
	3:  false, // SIGQUIT: somebody's order
	4:  true,  // SIGILL
	5:  true,  // SIGTRAP
	6:  true,  // SIGABRT
	7:  true,  // SIGBUS
	8:  true,  // SIGFPE
	11: true,  // SIGSEGV
	16: true,  // SIGSTKFLT
	31: true,  // SIGSYS
}

// OfSignal tells how a process ended on Linux, by what wait(2) reports of it:
// the signal that ended it, 0 if none did, and else its exit code.
func OfSignal(signal, code int) Ending {
	switch {
	case faults[signal]:
		return Crash
	case signal != 0:
		return Stopped
	case code != 0:
		return Failure
	}
	return Normal
}

// Exit codes of Windows that are nobody's fault (ntstatus.h).
const (
	statusControlC      = 0xC000013A // console closed, Ctrl+C
	statusDLLInitLogoff = 0xC000026B // the session ends
	statusKilled        = 1          // what TerminateProcess is given by task managers
	statusBreakpoint    = 0x80000003 // a failed assertion without a debugger
	exitAbort           = 3          // abort() of the C runtime
	severityError       = 0xC0000000 // of an NTSTATUS: what an unhandled exception and __fastfail leave
)

// OfStatus tells how a process ended on Windows, by its exit code: an unhandled
// exception leaves its own code there.
func OfStatus(code uint32) Ending {
	switch {
	case code == 0:
		return Normal
	case code == statusControlC, code == statusDLLInitLogoff, code == statusKilled:
		return Stopped
	case code == statusBreakpoint, code == exitAbort, code&severityError == severityError:
		return Crash
	}
	return Failure
}
