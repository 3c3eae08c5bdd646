//go:build linux && amd64

package ptrace

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// goVictimEnv makes the test binary a Go program that checks itself: its
// goroutines run on stacks that are pieces of its heap.
const goVictimEnv = "HOTPATCHD_TEST_GO_VICTIM"

func goVictim() {
	wrong := func(format string, args ...any) {
		fmt.Printf("wrong "+format+"\n", args...)
		os.Exit(2)
	}
	var turns atomic.Uint64
	for range 2 {
		go func() { // computes, and fills the heap around the stacks
			sum := func(seed float64) (v float64) {
				list := make([]float64, 200)
				for i := range list {
					list[i] = seed * float64(i)
				}
				for _, x := range list {
					v += x
				}
				return v
			}
			want := sum(1.25)
			for {
				if got := sum(1.25); got != want {
					wrong("sum %v, want %v", got, want)
				}
				turns.Add(1)
				runtime.Gosched() // to the one that tells of it
			}
		}()
	}
	for n := range 4 {
		go func() { // deep and shallow stacks, waiting
			var down func(int) int
			down = func(n int) int {
				if n == 0 {
					time.Sleep(time.Millisecond)
					return 0
				}
				return 1 + down(n-1)
			}
			for {
				if got := down(50 * n); got != 50*n {
					wrong("depth %d, want %d", got, 50*n)
				}
				turns.Add(1)
			}
		}()
	}
	go func() {
		for {
			runtime.GC()
			time.Sleep(50 * time.Millisecond)
		}
	}()
	for {
		fmt.Println(turns.Load())
		time.Sleep(10 * time.Millisecond)
	}
}

// startGoVictim starts a Go victim and returns its pid and a function that waits until
// it has done more work than when it was asked.
func startGoVictim(t *testing.T) (pid int, goesOn func(what string)) {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), goVictimEnv+"=1")
	out, err := c.StdoutPipe()
	must(t, "pipe", err)
	must(t, "start", c.Start())
	var last atomic.Uint64
	var said atomic.Value
	over := make(chan struct{})
	go func() {
		defer close(over)
		for s := bufio.NewScanner(out); s.Scan(); {
			if n, err := strconv.ParseUint(s.Text(), 10, 64); err == nil {
				last.Store(n)
			} else if said.Load() == nil || strings.HasPrefix(s.Text(), "fatal") {
				said.Store(s.Text())
			}
		}
	}()
	t.Cleanup(func() { c.Process.Kill(); <-over; c.Wait() })
	goesOn = func(what string) {
		t.Helper()
		from := last.Load()
		for end := time.Now().Add(hosttest.Patience); last.Load() <= from; time.Sleep(time.Millisecond) {
			select {
			case <-over:
				t.Fatalf("%s: the target ended: %v", what, said.Load())
			default:
			}
			if time.Now().After(end) {
				t.Fatalf("%s: the target stands still", what)
			}
		}
	}
	goesOn("start")
	return c.Process.Pid, goesOn
}

func TestGoTarget(t *testing.T) {
	pid, goesOn := startGoVictim(t)
	b := newBackend(t)
	p, err := b.Open(t.Context(), idOf(t, b, pid))
	must(t, "Open", err)
	defer p.Close()
	for range 100 {
		at := free()
		must(t, "Alloc", retryBusy(func() error { return p.Alloc(at, page, target.Read|target.Exec) }))
		z := freeze(t, p)
		list, err := z.Threads()
		must(t, "Threads", err)
		if len(list) < 3 {
			t.Errorf("%d threads", len(list))
		}
		thaw(t, z)
		must(t, "Free", retryBusy(func() error { return p.Free(at, page) }))
	}
	goesOn("after the work")
}

func TestTracerOfGoTargetKilled(t *testing.T) {
	pid, goesOn := startGoVictim(t)
	for _, order := range []string{"any", "computing"} {
		for range randomKills / 3 {
			killTracer(t, fmt.Sprintf("%d:%s", pid, order), time.Duration(rand.IntN(4000))*time.Microsecond)
			goesOn("killed at random")
		}
		for m := range moments {
			killTracer(t, fmt.Sprintf("%d:%s:%d", pid, order, m), hosttest.Patience)
			goesOn(fmt.Sprintf("killed at moment %d", m))
		}
	}
}
