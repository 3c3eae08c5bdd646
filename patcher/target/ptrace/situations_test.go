//go:build linux && amd64

package ptrace

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

const page = target.PageSize

// free is an address nobody uses: hosts map nothing there.
func free() target.Addr { return target.Addr(0x3000_0000_0000 + rand.Int64N(1<<28)<<16) }

func freeze(t testing.TB, p target.Process) target.Frozen {
	t.Helper()
	for end := time.Now().Add(hosttest.Patience); ; {
		z, err := p.Freeze(context.Background())
		if err == nil {
			return z
		}
		if !errors.Is(err, target.ErrBusy) || time.Now().After(end) {
			t.Fatalf("Freeze: %v", err)
		}
	}
}

func thaw(t testing.TB, z target.Frozen) {
	t.Helper()
	if err := z.Thaw(); err != nil {
		t.Fatalf("Thaw: %v", err)
	}
}

// works has everything done to a process once, at code level too.
func works(t testing.TB, p *process, h *hosttest.Host) {
	t.Helper()
	at := free()
	must(t, "Alloc", p.Alloc(at, 2*page, target.Read|target.Exec))
	b := []byte("some bytes across two pages")
	if _, err := p.WriteAt(b, at+page-7); err != nil {
		t.Fatalf("WriteAt: %v", err)
	}
	got := make([]byte, len(b))
	if _, err := p.ReadAt(got, at+page-7); err != nil || !bytes.Equal(b, got) {
		t.Fatalf("ReadAt: %q, %v", got, err)
	}
	z := freeze(t, p)
	threads, err := z.Threads()
	if err != nil || len(threads) == 0 {
		t.Fatalf("Threads: %v, %v", threads, err)
	}
	code := make([]byte, 5)
	if _, err := p.ReadAt(code, target.Addr(h.Entry())); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(code, target.Addr(h.Entry())); err != nil {
		t.Fatal(err)
	}
	thaw(t, z)
	must(t, "Free", p.Free(at, 2*page))
}

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// refused checks kind and words of an error.
func refused(t testing.TB, what string, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("%s: %v, want %v", what, err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

func guarded(i target.Info, code target.GuardCode, words ...string) bool {
	return slices.ContainsFunc(i.Guards, func(g target.Guard) bool {
		for _, w := range words {
			if !strings.Contains(g.Text, w) {
				return false
			}
		}
		return g.Code == code
	})
}

func TestStoppedTarget(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 2, Block: 2, Sleep: 4}))
	p := openHost(t, b, h)
	must(t, "kill", unix.Kill(h.PID, unix.SIGSTOP))
	stopped := func() bool {
		var s stat
		return p.dir.stat("", &s) == nil && s.state == 'T'
	}
	until(t, "the process is stopped", stopped)
	for range 5 {
		works(t, p, h)
		until(t, "it is stopped again after the thaw", stopped)
	}
	calls := h.Stats().Calls
	time.Sleep(50 * time.Millisecond)
	if now := h.Stats().Calls; now != calls {
		t.Errorf("a stopped process made %d calls", now-calls)
	}
	must(t, "kill", unix.Kill(h.PID, unix.SIGCONT))
	h.Runs()
	if h.Value() != 42 {
		t.Error("wrong value")
	}
	s := h.Stats()
	if s.Wrong != 0 || s.Faults != 0 && !strings.Contains(s.Example, "poll") { // SIGSTOP itself ends a poll that has no restart
		t.Errorf("%+v", s)
	}
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(hosttest.Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// A control group that is frozen may or may not let us stop its threads (the
// second version does, the first does not). Either way the answer comes in
// time, and all goes on when the group is thawed.
func TestFrozenControlGroup(t *testing.T) {
	hierarchies := 0
	for _, v := range []struct{ root, file, frozen, thawed string }{
		{"/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED"},
		{"/sys/fs/cgroup/unified", "cgroup.freeze", "1", "0"},
		{"/sys/fs/cgroup", "cgroup.freeze", "1", "0"},
	} {
		group := filepath.Join(v.root, "hotpatchd-test-"+strconv.Itoa(os.Getpid()))
		if os.Mkdir(group, 0o755) != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(group) })
		if _, err := os.Stat(filepath.Join(group, v.file)); err != nil {
			continue
		}
		hierarchies++
		t.Run(filepath.Base(v.root), func(t *testing.T) {
			set := func(file, value string) error {
				f, err := os.OpenFile(filepath.Join(group, file), os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteString(value)
				return err
			}
			b := newBackend(t)
			h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 2, Block: 1}))
			t.Cleanup(func() { set(v.file, v.thawed); h.Exit() })
			p := openHost(t, b, h)
			must(t, "join the group", set("cgroup.procs", strconv.Itoa(h.PID)))
			must(t, "freeze the group", set(v.file, v.frozen))
			until(t, "the group is frozen", func() bool {
				calls := h.Stats().Calls
				time.Sleep(20 * time.Millisecond)
				return h.Stats().Calls == calls
			})
			began := time.Now()
			z, err := p.Freeze(context.Background())
			if err == nil {
				thaw(t, z)
			} else {
				refused(t, "Freeze", err, target.ErrBusy, "thread")
			}
			at := free()
			refused(t, "Alloc", p.Alloc(at, page, target.Read), target.ErrBusy)
			if d := time.Since(began); d > hosttest.Patience {
				t.Errorf("it took %v", d)
			}
			must(t, "thaw the group", set(v.file, v.thawed))
			h.Runs()
			works(t, p, h)
			h.Healthy()
			if r, err := p.Regions(); err != nil || regionAt(r, at) != nil {
				t.Errorf("a refused Alloc mapped something: %v", err)
			}
		})
	}
	if hierarchies == 0 {
		hosttest.Need(t, "the right to make a control group that can be frozen")
	}
}

