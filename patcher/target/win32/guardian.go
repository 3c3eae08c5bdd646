//go:build windows && (amd64 || arm64)

package win32

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// slot is what the guardian knows of one thread, in memory it shares with us.
// It is written in an order that is true at every instant: the handle before
// the state that makes it count, and armed before the thread is suspended.
type slot struct {
	handle atomic.Uint64 // of the thread, in the guardian
	before atomic.Uint32 // how often it was suspended without us
	state  atomic.Uint32
}

// States of a slot.
const (
	slotFree    = iota
	slotArmed   // about to be suspended, or just suspended, or just resumed: the count tells
	slotStopped // suspended once by us
)

// maxGuarded bounds the threads that are held at a time, of all processes.
const maxGuarded = 1 << 16

const tableSize = maxGuarded * unsafe.Sizeof(slot{})

// suspended notes that our suspension is in force.
func (s *slot) suspended(before int) {
	s.before.Store(uint32(before))
	s.state.Store(slotStopped)
}

// releasing notes that our suspension is about to end.
func (s *slot) releasing() { s.state.Store(slotArmed) }

// guardian is our side: the process that watches over us, and the table.
type guardian struct {
	mu      sync.Mutex
	process windows.Handle // 0: none yet
	section windows.Handle
	table   []slot
	free    []*slot
	lost    func() // called when a guardian has ended, from a goroutine of its own
}

// guardianWord is the first argument of a guardian's command line.
const guardianWord = "hotpatch-guardian"

// readyLimit bounds the start of a guardian: a process of ours, on a machine
// that may be loaded. It is spent before any thread is stopped.
const readyLimit = 20 * time.Second

// errUnguarded: the guardian ended while there are threads that it had in its care.
var errUnguarded = errors.New("it ended while threads are held")

// over tells whether nobody watches over us.
func (g *guardian) over() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.process == 0 || signalled(g.process)
}

// ready makes sure that a guardian watches over us.
func (g *guardian) ready(k kernel) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.process != 0 && !signalled(g.process) {
		return nil
	}
	if g.process != 0 {
		if len(g.free) != len(g.table) {
			return errUnguarded
		}
		windows.CloseHandle(g.process)
		g.process = 0
	}
	if g.table == nil {
		if err := g.share(); err != nil {
			return err
		}
	}
	return g.start()
}

// share makes the table.
func (g *guardian) share() error {
	var err error
	if g.section, err = windows.CreateFileMapping(windows.InvalidHandle, &inheritable, windows.PAGE_READWRITE, 0, uint32(tableSize), nil); err != nil {
		return fmt.Errorf("cannot share memory with it: %w", err)
	}
	if g.table, err = mapTable(g.section); err != nil {
		windows.CloseHandle(g.section)
		return fmt.Errorf("cannot share memory with it: %w", err)
	}
	for i := len(g.table) - 1; i >= 0; i-- {
		g.free = append(g.free, &g.table[i])
	}
	return nil
}

var inheritable = windows.SecurityAttributes{Length: uint32(unsafe.Sizeof(windows.SecurityAttributes{})), InheritHandle: 1}

func mapTable(section windows.Handle) ([]slot, error) {
	at, err := windows.MapViewOfFile(section, windows.FILE_MAP_WRITE, 0, 0, tableSize)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice(*(**slot)(unsafe.Pointer(&at)), maxGuarded), nil
}

