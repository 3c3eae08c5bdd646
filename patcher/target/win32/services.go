//go:build windows && (amd64 || arm64)

package win32

import (
	"sync"
	"unsafe"
)

// waits are the system services a thread is likely to be found in.
var waits = []string{
	"NtWaitForSingleObject", "NtWaitForMultipleObjects", "NtDelayExecution", "NtRemoveIoCompletion", "NtRemoveIoCompletionEx",
	"NtWaitForWorkViaWorkerFactory", "NtWaitForAlertByThreadId", "NtWaitForKeyedEvent", "NtSignalAndWaitForSingleObject", "NtYieldExecution",
	"NtReadFile", "NtWriteFile", "NtDeviceIoControlFile", "NtFsControlFile", "NtFlushBuffersFile", "NtLockFile", "NtCreateFile", "NtOpenFile",
	"NtAlpcSendWaitReceivePort", "NtReplyWaitReceivePort", "NtWaitForDebugEvent", "NtTerminateThread", "NtTerminateProcess",
	"NtAllocateVirtualMemory", "NtFreeVirtualMemory", "NtProtectVirtualMemory", "NtMapViewOfSection", "NtUnmapViewOfSection",
	"NtCreateThreadEx", "NtResumeThread", "NtContinue", "NtQueryInformationFile",
}

// serviceNames are their numbers on this Windows, read from our own stubs: they
// change from one build to the next, but not from process to process.
var serviceNames = sync.OnceValue(func() map[uint32]string {
	m := map[uint32]string{}
	for _, name := range waits {
		p := ntdll.NewProc(name)
		if p.Find() != nil {
			continue
		}
		addr := p.Addr()
		stub := *(**[8]byte)(unsafe.Pointer(&addr))
		if number, ok := serviceOf(stub[:]); ok {
			m[number] = name
		}
	}
	return m
})
