package patcher_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32"
	"hotpatchd/patcher/target/win32/winhosttest"
)

func TestMain(m *testing.M) {
	win32.Guardian() // is this process one, it does nothing else
	os.Exit(m.Run())
}

// program is a running testdata/winapp: it calls a function of an image from
// all its threads and checks every answer and every wait.
type program struct {
	t     *testing.T
	p     target.Process
	base  patcher.Loaded
	stdin io.Writer
	lines chan string
}

func startProgram(t *testing.T, b target.Backend, image string, spin, sleep, block int, env ...string) *program {
	t.Helper()
	exe := os.Getenv("HOTPATCH_WINAPP")
	if exe == "" {
		winhosttest.Need(t, "testdata/winapp, built (scripts/wine test)")
	}
	dll := filepath.Join(winhosttest.Root(t), "testdata", "fixtures", filepath.FromSlash(image))
	c := exec.Command(exe, dll, "vuln", fmt.Sprint(spin), fmt.Sprint(sleep), fmt.Sprint(block), "42", "43", "44")
	c.Env = append(os.Environ(), env...)
	stdin, err := c.StdinPipe()
	must(t, err)
	stdout, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	w := &program{t: t, stdin: stdin, lines: make(chan string, 16)}
	over := make(chan struct{})
	go func() {
		defer close(over)
		defer close(w.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			w.lines <- strings.TrimSpace(s.Text())
		}
	}()
	t.Cleanup(func() { c.Process.Kill(); <-over; c.Wait() })
	if line := w.line(); !strings.HasPrefix(line, "ready ") {
		t.Fatalf("the program says %q", line)
	}
	list, err := b.List(context.Background())
	must(t, err)
	i := slices.IndexFunc(list, func(i target.Info) bool { return i.PID == c.Process.Pid })
	if i < 0 {
		t.Fatal("the program is not listed")
	}
	w.p, err = b.Open(context.Background(), list[i].ID)
	must(t, err)
	t.Cleanup(func() { w.p.Close() })
	images, err := patcher.Images(w.p)
	must(t, err)
	k := slices.IndexFunc(images, func(l patcher.Loaded) bool { return l.Is(filepath.Base(image)) })
	if k < 0 {
		t.Fatalf("%s is not among %d images", image, len(images))
	}
	w.base = images[k]
	return w
}

func (w *program) line() string {
	w.t.Helper()
	select {
	case s, ok := <-w.lines:
		if !ok {
			w.t.Fatal("the program ended")
		}
		return s
	case <-time.After(winhosttest.Patience):
		w.t.Fatal("the program does not answer")
	}
	return ""
}

type progress struct{ value, calls, wrong, faults, sleeps, waits, idle, threads int64 }

func (w *program) state() (s progress) {
	w.t.Helper()
	fmt.Fprintln(w.stdin, "state")
	line := w.line()
	if _, err := fmt.Sscanf(line, "%d calls %d wrong %d faults %d sleeps %d waits %d idle %d of %d", &s.value, &s.calls, &s.wrong, &s.faults, &s.sleeps, &s.waits, &s.idle, &s.threads); err != nil {
		w.t.Fatalf("the program says %q", line)
	}
	return s
}

// well waits until each single thread has done more, and looks for damage.
func (w *program) well(want int64) {
	w.t.Helper()
	w.state()
	for end := time.Now().Add(winhosttest.Patience); ; {
		time.Sleep(300 * time.Millisecond) // several turns of those that wait
		s := w.state()
		if s.value != want || s.wrong != 0 || s.faults != 0 {
			w.t.Fatalf("want %d: %+v", want, s)
		}
		if s.idle == 0 {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("threads stand still: %+v", s)
		}
	}
}

// change does f until no thread is in the way any more; on a loaded machine a
// freeze may come too late again and again.
func (w *program) change(f func() (patcher.Record, error)) patcher.Record {
	w.t.Helper()
	for end := time.Now().Add(2 * winhosttest.Patience); ; {
		rec, err := f()
		var r *patcher.Refusal
		switch {
		case err == nil:
			return rec
		case !errors.As(err, &r) || r.Reason != patcher.Busy || time.Now().After(end):
			w.t.Fatal(err)
		}
	}
}

func (w *program) apply(x *patcher.Patcher, patch *patcher.Patch) patcher.Record {
	w.t.Helper()
	return w.change(func() (patcher.Record, error) {
		plan, err := patcher.Prepare(w.p, w.base, patch)
		must(w.t, err)
		return x.Apply(context.Background(), w.p, plan)
	})
}

