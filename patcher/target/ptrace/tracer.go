//go:build linux && amd64

package ptrace

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// endLimit bounds the wait for a tracing thread of ours to end: it only has to
// be scheduled once.
const endLimit = 5 * time.Second

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
