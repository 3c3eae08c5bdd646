//go:build windows

package win32

import (
	"context"
	"testing"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

var getProcessHandleCount = kernel32.NewProc("GetProcessHandleCount")

func handles(t *testing.T, process windows.Handle) int {
	t.Helper()
	var n uint32
	if _, err := win(getProcessHandleCount, uintptr(process), uintptr(unsafe.Pointer(&n))); err != nil {
		winhosttest.Need(t, "GetProcessHandleCount: %v", err)
	}
	return int(n)
}

// TestHandles does everything to a process again and again: neither we nor the
// guardian may hold more handles after it, whether it succeeded or failed.
func TestHandles(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2, Block: 2, Churn: 1})
	a := &altered{}
	b := newBackend(a)
	ctx := context.Background()
	round := func(n int) {
		a.onSuspend = nil
		if _, err := b.List(ctx); err != nil {
			t.Fatal(err)
		}
		p, err := b.Open(ctx, idOf(t, h.PID))
		if err != nil {
			t.Fatal(err)
		}
		at := room(t, p, h, target.PageSize)
		write(t, p, at, target.Read|target.Exec, []byte{1})
		if err := p.Free(at, target.PageSize); err != nil {
			t.Fatal(err)
		}
		f := freezes(t, p)
		if _, err := f.Threads(); err != nil {
			t.Fatal(err)
		}
		if err := f.Thaw(); err != nil {
			t.Fatal(err)
		}
		k := 0
		a.onSuspend = func(windows.Handle) error {
			if k++; k == 1+n%4 {
				return windows.ERROR_ACCESS_DENIED
			}
			return nil
		}
		if f, err := p.Freeze(ctx); err == nil {
			f.Thaw()
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 5 {
		round(n)
	}
	watcher, err := windows.OpenProcess(windows.PROCESS_QUERY_INFORMATION, false, guardianPID(t, b))
	if err != nil {
		t.Fatal(err)
	}
	defer windows.CloseHandle(watcher)
	ours, theirs := handles(t, windows.CurrentProcess()), handles(t, watcher)
	const rounds = 30
	for n := range rounds {
		round(n)
	}
	// Go's own threads hold some, and come when they are needed.
	if n := handles(t, windows.CurrentProcess()); n > ours+rounds/2 {
		t.Errorf("we hold %d handles, %d before %d rounds", n, ours, rounds)
	}
	if n := handles(t, watcher); n > theirs+rounds/2 {
		t.Errorf("the guardian holds %d handles, %d before %d rounds", n, theirs, rounds)
	}
	if len(b.guard.free) != len(b.guard.table) || len(b.held) != 0 {
		t.Errorf("%d slots of the guardian are in use, %d lives are held", len(b.guard.table)-len(b.guard.free), len(b.held))
	}
	unheld(t, h, 0, "at the end")
	h.Healthy()
}

func guardianPID(t *testing.T, b *backend) uint32 {
	t.Helper()
	var basic windows.PROCESS_BASIC_INFORMATION
	var h windows.Handle
	if err := windows.DuplicateHandle(windows.CurrentProcess(), b.guard.process, windows.CurrentProcess(), &h, windows.PROCESS_QUERY_LIMITED_INFORMATION, false, 0); err == nil {
		defer windows.CloseHandle(h)
		if query(h, windows.ProcessBasicInformation, &basic) == nil {
			return uint32(basic.UniqueProcessId)
		}
	}
	return uint32(childOf(t, windows.CurrentProcess()))
}
