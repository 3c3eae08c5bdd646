//go:build windows

package win32

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// TestUnwind registers unwind records and asks the process's own unwinder for them.
func TestUnwind(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 2, Block: 2})
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	add := function(t, h, "RtlAddFunctionTable")
	// An image of two pages: a table, and a function with a frame of 32 bytes.
	base := room(t, p, h, 2*target.PageSize)
	var table []byte
	for _, v := range []uint32{0x1000, 0x1020, 0x100} {
		table = binary.LittleEndian.AppendUint32(table, v)
	}
	image := make([]byte, 0x200)
	copy(image, table)
	copy(image[0x100:], []byte{1, 4, 1, 0, 4, 0x32, 0, 0}) // UNWIND_INFO: one code, ALLOC_SMALL
	write(t, p, base, target.Read, image)
	write(t, p, base+0x1000, target.Read|target.Exec, []byte{0x48, 0x83, 0xec, 0x20, 0x48, 0x83, 0xc4, 0x20, 0xc3})

	lookup := func() string { return h.Do(fmt.Sprintf("lookup %x", uint64(base)+0x1004)) }
	if got := lookup(); got != "none" {
		t.Fatalf("before: %s", got)
	}
	threads := h.Threads()
	u := p.(target.Unwinder)
	if err := u.Register(add, base, 1, base); err != nil {
		t.Fatal(err)
	}
	if got, want := lookup(), fmt.Sprintf("%x 1000 1020", uint64(base)); got != want {
		t.Errorf("the unwinder finds %s, want %s", got, want)
	}
	remove := function(t, h, "RtlDeleteFunctionTable")
	if yes, err := p.(*process).call("undo", remove, uint64(base), 0, 0); err != nil || !yes {
		t.Errorf("RtlDeleteFunctionTable: %v, %v", yes, err)
	}
	if got := lookup(); got != "none" {
		t.Errorf("after: %s", got)
	}
	// It answers no for a table it does not know: that is told, too.
	wantError(t, "a function that says no", u.Register(remove, base, 1, base), target.ErrUnsupported)
	wantError(t, "no records", u.Register(add, base, 0, base), target.ErrUnsupported)
	for end := time.Now().Add(winhosttest.Patience); h.Threads() != threads && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := h.Threads(); n != threads {
		t.Errorf("%d threads, %d before", n, threads)
	}
	f := freezes(t, p)
	wantError(t, "Register while frozen", u.Register(add, base, 1, base), target.ErrBusy)
	if err := f.Thaw(); err != nil {
		t.Error(err)
	}
	h.Healthy()
}

// TestCallStays: a call that does not come back is told of, keeps its memory,
// and the process goes on.
func TestCallStays(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	b.limit = 300 * time.Millisecond
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	at := room(t, p, h, target.PageSize)
	write(t, p, at, target.Read|target.Exec, []byte{0xf3, 0x90, 0xeb, 0xfc}) // pause; jmp to it
	mapped := count(t, p)
	wantError(t, "Register", p.(target.Unwinder).Register(at, at, 1, at), target.ErrBusy, "has not come back")
	if n := count(t, p); n <= mapped {
		t.Errorf("%d regions, %d before: the memory of a call that goes on was taken from it", n, mapped)
	}
	h.Runs()
	h.Exit()
	wantError(t, "Register", p.(target.Unwinder).Register(at, at, 1, at), target.ErrGone)
}
