//go:build windows

package win32

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/targettest"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// changes is a kernel that has process state changes, made of NtSuspendProcess
// and NtResumeProcess. What it cannot show is that Windows takes a stop back
// when the last handle of the object closes: that is Windows's promise.
type changes struct{ system }

var (
	ntSuspendProcess = ntdll.NewProc("NtSuspendProcess")
	ntResumeProcess  = ntdll.NewProc("NtResumeProcess")
)

func (changes) newChange(process windows.Handle) (windows.Handle, error) {
	return windows.CreateEvent(nil, 0, 0, nil)
}

func (changes) change(object, process windows.Handle, stop bool) error {
	if stop {
		return nt(ntSuspendProcess, uintptr(process))
	}
	return nt(ntResumeProcess, uintptr(process))
}

func (changes) suspend(windows.Handle) (int, error) {
	return 0, errors.New("no thread is suspended by itself under a state change")
}

// TestSuiteByStateChange holds the other way to stop against the same promises.
func TestSuiteByStateChange(t *testing.T) {
	b := newBackend(changes{})
	if b.method != stateChange || b.FreezeMethod() == newBackend(system{}).FreezeMethod() && newBackend(system{}).method == suspension {
		t.Fatalf("the method is %q", b.FreezeMethod())
	}
	targettest.Run(t, targettest.Setup{Backend: b, Start: startVictim, Patience: winhosttest.Patience, Lacks: lacks})
	if b.guard.process != 0 {
		t.Error("a guardian was started")
	}
}

// TestStateChangeFails: where the system refuses the object or the change, the
// threads are suspended one by one, now or at the next try; a change that does
// not let go is told of, and let go of again.
func TestStateChangeFails(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2})
	k := &failingChanges{}
	b := newBackend(k)
	open := func() target.Process {
		p, err := b.Open(context.Background(), idOf(t, h.PID))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	p := open()
	k.fail = "new"
	f := freezes(t, p)
	if f.(*frozen).change != 0 || k.suspended == 0 {
		t.Error("not suspended one by one")
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	k.fail, k.suspended = "stop", 0
	_, err := p.Freeze(context.Background())
	wantError(t, "Freeze", err, target.ErrBusy, "the next try")
	unheld(t, h, 0, "after a change that was refused")
	f = freezes(t, p)
	if f.(*frozen).change != 0 || k.suspended == 0 {
		t.Error("not suspended one by one")
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	k.fail, k.suspended = "", 0
	f = freezes(t, open())
	if f.(*frozen).change == 0 || k.suspended != 0 {
		t.Error("another handle is not stopped by a state change")
	}
	k.fail = "resume"
	if err := f.Thaw(); err == nil {
		t.Error("a Thaw that does not let go succeeds")
	}
	k.fail = ""
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	unheld(t, h, 0, "after the second Thaw")
	h.Healthy()
}

type failingChanges struct {
	changes
	fail      string
	suspended int // threads, by themselves
}

func (f *failingChanges) suspend(thread windows.Handle) (int, error) {
	f.suspended++
	return f.system.suspend(thread)
}

func (f *failingChanges) newChange(process windows.Handle) (windows.Handle, error) {
	if f.fail == "new" {
		return 0, windows.STATUS_ACCESS_DENIED
	}
	return f.changes.newChange(process)
}

func (f *failingChanges) change(object, process windows.Handle, stop bool) error {
	if f.fail == "stop" && stop || f.fail == "resume" && !stop {
		return windows.STATUS_ACCESS_DENIED
	}
	return f.changes.change(object, process, stop)
}
