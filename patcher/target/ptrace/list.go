//go:build linux && amd64

package ptrace

import (
	"context"
	"strconv"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// List reads one file of a process whose start, place of code and stack, and
// mapped size are as they were, and everything about one that changed.
func (b *backend) List(ctx context.Context) ([]target.Info, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.round++
	var err error
	if b.pids, err = b.proc.numbers(b.pids[:0], b.dirbuf); err != nil {
		return nil, &target.Error{Op: "list", Note: "cannot read /proc", Err: err}
	}
	list := make([]target.Info, 0, len(b.procs)+16)
	for n, pid := range b.pids {
		if n%64 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if k := b.refresh(pid); k != nil {
			list = append(list, k.info)
		}
	}
	for pid, k := range b.procs {
		if k.round != b.round {
			delete(b.procs, pid)
		}
	}
	return list, nil
}

// refresh looks at one process and returns nil if it is none of ours to tell
// of: gone, a kernel thread, or dead and not yet reaped.
func (b *backend) refresh(pid int) *known {
	var path [32]byte
	var s stat
	if !b.quickStat(strconv.AppendInt(path[:0], int64(pid), 10), &s) || s.flags&kernelThread != 0 {
		return nil
	}
	k := b.procs[pid]
	if k != nil && !s.dead() && unchanged(&k.stat, &s) {
		k.round = b.round
		return k
	}
	if s.dead() && s.threads < 2 {
		return nil
	}
	dir, err := openDir(b.proc, strconv.Itoa(pid))
	if err != nil {
		return nil
	}
	defer dir.close()
	l, err := readLife(dir, pid, -1)
	if err != nil || l.stat.vsize == 0 {
		return nil
	}
	if k != nil && l.sub != "" && unchanged(&k.stat, &l.stat) {
		k.round = b.round
		return k
	}
	k = &known{stat: l.stat, info: b.desc.describe(dir, &l), round: b.round}
	b.changes++
	k.info.Change = b.changes
	b.procs[pid] = k
	return k
}

func unchanged(a, b *stat) bool {
	return a.start == b.start && a.startStack == b.startStack && a.startCode == b.startCode && a.vsize == b.vsize
}

// quickStat reads /proc/PID/stat with three system calls and no allocation.
func (b *backend) quickStat(name []byte, s *stat) bool {
	name = append(name, "/stat\x00"...)
	fd, e := openat(b.proc, name)
	if e != 0 {
		return false
	}
	var buf [1024]byte
	n, err := unix.Read(fd, buf[:])
	unix.Close(fd)
	return err == nil && parseStat(buf[:n], s)
}

// forget makes the next List look anew at a process that turned out to be in
// another life than List said.
func (b *backend) forget(pid int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.procs, pid)
}
