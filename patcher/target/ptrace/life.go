//go:build linux && amd64

package ptrace

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// life is one program in one process, as the kernel tells it apart from others.
type life struct {
	id       target.ID
	randomAt uint64    // address of the 16 bytes of AT_RANDOM, 0 if unknown
	random   [2]uint64 // those bytes
	sub      string    // "" or, with a dead main thread, "task/TID/" of one that lives
	stat     stat
	x86      bool // a 32-bit program
}

// auxv entries (getauxval(3)).
const (
	atNull   = 0
	atPhent  = 4
	atRandom = 25
)

// elf32Phent is the size of a program header of a 32-bit program (elf(5)).
const elf32Phent = 32

func (l *life) lifetime() lifetime { return lifetime{l.id.PID, l.stat.start} }

// readLife tells which life a process is in. mem is a descriptor of its memory,
// or -1. Without the right to read memory the identity is the start time and
// the place of the stack, where that is visible.
//
// The Go runtime clears AT_RANDOM when it starts: a Go program is another life
// a moment after its exec than later, which costs one more look and no more.
//
// With an error of kind ErrBusy the memory could not be looked at in time, and
// the life is the one of a process without the right to.
func (s *patience) readLife(dir procDir, pid, mem int) (life, error) {
	for try := 0; ; try++ {
		l, err := s.readLifeOnce(dir, pid, mem)
		if err != nil {
			return l, err
		}
		// The thread looked through may have ended, or executed a program, meanwhile.
		var again stat
		if err := dir.stat(l.sub, &again); err == nil && !again.dying() && again.startStack == l.stat.startStack || try == lookTries {
			return l, nil
		}
	}
}

// lookTries bounds how often a life is read that changes while it is read.
const lookTries = 4

func (s *patience) readLifeOnce(dir procDir, pid, mem int) (life, error) {
	l := life{id: target.ID{PID: pid}}
	if err := l.look(dir); err != nil {
		return l, err
	}
	h := fnv.New64a()
	var word [8]byte
	fold := func(v uint64) {
		binary.LittleEndian.PutUint64(word[:], v)
		h.Write(word[:])
	}
	fold(l.stat.start)
	found := l
	_, late := s.within(l.lifetime(), "look at", func() { found.lookInside(dir, mem) })
	if late == nil {
		l = found
	}
	// The place is random too and tells lives of Go programs apart.
	fold(l.stat.startStack)
	fold(l.randomAt)
	h.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, l.random[0]), l.random[1]))
	l.id.Start = h.Sum64()
	return l, late
}

// lookInside reads what the kernel told the program when it started.
func (l *life) lookInside(dir procDir, mem int) {
	auxv, err := dir.read(l.sub+"auxv", make([]byte, 0, 1024), 4096)
	if err != nil {
		return
	}
	le := binary.LittleEndian
	for b := auxv; len(b) >= 8 && le.Uint64(b) != atNull; b = b[8:] {
		l.x86 = l.x86 || le.Uint32(b) == atPhent && le.Uint32(b[4:]) == elf32Phent
	}
	for ; len(auxv) >= 16 && le.Uint64(auxv) != atNull; auxv = auxv[16:] {
		switch value := le.Uint64(auxv[8:]); le.Uint64(auxv) {
		case atRandom:
			l.randomAt = value
		case atPhent:
			l.x86 = false // whatever words of it looked like
		}
	}
	if l.randomAt == 0 {
		return
	}
	var b [16]byte
	if !anonymous(dir, l.sub, target.Addr(l.randomAt), len(b)) {
		l.randomAt = 0
		return
	}
	if n, err := readMem(dir, l.sub, mem, b[:], l.randomAt); err != nil || n != len(b) {
		l.randomAt = 0
		return
	}
	l.random[0], l.random[1] = le.Uint64(b[:]), le.Uint64(b[8:])
}

// anonymous tells whether memory is the program's own and is there, as its stack
// is. A program may map a file over its stack, and a page of that may have to
// come from a server that never answers.
func anonymous(dir procDir, sub string, at target.Addr, n int) bool {
	first, last := at/target.PageSize, (at+target.Addr(n)-1)/target.PageSize
	entries, err := readPagemap(dir, sub, first*target.PageSize, int(last-first)+1)
	if err != nil || len(entries) != pagemapSize*(int(last-first)+1) {
		return false
	}
	for ; len(entries) > 0; entries = entries[pagemapSize:] {
		e := binary.LittleEndian.Uint64(entries)
		if e&(pageOfFile|pageMarked) != 0 || e&(pagePresent|pageSwapped) == 0 {
			return false
		}
	}
	return true
}

// via is the folder of the thread to look through, below that of the process.
func (l *life) via() string { return strings.TrimSuffix("/"+l.sub, "/") }

// look reads the stat file, through a thread that lives if the main thread has
// ended. The start stays that of the process.
func (l *life) look(dir procDir) error {
	l.sub = ""
	if err := dir.stat("", &l.stat); err != nil {
		return err
	}
	if !l.stat.dying() {
		return nil
	}
	start := l.stat.start
	sub, ok := "", false
	if l.stat.threads > 1 {
		sub, ok = liveThread(dir)
	}
	if !ok {
		return unix.ESRCH
	}
	if err := dir.stat(sub, &l.stat); err != nil {
		return err
	}
	l.sub, l.stat.start = sub, start
	return nil
}

func readMem(dir procDir, sub string, mem int, b []byte, at uint64) (int, error) {
	if mem < 0 {
		fd, err := dir.open(sub+"mem", unix.O_RDONLY)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		mem = fd
	}
	return retry(func() (int, error) { return unix.Pread(mem, b, int64(at)) })
}

// still is nil if the process is in the life that was opened, by a fresh look,
// and ErrGone if it is not.
func (p *process) still(op string) error {
	now, err := p.b.late.readLife(p.dir, p.life.id.PID, -1)
	switch {
	case errors.Is(err, target.ErrBusy):
		return p.fail(op, 0, err)
	case err != nil || now.id != p.life.id:
		p.b.forget(p.life.id.PID)
		return p.fail(op, 0, target.ErrGone)
	}
	return nil
}

// running tells whether a stopped thread is still in this life. It asks the
// thread's present address space, so an exec just before cannot deceive it.
func (l *life) running(tid int) bool {
	if l.randomAt == 0 {
		return true // not told from outside; the memory descriptor still keeps writes in the old life
	}
	a, e1 := peek(tid, l.randomAt)
	b, e2 := peek(tid, l.randomAt+8)
	return e1 == 0 && e2 == 0 && a == l.random[0] && b == l.random[1]
}

// liveThread finds a thread to look through when the main thread has ended:
// with it gone, the files of the process itself are empty.
func liveThread(dir procDir) (sub string, ok bool) {
	task, err := openDir(dir, "task")
	if err != nil {
		return "", false
	}
	defer task.close()
	tids, err := task.numbers(nil, make([]byte, 64<<10))
	if err != nil {
		return "", false
	}
	for _, tid := range tids {
		var s stat
		if task.stat(strconv.Itoa(tid)+"/", &s) == nil && !s.dying() {
			return taskPath(tid), true
		}
	}
	return "", false
}
