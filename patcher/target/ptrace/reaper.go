//go:build linux && amd64

package ptrace

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// reapAfter is how long a seize may take before threads that have ended are
// taken note of for it, and how often after that. It takes microseconds.
const reapAfter = 2 * time.Millisecond

// reaper keeps a freeze out of the deadlock of ptrace(2) with execve(2). An exec
// ends the other threads of its program and, if they are traced, waits until
// their tracer has asked about each; all the while it holds the lock
// (cred_guard_mutex) that the seize of one more thread waits for. The tracing
// thread would wait there for ever, and the program with it. But any thread of
// ours may ask in its place (wait(2): without __WNOTHREAD, the children and
// tracees of all threads of the process).
type reaper struct {
	mu      sync.Mutex
	timer   *time.Timer
	tids    []int // seized threads, without the main one, whose end no exec waits for
	seizing bool
	over    bool
}

func (r *reaper) start() {
	r.mu.Lock()
	r.timer = time.AfterFunc(reapAfter, r.reap)
	r.mu.Unlock()
}

func (r *reaper) stop() {
	r.mu.Lock()
	r.over = true
	r.timer.Stop()
	r.mu.Unlock()
}

// begins and ended stand around each seize.
func (r *reaper) begins() {
	r.mu.Lock()
	r.seizing = true
	r.mu.Unlock()
}

// ended notes a thread that was seized, 0 if none was.
func (r *reaper) ended(tid int) {
	r.mu.Lock()
	r.seizing = false
	if tid != 0 {
		r.tids = append(r.tids, tid)
	}
	r.mu.Unlock()
}

// reap asks about the threads that have ended while a seize is under way. The
// tracing thread finds them gone afterwards, as if it had asked itself.
func (r *reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return
	}
	if r.seizing {
		for _, tid := range r.tids {
			var info childInfo
			wait(tid, unix.WEXITED, &info)
		}
	}
	r.timer.Reset(reapAfter)
}
