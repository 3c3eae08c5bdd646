//go:build linux && amd64

package ptrace

import (
	"strconv"

	"golang.org/x/sys/unix"
)

const kcmpVM = 1 // KCMP_VM, kcmp(2)

// sharer finds another process that uses the same memory: a vfork child until
// its exec, or one made by clone with CLONE_VM. Its threads would not be
// stopped with ours. Only processes that map as much and have their stack at
// the same place are asked about; 0 means none, or that it is not visible.
func (p *process) sharer() int {
	var own stat
	if p.dir.stat(p.life.sub, &own) != nil {
		return 0
	}
	b := p.b
	b.mu.Lock()
	defer b.mu.Unlock()
	var err error
	if b.pids, err = b.proc.numbers(b.pids[:0], b.dirbuf); err != nil {
		return 0
	}
	var path [32]byte
	for _, pid := range b.pids {
		var s stat
		if pid == p.life.id.PID || !b.statOf(pid, strconv.AppendInt(path[:0], int64(pid), 10), &s) {
			continue
		}
		// A vfork child maps and unmaps for both, so the sizes differ only for
		// the instant between the two reads; the stack never does.
		if s.startStack != own.startStack || s.startCode != own.startCode || s.startStack == 0 {
			continue
		}
		order, _, e := unix.RawSyscall6(unix.SYS_KCMP, uintptr(p.life.id.PID), uintptr(pid), kcmpVM, 0, 0, 0)
		if e == 0 && order == 0 {
			return pid
		}
	}
	return 0
}
