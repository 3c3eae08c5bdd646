//go:build windows

package win32

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

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
// the next freeze; a freeze whose guardian ends is given up, unless something
// has been written.
func TestGuardianEnds(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	end := func() { endGuardian(t, b) }
	if err := freezes(t, p).Thaw(); err != nil {
		t.Fatal(err)
	}
	end()
	f := freezes(t, p)
	if signalled(b.guard.process) {
		t.Error("a thread is suspended without a guardian")
	}
	end()
	unheld(t, h, 0, "when the guardian has ended") // nobody calls for it
	h.Runs()
	at := target.Addr(h.Scratch())
	_, err = p.WriteAt([]byte{1}, at)
	wantError(t, "WriteAt without a guardian", err, target.ErrBusy, "the guardian has ended")
	_, err = f.Threads()
	wantError(t, "Threads without a guardian", err, target.ErrBusy, "the guardian has ended")
	other := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	q, err := b.Open(context.Background(), idOf(t, other.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	_, err = q.Freeze(context.Background())
	wantError(t, "Freeze while its guardian is gone", err, target.ErrBusy, "it ended while threads are held")
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	if err := freezes(t, q).Thaw(); err != nil {
		t.Error(err)
	}

	// What was begun is finished: no thread goes on into half of it.
	f = freezes(t, p)
	for n := range 2 {
		if _, err := p.WriteAt([]byte{1}, at); err != nil {
			t.Errorf("write %d: %v", n, err)
		}
		if n == 0 {
			end()
		}
	}
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	unheld(t, h, 0, "at the end")
	h.Healthy()
	other.Healthy()
}

// TestGuardianEndsUnseen is that with nobody told: each step of a freeze asks.
func TestGuardianEndsUnseen(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	a := &altered{}
	b := newBackend(a)
	b.guard.lost = func() {}
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for name, ask := range map[string]func(target.Frozen) error{
		"WriteAt": func(target.Frozen) error { _, err := p.WriteAt([]byte{1}, target.Addr(h.Scratch())); return err },
		"Threads": func(f target.Frozen) error { _, err := f.Threads(); return err },
	} {
		f := freezes(t, p)
		endGuardian(t, b)
		wantError(t, name+" without a guardian", ask(f), target.ErrBusy, "the guardian has ended")
		unheld(t, h, 0, "after the refusal")
		if err := f.Thaw(); err != nil {
			t.Error(err)
		}
	}
	seen := false // by the last step of a Freeze
	for end := time.Now().Add(winhosttest.Patience); !seen && time.Now().Before(end); {
		var once sync.Once
		a.onRegisters = func(windows.Handle, *registers) { once.Do(func() { endGuardian(t, b) }) }
		f, err := p.Freeze(context.Background())
		if err == nil {
			t.Error("frozen, and nobody watches")
			f.Thaw()
			break
		}
		seen = errors.Is(err, target.ErrBusy) && strings.Contains(err.Error(), "the guardian has ended")
	}
	if !seen {
		t.Error("no Freeze said so")
	}
	a.onRegisters = nil
	unheld(t, h, 0, "at the end")
	h.Healthy()
}

// endGuardian kills it.
func endGuardian(t *testing.T, b *backend) {
	t.Helper()
	g, err := windows.OpenProcess(windows.PROCESS_TERMINATE|windows.SYNCHRONIZE, false, guardianPID(t, b))
	if err != nil {
		t.Error(err)
		return
	}
	defer windows.CloseHandle(g)
	if err := windows.TerminateProcess(g, 1); err != nil {
		t.Error(err)
	}
	if e, err := windows.WaitForSingleObject(g, 60000); err != nil || e != windows.WAIT_OBJECT_0 {
		t.Errorf("the guardian does not end: %v", err)
	}
}
