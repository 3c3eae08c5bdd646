//go:build linux && amd64

package ptrace

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

type waiting struct {
	name        string
	tid, eintrs int
}

// waitersOf are the threads of a host that wait without a time limit, and the
// signal whose handler is to interrupt them.
func waitersOf(t *testing.T, h *hosttest.Host) (signal int, list []waiting) {
	t.Helper()
	words := strings.Fields(strings.TrimPrefix(h.Do("waiters"), "waiters "))
	fmt.Sscan(words[0], &signal)
	for words = words[1:]; len(words) >= 3; words = words[3:] {
		w := waiting{name: words[0]}
		fmt.Sscan(words[1], &w.tid)
		fmt.Sscan(words[2], &w.eintrs)
		list = append(list, w)
	}
	if len(list) < 6 { // without the right to a namespace of their own there are no semaphores
		t.Fatalf("only %d threads wait: %v", len(list), list)
	}
	return signal, list
}

// first has one thread tried before all others.
func first(t *testing.T, tid *int) {
	was := before
	t.Cleanup(func() { before = was })
	before = func(a, b *candidate) bool { return a.tid == *tid && b.tid != *tid }
}

// Calls that a stop would end with EINTR go on: after freezes, after calls made
// in their threads, and after the death of whoever stopped them.
func TestStopsGoUnnoticed(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Wait: true}))
	_, list := waitersOf(t, h)
	p := openHost(t, b, h)
	tid := 0
	first(t, &tid)
	for range 15 {
		thaw(t, freeze(t, p))
		for _, w := range list {
			tid = w.tid
			at := free()
			must(t, "Alloc", p.Alloc(at, page, target.Read))
			must(t, "Free", retryBusy(func() error { return p.Free(at, page) }))
		}
	}
	for m := range moments {
		killTracer(t, fmt.Sprintf("%d:any:%d", h.PID, m), hosttest.Patience)
	}
	if _, now := waitersOf(t, h); h.Stats().EINTRs != 0 {
		t.Errorf("%d calls ended with EINTR: %v", h.Stats().EINTRs, now)
	}
	from := h.Stats().Waits
	until(t, "the threads wait and are woken", func() bool { return h.Stats().Waits > from+uint64(len(list)) })
	h.Healthy()
}

// A signal whose handler ends such a call does so as well if it comes while
// the thread is held: by a freeze, or by us at any moment of a remote call.
func TestSignalEndsWait(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Wait: true}))
	signal, list := waitersOf(t, h)
	p := openHost(t, b, h)
	send := func(w waiting) {
		t.Helper()
		must(t, "signal "+w.name, unix.Tgkill(h.PID, w.tid, unix.Signal(signal)))
	}
	each := func(held func(w waiting)) {
		t.Helper()
		for _, w := range list {
			before := h.Stats()
			ended := func() int {
				_, now := waitersOf(t, h)
				for _, n := range now {
					if n.tid == w.tid {
						return n.eintrs
					}
				}
				return -1
			}
			from := ended()
			// The thread may just not be waiting when it is stopped: the handler
			// runs then and nothing has to end.
			for try := 0; ended() == from; try++ {
				if try == 20 {
					t.Errorf("%s: no signal ended it (%d were handled)", w.name, h.Stats().Handled-before.Handled)
					break
				}
				handled := h.Stats().Handled
				held(w)
				until(t, "the signal is handled", func() bool { return h.Stats().Handled == handled+1 })
				time.Sleep(5 * time.Millisecond) // for the thread to say so
			}
		}
	}
	each(func(w waiting) {
		z := freeze(t, p)
		send(w)
		thaw(t, z)
	})
	tid := 0
	first(t, &tid)
	defer func(f func(moment)) { passing = f }(passing)
	for m := range moments {
		each(func(w waiting) {
			tid = w.tid
			sent := false
			passing = func(now moment) {
				if now == m && !sent {
					sent = true
					send(w)
				}
			}
			at := free()
			must(t, "Alloc", p.Alloc(at, page, target.Read))
			passing = func(moment) {}
			if !sent {
				t.Fatalf("moment %d was not passed", m)
			}
			must(t, "Free", retryBusy(func() error { return p.Free(at, page) }))
		})
	}
	h.Healthy()
}

func TestWaitsAgain(t *testing.T) {
	const eintr = ^uint64(4 - 1)
	forEver := uint64(0xffffffff) // -1 as an int
	for _, c := range []struct {
		r    unix.PtraceRegs
		want bool
	}{
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_WAIT, Rax: eintr, R10: forEver}, true},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_WAIT, Rax: eintr, R10: ^uint64(0)}, true},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_WAIT, Rax: eintr, R10: 3000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_WAIT, Rax: eintr}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_WAIT, Rax: 1, R10: forEver}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_PWAIT, Rax: eintr, R10: 3000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_PWAIT2, Rax: eintr}, true},
		{unix.PtraceRegs{Orig_rax: unix.SYS_EPOLL_PWAIT2, Rax: eintr, R10: 0x7ffc0000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_SEMOP, Rax: eintr, R10: 5}, true},
		{unix.PtraceRegs{Orig_rax: unix.SYS_SEMTIMEDOP, Rax: eintr, R10: 0x7ffc0000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_RT_SIGTIMEDWAIT, Rax: eintr, Rdx: 0x7ffc0000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_IO_GETEVENTS, Rax: eintr, R8: 0x7ffc0000}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_IO_URING_ENTER, Rax: eintr, R10: 1 | enterExtArg}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_READ, Rax: eintr}, false},
		{unix.PtraceRegs{Orig_rax: unix.SYS_RT_SIGSUSPEND, Rax: eintr}, false},
		{unix.PtraceRegs{Orig_rax: ^uint64(0), Rax: eintr}, false},
	} {
		if got := waitsAgain(&c.r); got != c.want {
			t.Errorf("call %d with %x %x %x: %v", int64(c.r.Orig_rax), c.r.Rdx, c.r.R10, c.r.R8, got)
		}
	}
}
