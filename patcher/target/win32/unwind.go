//go:build windows && (amd64 || arm64)

package win32

import (
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// callLimit bounds a call made in a process. The functions called here take a
// lock and link a list; a thread that has not come back by then stands still
// (a suspended job, a debugger) or waits for a lock that will not be released.
const callLimit = 5 * time.Second

// Register has the process tell its unwinder of count records.
func (p *process) Register(add, table target.Addr, count int, base target.Addr) error {
	if count <= 0 || count > 1<<20 {
		return p.refuse("register unwind records in", table, target.ErrUnsupported, "%d records", count)
	}
	yes, err := p.call("register unwind records in", add, uint64(table), uint64(uint32(count)), uint64(base))
	if err == nil && !yes {
		err = p.refuse("register unwind records in", table, target.ErrUnsupported, "RtlAddFunctionTable says no")
	}
	return err
}

// argumentsAt is where the words that callStub reads lie behind it.
const argumentsAt = 0x100

// call runs a function of the process with three arguments in a thread of its
// own there and answers its BOOLEAN. The memory of a call that does not come
// back is left to it.
func (p *process) call(op string, fn target.Addr, args ...uint64) (bool, error) {
	if p.over() {
		return false, p.refuse(op, fn, target.ErrGone, "it has ended")
	}
	if p.frozen != nil {
		return false, p.refuse(op, fn, target.ErrBusy, "it is frozen")
	}
	if err := p.grant(op, rightsWrite|rightsThread); err != nil {
		return false, err
	}
	code, err := win(virtualAllocEx, uintptr(p.h), 0, target.PageSize, windows.MEM_RESERVE|windows.MEM_COMMIT, windows.PAGE_READWRITE)
	if err != nil {
		return false, p.fail(op, 0, err)
	}
	ended := false
	defer func() {
		if ended {
			win(virtualFreeEx, uintptr(p.h), code, 0, windows.MEM_RELEASE)
		}
	}()
	thread, err := p.startCall(code, fn, args)
	if err != nil {
		ended = true // it never began
		return false, p.fail(op, fn, err)
	}
	defer windows.CloseHandle(thread)
	which, err := windows.WaitForMultipleObjects([]windows.Handle{thread, p.h}, false, uint32(p.b.limit/time.Millisecond))
	if p.over() {
		return false, p.refuse(op, fn, target.ErrGone, "it has ended")
	}
	if err != nil || which != windows.WAIT_OBJECT_0 {
		return false, p.refuse(op, fn, target.ErrBusy, "a call made in it has not come back within %v", p.b.limit)
	}
	ended = true
	var result threadBasic
	if err := queryThread(thread, threadBasicInformation, &result); err != nil {
		return false, p.fail(op, fn, err)
	}
	return byte(result.exit) != 0, nil
}

// startCall fills the page and starts the thread.
func (p *process) startCall(code uintptr, fn target.Addr, args []uint64) (windows.Handle, error) {
	b := make([]byte, argumentsAt, argumentsAt+32)
	copy(b, callStub)
	b = binary.LittleEndian.AppendUint64(b, uint64(fn))
	for _, a := range args {
		b = binary.LittleEndian.AppendUint64(b, a)
	}
	var n uintptr
	if err := windows.WriteProcessMemory(p.h, code, &b[0], uintptr(len(b)), &n); err != nil {
		return 0, err
	}
	var old uint32
	if err := windows.VirtualProtectEx(p.h, code, target.PageSize, windows.PAGE_EXECUTE_READ, &old); err != nil {
		return 0, err
	}
	if _, err := win(flushInstructionCache, uintptr(p.h), code, uintptr(len(b))); err != nil {
		return 0, err
	}
	// The libraries of the program are not told of the thread: their entry
	// points are none of our business, and their lock may be held.
	const skipThreadAttach = 2 // THREAD_CREATE_FLAGS_SKIP_THREAD_ATTACH
	const access = windows.SYNCHRONIZE | windows.THREAD_QUERY_INFORMATION
	var thread windows.Handle
	err := nt(ntCreateThreadEx, uintptr(unsafe.Pointer(&thread)), access, 0, uintptr(p.h), code, code+argumentsAt, skipThreadAttach, 0, 0, 0, 0)
	if err == statusNotImplemented {
		var h uintptr
		h, err = win(createRemoteThread, uintptr(p.h), 0, 0, code, code+argumentsAt, 0, 0)
		thread = windows.Handle(h)
	}
	return thread, err
}