// start starts ourselves anew as a guardian and waits until it watches.
func (g *guardian) start() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var us windows.Handle
	current := windows.CurrentProcess()
	if err := windows.DuplicateHandle(current, current, current, &us, windows.SYNCHRONIZE, true, 0); err != nil {
		return err
	}
	defer windows.CloseHandle(us)
	watching, err := windows.CreateEvent(&inheritable, 1, 0, nil)
	if err != nil {
		return err
	}
	defer windows.CloseHandle(watching)
	// Away from our console: what ends us there must not end it. Away from our
	// job too if that is allowed, since a job may end all its processes at once.
	const apart = windows.CREATE_NEW_PROCESS_GROUP | windows.DETACHED_PROCESS | windows.ABOVE_NORMAL_PRIORITY_CLASS
	var c *exec.Cmd
	for _, flags := range []uint32{apart | windows.CREATE_BREAKAWAY_FROM_JOB, apart} {
		c = exec.Command(self, guardianWord, number(us), number(g.section), number(watching))
		c.Dir = os.Getenv("SystemRoot")
		c.SysProcAttr = &syscall.SysProcAttr{CreationFlags: flags,
			AdditionalInheritedHandles: []syscall.Handle{syscall.Handle(us), syscall.Handle(g.section), syscall.Handle(watching)}}
		if err = c.Start(); err == nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("cannot start it: %w", err)
	}
	defer c.Process.Release() // its pid is its own until then
	h, err := windows.OpenProcess(windows.PROCESS_DUP_HANDLE|windows.SYNCHRONIZE, false, uint32(c.Process.Pid))
	if err != nil {
		c.Process.Kill()
		return err
	}
	which, err := windows.WaitForMultipleObjects([]windows.Handle{watching, h}, false, uint32(readyLimit/time.Millisecond))
	if err != nil || which != windows.WAIT_OBJECT_0 {
		c.Process.Kill()
		windows.CloseHandle(h)
		return fmt.Errorf("it does not begin to watch within %v", readyLimit)
	}
	var end windows.Handle // closing ours ends no wait
	if err := windows.DuplicateHandle(current, h, current, &end, windows.SYNCHRONIZE, false, 0); err != nil {
		c.Process.Kill()
		windows.CloseHandle(h)
		return err
	}
	g.process = h
	go func() {
		// It ends with us at the latest: a wait without a bound.
		windows.WaitForSingleObject(end, windows.INFINITE)
		windows.CloseHandle(end)
		g.lost()
	}()
	return nil
}

func number(h windows.Handle) string { return strconv.FormatUint(uint64(h), 16) }

// arm gives the guardian a handle of a thread that is not suspended by us yet.
func (g *guardian) arm(k kernel, thread windows.Handle) (*slot, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.free) == 0 {
		return nil, fmt.Errorf("more than %d threads at a time", maxGuarded)
	}
	before, err := k.count(thread)
	if err != nil {
		return nil, err
	}
	h, err := k.share(thread, g.process)
	if err != nil {
		return nil, err
	}
	s := g.free[len(g.free)-1]
	g.free = g.free[:len(g.free)-1]
	s.handle.Store(uint64(h))
	s.before.Store(uint32(before))
	s.state.Store(slotArmed)
	return s, nil
}

// disarm takes the handle of a thread back that is not suspended by us any more.
func (g *guardian) disarm(k kernel, s *slot) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s.state.Store(slotFree)
	k.unshare(g.process, windows.Handle(s.handle.Swap(0)))
	g.free = append(g.free, s)
}

// Guardian does a guardian's work, and does not return then, if this process
// was started as one; otherwise it returns at once. A program that uses this
// backend calls it first of all in main, and its tests in TestMain.
func Guardian() {
	if len(os.Args) != 5 || os.Args[1] != guardianWord {
		return
	}
	var h [3]windows.Handle
	for i := range h {
		n, err := strconv.ParseUint(os.Args[2+i], 16, 64)
		if err != nil {
			os.Exit(2)
		}
		h[i] = windows.Handle(n)
	}
	os.Exit(watch(system{}, h[0], h[1], h[2]))
}

// watch waits for the end of the process it guards, the one wait here without a
// bound, and resumes what that had suspended.
func watch(k kernel, process, section, watching windows.Handle) int {
	table, err := mapTable(section)
	if err != nil {
		return 3
	}
	if err := windows.SetEvent(watching); err != nil {
		return 3
	}
	windows.CloseHandle(watching)
	if e, err := windows.WaitForSingleObject(process, windows.INFINITE); err != nil || e != windows.WAIT_OBJECT_0 {
		return 3
	}
	left := 0
	for i := range table {
		if !table[i].settle(k) {
			left++
		}
	}
	if left > 0 {
		return 1
	}
	return 0
}

// settle resumes a thread that is suspended by us, and no other: where our end
// came between a call and its note, the count tells whether the call was made.
func (s *slot) settle(k kernel) bool {
	state, thread := s.state.Load(), windows.Handle(s.handle.Load())
	if state == slotFree {
		return true
	}
	if state == slotArmed {
		n, err := k.count(thread)
		if err == nil && uint32(n) <= s.before.Load() {
			return true
		}
	}
	_, err := k.resume(thread)
	return err == nil || k.ended(thread)
}
