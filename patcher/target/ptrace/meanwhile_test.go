//go:build linux && amd64

package ptrace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// Every signal sent while threads are stopped, and calls made in them, arrives
// once and with what it carried.
func TestSignalsArrive(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Sleep: 1}))
	var tid, sig int
	if _, err := fmt.Sscanf(h.Do("receiver"), "receiver %d %d", &tid, &sig); err != nil {
		t.Fatal(err)
	}
	p := openHost(t, b, h)
	defer func(f func(a, b *candidate) bool) { before = f }(before)
	before = func(a, b *candidate) bool { return a.tid == tid && b.tid != tid }
	const signals = 3000
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for n := 1; n <= signals; n++ {
			var info struct { // siginfo_t of rt_tgsigqueueinfo(2)
				signo, errno, code, _ int32
				pid, uid              int32
				value                 uint64
				_                     [96]byte
			}
			info.signo, info.code, info.value = int32(sig), -1 /* SI_QUEUE */, uint64(n)
			for {
				_, _, e := unix.Syscall6(unix.SYS_RT_TGSIGQUEUEINFO, uintptr(h.PID), uintptr(tid), uintptr(sig), uintptr(unsafe.Pointer(&info)), 0, 0)
				if e != unix.EAGAIN {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if n%10 == 0 {
				time.Sleep(2 * time.Millisecond)
			}
		}
	}()
	at := free()
	rounds := 0
	for sending := true; sending || rounds < 100; {
		select {
		case <-sent:
			sending = false
		default:
		}
		rounds++
		if z, err := p.Freeze(context.Background()); err == nil {
			thaw(t, z)
		}
		if err := p.Alloc(at, page, target.Read); err == nil {
			must(t, "Free", retryBusy(func() error { return p.Free(at, page) }))
		} else if !errors.Is(err, target.ErrBusy) {
			t.Fatal(err)
		}
	}
	until(t, "all signals arrive", func() bool { return h.Stats().Signals >= signals })
	if s := h.Stats(); s.Signals != signals || s.Sum != signals*(signals+1)/2 {
		t.Errorf("%d signals with sum %d, want %d with %d", s.Signals, s.Sum, signals, signals*(signals+1)/2)
	}
	t.Logf("%d rounds", rounds)
	h.Healthy()
}

func retryBusy(f func() error) (err error) {
	for range 100 {
		if err = f(); !errors.Is(err, target.ErrBusy) {
			return err
		}
	}
	return err
}

// A program that is replaced again and again while it is worked on is never
// changed by work that was meant for the program before.
func TestExecMeanwhile(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Block: 1}))
	pid := h.PID
	stop := make(chan struct{})
	var wg sync.WaitGroup
	execs := 0
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				h.Exec()
				execs++
				if execs > 110 { // one block of counters a life
					return
				}
			}
		}
	})
	over := func(what string, err error) bool {
		if err != nil && !errors.Is(err, target.ErrGone) && !errors.Is(err, target.ErrBusy) {
			t.Errorf("%s: %v", what, err)
		}
		return err != nil
	}
	written := 0
	for range 150 {
		l, err := b.List(context.Background())
		must(t, "List", err)
		for _, i := range l {
			if i.PID != pid {
				continue
			}
			p, err := b.Open(context.Background(), i.ID)
			if over("Open", err) {
				continue
			}
			at := free()
			err = p.Alloc(at, page, target.Read|target.Write)
			if errors.Is(err, target.ErrUnsupported) {
				err = target.ErrBusy // so young that it has not mapped libc
			}
			if !over("Alloc", err) {
				_, err := p.WriteAt([]byte("mine"), at)
				over("WriteAt", err)
			}
			if z, err := p.Freeze(context.Background()); !over("Freeze", err) {
				// Frozen, it is the program that was opened: its own memory
				// may be written, and is written back.
				var was [16]byte
				if _, err := p.ReadAt(was[:], hosttest.Probe); err == nil && was[0] == 0x5a {
					_, err := p.WriteAt(make([]byte, 16), hosttest.Probe)
					must(t, "WriteAt while frozen", err)
					_, err = p.WriteAt(was[:], hosttest.Probe)
					must(t, "WriteAt while frozen", err)
					written++
				}
				thaw(t, z)
			}
			p.Close()
		}
	}
	close(stop)
	wg.Wait()
	h.Runs()
	p := openHost(t, b, h)
	got := make([]byte, 4096)
	if _, err := p.ReadAt(got, hosttest.Probe); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0x5a}, 4096)) {
		t.Errorf("the probe page was written: %v", err)
	}
	t.Logf("%d execs, %d writes", execs, written)
	h.Healthy()
}

// An exec between the look at a process and the stop of its thread: what was
// meant for the old program must not reach the new one.
func TestExecJustBefore(t *testing.T) {
	defer func(f func(a, b *candidate) bool) { before = f }(before)
	for _, readOnly := range []bool{false, true} {
		b := newBackend(t)
		h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
		at := free()
		for what, do := range map[string]func(p *process) error{
			"Alloc": func(p *process) error { return p.Alloc(at, page, target.Read|target.Write) },
			"WriteAt": func(p *process) error {
				_, err := p.WriteAt(make([]byte, 16), hosttest.Probe)
				return err
			},
		} {
			if what == "WriteAt" && !readOnly {
				continue // no thread is stopped for it
			}
			p := openHost(t, b, h)
			p.readOnly = readOnly
			var once sync.Once
			before = func(a, b *candidate) bool {
				once.Do(h.Exec)
				return a.rank < b.rank
			}
			refused(t, what, do(p), target.ErrGone)
			once.Do(func() { t.Errorf("%s: there was no exec", what) })
			h.Runs()
			q := openHost(t, b, h)
			got := make([]byte, page)
			if _, err := q.ReadAt(got, hosttest.Probe); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0x5a}, page)) {
				t.Errorf("%s: the new program was written: %v", what, err)
			}
			if r, err := q.Regions(); err != nil || regionAt(r, at) != nil {
				t.Errorf("%s: the new program has the memory of the old one: %v", what, err)
			}
			h.Healthy()
		}
	}
}
