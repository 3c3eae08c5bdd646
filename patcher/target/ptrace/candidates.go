//go:build linux && amd64

package ptrace

import (
	"encoding/binary"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// candidate is a thread that could make a call, as seen while it runs.
type candidate struct {
	tid  int
	rank int // best first
	// A thread that waits in restart_syscall: the call that was once
	// interrupted, and by what to know that it still is the same.
	call          uint64
	rdi, rsi, rsp uint64
}

// before tells which of two threads is tried first; tests turn it round.
var before = func(a, b *candidate) bool { return a.rank < b.rank }

// candidates lists threads, those that wait in a plain system call first: they
// hold no lock of their own program and have nothing in flight.
func (p *process) candidates() ([]candidate, error) {
	tids, err := p.task.numbers(p.tids[:0], p.dirbuf)
	if err != nil {
		return nil, err
	}
	p.tids = tids
	var list []candidate
	for _, tid := range tids {
		path := taskPath(tid)
		b, err := p.read(path+"syscall", 256)
		if err != nil {
			continue
		}
		c := candidate{tid: tid, rank: 2}
		wchan, _ := p.dir.read(path+"wchan", nil, 64)
		if p.unreachable(path, string(wchan)) {
			continue
		}
		if nr := firstNumber(string(b)); nr >= 0 {
			switch nr {
			case unix.SYS_READ, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_FUTEX, unix.SYS_POLL, unix.SYS_EPOLL_WAIT, unix.SYS_ACCEPT, unix.SYS_ACCEPT4, unix.SYS_RECVFROM, unix.SYS_WAIT4:
				c.rank = 0
			case restartSyscall:
				c.restarted(p, string(wchan), string(b))
				c.rank = 1
			default:
				c.rank = 1
			}
		}
		list = append(list, c)
		if len(list) >= 8*maxCandidates {
			break
		}
	}
	sort.SliceStable(list, func(i, j int) bool { return before(&list[i], &list[j]) })
	return list[:min(len(list), maxCandidates)], nil
}

// unreachable tells whether a thread could not be stopped, or would not run on
// when it is let go: it waits uninterruptibly, or its control group is frozen. A
// thread of the first version of those is in such a wait; the second holds it
// where signals are taken, in which a stopped thread waits too, but in another state.
func (p *process) unreachable(path, wchan string) bool {
	var s stat
	if p.dir.stat(path, &s) != nil {
		return true
	}
	return s.state == 'D' || s.state == 'S' && (wchan == "get_signal" || strings.Contains(wchan, "freezer"))
}

// restarted finds out which call a thread waits in whose call number has become
// restart_syscall because it was interrupted before. Four calls have a restart
// block. Most programs set the number right before the instruction; else the
// place where the thread sleeps in the kernel tells them apart, and the first
// argument the two sleeps. syscall is a line of proc_pid_syscall(5).
func (c *candidate) restarted(p *process, wchan, syscall string) {
	fields := strings.Fields(syscall)
	if len(fields) != 9 {
		return
	}
	var pc uint64
	for _, f := range []struct {
		n int
		v *uint64
	}{{1, &c.rdi}, {2, &c.rsi}, {7, &c.rsp}, {8, &pc}} {
		var err error
		if *f.v, err = strconv.ParseUint(strings.TrimPrefix(fields[f.n], "0x"), 16, 64); err != nil {
			return
		}
	}
	var code [7]byte // mov $N,%eax; syscall
	if _, err := p.ReadAt(code[:], target.Addr(pc-7)); err == nil && code[0] == 0xb8 && code[5] == 0x0f && code[6] == 0x05 {
		switch nr := binary.LittleEndian.Uint32(code[1:]); nr {
		case unix.SYS_FUTEX, unix.SYS_POLL, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP:
			c.call = uint64(nr)
			return
		}
	}
	switch {
	case strings.Contains(wchan, "futex"):
		c.call = unix.SYS_FUTEX
	case strings.Contains(wchan, "poll"):
		c.call = unix.SYS_POLL
	case !strings.Contains(wchan, "syscall") && !strings.Contains(wchan, "nanosleep"):
		// The sleeps leave no trace of their own: their functions count as the scheduler's.
	case c.rdi < 16 || int32(c.rdi) < 0 && c.rdi>>32 == 0 || int64(c.rdi) < 0:
		c.call = unix.SYS_CLOCK_NANOSLEEP // a clock's number; negative ones are of processes
	case c.rdi >= 4096:
		c.call = unix.SYS_NANOSLEEP // a pointer
	}
}

// again is the number of the call that a stopped thread was interrupted in.
func (c *candidate) again(r *unix.PtraceRegs) (call uint64, ok bool) {
	if r.Orig_rax != restartSyscall {
		return r.Orig_rax, true
	}
	return c.call, c.call != 0 && r.Rdi == c.rdi && r.Rsi == c.rsi && r.Rsp == c.rsp
}
