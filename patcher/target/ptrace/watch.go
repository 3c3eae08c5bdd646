//go:build linux && amd64

package ptrace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

const (
	// watchBuffer is what the kernel keeps for us of events that we have not
	// read, bytes: some thousands of events.
	watchBuffer = 2 << 20
	// watchGather is how long events gather before they are read, so that a
	// machine that starts very many programs wakes us no oftener than that. An
	// image is not mapped in the first moment of a program anyway.
	watchGather = 20 * time.Millisecond
	// watchBehind is how many events the reader of the channel may be behind.
	// Those above are lost to him, and he is told.
	watchBehind = 4096
	// watchAnswer bounds the wait for the kernel's answer that it will tell us.
	// It is on its way when the request has been made.
	watchAnswer = time.Second
)

// Watch tells of forks, execs and exits by the process events connector. It
// needs CAP_NET_ADMIN, and the first pid, user and network namespaces.
func (b *backend) Watch(ctx context.Context) (<-chan target.Event, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("cannot watch process starts: %w: %v", target.ErrUnsupported, err)
	}
	f := os.NewFile(uintptr(fd), "process events")
	if err := listen(fd); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot watch process starts (CAP_NET_ADMIN?): %w: %v", target.ErrDenied, err)
	}
	w := &watcher{f: f, faults: openFaults(), execs: &b.execs, buf: make([]byte, 16<<10), events: make(chan target.Event, watchBehind)}
	if err := w.answer(); err != nil {
		w.faults.close()
		f.Close()
		return nil, fmt.Errorf("cannot watch process starts: %w", err)
	}
	context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	b.execs.begin()
	go func() {
		defer close(w.events)
		defer b.execs.end()
		defer f.Close()
		defer w.faults.close()
		w.run(ctx)
	}()
	return w.events, nil
}

// watcher reads the connector's socket. It belongs to one goroutine.
type watcher struct {
	f      *os.File
	faults *faults
	buf    []byte
	events chan target.Event
	lost   bool // since the last Lost that was told
	execs  *execs
}

// run reads until ctx ends.
func (w *watcher) run(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		err := w.drain(w.tell)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			w.execs.end()
			// Nothing comes any more; the channel stays open until the end, as promised.
			w.send(target.Event{Kind: target.Lost, At: time.Now()})
			<-ctx.Done()
			return
		}
		t.Reset(watchGather)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// drain waits until something can be read and reads all there is. Messages are
// taken from the kernel only: any process may send to our port.
func (w *watcher) drain(take func(message)) error {
	c, err := w.f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = c.Read(func(fd uintptr) bool {
		for n := 0; ; n++ {
			size, from, err := unix.Recvfrom(int(fd), w.buf, 0)
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				return n > 0 // the first time: wait
			case err == unix.ENOBUFS:
				w.lose()
			case err != nil:
				failed = err
				return true
			default:
				if a, ok := from.(*unix.SockaddrNetlink); ok && a.Pid == 0 {
					parseEvents(w.buf[:size], take)
				}
			}
			if n >= watchBehind { // they come as fast as they are read
				return true
			}
		}
	})
	if w.lost && w.send(target.Event{Kind: target.Lost, At: time.Now()}) {
		w.lost = false
	}
	return errors.Join(err, failed)
}

// tell hands one event on.
func (w *watcher) tell(m message) {
	e := target.Event{PID: m.pid, At: sinceBoot(m.at)}
	switch m.what {
	case eventExec:
		w.execs.add(m.pid)
		e.Kind = target.Started
	case eventFork:
		e.Kind, e.Parent = target.Forked, m.parent
	case eventExit:
		status := unix.WaitStatus(m.status)
		e.Kind, e.Code = target.Exited, uint32(max(status.ExitStatus(), 0))
		if status.Signaled() {
			e.Signal = int(status.Signal())
			switch status.Signal() {
			case unix.SIGSEGV, unix.SIGBUS, unix.SIGILL, unix.SIGFPE, unix.SIGTRAP:
				e.Faults = w.faults.recent(time.Now())
			}
		}
	default:
		return
	}
	if !w.send(e) {
		w.lose()
	}
}

// lose notes that something was lost.
func (w *watcher) lose() {
	w.lost = true
	w.execs.miss()
}

// send never waits: who does not read loses events.
func (w *watcher) send(e target.Event) bool {
	select {
	case w.events <- e:
		return true
	default:
		return false
	}
}

// answer waits until the kernel says that it will tell us. Outside the first
// namespaces it takes the request and says nothing, then or ever.
func (w *watcher) answer() error {
	answered, status := false, uint32(0)
	w.f.SetReadDeadline(time.Now().Add(watchAnswer))
	defer w.f.SetReadDeadline(time.Time{})
	for !answered {
		err := w.drain(func(m message) {
			if m.what == eventNone {
				answered, status = true, m.status
				return
			}
			w.tell(m)
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("%w: the kernel tells of them in the first pid and user namespaces only, or was built without CONFIG_PROC_EVENTS", target.ErrUnsupported)
		case err != nil:
			return err
		}
	}
	if status != 0 {
		return fmt.Errorf("%w (CAP_NET_ADMIN?): %v", target.ErrDenied, unix.Errno(status))
	}
	return nil
}

// sinceBoot turns a time of CLOCK_MONOTONIC, nanoseconds, into ours.
func sinceBoot(ns uint64) time.Time {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return time.Now()
	}
	return time.Now().Add(time.Duration(ns) - time.Duration(ts.Nano()))
}
