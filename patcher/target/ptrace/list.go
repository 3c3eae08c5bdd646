//go:build linux && amd64

package ptrace

import (
	"bytes"
	"context"
	"errors"
	"hash/maphash"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// faultChecks is how many processes that map as much as before, but took page
// faults, have their mappings compared in one List. The others come later.
const faultChecks = 32

// maxKept bounds the files that stay open from one List to the next, which
// halves its cost; a quarter of the descriptors we may have, if that is less.
const maxKept = 2048

// List reads one file of a process that did nothing: its start, the places of
// its code and stack, its size and its page faults are as they were. Where the
// kernel tells of execs it is a cheaper file in most rounds, with what it maps
// and how much of that is resident; and where it tells of new code, too, no file
// at all of one that has none that could be an image's. Of one that did
// something it compares the mappings that code can come from, files and
// executable ones; only if those changed everything about it is read anew. A
// module that went and came back at the same place between two calls does not
// show.
func (b *backend) List(ctx context.Context) (list []target.Info, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.round++
	b.heard = b.news.take()
	defer func() {
		if err != nil { // not all that was told has been looked at
			b.news.miss()
		}
	}()
	if r := readRights(); r != b.desc.rights {
		b.desc.rights = r
		for pid := range b.procs {
			b.drop(pid)
		}
	}
	if b.pids, err = b.proc.numbers(b.pids[:0], b.dirbuf); err != nil {
		return nil, &target.Error{Op: "list", Note: "cannot read /proc", Err: err}
	}
	b.turns, b.waiting = 1+b.waiting/faultChecks, 0
	list = make([]target.Info, 0, len(b.procs)+16)
	for n, pid := range b.pids {
		if n%64 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if k := b.refresh(pid, false); k != nil {
			list = append(list, k.info)
		}
		if k := b.procs[pid]; k != nil {
			k.round = b.round
		}
	}
	for pid, k := range b.procs {
		if k.round != b.round {
			b.drop(pid)
		}
	}
	return list, nil
}

// ListOf looks at these processes as List does, and soon again at those that
// took page faults.
func (b *backend) ListOf(ctx context.Context, pids []int) ([]target.Info, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]target.Info, 0, len(pids))
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if k := b.refresh(pid, true); k != nil {
			list = append(list, k.info)
		}
		if k := b.procs[pid]; k != nil {
			k.round = b.round
		}
	}
	return list, nil
}

// refresh looks at one process and returns nil if it is none of ours to tell
// of: gone, a kernel thread, or dead and not yet reaped. Where many took page
// faults, those have to wait for their turn that are not wanted now.
func (b *backend) refresh(pid int, now bool) *known {
	k := b.procs[pid]
	var size pages
	quiet := k != nil && !now && !k.kernel && !k.late && !b.heard.untold && !b.heard.pids[pid] && (uint64(pid)+b.round)%statRounds != 0
	if quiet && k.info.Bare && b.heard.code {
		return k
	}
	if k != nil && k.brief && readPages(k.file, &size) && size == k.size && quiet {
		return k
	}
	var path [48]byte
	var s stat
	name := strconv.AppendInt(path[:0], int64(pid), 10)
	if !b.statOf(pid, name, &s) || s.flags&kernelThread != 0 || s.dying() && s.threads < 2 {
		return nil
	}
	k = b.procs[pid]
	if k != nil && !s.dying() && sameProgram(&k.stat, &s) {
		// New code may be where others was, and not be touched yet.
		told := k.info.Bare && (now || b.heard.pids[pid])
		if s.vsize == k.stat.vsize && !k.late && !told {
			if s.faults == k.stat.faults {
				k.size = size
				return k
			}
			if now && k.calmly() || !now && !b.turn(pid) {
				return k
			}
		}
		if k.late && b.late.admit(lifetime{pid, s.start}) != nil {
			return k
		}
		if sum, _, ok := b.sumMaps(lifetime{pid, s.start}, name); ok && sum == k.sum && !k.late {
			k.stat, k.size = s, size
			k.calm = min(2*k.calm+1, mostCalm)
			k.passes = k.calm
			return k
		}
	}
	dir, err := openDir(b.proc, strconv.Itoa(pid))
	if err != nil {
		return nil
	}
	defer dir.close()
	l, err := b.late.readLife(dir, pid, -1)
	late := errors.Is(err, target.ErrBusy)
	if err != nil && !late || l.stat.vsize == 0 {
		return nil
	}
	id := l.id
	if late && k != nil && sameProgram(&k.stat, &l.stat) {
		id = k.info.ID // it is known to be the same, and must not seem to be over
	}
	if k != nil && l.sub != "" && sameProgram(&k.stat, &l.stat) && k.stat.vsize == l.stat.vsize {
		return k // with a dead main thread, seen through another one
	}
	b.drop(pid)
	k = &known{stat: l.stat, info: b.desc.describe(dir, &l), file: -1, late: late}
	k.info.ID = id
	if late {
		k.info.Guards = append(k.info.Guards, target.Guard{Code: target.GuardProtected, Text: err.Error()})
	} else {
		k.sum, k.info.Bare, _ = b.sumMaps(l.lifetime(), append(name, l.via()...))
	}
	switch told := b.news.tells(); {
	case k.info.Bare && b.heard.code:
	case told:
		k.file = b.keep(dir, "statm")
		k.brief = k.file >= 0
	default:
		k.file = b.keep(dir, "stat")
	}
	k.info.Guards = slices.Clip(k.info.Guards)
	b.changes++
	k.info.Change = b.changes
	b.procs[pid] = k
	return k
}

