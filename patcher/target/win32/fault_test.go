//go:build windows

package win32

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// altered is the kernel with some of its answers replaced.
type altered struct {
	system
	onProcess   func(pid int, rights uint32) error
	onThreads   func([]int) []int
	onNext      func(h windows.Handle, err error) (windows.Handle, error)
	onCount     func() error
	onSuspend   func(thread windows.Handle) error
	onResume    func(thread windows.Handle) error
	onRegisters func(thread windows.Handle, r *registers)
}

func (a *altered) process(pid int, rights uint32) (windows.Handle, error) {
	if a.onProcess != nil {
		if err := a.onProcess(pid, rights); err != nil {
			return 0, err
		}
	}
	return a.system.process(pid, rights)
}

func (a *altered) threads(id target.ID) ([]int, error) {
	list, err := a.system.threads(id)
	if a.onThreads != nil {
		list = a.onThreads(list)
	}
	return list, err
}

func (a *altered) next(process, after windows.Handle) (windows.Handle, error) {
	h, err := a.system.next(process, after)
	if a.onNext != nil {
		return a.onNext(h, err)
	}
	return h, err
}

func (a *altered) count(thread windows.Handle) (int, error) {
	if a.onCount != nil {
		if err := a.onCount(); err != nil {
			return 0, err
		}
	}
	return a.system.count(thread)
}

func (a *altered) suspend(thread windows.Handle) (int, error) {
	if a.onSuspend != nil {
		if err := a.onSuspend(thread); err != nil {
			return 0, err
		}
	}
	return a.system.suspend(thread)
}

func (a *altered) resume(thread windows.Handle) (int, error) {
	if a.onResume != nil {
		if err := a.onResume(thread); err != nil {
			return 0, err
		}
	}
	return a.system.resume(thread)
}

func (a *altered) registers(thread windows.Handle, r *registers) error {
	err := a.system.registers(thread, r)
	if a.onRegisters != nil {
		a.onRegisters(thread, r)
	}
	return err
}

// TestFreezeFails has each call of a freeze fail: nobody may be held after it,
// and the next freeze works.
func TestFreezeFails(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2, Block: target.FreezePasses})
	for _, c := range []struct {
		name  string
		alter func(a *altered)
		kind  error
		text  string
	}{
		{"a thread refuses to be suspended", func(a *altered) {
			n := 0
			a.onSuspend = func(windows.Handle) error {
				if n++; n == 3 {
					return windows.ERROR_ACCESS_DENIED
				}
				return nil
			}
		}, target.ErrBusy, "cannot suspend thread"},
		{"a thread stands where none can", func(a *altered) {
			a.onRegisters = func(_ windows.Handle, r *registers) { r.pc = 0x10 }
		}, target.ErrBusy, "where no thread can be"},
		{"a stack pointer leads nowhere", func(a *altered) {
			a.onRegisters = func(_ windows.Handle, r *registers) { r.sp = 0x10 }
		}, target.ErrBusy, "where no thread can be"},
		{"threads start all the time", func(a *altered) {
			shown := 0 // one more in each pass
			a.onThreads = func(list []int) []int { shown = 0; return list[:0] }
			rest := 0
			a.onNext = func(h windows.Handle, err error) (windows.Handle, error) {
				if err != nil || rest > shown {
					if err == nil {
						windows.CloseHandle(h)
					}
					shown, rest = shown+1, 0
					return 0, statusNoMoreEntries
				}
				rest++
				return h, nil
			}
		}, target.ErrBusy, ""},
		{"the count of suspensions is not told", func(a *altered) {
			a.onCount = func() error { return statusNotImplemented }
		}, target.ErrUnsupported, ""},
		{"the right to stop is refused", func(a *altered) {
			a.onProcess = func(_ int, rights uint32) error {
				if rights&rightsStop != 0 {
					return windows.ERROR_ACCESS_DENIED
				}
				return nil
			}
		}, target.ErrDenied, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := &altered{}
			p := openHost(t, a, h)
			c.alter(a)
			_, err := p.Freeze(context.Background())
			wantError(t, "Freeze", err, c.kind, c.text)
			unheld(t, h, 0, c.name)
			h.Runs()
			*a = altered{}
			f := freezes(t, p)
			if err := f.Thaw(); err != nil {
				t.Error(err)
			}
			unheld(t, h, 0, "the next freeze")
		})
	}
	h.Healthy()
}

