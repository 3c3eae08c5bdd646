//go:build linux && amd64

package ptrace

import (
	"strconv"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

const kcmpVM = 1 // KCMP_VM, kcmp(2)

// sharer finds another process that uses the same memory: a vfork child until
// its exec, or one made by clone with CLONE_VM. Its threads would not be
// stopped with ours. Only processes that map as much and have their stack at
// the same place are asked about; 0 means none, or that it is not visible.
func (p *process) sharer() (int, error) {
	var own stat
	if p.dir.stat(p.life.sub, &own) != nil || own.startStack == 0 {
		return 0, nil
	}
	list, err := p.lookAlikes(&own)
	if err != nil {
		return 0, nil
	}
	for _, other := range list {
		order, e := uintptr(0), unix.Errno(0)
		// It waits while one of the two executes a program.
		if _, err := p.b.late.within(other, "compare with", func() {
			order, _, e = unix.Syscall6(unix.SYS_KCMP, uintptr(p.life.id.PID), uintptr(other.pid), kcmpVM, 0, 0, 0)
		}); err != nil {
			return 0, p.refuse("compare", 0, target.ErrBusy, "whether %s shares its memory: %v", processName(other.pid), err)
		}
		if e == 0 && order == 0 {
			return other.pid, nil
		}
	}
	return 0, nil
}

// lookAlikes are the other processes with the same program and stack.
func (p *process) lookAlikes(own *stat) (list []lifetime, err error) {
	b := p.b
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pids, err = b.proc.numbers(b.pids[:0], b.dirbuf); err != nil {
		return nil, err
	}
	var path [32]byte
	for _, pid := range b.pids {
		var s stat
		if pid == p.life.id.PID || !b.statOf(pid, strconv.AppendInt(path[:0], int64(pid), 10), &s) {
			continue
		}
		// A vfork child maps and unmaps for both, so the sizes differ only for
		// the instant between the two reads; the stack never does.
		if s.startStack == own.startStack && s.startCode == own.startCode {
			list = append(list, lifetime{pid, s.start})
		}
	}
	return list, nil
}