// mostCalm bounds how many looks in a row pass over a process that takes page
// faults and maps as much as before.
const mostCalm = 4

// calmly tells that a look may pass over a process because its mappings were the
// same when they were last compared. Nearly all that maps something maps more.
func (k *known) calmly() bool {
	if k.passes == 0 {
		return false
	}
	k.passes--
	return true
}

// turn tells whether a process that took page faults is looked at this time.
func (b *backend) turn(pid int) bool {
	b.waiting++
	return (uint64(pid)+b.round)%uint64(b.turns) == 0
}

func sameProgram(a, b *stat) bool {
	return a.start == b.start && a.startStack == b.startStack && a.startCode == b.startCode
}

// quickStat reads /proc/PID/stat with three system calls and no allocation.
func (b *backend) quickStat(name []byte, s *stat) bool {
	fd, e := openat(b.proc, append(name, "/stat\x00"...))
	if e != 0 {
		return false
	}
	ok := readStat(fd, s)
	unix.Close(fd)
	return ok
}

func readStat(fd int, s *stat) bool {
	var buf [1024]byte
	n, err := unix.Pread(fd, buf[:], 0)
	return err == nil && parseStat(buf[:n], s)
}

// pages is the size of a process: what it maps, what of that is resident and
// what of that is of files (proc_pid_statm(5)), in pages.
type pages [3]uint64

// readPages reads /proc/PID/statm, a quarter of the work of stat.
func readPages(fd int, p *pages) bool {
	var buf [128]byte
	n, err := unix.Pread(fd, buf[:], 0)
	if err != nil {
		return false
	}
	*p = pages{}
	field := 0
	for _, c := range buf[:n] {
		switch {
		case c >= '0' && c <= '9':
			p[field] = 10*p[field] + uint64(c-'0')
			continue
		case c != ' ':
			return false
		}
		if field++; field == len(p) {
			return true
		}
	}
	return false
}

// statRounds is after how many Lists the stat file of a process is read that
// seems to have done nothing: one may map as much as before, elsewhere, and what
// the kernel tells is a hint.
const statRounds = 32

// statOf reads the stat file of a process, through the descriptor that was kept
// if there is one. Of a kernel thread it says from memory
// what it is, but looks again from time to time: a thread may go from the kernel
// to a program.
func (b *backend) statOf(pid int, name []byte, s *stat) bool {
	k := b.procs[pid]
	if k != nil && k.file >= 0 && !k.brief {
		if k.kernel && (uint64(pid)+b.round)%kernelRounds != 0 {
			var comm [32]byte
			if _, err := unix.Pread(k.file, comm[:], 0); err == nil {
				s.flags = kernelThread
				return true
			}
		} else if !k.kernel && readStat(k.file, s) {
			return true
		}
		b.drop(pid) // it is over, and its pid may have been given to another
	}
	if !b.quickStat(name, s) {
		return false
	}
	if s.flags&kernelThread != 0 && b.kept < b.mayKeep {
		if dir, err := openDir(b.proc, string(name)); err == nil {
			// Nothing is cheaper to read, and it fails when the thread is over.
			b.procs[pid] = &known{kernel: true, file: b.keep(dir, "comm"), round: b.round}
			dir.close()
		}
	}
	return true
}

// kernelRounds is after how many Lists a kernel thread is looked at anew.
const kernelRounds = 16

// keep opens a file of a process for the next time, -1 if there are enough
// open. It stays that process's, whoever gets its pid.
func (b *backend) keep(dir procDir, name string) int {
	if b.kept >= b.mayKeep {
		return -1
	}
	fd, err := dir.open(name, unix.O_RDONLY)
	if err != nil {
		return -1
	}
	b.kept++
	return fd
}

// drop forgets a process.
func (b *backend) drop(pid int) {
	if k := b.procs[pid]; k != nil {
		if k.file >= 0 {
			unix.Close(k.file)
			b.kept--
		}
		delete(b.procs, pid)
	}
}

// sumMaps digests the lines of a maps file that tell of files or of code, and
// tells whether all code is that of ELF files.
func (b *backend) sumMaps(l lifetime, name []byte) (sum uint64, bare, ok bool) {
	var err error
	folder, buf := string(name), b.mapbuf
	b.mapbuf = nil // it is that call's until it comes back
	if _, late := b.late.within(l, "read the maps of", func() {
		if buf, err = b.proc.read(folder+"/maps", buf, mapsLimit); err == nil {
			bare = b.elfOnly(folder, buf)
		}
	}); late != nil {
		return 0, false, false
	}
	b.mapbuf = buf
	if err != nil || len(b.mapbuf) == 0 {
		return 0, false, false
	}
	var h maphash.Hash
	h.SetSeed(b.seed)
	for rest := b.mapbuf; len(rest) > 0; {
		line, next, _ := bytes.Cut(rest, newline)
		if bytes.IndexByte(line, '/') >= 0 || bytes.Contains(line, executable) {
			h.Write(line)
		}
		rest = next
	}
	return h.Sum64(), bare, true
}

var newline, executable = []byte("\n"), []byte("xp ")

// forget makes the next List look anew at a process that turned out to be in
// another life than List said.
func (b *backend) forget(pid int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drop(pid)
}
