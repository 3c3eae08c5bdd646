//go:build linux && amd64

package ptrace

import (
	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// moveChunk is how much is read or written in one call: a piece of a search for
// code, and with it most stacks.
const moveChunk = scanChunk + scanOverlap

// ReadAt does not read what would have to be fetched from far away: it could
// wait for ever, in a way that nothing ends.
func (p *process) ReadAt(b []byte, at target.Addr) (int, error) {
	if err := p.admit("read"); err != nil {
		return 0, err
	}
	if !p.mapped {
		if _, err := p.Regions(); err != nil {
			return 0, err
		}
	}
	there, why := p.reach("read", at, len(b), false)
	for n := 0; n < there; {
		k, err := p.move("read", b[n:there], at+target.Addr(n), unix.Pread)
		if err == nil && k == 0 {
			err = target.ErrGone // an address space that is over reads as empty
		}
		if err != nil {
			return n, p.fail("read", at+target.Addr(n), err)
		}
		n += k
	}
	return there, why
}

// move makes one call, with a buffer that stays the call's own if it is left behind.
func (p *process) move(op string, b []byte, at target.Addr, call func(fd int, b []byte, at int64) (int, error)) (n int, err error) {
	if len(b) > moveChunk {
		b = b[:moveChunk]
	}
	own := p.bounce
	p.bounce = nil
	if cap(own) < len(b) {
		own = make([]byte, max(len(b), target.PageSize))
	}
	own = own[:len(b)]
	write := op == "write"
	if write {
		copy(own, b)
	}
	if late := p.within(op, func() { n, err = retry(func() (int, error) { return call(p.mem, own, int64(at)) }) }); late != nil {
		return 0, late
	}
	if !write {
		copy(b[:max(n, 0)], own)
	}
	p.bounce = own
	return n, err
}

func (p *process) WriteAt(b []byte, at target.Addr) (int, error) {
	if err := p.admit("write"); err != nil {
		return 0, err
	}
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
//
// A write that had to be left behind may still be made, at any time. That takes a
// program which replaces its own memory in the instant after we looked, or takes
// its pages away: it harms nobody else.
func (p *process) writeMem(b []byte, at target.Addr) (int, error) {
	if !p.mapped {
		if _, err := p.Regions(); err != nil {
			return 0, err
		}
	}
	if there, why := p.reach("write", at, len(b), true); there < len(b) {
		return 0, why
	}
	n := 0
	for n < len(b) && !p.readOnly {
		k, err := p.move("write", b[n:], at+target.Addr(n), unix.Pwrite)
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
	n, err := p.move("read", one[:], at, unix.Pread)
	return n == 1 && err == nil
}

// Flush has nothing to do: an amd64 processor sees its own and others' stores
// to code, and every stopped thread comes back through the kernel, which serialises.
func (p *process) Flush(target.Addr, int) error { return nil }