func (w *program) undo(x *patcher.Patcher, rec patcher.Record) {
	w.t.Helper()
	w.change(func() (patcher.Record, error) {
		var err error
		rec, err = x.Undo(context.Background(), w.p, rec)
		return rec, err
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Images of two compilers, loaded by the system's own loader, are patched and
// taken back in a running program, by the Windows backend.
func TestLiveWindows(t *testing.T) {
	b, err := win32.New()
	must(t, err)
	for _, c := range []struct{ image, hotpatch string }{
		{"mingw/app.dll", "mingw/app-ref-1.dll"},
		{"mingw/app.dll", "mingw/app-import-1.dll"},
		{"mingw/app.dll", "mingw/app-copy-1.dll"},
		{"clang/app.dll", "clang/app-ref-1.dll"},
		{"clang/app.dll", "clang/app-import-1.dll"},
		{"plain/app.dll", "plain/app-1.dll"},
	} {
		t.Run(c.hotpatch, func(t *testing.T) {
			w := startProgram(t, b, c.image, 1, 2, 2)
			x := &patcher.Patcher{}
			w.well(42)
			for range 2 {
				rec := w.apply(x, patchOf(t, c.image, c.hotpatch))
				w.well(43)
				w.undo(x, rec)
				w.well(42)
			}
		})
	}
}

// One image at two places in two programs: both are patched, each with what it
// takes at its place.
func TestLiveWindowsRelocated(t *testing.T) {
	b, err := win32.New()
	must(t, err)
	for _, image := range []string{"mingw/app.dll", "clang/app.dll"} {
		there := startProgram(t, b, image, 1, 1, 1)
		elsewhere := startProgram(t, b, image, 1, 1, 1, "WINAPP_ELSEWHERE=1")
		if there.base.Base == elsewhere.base.Base {
			t.Fatalf("both are at %s", there.base.Base)
		}
		x := &patcher.Patcher{}
		patch := patchOf(t, image, strings.Replace(image, "app.dll", "app-import-1.dll", 1))
		for _, w := range []*program{there, elsewhere} {
			rec := w.apply(x, patch)
			w.well(43)
			w.undo(x, rec)
			w.well(42)
		}
	}
}

// More threads call the function than there are processors, others wait, and it
// changes again and again: no value is ever wrong, no wait is cut short, and no
// thread is left suspended.
func TestLiveWindowsUnderLoad(t *testing.T) {
	cycles := 200
	if testing.Short() {
		cycles = 20
	}
	b, err := win32.New()
	must(t, err)
	w := startProgram(t, b, "mingw/app.dll", 3, 4, 4)
	x := &patcher.Patcher{}
	patch := patchOf(t, "mingw/app.dll", "mingw/app-ref-1.dll")
	var pauses []time.Duration
	for range cycles {
		rec := w.apply(x, patch)
		pauses = append(pauses, rec.Pause)
		w.undo(x, rec)
	}
	w.well(42)
	if s := w.state(); s.threads != 3+4+4+1 {
		t.Errorf("%d threads", s.threads)
	}
	slices.Sort(pauses)
	t.Logf("%d cycles, %d calls; pause p50 %v, longest %v", cycles, w.state().calls, pauses[len(pauses)/2], pauses[len(pauses)-1])
}

// An image that imports from API sets only, and a fix that imports from more of
// them and by names that a module forwards: each slot gets the address that the
// system's own loader would have put there, found in the process's own map, and
// the new function works by them.
func TestLiveWindowsApiSets(t *testing.T) {
	b, err := win32.New()
	must(t, err)
	w := startProgram(t, b, "sets/sets.dll", 1, 2, 2)
	w.well(42)
	images, err := patcher.Images(w.p)
	must(t, err)
	patch := patchOf(t, "sets/sets.dll", "sets/sets-1.dll")
	plan, err := patcher.Prepare(w.p, w.base, patch)
	must(t, err)
	want := map[string]string{ // where the function is that a name means
		"KERNEL32.DLL!HEAPSIZE":                  "ntdll.dll",
		"API-MS-WIN-CRT-CONVERT-L1-1-0.DLL!ATOI": "ucrtbase.dll",
	}
	shared := 0
	for _, bind := range plan.Binds {
		if bind.Kind == "shared" {
			shared++
			continue
		}
		module, ok := want[strings.ToUpper(bind.What)]
		if !ok {
			t.Errorf("%s is bound, too", bind.What)
			continue
		}
		delete(want, strings.ToUpper(bind.What))
		in := slices.IndexFunc(images, func(l patcher.Loaded) bool {
			return uint64(l.Base) <= bind.Value && bind.Value < uint64(l.Base)+uint64(l.Size)
		})
		if in < 0 || !images[in].Is(module) {
			t.Errorf("%s is bound to %x, which is not in %s", bind.What, bind.Value, module)
		}
		lib, symbol := windows.NewLazySystemDLL(module), bind.What[strings.IndexByte(bind.What, '!')+1:]
		if symbol == "HeapSize" {
			symbol = "RtlSizeHeap"
		}
		must(t, lib.NewProc(symbol).Find())
		// Compared as distances: the module may be at another place there.
		if there, here := bind.Value-uint64(images[in].Base), uint64(lib.NewProc(symbol).Addr()-lib.Handle()); there != here {
			t.Errorf("%s is bound to %s+%x; here it is at +%x", bind.What, module, there, here)
		}
	}
	if len(want) != 0 || shared != 4 {
		t.Errorf("not bound: %v; %d slots are shared with the base", want, shared)
	}
	if t.Failed() {
		return // a call of what is not there would end the program
	}
	x := &patcher.Patcher{}
	for range 2 {
		rec := w.apply(x, patch)
		w.well(43)
		w.undo(x, rec)
		w.well(42)
	}
}
