//go:build windows

package win32

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// TestMemoryNotAnswered has the system not answer about one process: the others
// are listed, that one with the reason, its owner is told, and when the system
// answers again it is as any other.
func TestMemoryNotAnswered(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	var mute atomic.Bool
	answer := make(chan struct{})
	real := virtualQuery
	defer func() { virtualQuery = real }()
	virtualQuery = func(p windows.Handle, at uintptr, i *windows.MemoryBasicInformation, n uintptr) error {
		if pid, _ := windows.GetProcessId(p); mute.Load() && pid == uint32(h.PID) {
			<-answer
		}
		return real(p, at, i, n)
	}
	b := newBackend(system{})
	look := func() (all int, i target.Info) {
		list, err := b.List(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		k := slices.IndexFunc(list, func(i target.Info) bool { return i.PID == h.PID })
		if k < 0 {
			t.Fatal("not listed")
		}
		return len(list), list[k]
	}
	mute.Store(true)
	began := time.Now()
	all, i := look()
	if all < 2 || len(i.Guards) != 1 || i.Guards[0].Code != target.GuardKernel {
		t.Fatalf("%d processes, %+v", all, i)
	}
	asked := time.Since(began)
	for range 3 { // not asked about again at once
		began = time.Now()
		if _, again := look(); again.Change != i.Change || time.Since(began) > asked {
			t.Errorf("in %v (the first took %v): %+v", time.Since(began), asked, again)
		}
	}
	p, err := b.Open(context.Background(), i.ID)
	if err == nil {
		_, err = p.Regions()
		p.Close()
	}
	wantError(t, "Regions", err, target.ErrBusy, "not answered")
	mute.Store(false)
	close(answer)
	b.listing.Lock()
	b.procs[h.PID].ask = time.Now().Add(-time.Second) // as if the pause were over
	b.listing.Unlock()
	if _, well := look(); len(well.Guards) != 0 || well.Change == i.Change || well.Image == "" {
		t.Errorf("answered again: %+v", well)
	}
	h.Healthy()
}
