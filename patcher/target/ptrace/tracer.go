//go:build linux && amd64

package ptrace

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// endLimit bounds the wait for a tracing thread of ours to end: it only has to
// be scheduled once.
const endLimit = 5 * time.Second

// change is what happened to a thread since it was last asked about.
type change uint8

const (
	nothing change = iota
	stops
	ends
)

// changeOf asks once, without waiting, whether a thread has stopped or ended,
// and notes it. The kernel reports stops of a traced thread whatever was asked
// for, so both are asked for: but not of the main thread, whose exit status
// belongs to the parent of the process. If that ends, the tracing thread's end
// lets go of it.
func (p *process) changeOf(t *held) (status int32, c change) {
	var info childInfo
	options := unix.WSTOPPED | unix.WEXITED
	if t.tid == p.life.id.PID {
		options = unix.WSTOPPED
	}
	switch none, e := wait(t.tid, options, &info); {
	case e == unix.ECHILD:
		t.state, t.attached = gone, t.tid == p.life.id.PID
		return 0, ends
	case e != 0 || none:
		return 0, nothing
	case info.code == cldTrapped:
		t.state = stopped
		return info.status, stops
	default:
		t.state, t.attached = gone, false
		return 0, ends
	}
}

// onThread runs f on an operating system thread of its own and returns at once.
// The kernel accepts ptrace requests only from the thread that attached, and
// lets go of everything a thread traces when that thread ends. So when f
// reports that something could not be let go of (clean false), its thread ends.
// f must close or send to what its caller waits for.
func onThread(f func() (clean bool)) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end before the program. Held here until the
			// other one has a thread, it cannot be given to that one too.
			started := make(chan struct{})
			go func() {
				runtime.LockOSThread()
				close(started)
				if f() {
					runtime.UnlockOSThread()
				}
			}()
			<-started
			runtime.UnlockOSThread()
			return
		}
		if f() {
			runtime.UnlockOSThread()
		}
		// A goroutine that ends while locked takes its thread with it.
	}()
}

// urgent is the nice value of our threads while they hold others: what they do
// is short, and as long as they wait for a processor somebody's program stands.
// More would keep the processor from the threads that have yet to stop.
const urgent = -10

// hurry gives one of our threads precedence, if we may; calm takes it back.
func hurry(tid int) { unix.Setpriority(unix.PRIO_PROCESS, tid, urgent) }

func (b *backend) calm(tid int) {
	if ours(tid) {
		unix.Setpriority(unix.PRIO_PROCESS, tid, b.nice)
	}
}

// event wakes one thread of ours that waits in the kernel. A channel would do,
// but what a channel wakes has to be found a thread and a processor by the Go
// scheduler first, whose threads are not in a hurry: seconds on a loaded
// machine, while somebody's program stands.
type event struct {
	fd   int
	sent atomic.Uint64 // orders what was done before a signal before what is done after the wait
}

func (e *event) open() (err error) {
	e.fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	return err
}

func (e *event) close() { unix.Close(e.fd) }

func (e *event) signal() {
	e.sent.Add(1)
	unix.Write(e.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// within waits for one or more signals, and is false if none came in time.
func (e *event) within(limit time.Duration) bool {
	deadline := time.Now().Add(limit)
	fds := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
	for {
		left := unix.NsecToTimespec(max(0, int64(time.Until(deadline))))
		switch n, err := unix.Ppoll(fds, &left, nil); {
		case n > 0:
			e.wait()
			return true
		case err == nil:
			return false
		case err != unix.EINTR:
			e.wait()
			return true
		}
	}
}

// wait returns after one or more signals.
func (e *event) wait() {
	var b [8]byte
	retry(func() (int, error) { return unix.Read(e.fd, b[:]) })
	e.sent.Load()
}

// awaitEnd waits until a tracing thread that was not clean is gone and with it
// its hold on any thread.
func awaitEnd(tid int) bool {
	for end := time.Now().Add(endLimit); time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
		if unix.Tgkill(unix.Getpid(), tid, 0) == unix.ESRCH {
			return true
		}
	}
	return false
}
