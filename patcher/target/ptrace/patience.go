//go:build linux && amd64

package ptrace

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"hotpatchd/patcher/target"
)

// Whoever reads the memory of a process, or its mappings, may wait for as long
// as that process likes: for a page of a file system whose server does not
// answer, for a userfaultfd, or for a lock that one of its threads holds in such
// a wait. Some of these waits not even SIGKILL ends. So every call of that kind
// is made on a thread that can be left behind.
const (
	// lookLimit bounds such a call. A page that comes from a disk or from swap,
	// and a lock that is held for some work, take less; where they do not,
	// nothing is lost but the time until the next attempt.
	lookLimit = 2 * time.Second
	// rest is how long a process is left alone after a call about it came back
	// late: else it could take lookLimit from us again and again.
	rest = time.Minute
	// maxLateOfUser is how many processes of one user may be late before all of
	// them are left alone, maxLate how many there may be in all: each may cost a thread.
	maxLateOfUser = 4
	maxLate       = 256
)

// patience keeps an account of processes that let us wait. Safe for concurrent use.
type patience struct {
	mu    sync.Mutex
	limit time.Duration
	rest  time.Duration
	late  map[lifetime]*delay
}

// lifetime is a process, whatever program it executes.
type lifetime struct {
	pid   int
	start uint64
}

type delay struct {
	uid     int
	what    string
	since   time.Time
	pending int       // calls that have not come back
	until   time.Time // with none pending: when it may be looked at again
}

func newPatience() *patience {
	return &patience{limit: lookLimit, rest: rest, late: map[lifetime]*delay{}}
}

// admit is an error about a process that is not to be looked at now.
func (s *patience) admit(l lifetime) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.late) == 0 {
		return nil
	}
	now := time.Now()
	for k, d := range s.late {
		if d.pending == 0 && now.After(d.until) {
			delete(s.late, k)
		}
	}
	if d := s.late[l]; d != nil {
		note := "it was late and is left alone until " + d.until.Format(time.TimeOnly)
		if d.pending > 0 {
			note = "it has not come back since " + d.since.Format(time.TimeOnly)
		}
		return &target.Error{Op: d.what, ID: target.ID{PID: l.pid}, Err: target.ErrBusy, Note: note}
	}
	if len(s.late) >= maxLate {
		return &target.Error{Op: "look at", ID: target.ID{PID: l.pid}, Err: target.ErrBusy,
			Note: fmt.Sprintf("looks at %d other processes do not come back", len(s.late))}
	}
	uid, n := userOf(l.pid), 0
	for _, d := range s.late {
		if d.uid == uid {
			n++
		}
	}
	if n >= maxLateOfUser {
		return &target.Error{Op: "look at", ID: target.ID{PID: l.pid}, Err: target.ErrBusy,
			Note: fmt.Sprintf("looks at %d processes of its user, uid %d, do not come back", n, uid)}
	}
	return nil
}

// within runs f, which must use nothing that its caller uses after an error: it
// may come back at any time later. It gives up the wait, not the call. Without
// ran, f is not run, now or later.
func (s *patience) within(l lifetime, what string, f func()) (ran bool, err error) {
	if err := s.admit(l); err != nil {
		return false, err
	}
	done := make(chan struct{})
	go func() {
		f()
		close(done)
	}()
	t := time.NewTimer(s.limit)
	defer t.Stop()
	select {
	case <-done:
		return true, nil
	case <-t.C:
		return true, s.leave(l, what, s.limit, done)
	}
}

// leave notes a call that has been waited for long enough and ends with done.
func (s *patience) leave(l lifetime, what string, waited time.Duration, done <-chan struct{}) error {
	s.mu.Lock()
	d := s.late[l]
	if d == nil {
		d = &delay{uid: userOf(l.pid), since: time.Now().Add(-waited)}
		s.late[l] = d
	}
	d.what = what
	d.pending++
	s.mu.Unlock()
	go func() {
		<-done
		s.mu.Lock()
		d.pending--
		d.until = time.Now().Add(s.rest)
		s.mu.Unlock()
	}()
	return &target.Error{Op: what, ID: target.ID{PID: l.pid}, Err: target.ErrBusy,
		Note: fmt.Sprintf("no answer in %v: its memory may lie on a file system whose server does not answer", waited)}
}

// userOf is the real user of a process, -1 if it is over: no program changes that
// without the right to.
func userOf(pid int) int {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return -1
	}
	return firstNumber(statusField(status, "Uid"))
}

// read is procDir.read of a file that has to do with memory.
func (s *patience) read(l lifetime, dir procDir, name string, limit int) ([]byte, error) {
	var b []byte
	var err error
	if _, late := s.within(l, "read "+name+" of", func() { b, err = dir.read(name, nil, limit) }); late != nil {
		return nil, late
	}
	return b, err
}
