//go:build linux && amd64

package ptrace

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// process implements target.Process. Its descriptors were opened on one
// address space and stay with it: after execve they read nothing.
type process struct {
	b    *backend
	life life
	info target.Info

	users  atomic.Int32 // of the descriptors: the handle, and calls that have not come back
	closed bool
	alone  bool // others that share its memory were looked for
	dir    procDir
	task   procDir // the thread folder
	mem    int
	maps   int

	readOnly bool // the memory descriptor refuses writes: poke instead
	ownChild bool // its exit status belongs to whoever of us started it
	frozen   *frozen
	far      []farSpan // as of the last Regions
	mapped   bool      // Regions was read
	buf      []byte    // of Regions
	bounce   []byte    // of reads and writes
	dirbuf   []byte    // of the thread folder
	tids     []int
	trampolines
}

func (b *backend) Open(ctx context.Context, id target.ID) (target.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p, err := b.open(id)
	if err != nil {
		if !errors.Is(err, target.ErrBusy) {
			b.forget(id.PID)
		}
		return nil, failed("open", id, 0, err)
	}
	return p, nil
}

func (b *backend) open(id target.ID) (_ *process, err error) {
	p := &process{b: b, dir: -1, task: -1, mem: -1, maps: -1}
	p.users.Store(1)
	defer func() {
		if err != nil {
			p.release()
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
	p.life.id = id
	// Memory first, identity second: whatever life is read now, the
	// descriptors belong to it or to one that is over.
	if p.mem, err = p.open("mem", unix.O_RDWR); err == unix.EROFS {
		p.readOnly = true
		p.mem, err = p.open("mem", unix.O_RDONLY)
	}
	if err != nil {
		return nil, err
	}
	if p.maps, err = p.open("maps", unix.O_RDONLY); err != nil {
		return nil, err
	}
	if p.life, err = b.late.readLife(p.dir, id.PID, p.mem); err != nil {
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
	return p, nil
}

// Info tells of a process that shares this one's memory, too. To find it all
// processes are asked, which is for those that are worked on, not for those
// that are only looked into: it is done when Info is first called.
func (p *process) Info() target.Info {
	if p.alone || p.closed {
		return p.info
	}
	p.alone = true
	switch other, err := p.sharer(); {
	case err != nil:
		p.info.Guards = append(p.info.Guards, target.Guard{Code: target.GuardShared, Text: err.Error()})
	case other != 0:
		p.info.Guards = append(p.info.Guards, target.Guard{Code: target.GuardShared,
			Text: "shares its memory with " + processName(other)})
	}
	return p.info
}

func (p *process) Close() error {
	var err error
	if p.frozen != nil {
		err = p.frozen.Thaw()
	}
	if !p.closed {
		p.closed = true
		p.release()
	}
	return err
}

// release closes the descriptors when nobody uses them any more. Before that
// their numbers must not become those of other files, to be read or written by
// a call that was left behind.
func (p *process) release() {
	if p.users.Add(-1) != 0 {
		return
	}
	for _, fd := range []*int{(*int)(&p.dir), (*int)(&p.task), &p.mem, &p.maps} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

// within has patience with a call about the process: see there what f may use.
func (p *process) within(op string, f func()) error {
	p.users.Add(1)
	ran, err := p.b.late.within(p.life.lifetime(), op, func() {
		f()
		p.release()
	})
	if !ran {
		p.release()
	}
	return p.lateness(op, err)
}

// admit is an error if nothing about the process is to be tried now: a call that
// was left behind may still use what belongs to it.
func (p *process) admit(op string) error {
	return p.lateness(op, p.b.late.admit(p.life.lifetime()))
}

func (p *process) lateness(op string, err error) error {
	if e, ok := err.(*target.Error); ok {
		e.ID = p.life.id
		return e
	}
	return err
}

// open opens one of its files that have to do with memory.
func (p *process) open(name string, flags int) (int, error) {
	fd, err := -1, error(nil)
	var mine atomic.Bool // to close, of whoever comes second: the call, or we who left it
	name = p.life.sub + name
	if late := p.within("open "+name+" of", func() {
		fd, err = p.dir.open(name, flags)
		if mine.Swap(true) && err == nil {
			unix.Close(fd)
		}
	}); late != nil {
		if mine.Swap(true) && err == nil && fd >= 0 {
			unix.Close(fd)
		}
		return -1, late
	}
	return fd, err
}

// read is procDir.read of a file that has to do with memory.
func (p *process) read(name string, limit int) ([]byte, error) {
	var b []byte
	var err error
	if late := p.within("read "+name+" of", func() { b, err = p.dir.read(name, nil, limit) }); late != nil {
		return nil, late
	}
	return b, err
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
