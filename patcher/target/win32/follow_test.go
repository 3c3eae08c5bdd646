//go:build windows

package win32

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// ends begins to listen; over ends that and waits until nothing is held.
func ends(t *testing.T, b *backend) (c <-chan target.Event, over func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	c, err := b.Ends(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c, func() {
		t.Helper()
		cancel()
		for limit := time.After(winhosttest.Patience); ; {
			select {
			case _, open := <-c:
				if !open {
					return
				}
			case <-limit:
				t.Fatal("the channel is not closed")
			}
		}
	}
}

func nextEnd(t *testing.T, c <-chan target.Event) target.Event {
	t.Helper()
	select {
	case e, open := <-c:
		if !open {
			t.Fatal("the channel was closed")
		}
		return e
	case <-time.After(winhosttest.Patience):
		t.Fatal("no end is told")
	}
	return target.Event{}
}

// exists tells whether the system keeps a pid for one process, alive or not.
func exists(t *testing.T, pid int) bool {
	t.Helper()
	h, err := windows.OpenProcess(windows.PROCESS_QUERY_LIMITED_INFORMATION, false, uint32(pid))
	if errors.Is(err, windows.ERROR_INVALID_PARAMETER) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	windows.CloseHandle(h)
	return true
}

// TestEnds: how processes end is told by their exit codes, a crash by its NTSTATUS.
func TestEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		end  func(h *winhosttest.Host)
		code uint32
	}{
		"an access violation": {func(h *winhosttest.Host) { h.Tell("crash") }, uint32(windows.STATUS_ACCESS_VIOLATION)},
		"well":                {func(h *winhosttest.Host) { h.Tell("quit 0") }, 0},
		"an exit code":        {func(h *winhosttest.Host) { h.Tell("quit 259") }, 259}, // STILL_ACTIVE, which it is not
		"ended by us":         {func(h *winhosttest.Host) { h.Kill() }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestBackend(t)
			c, over := ends(t, b)
			h := winhosttest.Start(t, winhosttest.Options{})
			id := idOf(t, h.PID)
			if got := b.Follow([]target.ID{id}); len(got) != 1 || got[0] != id {
				t.Fatalf("followed: %v", got)
			}
			from := time.Now()
			tc.end(h)
			e := nextEnd(t, c)
			if e.Kind != target.Exited || e.PID != id.PID || e.Start != id.Start || e.Code != tc.code || !e.Status {
				t.Errorf("%+v", e)
			}
			if age := e.At.Sub(from); age < -time.Second || age > winhosttest.Patience {
				t.Errorf("it ended %v after it was told to", age)
			}
			// Still followed: asked again it is neither told twice nor let go of.
			h.Exit()
			b.Follow([]target.ID{id})
			if !exists(t, id.PID) {
				t.Error("its pid is free while it is followed")
			}
			b.Follow(nil)
			for limit := time.Now().Add(winhosttest.Patience); exists(t, id.PID); time.Sleep(time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatal("its pid is kept by nobody's wish")
				}
			}
			select {
			case e := <-c:
				t.Errorf("told besides: %+v", e)
			default:
			}
			over()
			if got := b.Follow([]target.ID{id}); got != nil {
				t.Errorf("nobody listens, and followed are %v", got)
			}
		})
	}
}

// TestFollowOnly: who is not to be followed any more, who is another life and who
// cannot be opened is not followed, and no handle of them is kept.
func TestFollowOnly(t *testing.T) {
	a := &altered{}
	b := newBackend(a)
	c, over := ends(t, b)
	if _, err := b.Ends(context.Background()); !errors.Is(err, target.ErrBusy) {
		t.Errorf("a second listener: %v", err)
	}
	one, two := winhosttest.Start(t, winhosttest.Options{}), winhosttest.Start(t, winhosttest.Options{})
	first, second := idOf(t, one.PID), idOf(t, two.PID)
	other := target.ID{PID: first.PID, Start: first.Start + 1}
	b.Follow([]target.ID{first, second})
	b.Follow(nil)
	settled := func() int {
		for limit := time.Now().Add(winhosttest.Patience); ; time.Sleep(time.Millisecond) {
			b.follow.mu.Lock()
			n := len(b.follow.groups)
			b.follow.mu.Unlock()
			if n == 0 {
				return handles(t, windows.CurrentProcess())
			}
			if time.Now().After(limit) {
				t.Fatalf("%d groups wait for nobody", n)
			}
		}
	}
	before := settled()
	const rounds = 50
	for range rounds {
		if got := b.Follow([]target.ID{first, other, second}); len(got) != 2 || got[0] != first || got[1] != second {
			t.Fatalf("followed: %v", got)
		}
		if got := b.Follow([]target.ID{second, {PID: 0x7ffffff0, Start: 1}}); len(got) != 1 || got[0] != second {
			t.Fatalf("followed: %v", got)
		}
		b.Follow(nil)
	}
	if n := settled(); n > before+rounds/2 { // Go's own threads hold some
		t.Errorf("we hold %d handles, %d before %d rounds", n, before, rounds)
	}
	b.Follow([]target.ID{first, second})
	b.Follow([]target.ID{second})
	one.Exit()
	two.Exit()
	if e := nextEnd(t, c); e.PID != second.PID {
		t.Errorf("told of %+v", e)
	}
	over()
}

// TestFollowMany: more lives than one thread can wait for.
func TestFollowMany(t *testing.T) {
	b := newTestBackend(t)
	c, over := ends(t, b)
	hosts, ids := map[int]*winhosttest.Host{}, []target.ID(nil)
	for range groupMost + 4 {
		h := winhosttest.Start(t, winhosttest.Options{})
		hosts[h.PID] = h
		ids = append(ids, idOf(t, h.PID))
	}
	if got := b.Follow(ids); len(got) != len(ids) {
		t.Fatalf("followed: %d of %d", len(got), len(ids))
	}
	for _, h := range hosts {
		h.Tell("quit 7")
	}
	for range ids {
		e := nextEnd(t, c)
		if hosts[e.PID] == nil || e.Code != 7 {
			t.Fatalf("%+v", e)
		}
		delete(hosts, e.PID)
	}
	over()
}