// TestCallHangs has a call about one thread not come back in time: all others
// run on meanwhile, and that one too when it has come back.
func TestCallHangs(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2, Block: 2})
	a := &altered{}
	p := openHost(t, a, h)
	back := make(chan struct{})
	hung := atomic.Bool{}
	a.onRegisters = func(windows.Handle, *registers) {
		if hung.CompareAndSwap(false, true) {
			<-back
		}
	}
	_, err := p.Freeze(context.Background())
	wantError(t, "Freeze", err, target.ErrBusy, "does not stop in time")
	unheld(t, h, 0, "while the call hangs")
	h.Runs()
	_, err = p.Freeze(context.Background())
	wantError(t, "Freeze while the call hangs", err, target.ErrBusy)
	close(back)
	if err := freezes(t, p).Thaw(); err != nil {
		t.Error(err)
	}
	h.Healthy()
}

// TestThawFails has a resume fail: the thread is still held then, the error
// says so, and the next Thaw lets it go.
func TestThawFails(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2})
	a := &altered{}
	p := openHost(t, a, h)
	f := freezes(t, p)
	n := 0
	a.onResume = func(windows.Handle) error {
		if n++; n == 2 {
			return windows.ERROR_INVALID_FUNCTION
		}
		return nil
	}
	if err := f.Thaw(); err == nil || !strings.Contains(err.Error(), "thread ") {
		t.Errorf("Thaw: %v", err)
	}
	held := 0
	for _, th := range f.(*frozen).threads {
		if c, err := a.system.count(th.h); err == nil && c > 0 {
			held++
		}
	}
	if held != 1 {
		t.Errorf("%d threads are held after the Thaw that failed, want 1", held)
	}
	if err := f.Thaw(); err != nil {
		t.Errorf("second Thaw: %v", err)
	}
	unheld(t, h, 0, "after the second Thaw")
	h.Healthy()
}

// TestUnbelievable has a thread stand nowhere at first: it goes on a little and
// is asked again.
func TestUnbelievable(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2})
	a := &altered{}
	p := openHost(t, a, h)
	asked := map[windows.Handle]int{}
	a.onRegisters = func(th windows.Handle, r *registers) {
		if asked[th]++; asked[th] < looks {
			r.pc = 0x7ff0_0000_0000
		}
	}
	var f target.Frozen
	for end := time.Now().Add(winhosttest.Patience); f == nil; {
		clear(asked)
		var err error
		if f, err = p.Freeze(context.Background()); err != nil && time.Now().After(end) {
			t.Fatal(err)
		}
	}
	list, err := f.Threads()
	if err != nil || len(list) != h.Threads() {
		t.Errorf("%d threads, %v; want %d", len(list), err, h.Threads())
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	unheld(t, h, 0, "after the Thaw")
	h.Healthy()
}

// TestRights: looking asks for less than writing, and what the system refuses
// is told as that and changes nothing.
func TestRights(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	a := &altered{}
	var asked uint32
	refuse := uint32(0)
	a.onProcess = func(pid int, rights uint32) error {
		if pid == h.PID {
			asked |= rights
			if rights&refuse != 0 {
				return windows.ERROR_ACCESS_DENIED
			}
		}
		return nil
	}
	p := openHost(t, a, h)
	at := target.Addr(h.Scratch())
	if _, err := p.ReadAt(make([]byte, 8), at); err != nil {
		t.Error(err)
	}
	if _, err := p.Regions(); err != nil {
		t.Error(err)
	}
	if asked&^rightsLook != 0 {
		t.Errorf("to look it asks for %#x", asked)
	}
	refuse = rightsWrite
	n, err := p.WriteAt([]byte{1}, at)
	wantError(t, "WriteAt", err, target.ErrDenied)
	if n != 0 {
		t.Errorf("%d bytes written", n)
	}
	wantError(t, "Alloc", p.Alloc(0x10000000, target.PageSize, target.Read), target.ErrDenied)
	refuse = ^uint32(0)
	b := newBackend(a)
	if _, err := b.Open(context.Background(), idOf(t, h.PID)); !errors.Is(err, target.ErrDenied) {
		t.Errorf("Open: %v", err)
	}
	list, err := b.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, i := range list {
		if i.PID == h.PID {
			found = true
			if len(i.Guards) != 1 || i.Guards[0].Code != target.GuardProtected || i.Guards[0].Text == "" {
				t.Errorf("guards %v", i.Guards)
			}
		}
	}
	if !found {
		t.Error("a process that may not be opened is not listed")
	}
	h.Healthy()
}

// TestStalePID: a pid that is free, or belongs to a thread, is over.
func TestStalePID(t *testing.T) {
	b := newBackend(system{})
	for _, pid := range []int{0x7ffffff0, 3, -4} {
		_, err := b.Open(context.Background(), target.ID{PID: pid, Start: 1})
		wantError(t, "Open", err, target.ErrGone)
	}
}
