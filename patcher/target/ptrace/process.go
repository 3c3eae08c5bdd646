//go:build linux && amd64

package ptrace

import (
	"context"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// process implements target.Process. Its descriptors were opened on one
// address space and stay with it: after execve they read nothing.
type process struct {
	b    *backend
	life life
	info target.Info
	dir  procDir
	task procDir // the thread folder
	mem  int
	maps int

	readOnly bool // the memory descriptor refuses writes: poke instead
	ownChild bool // its exit status belongs to whoever of us started it
	frozen   *frozen
	buf      []byte // of Regions
	dirbuf   []byte // of the thread folder
	tids     []int
	trampolines
}

func (b *backend) Open(ctx context.Context, id target.ID) (target.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p, err := b.open(id)
	if err != nil {
		b.forget(id.PID)
		return nil, failed("open", id, 0, err)
	}
	return p, nil
}

func (b *backend) open(id target.ID) (_ *process, err error) {
	p := &process{b: b, dir: -1, task: -1, mem: -1, maps: -1}
	defer func() {
		if err != nil {
			p.closeFiles()
		}
	}()
	if p.dir, err = openDir(b.proc, strconv.Itoa(id.PID)); err != nil {
		return nil, err
	}
	if p.task, err = openDir(p.dir, "task"); err != nil {
		return nil, err
	}
	if err = p.life.look(p.dir); err != nil {
		return nil, err
	}
	// Memory first, identity second: whatever life is read now, the
	// descriptors belong to it or to one that is over.
	if p.mem, err = p.dir.open(p.life.sub+"mem", unix.O_RDWR); err == unix.EROFS {
		p.readOnly = true
		p.mem, err = p.dir.open(p.life.sub+"mem", unix.O_RDONLY)
	}
	if err != nil {
		return nil, err
	}
	if p.maps, err = p.dir.open(p.life.sub+"maps", unix.O_RDONLY); err != nil {
		return nil, err
	}
	if p.life, err = readLife(p.dir, id.PID, p.mem); err != nil {
		return nil, err
	}
	if p.life.id != id {
		return nil, target.ErrGone
	}
	p.ownChild = p.life.stat.ppid == b.desc.self
	p.dirbuf = make([]byte, 64<<10)
	b.mu.Lock()
	p.info = b.desc.describe(p.dir, &p.life)
	if k := b.procs[id.PID]; k != nil && k.info.ID == id {
		p.info.Change = k.info.Change
	}
	b.mu.Unlock()
	if other := p.sharer(); other != 0 {
		p.info.Guards = append(p.info.Guards, target.Guard{Code: target.GuardShared,
			Text: "shares its memory with " + processName(other)})
	}
	return p, nil
}

func (p *process) Info() target.Info { return p.info }

func (p *process) Close() error {
	var err error
	if p.frozen != nil {
		err = p.frozen.Thaw()
	}
	p.closeFiles()
	return err
}

func (p *process) closeFiles() {
	for _, fd := range []*int{(*int)(&p.dir), (*int)(&p.task), &p.mem, &p.maps} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// failed gives an error of the system its kind.
func failed(op string, id target.ID, at target.Addr, err error) error {
	if e, ok := err.(*target.Error); ok {
		return e
	}
	e := &target.Error{Op: op, ID: id, At: at, Err: err}
	switch err {
	case unix.ESRCH, unix.ENOENT, unix.ENOTDIR:
		e.Err = target.ErrGone
	case unix.EACCES, unix.EPERM, unix.EROFS:
		e.Note, e.Err = err.Error(), target.ErrDenied
	}
	return e
}

func (p *process) fail(op string, at target.Addr, err error) error {
	return failed(op, p.life.id, at, err)
}

// refuse is an error with a sentence.
func (p *process) refuse(op string, at target.Addr, kind error, format string, args ...any) error {
	return &target.Error{Op: op, ID: p.life.id, At: at, Note: fmt.Sprintf(format, args...), Err: kind}
}

func (p *process) ReadAt(b []byte, at target.Addr) (int, error) {
	n := 0
	for n < len(b) {
		k, err := retry(func() (int, error) { return unix.Pread(p.mem, b[n:], int64(at)+int64(n)) })
		if err == nil && k == 0 {
			return n, p.fail("read", at+target.Addr(n), target.ErrGone) // an address space that is over reads as empty
		}
		if err != nil {
			return n, p.fail("read", at+target.Addr(n), err)
		}
		n += k
	}
	return n, nil
}

func (p *process) WriteAt(b []byte, at target.Addr) (int, error) {
	if z := p.frozen; z != nil {
		return z.write(b, at)
	}
	n, err := p.writeMem(b, at)
	if err == nil && n < len(b) {
		return p.pokeRunning(b, at)
	}
	return n, err
}

// writeMem writes through the descriptor. It notes when the kernel does not let
// it write what is mapped without the right to write, and then writes nothing
// and says nothing: a stopped thread is needed.
func (p *process) writeMem(b []byte, at target.Addr) (int, error) {
	n := 0
	for n < len(b) && !p.readOnly {
		k, err := retry(func() (int, error) { return unix.Pwrite(p.mem, b[n:], int64(at)+int64(n)) })
		switch {
		case err == nil && k == 0:
			return n, p.fail("write", at+target.Addr(n), target.ErrGone)
		case err == unix.EIO && p.readable(at+target.Addr(n)):
			p.readOnly = true
			return 0, nil
		case err != nil:
			return n, p.fail("write", at+target.Addr(n), err)
		}
		n += k
	}
	return n, nil
}

func (p *process) readable(at target.Addr) bool {
	var one [1]byte
	n, err := unix.Pread(p.mem, one[:], int64(at))
	return n == 1 && err == nil
}

// Flush has nothing to do: an amd64 processor sees its own and others' stores
// to code, and every stopped thread comes back through the kernel, which serialises.
func (p *process) Flush(target.Addr, int) error { return nil }

// Regions reads the maps file of the address space that was opened.
func (p *process) Regions() ([]target.Region, error) {
	if p.maps >= 0 {
		if b, err := p.readMaps(); err == nil && len(b) > 0 {
			p.buf = b
			r, ok := parseMaps(b, make([]target.Region, 0, 1+len(b)/90))
			if !ok {
				return nil, p.refuse("list regions of", 0, target.ErrUnsupported, "line %d of its maps file is not understood", len(r)+1)
			}
			return r, nil
		}
	}
	return nil, p.fail("list regions of", 0, target.ErrGone)
}

// mapsLimit bounds the maps file: 65530 mappings, as many as a process may have
// by default, with paths of 200 bytes.
const mapsLimit = 16 << 20

// readMaps reads from the start. The file belongs to the address space but
// looks it up by the thread it was opened on: if that one has ended, through
// another one that lives.
func (p *process) readMaps() ([]byte, error) {
	if _, err := unix.Seek(p.maps, 0, 0); err != nil {
		return nil, err
	}
	b, err := readAll(p.maps, p.buf, mapsLimit)
	if err == nil && len(b) > 0 {
		return b, nil
	}
	fd := -1
	now, err := readLife(p.dir, p.life.id.PID, p.mem)
	if err != nil || now.id != p.life.id {
		return nil, unix.ESRCH
	}
	if fd, err = p.dir.open(now.sub+"maps", unix.O_RDONLY); err != nil {
		return nil, err
	}
	// Opened first, checked after: it may be that of a program that came between.
	if again, err := readLife(p.dir, p.life.id.PID, p.mem); err != nil || again.id != p.life.id {
		unix.Close(fd)
		return nil, unix.ESRCH
	}
	unix.Close(p.maps)
	p.maps, p.life.sub = fd, now.sub
	return readAll(p.maps, p.buf, mapsLimit)
}
