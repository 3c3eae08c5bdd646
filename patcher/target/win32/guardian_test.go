//go:build windows

package win32

import (
	"context"
	"testing"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// counted is a kernel of one thread that is suspended so often.
type counted struct {
	system
	n       int
	unknown bool
}

func (c *counted) count(windows.Handle) (int, error) {
	if c.unknown {
		return 0, statusNotImplemented
	}
	return c.n, nil
}

func (c *counted) resume(windows.Handle) (int, error) {
	c.n--
	return c.n + 1, nil
}

// TestSettle: what a guardian makes of each state that our end can leave.
func TestSettle(t *testing.T) {
	for _, c := range []struct {
		name    string
		state   uint32
		before  uint32
		n       int
		unknown bool
		left    int
	}{
		{"a free slot", slotFree, 0, 2, false, 2},
		{"not suspended yet", slotArmed, 0, 0, false, 0},
		{"suspended, not noted", slotArmed, 0, 1, false, 0},
		{"suspended and noted", slotStopped, 0, 1, false, 0},
		{"not suspended yet, by the program twice", slotArmed, 2, 2, false, 2},
		{"suspended, not noted, by the program twice", slotArmed, 2, 3, false, 2},
		{"suspended and noted, by the program twice", slotStopped, 2, 3, false, 2},
		{"resumed by the program meanwhile", slotArmed, 2, 1, false, 1},
		{"the count is not told", slotArmed, 0, 1, true, 0},
	} {
		k := &counted{n: c.n, unknown: c.unknown}
		var s slot
		s.before.Store(c.before)
		s.state.Store(c.state)
		if !s.settle(k) || k.n != c.left {
			t.Errorf("%s: suspended %d times after it, want %d", c.name, k.n, c.left)
		}
	}
}

// TestGuardianEnds: without one no thread is stopped, so there is another for
// the next freeze.
func TestGuardianEnds(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	end := func() {
		g, err := windows.OpenProcess(windows.PROCESS_TERMINATE|windows.SYNCHRONIZE, false, guardianPID(t, b))
		if err != nil {
			t.Fatal(err)
		}
		defer windows.CloseHandle(g)
		if err := windows.TerminateProcess(g, 1); err != nil {
			t.Fatal(err)
		}
		if e, err := windows.WaitForSingleObject(g, 60000); err != nil || e != windows.WAIT_OBJECT_0 {
			t.Fatalf("the guardian does not end: %v", err)
		}
	}
	if err := freezes(t, p).Thaw(); err != nil {
		t.Fatal(err)
	}
	end()
	f := freezes(t, p)
	if signalled(b.guard.process) {
		t.Error("a thread is suspended without a guardian")
	}
	end()
	other := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	q, err := b.Open(context.Background(), idOf(t, other.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	_, err = q.Freeze(context.Background())
	wantError(t, "Freeze while its guardian is gone", err, target.ErrUnsupported, "it ended while threads are held")
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	if err := freezes(t, q).Thaw(); err != nil {
		t.Error(err)
	}
	unheld(t, h, 0, "at the end")
	h.Healthy()
	other.Healthy()
}
