//go:build windows

package win32

import (
	"context"
	"testing"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// TestAllocParts maps an annex as the patcher does, part beside part with
// protections of their own, across granules, and gives it back: then the
// system has its addresses back too.
func TestAllocParts(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	open := func(b *backend) *process {
		p, err := b.Open(context.Background(), idOf(t, h.PID))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p.(*process)
	}
	p := open(b)
	const page = target.PageSize
	at := room(t, p, h, 4*granule)
	sizes := []uint64{page, 20 * page, 3 * page, page}
	fill := func() {
		next := at
		for n, size := range sizes {
			prot := []target.Prot{target.Read, target.Read | target.Exec, target.Read | target.Write, target.Read | target.Exec}[n]
			if err := p.Alloc(next, size, prot); err != nil {
				t.Fatalf("part %d: %v", n, err)
			}
			next += target.Addr(size)
		}
	}
	empty := func(p *process) {
		next := at
		for n, size := range sizes {
			if err := p.Free(next, size); err != nil {
				t.Fatalf("part %d: %v", n, err)
			}
			next += target.Addr(size)
		}
	}
	free := func(what string) {
		walk(p.h, at, at+2*granule, func(i *windows.MemoryBasicInformation) bool {
			if i.State != memFree {
				t.Errorf("%s: %x is in state %#x", what, i.BaseAddress, i.State)
			}
			return true
		})
		if n := len(b.reserved[p.id]); n != 0 {
			t.Errorf("%s: %d reservations are remembered", what, n)
		}
	}
	fill()
	if err := p.Protect(at, 24*page, target.Read); err != nil { // over two allocations
		t.Error(err)
	}
	// Another handle of the same backend goes on beside them.
	next := at + 25*page
	if err := open(b).Alloc(next, page, target.Read); err != nil {
		t.Error(err)
	}
	if err := open(b).Free(next, page); err != nil {
		t.Error(err)
	}
	empty(p)
	free("given back")

	// Another backend, we after a restart: what lies beside is not ours to it,
	// and shows as taken, but what it is told to give back it gives back whole.
	fill()
	other := open(newTestBackend(t))
	wantError(t, "Alloc beside them by another backend", other.Alloc(next, page, target.Read), target.ErrTaken)
	list, err := other.Regions()
	if err != nil {
		t.Fatal(err)
	}
	told := false
	for _, r := range list {
		told = told || r.Start <= next && next < r.End && r.Prot == 0
	}
	if !told {
		t.Error("a reservation of others is not told of")
	}
	empty(other)
	if err := p.Alloc(at, page, target.Read); err != nil {
		t.Errorf("Alloc where another backend gave back: %v", err)
	}
	if err := p.Free(at, page); err != nil {
		t.Error(err)
	}
	if _, err := p.Regions(); err != nil { // what is gone is forgotten
		t.Error(err)
	}
	free("given back by another backend")
	h.Healthy()
}

// TestAllocBesideOthers: the rest of somebody's granule can be had by nobody.
func TestAllocBesideOthers(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	p, err := newTestBackend(t).Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	at := room(t, p, h, granule)
	if err := p.(*process).grant("alloc", rightsWrite); err != nil {
		t.Fatal(err)
	}
	if _, err := win(virtualAllocEx, uintptr(p.(*process).h), uintptr(at), target.PageSize, windows.MEM_RESERVE|windows.MEM_COMMIT, windows.PAGE_READWRITE); err != nil {
		t.Fatal(err)
	}
	wantError(t, "Alloc", p.Alloc(at+4*target.PageSize, target.PageSize, target.Read), target.ErrTaken, "shares its 64 KiB")
	if err := p.Alloc(at+granule, target.PageSize, target.Read); err != nil {
		t.Errorf("Alloc of the next granule: %v", err)
	}
	h.Healthy()
}

// TestWriteProtected: whatever the protection, it is written and stays.
func TestWriteProtected(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	at := room(t, p, h, granule)
	for n, prot := range []target.Prot{target.Read, target.Read | target.Write, target.Read | target.Exec, target.Exec, 0} {
		page := at + target.Addr(n)*target.PageSize
		if err := p.Alloc(page, target.PageSize, prot); err != nil {
			t.Fatal(err)
		}
		if n, err := p.WriteAt([]byte{1, 2, 3}, page+5); n != 3 || err != nil {
			t.Errorf("WriteAt to %s: %d, %v", prot, n, err)
		}
		list, err := p.Regions()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range list {
			if r.Start <= page && page < r.End && r.Prot != prot {
				t.Errorf("%s is %s after a write", prot, r.Prot)
			}
		}
		if prot&target.Read == 0 {
			if err := p.Protect(page, target.PageSize, target.Read); err != nil {
				t.Fatal(err)
			}
		}
		var got [3]byte
		if _, err := p.ReadAt(got[:], page+5); err != nil || got != [3]byte{1, 2, 3} {
			t.Errorf("%s holds % x, %v", prot, got, err)
		}
	}
	h.Healthy()
}
