//go:build windows && (amd64 || arm64)

package win32

import (
	"unsafe"

	"golang.org/x/sys/windows"
)

// Functions are looked up when they are first called: one that this Windows has
// not is an answer ("unknown"), never a reason not to start.
var (
	ntdll      = windows.NewLazySystemDLL("ntdll.dll")
	kernel32   = windows.NewLazySystemDLL("kernel32.dll")
	kernelbase = windows.NewLazySystemDLL("kernelbase.dll")

	ntGetNextThread            = ntdll.NewProc("NtGetNextThread")
	ntQueryInformationThread   = ntdll.NewProc("NtQueryInformationThread")
	ntQueryVirtualMemory       = ntdll.NewProc("NtQueryVirtualMemory")
	ntCreateProcessStateChange = ntdll.NewProc("NtCreateProcessStateChange")
	ntChangeProcessState       = ntdll.NewProc("NtChangeProcessState")

	ntCreateThreadEx = ntdll.NewProc("NtCreateThreadEx")

	createRemoteThread    = kernel32.NewProc("CreateRemoteThread")
	flushInstructionCache = kernel32.NewProc("FlushInstructionCache")
	getThreadContext      = kernel32.NewProc("GetThreadContext")
	suspendThread         = kernel32.NewProc("SuspendThread")
	setThreadPriority     = kernel32.NewProc("SetThreadPriority")
	virtualAllocEx        = kernel32.NewProc("VirtualAllocEx")
	virtualFreeEx         = kernel32.NewProc("VirtualFreeEx")
	virtualAlloc2         = kernelbase.NewProc("VirtualAlloc2")
)

// Status codes and process rights that x/sys does not name, as in ntstatus.h and winnt.h.
const (
	statusNoMoreEntries        = windows.NTStatus(0x8000001a)
	statusThreadIsTerminating  = windows.NTStatus(0xc000004b)
	statusProcessIsTerminating = windows.NTStatus(0xc000010a)
	statusNotImplemented       = windows.NTStatus(0xc0000002)

	memFree    = 0x10000
	memPrivate = 0x20000
	memMapped  = 0x40000
	memImage   = 0x1000000
)

// nt calls a function of ntdll. Without it the answer is STATUS_NOT_IMPLEMENTED.
//
//go:uintptrescapes
func nt(p *windows.LazyProc, args ...uintptr) error {
	if p.Find() != nil {
		return statusNotImplemented
	}
	r, _, _ := p.Call(args...)
	if s := windows.NTStatus(uint32(r)); s != 0 {
		return s
	}
	return nil
}

// win calls a function that answers zero for failure.
//
//go:uintptrescapes
func win(p *windows.LazyProc, args ...uintptr) (uintptr, error) {
	if err := p.Find(); err != nil {
		return 0, statusNotImplemented
	}
	r, _, err := p.Call(args...)
	if r == 0 {
		return 0, err
	}
	return r, nil
}

// query reads a fixed-size answer of NtQueryInformationProcess.
func query[T any](process windows.Handle, class int32, into *T) error {
	return windows.NtQueryInformationProcess(process, class, unsafe.Pointer(into), uint32(unsafe.Sizeof(*into)), nil)
}

// queryThread reads a fixed-size answer of NtQueryInformationThread.
func queryThread[T any](thread windows.Handle, class uintptr, into *T) error {
	return nt(ntQueryInformationThread, uintptr(thread), class, uintptr(unsafe.Pointer(into)), unsafe.Sizeof(*into), 0)
}

// signalled tells whether a process or thread has ended.
func signalled(h windows.Handle) bool {
	e, err := windows.WaitForSingleObject(h, 0)
	return err == nil && e == windows.WAIT_OBJECT_0
}