func TestDeadLeader(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 2, Block: 1, Sleep: 2}))
	before := openHost(t, b, h)
	works(t, before, h)
	id := before.Info().ID
	h.Do("stop-leader")
	info := infoOf(t, b, h.PID)
	if info.ID != id || info.Exe == "" {
		t.Errorf("with a dead main thread it is %+v, was %v", info, id)
	}
	works(t, before, h) // the handle from before
	after := openHost(t, b, h)
	works(t, after, h)
	z := freeze(t, after)
	threads, err := z.Threads()
	if err != nil || len(threads) != h.Stats().Threads {
		t.Errorf("%d threads, want %d (%v)", len(threads), h.Stats().Threads, err)
	}
	thaw(t, z)
	h.Runs()
	h.Healthy()
	// The dead main thread must not stay ours: its parent waits for it.
	h.Exit()
}

// A main thread that ends while threads are being stopped.
func TestLeaderEndsMeanwhile(t *testing.T) {
	b := newBackend(t)
	for range 10 {
		h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Block: 1}))
		p := openHost(t, b, h)
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.Ask("stop-leader")
		}()
		for range 20 {
			if z, err := p.Freeze(context.Background()); err == nil {
				thaw(t, z)
			} else {
				refused(t, "Freeze", err, target.ErrBusy)
			}
		}
		<-done
		works(t, p, h)
		h.Healthy()
		h.Exit()
	}
}

// Where the memory file may not write code, words are poked.
func TestPoke(t *testing.T) {
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Sleep: 1, Block: 1}))
	p := openHost(t, b, h)
	p.readOnly = true
	at := free()
	must(t, "Alloc", p.Alloc(at, 2*page, target.Read|target.Exec))
	want := make([]byte, 2*page)
	check := func() {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("memory differs, %v", err)
		}
	}
	for n := range 40 {
		o := rand.IntN(len(want))
		part := want[o : o+rand.IntN(min(100, len(want)-o))]
		for i := range part {
			part[i] = byte(n + i + 1)
		}
		var z target.Frozen
		if n%2 == 1 {
			z = freeze(t, p)
		}
		if k, err := p.WriteAt(part, at+target.Addr(o)); err != nil || k != len(part) {
			t.Fatalf("WriteAt: %d, %v", k, err)
		}
		check()
		if z != nil {
			thaw(t, z)
		}
	}
	k, err := p.WriteAt(make([]byte, 16), at+2*page-3)
	if k != 3 || err == nil {
		t.Errorf("WriteAt beyond the end: %d, %v", k, err)
	}
	must(t, "Free", p.Free(at, 2*page))
	h.Healthy()
}

// The main thread of ours cannot end before we do: it never traces.
func TestMainThreadNeverTraces(t *testing.T) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	onMain := 0
	for range 2000 {
		wg.Add(1)
		onThread(func() bool {
			defer wg.Done()
			if unix.Gettid() == unix.Getpid() {
				mu.Lock()
				onMain++
				mu.Unlock()
			}
			runtime.Gosched()
			return true
		})
	}
	wg.Wait()
	if onMain > 0 {
		t.Errorf("%d of 2000 ran on the main thread", onMain)
	}
}
