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

// TestMemoryWithoutEnd has the walk through one process never end, and that of
// others be slow: all are listed soon, that one is left alone for longer each
// time with one Change, the others in turn, and it is as any other when it ends.
func TestMemoryWithoutEnd(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	modest := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	var endless atomic.Bool
	var walks, questions atomic.Int64
	real := virtualQuery
	defer func() { virtualQuery = real }()
	virtualQuery = func(p windows.Handle, at uintptr, i *windows.MemoryBasicInformation, n uintptr) error {
		if pid, _ := windows.GetProcessId(p); endless.Load() && pid == uint32(h.PID) {
			if at == 0 {
				walks.Add(1)
			}
			questions.Add(1)
			time.Sleep(time.Millisecond)
			*i = windows.MemoryBasicInformation{BaseAddress: at, RegionSize: 0x1000, State: windows.MEM_RESERVE}
			return nil
		}
		return real(p, at, i, n)
	}
	b := newBackend(system{})
	look := func(pid int) target.Info {
		t.Helper()
		list, err := b.List(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		k := slices.IndexFunc(list, func(i target.Info) bool { return i.PID == pid })
		if k < 0 {
			t.Fatalf("%d is not listed", pid)
		}
		return list[k]
	}
	rested := func(pid int) {
		b.listing.Lock()
		defer b.listing.Unlock()
		b.procs[pid].ask = time.Now().Add(-time.Second)
	}
	pause := func() time.Duration {
		b.listing.Lock()
		defer b.listing.Unlock()
		return b.procs[h.PID].pause
	}
	// A round in which others took all the time leaves it for the next.
	walked := func() target.Info {
		t.Helper()
		before := walks.Load()
		for end := time.Now().Add(winhosttest.Patience); ; {
			switch i := look(h.PID); {
			case walks.Load() > before:
				return i
			case time.Now().After(end):
				t.Fatal("nobody walks through it")
			}
		}
	}
	endless.Store(true)
	i := walked()
	if i.Image == "" || len(i.Guards) != 0 || pause() != longFirst || walks.Load() != 1 {
		t.Errorf("%+v, to rest for %v after %d walks", i, pause(), walks.Load())
	}
	if n := questions.Load(); n > walkRegions/10 {
		t.Errorf("%d questions", n)
	}
	short := walkWithin(windows.CurrentProcess(), 0, maxAddr, 3, 0, func(*windows.MemoryBasicInformation) bool { return true })
	wantError(t, "a walk of three regions", short, errLong)
	b.listing.Lock()
	b.procs[h.PID].ask = time.Now().Add(time.Hour)
	b.listing.Unlock()
	for range 3 {
		if again := look(h.PID); again.Change != i.Change || walks.Load() != 1 {
			t.Errorf("looked at again at once: %+v, %d walks", again, walks.Load())
		}
	}
	for _, want := range []time.Duration{2 * longFirst, 4 * longFirst} {
		rested(h.PID)
		if again := walked(); again.Change == i.Change || pause() != want {
			t.Errorf("%+v, to rest for %v, want %v", again, pause(), want)
		}
	}

	// A round without time for anybody: a known one is as before, a new one is
	// listed, and both are looked at in the next.
	known := look(modest.PID)
	b.listing.Lock()
	b.procs[modest.PID].sum++ // as if it had changed
	b.procs[modest.PID].virtual++
	b.listing.Unlock()
	fresh := newBackend(system{})
	for _, b := range []*backend{b, fresh} {
		e, err := find(target.ID{PID: modest.PID, Start: known.Start})
		if err != nil {
			t.Fatal(err)
		}
		b.walked, b.leftOver = walkTotal, 0
		k := b.refresh(e)
		if k == nil || k.info.Image == "" || b.leftOver != modest.PID {
			t.Fatalf("%+v, left over %d", k, b.leftOver)
		}
		if left := k.info.Change; b == fresh && k.sum != 0 || b != fresh && left != known.Change {
			t.Errorf("looked at: %+v", k)
		}
	}
	list, err := b.List(context.Background())
	if err != nil || list[0].PID != modest.PID || list[0].Change == known.Change {
		t.Errorf("not the first in the next round: %+v, %v", list, err)
	}
	endless.Store(false)
	for end := time.Now().Add(winhosttest.Patience); pause() != 0; { // a loaded machine may be slow
		rested(h.PID)
		if well := look(h.PID); well.Change == i.Change || time.Now().After(end) {
			t.Fatalf("its end can be reached: %+v", well)
		}
	}
	if b.procs[h.PID].sum == 0 {
		t.Error("nothing was found in it")
	}
	h.Healthy()
}
