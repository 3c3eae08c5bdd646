//go:build windows

package win32

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

func function(t *testing.T, h *winhosttest.Host, name string) target.Addr {
	t.Helper()
	var at uint64
	if _, err := fmt.Sscanf(h.Do("proc "+name), "%x", &at); err != nil || at == 0 {
		t.Fatalf("no %s: %v", name, err)
	}
	return target.Addr(at)
}

// room is a free place behind the program's image.
func room(t *testing.T, p target.Process, h *winhosttest.Host, size uint64) target.Addr {
	t.Helper()
	list, err := p.Regions()
	if err != nil {
		t.Fatal(err)
	}
	last := target.Addr(h.Entry())
	for _, r := range list {
		if r.Start >= last && r.Start-last > target.Addr(size)+4*granule {
			return (last + 2*granule) &^ (granule - 1)
		}
		last = max(last, r.End)
	}
	t.Fatal("no room")
	return 0
}

func write(t *testing.T, p target.Process, at target.Addr, prot target.Prot, b []byte) {
	t.Helper()
	if err := p.Alloc(at, target.PageSize, prot); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := p.Flush(at, len(b)); err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, p target.Process) int {
	t.Helper()
	list, err := p.Regions()
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// openHost opens a host through an altered kernel.
func openHost(t *testing.T, a *altered, h *winhosttest.Host) target.Process {
	t.Helper()
	p, err := newBackend(a).Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func idOf(t *testing.T, pid int) target.ID {
	t.Helper()
	h, err := windows.OpenProcess(windows.PROCESS_QUERY_LIMITED_INFORMATION, false, uint32(pid))
	if err != nil {
		t.Fatal(err)
	}
	defer windows.CloseHandle(h)
	start, err := started(h)
	if err != nil {
		t.Fatal(err)
	}
	return target.ID{PID: pid, Start: start}
}

// freezes tries until the machine is quiet enough.
func freezes(t *testing.T, p target.Process) target.Frozen {
	t.Helper()
	for end := time.Now().Add(winhosttest.Patience); ; time.Sleep(time.Millisecond) {
		f, err := p.Freeze(context.Background())
		if err == nil {
			return f
		}
		if !errors.Is(err, target.ErrBusy) || time.Now().After(end) {
			t.Fatalf("Freeze: %v", err)
		}
	}
}

func wantError(t *testing.T, what string, err, kind error, texts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
		return
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %q does not say %q", what, err, s)
		}
	}
}
