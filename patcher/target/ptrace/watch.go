//go:build linux && amd64

package ptrace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
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
	// watchCalm is that where new code is told of, and none was that may be an
	// image's for watchQuiet: most of what machines start is of ELF files.
	watchCalm  = 50 * time.Millisecond
	watchQuiet = time.Second
	// watchNews is how long starts and ends wait to be told where new code is told
	// of: that alone is in a hurry.
	watchNews = 100 * time.Millisecond
	// watchHold is how long new code waits to be told: most that end at once have
	// ended then, and no loader is done before.
	watchHold = 5 * time.Millisecond
	// watchBehind is how many events the reader of the channel may be behind.
	// Those above are lost to him, and he is told.
	watchBehind = 4096
	// watchAnswer bounds the wait for the kernel's answer that it will tell us.
	// It is on its way when the request has been made.
	watchAnswer = time.Second
)

// Watch tells of forks, execs and exits by the process events connector. It
// needs CAP_NET_ADMIN, and the first pid, user and network namespaces. Of new
// code it tells by perf events where it may have them.
func (b *backend) Watch(ctx context.Context) (<-chan target.Event, error) {
	w := &watcher{faults: openFaults(), news: &b.news, elfs: &b.elfs, self: b.desc.self,
		buf: make([]byte, 16<<10), mapped: map[int]uint64{}, forks: map[int]fork{}, events: make(chan target.Event, watchBehind)}
	if err := w.open(); err != nil {
		w.close()
		return nil, fmt.Errorf("cannot watch process starts: %w", err)
	}
	context.AfterFunc(ctx, func() { w.f.SetReadDeadline(time.Unix(1, 0)) })
	b.news.begin(w.perf != nil)
	go func() {
		defer close(w.events)
		defer b.news.end(false)
		defer w.close()
		w.run(ctx)
	}()
	return w.events, nil
}

// watcher reads the connector's socket and the records of mappings. It belongs
// to one goroutine.
type watcher struct {
	f       *os.File // an epoll of sources, that says once that there is something
	source  int      // an epoll of all that can be read
	socket  int
	perf    *perf // nil: there are no records
	faults  *faults
	news    *news
	elfs    *elfs
	self    int
	buf     []byte
	mapped  map[int]uint64 // what one reading tells of new code: when it came first
	forks   map[int]fork   // by child, of the last reading of the socket
	events  chan target.Event
	lost    bool      // since the last Lost that was told
	drained time.Time // the socket
	told    time.Time // of new code, last
}

// fork is how a process began. One that was forked when its parent had new code
// has that too, and nothing else tells of it.
type fork struct {
	parent int
	at     uint64 // CLOCK_MONOTONIC, nanoseconds
	over   bool   // it has ended since, or executes another program
}

func (w *watcher) open() error {
	w.source, w.socket = -1, -1
	gate, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(gate, true); err != nil {
		unix.Close(gate)
		return err
	}
	w.f = os.NewFile(uintptr(gate), "process events")
	if w.source, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if err := unix.EpollCtl(gate, unix.EPOLL_CTL_ADD, w.source, gateEvent()); err != nil {
		return err
	}
	w.socket, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return fmt.Errorf("%w: %v", target.ErrUnsupported, err)
	}
	if err := listen(w.socket); err != nil {
		return fmt.Errorf("%w (CAP_NET_ADMIN?): %v", target.ErrDenied, err)
	}
	if err := unix.EpollCtl(w.source, unix.EPOLL_CTL_ADD, w.socket, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return err
	}
	if err := w.answer(); err != nil {
		return err
	}
	w.perf, _ = openPerf(w.source) // without it young processes are looked at again and again
	return nil
}

func (w *watcher) close() {
	w.faults.close()
	if w.perf != nil {
		w.perf.close()
	}
	if w.socket >= 0 {
		unix.Close(w.socket)
	}
	if w.source >= 0 {
		unix.Close(w.source)
	}
	if w.f != nil {
		w.f.Close()
	}
}

// run reads until ctx ends.
func (w *watcher) run(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		err := w.wait()
		if err == nil {
			err = w.read()
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			w.news.end(false)
			// Nothing comes any more; the channel stays open until the end, as promised.
			w.send(target.Event{Kind: target.Lost, At: time.Now()})
			<-ctx.Done()
			return
		}
		t.Reset(w.gather())
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// read reads what there is, and hands it on if it is time for that.
func (w *watcher) read() error {
	w.readMapped() // first: else new code would be told before the start of its process
	now := time.Now()
	if w.perf != nil && len(w.mapped) == 0 && !w.lost && now.Sub(w.drained) < watchNews {
		return nil
	}
	if len(w.mapped) > 0 {
		time.Sleep(watchHold)
	}
	w.drained = now
	w.inherit()
	err := w.drain(w.tell)
	w.tellMapped()
	if w.lost && w.send(target.Event{Kind: target.Lost, At: now}) {
		w.lost = false
	}
	return err
}

// gather is how long events are left to gather.
func (w *watcher) gather() time.Duration {
	if w.perf != nil && time.Since(w.told) > watchQuiet {
		return watchCalm
	}
	return watchGather
}

// gateEvent lets the gate say once that there is something, until it is set
// anew: else each of a thousand events would wake a thread of ours, while they
// gather to be read together.
func gateEvent() *unix.EpollEvent {
	return &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT}
}

