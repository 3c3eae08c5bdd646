package pehost

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

//go:noescape
func call(fn, argument, stack uintptr) uintptr

// Run is all of "hotpatchd pe-host": args are what follows. It talks on
// standard input and output and returns the exit code: 0, 1 where something
// went wrong, 2 for wrong usage.
func Run(args []string) int { return run(args, os.Stdin, os.Stdout, os.Stderr) }

func run(args []string, in io.Reader, out, errOut io.Writer) int {
	c, err := parse(args, errOut)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(errOut, "pe-host: %v\n", err)
		return 2
	}
	m, err := load(c)
	if err != nil {
		fmt.Fprintf(errOut, "pe-host: cannot host %s: %v\n", c.image, err)
		return 1
	}
	allowTracing()
	leaveRoom(c.threads + c.sleepers)
	h := &host{config: c, mapped: m}
	if err := h.start(); err != nil {
		fmt.Fprintf(errOut, "pe-host: %v\n", err)
		return 1
	}
	if err := h.serve(in, out); err != nil {
		fmt.Fprintf(errOut, "pe-host: %v\n", err)
		return 1
	}
	return h.end()
}

// allowTracing lets any process of the same user trace us, where Yama would
// allow our ancestors alone. Without Yama the call is unknown and not needed.
func allowTracing() {
	const anybody = ^uintptr(0) // PR_SET_PTRACER_ANY
	unix.Prctl(unix.PR_SET_PTRACER, anybody, 0, 0, 0)
}

// memoryLimit is where the garbage collector begins to work after all: a
// request costs some hundred bytes.
const memoryLimit = 256 << 20

// leaveRoom makes sure that we answer, and end, even if all callers are
// patched to run something that never returns: the runtime cannot take such a
// thread's processor away, nor stop it for a garbage collection.
func leaveRoom(callers int) {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), callers+2))
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
}

// host is a mapped image and the threads that call it.
type host struct {
	config
	*mapped
	tallies []*tally
	stop    atomic.Bool
	wg      sync.WaitGroup
}

// start starts the threads and returns when each has made a call.
func (h *host) start() error {
	var first sync.WaitGroup
	for i := range h.threads + h.sleepers {
		stack, err := newStack()
		if err != nil {
			h.stop.Store(true)
			return err
		}
		t := &tally{}
		h.tallies = append(h.tallies, t)
		sleeps := i >= h.threads
		first.Add(1)
		h.wg.Go(func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			h.once(t, stack)
			first.Done()
			for !h.stop.Load() {
				if sleeps && !sleep(nap) {
					t.wrong.Add(1)
				}
				h.once(t, stack)
			}
		})
	}
	first.Wait()
	return nil
}

func (h *host) once(t *tally, stack uintptr) {
	t.add(int32(call(h.entry, uintptr(h.argument), stack)), h.allow)
}

// nap is how long a sleeper sleeps between calls.
const nap = time.Millisecond

// sleep blocks the thread in the kernel and tells whether it slept as long as
// it should: a system call that a patcher interrupts must go on afterwards.
func sleep(d time.Duration) bool {
	begin := time.Now()
	left := unix.NsecToTimespec(int64(d))
	for {
		ts := left
		err := unix.Nanosleep(&ts, &left)
		if err == unix.EINTR { // the runtime's own preemption signal
			continue
		}
		return err == nil && time.Since(begin) >= d
	}
}

// serve answers until it is told to quit or in closes.
func (h *host) serve(in io.Reader, out io.Writer) error {
	if _, err := fmt.Fprintf(out, "ready %d %#x\n", os.Getpid(), h.base); err != nil {
		return err
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		answer := ""
		switch lines.Text() {
		case "value":
			answer = fmt.Sprintf("value %d", h.tallies[0].last.Load())
		case "entry":
			answer = fmt.Sprintf("entry %#x", h.entry)
		case "stats":
			answer = stats(h.tallies)
		case "quit":
			_, err := fmt.Fprintln(out, "bye")
			return err
		default:
			answer = fmt.Sprintf("error unknown request %q", lines.Text())
		}
		if _, err := fmt.Fprintln(out, answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// patience bounds the wait for threads that may never return from what they
// were patched to run: the process then ends with them.
const patience = 2 * time.Second

// end stops the threads and gives the exit code.
func (h *host) end() int {
	h.stop.Store(true)
	done := make(chan struct{})
	go func() { h.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		return 1
	}
	for _, t := range h.tallies {
		if t.wrong.Load() != 0 {
			return 1
		}
	}
	return 0
}
