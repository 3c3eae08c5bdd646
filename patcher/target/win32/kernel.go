//go:build windows && (amd64 || arm64)

package win32

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// kernel is what rights and freezes ask of Windows. system is the real one; tests put
// others in its place: one that ends us at the n-th call, one that has what
// the Windows they run on has not.
type kernel interface {
	// process opens a process by its pid.
	process(pid int, rights uint32) (windows.Handle, error)
	// threads are the ids of the threads of a process.
	threads(id target.ID) ([]int, error)
	open(tid int) (windows.Handle, error)
	// next is the thread after another one (0: the first) in the order of their
	// start, or statusNoMoreEntries. The other one must not end meanwhile.
	next(process, after windows.Handle) (windows.Handle, error)
	id(thread windows.Handle) (pid, tid int, err error)
	ended(thread windows.Handle) bool
	// count is how often the thread has been suspended and not resumed.
	count(thread windows.Handle) (int, error)
	// suspend and resume answer the count as it was before.
	suspend(thread windows.Handle) (before int, err error)
	resume(thread windows.Handle) (before int, err error)
	// registers waits until a suspended thread stands and reads where.
	registers(thread windows.Handle, r *registers) error
	// share gives another process a handle of the thread.
	share(thread, with windows.Handle) (windows.Handle, error)
	// unshare closes a handle that another process holds.
	unshare(with, thread windows.Handle)
	newChange(process windows.Handle) (windows.Handle, error)
	// change stops all threads of the process, or lets them go.
	change(object, process windows.Handle, stop bool) error
	close(h windows.Handle)
}

// registers are where a thread stands.
type registers struct {
	pc, sp target.Addr
	regs   []uint64
	buf    []byte // of the call, kept for the next
}

type system struct{}

const rightsThreadStop = windows.THREAD_SUSPEND_RESUME | windows.THREAD_GET_CONTEXT | windows.THREAD_QUERY_INFORMATION | windows.SYNCHRONIZE

func (system) process(pid int, rights uint32) (windows.Handle, error) {
	return windows.OpenProcess(rights, false, uint32(pid))
}

func (system) threads(id target.ID) ([]int, error) {
	e, err := find(id)
	return e.threads, err
}

func (system) open(tid int) (windows.Handle, error) {
	return windows.OpenThread(rightsThreadStop, false, uint32(tid))
}

func (system) next(process, after windows.Handle) (windows.Handle, error) {
	var h windows.Handle
	err := nt(ntGetNextThread, uintptr(process), uintptr(after), rightsThreadStop, 0, 0, uintptr(unsafe.Pointer(&h)))
	return h, err
}

// threadBasic is THREAD_BASIC_INFORMATION (class 0).
type threadBasic struct {
	exit           int32
	teb            uintptr
	process, id    uintptr
	affinity       uintptr
	priority, base int32
}

// Classes of NtQueryInformationThread.
const (
	threadBasicInformation = 0
	threadSuspendCount     = 35
)

func (system) id(thread windows.Handle) (pid, tid int, err error) {
	var b threadBasic
	err = queryThread(thread, threadBasicInformation, &b)
	return int(b.process), int(b.id), err
}

func (system) ended(thread windows.Handle) bool { return signalled(thread) }

func (system) count(thread windows.Handle) (int, error) {
	var n uint32
	err := queryThread(thread, threadSuspendCount, &n)
	return int(n), err
}

func (system) suspend(thread windows.Handle) (int, error) {
	n, _, err := suspendThread.Call(uintptr(thread))
	if uint32(n) == ^uint32(0) {
		return 0, err
	}
	return int(n), nil
}

func (system) resume(thread windows.Handle) (int, error) {
	n, err := windows.ResumeThread(thread)
	return int(n), err
}

func (system) registers(thread windows.Handle, r *registers) error {
	const align = 16
	if r.buf == nil {
		r.buf = make([]byte, contextSize+align)
	}
	c := r.buf[(align-uintptr(unsafe.Pointer(&r.buf[0]))%align)%align:][:contextSize]
	binary.LittleEndian.PutUint32(c[contextFlagsAt:], contextWanted)
	if _, err := win(getThreadContext, uintptr(thread), uintptr(unsafe.Pointer(&c[0]))); err != nil {
		return err
	}
	r.pc = target.Addr(binary.LittleEndian.Uint64(c[contextPCAt:]))
	r.sp = target.Addr(binary.LittleEndian.Uint64(c[contextSPAt:]))
	r.regs = make([]uint64, contextRegs)
	for n := range r.regs {
		r.regs[n] = binary.LittleEndian.Uint64(c[contextRegsAt+8*n:])
	}
	return nil
}

func (system) share(thread, with windows.Handle) (windows.Handle, error) {
	var h windows.Handle
	err := windows.DuplicateHandle(windows.CurrentProcess(), thread, with, &h, windows.THREAD_SUSPEND_RESUME|windows.THREAD_QUERY_INFORMATION, false, 0)
	return h, err
}

func (system) unshare(with, thread windows.Handle) {
	windows.DuplicateHandle(with, thread, 0, nil, 0, false, windows.DUPLICATE_CLOSE_SOURCE)
}

// Process state changes (ntpsapi.h): what their objects allow, and the two changes.
const (
	stateChangeAll = 0x1f0001
	stateSuspend   = 0
	stateResume    = 1
)

func (system) newChange(process windows.Handle) (windows.Handle, error) {
	var h windows.Handle
	err := nt(ntCreateProcessStateChange, uintptr(unsafe.Pointer(&h)), stateChangeAll, 0, uintptr(process), 0)
	return h, err
}

func (system) change(object, process windows.Handle, stop bool) error {
	action := uintptr(stateResume)
	if stop {
		action = stateSuspend
	}
	return nt(ntChangeProcessState, uintptr(object), uintptr(process), action, 0, 0, 0)
}

func (system) close(h windows.Handle) { windows.CloseHandle(h) }