// wait waits until something can be read.
func (w *watcher) wait() error {
	c, err := w.f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := c.Control(func(gate uintptr) {
		failed = unix.EpollCtl(int(gate), unix.EPOLL_CTL_MOD, w.source, gateEvent())
	}); err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	err = c.Read(func(fd uintptr) bool {
		var ready [1]unix.EpollEvent
		n, err := retry(func() (int, error) { return unix.EpollWait(int(fd), ready[:], 0) })
		failed = err
		// That a ring can be read is said once, perhaps to the poller of the runtime.
		return n > 0 || err != nil || w.perf != nil && w.perf.pending()
	})
	return errors.Join(err, failed)
}

// drain reads the messages there are. They are taken from the kernel only: any
// process may send to our port.
func (w *watcher) drain(take func(message)) error {
	for n := 0; n < watchBehind; n++ { // they may come as fast as they are read
		size, from, err := unix.Recvfrom(w.socket, w.buf, 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return nil
		case err == unix.ENOBUFS:
			w.lose()
		case err != nil:
			return err
		default:
			if a, ok := from.(*unix.SockaddrNetlink); ok && a.Pid == 0 {
				parseEvents(w.buf[:size], take)
			}
		}
	}
	return nil
}

// readMapped reads of new code, but not of that of ELF files.
func (w *watcher) readMapped() {
	if w.perf == nil {
		return
	}
	lost, err := w.perf.drain(func(c newCode) {
		if c.own || c.pid == w.self {
			return
		}
		w.news.add(c.pid) // of ELF files, too: a file may be another one by now
		if w.elfs.has(c.file) {
			return
		}
		if at, ok := w.mapped[c.pid]; !ok || c.at < at {
			w.mapped[c.pid] = c.at
		}
	})
	if err != nil {
		w.perf.close()
		w.perf, lost = nil, true
		w.news.end(true)
	}
	if lost {
		w.lose()
	}
}

// inherit gives new code to those that were forked with it, but were told before
// it was read of. What is read next of the socket begins anew.
func (w *watcher) inherit() {
	defer clear(w.forks)
	if len(w.mapped) == 0 {
		return
	}
	has := maps.Clone(w.mapped)
	for _, child := range slices.SortedFunc(maps.Keys(w.forks), func(a, b int) int { return cmp.Compare(w.forks[a].at, w.forks[b].at) }) {
		f := w.forks[child]
		if at, ok := has[f.parent]; !ok || f.at < at {
			continue
		}
		if _, ok := has[child]; !ok {
			has[child] = f.at
			if !f.over {
				w.mapped[child] = f.at
			}
		}
	}
}

// over notes that a process has no more what it was forked with.
func (w *watcher) over(pid int) {
	if f, ok := w.forks[pid]; ok {
		f.over = true
		w.forks[pid] = f
	}
}

// tellMapped tells of new code, once of each process.
func (w *watcher) tellMapped() {
	if len(w.mapped) > 0 {
		w.told = time.Now()
	}
	for pid, at := range w.mapped {
		if !w.send(target.Event{Kind: target.Mapped, PID: pid, At: sinceBoot(at)}) {
			w.lose()
		}
	}
	clear(w.mapped)
}

// tell hands one event on.
func (w *watcher) tell(m message) {
	w.news.add(m.pid)
	e := target.Event{PID: m.pid, At: sinceBoot(m.at)}
	switch m.what {
	case eventExec:
		e.Kind, e.Told = target.Started, w.perf != nil
		w.over(m.pid)
	case eventFork:
		e.Kind, e.Parent, e.Told = target.Forked, m.parent, w.perf != nil
		if w.perf != nil {
			w.forks[m.pid] = fork{parent: m.parent, at: m.at}
		}
		if at, ok := w.mapped[m.parent]; ok && at <= m.at {
			w.mapped[m.pid] = m.at
		}
	case eventExit:
		delete(w.mapped, m.pid) // nobody need look at it any more
		w.over(m.pid)
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
	w.news.miss()
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
		err := w.wait()
		if err == nil {
			err = w.drain(func(m message) {
				if m.what == eventNone {
					answered, status = true, m.status
					return
				}
				w.tell(m)
			})
		}
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
