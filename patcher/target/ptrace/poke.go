//go:build linux && amd64

package ptrace

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// poke writes through ptrace, by words, for kernels that restrict the memory
// file (proc_mem.force_override). It runs on the tracing thread of a freeze.
func (z *frozen) poke(b []byte, at target.Addr) (int, error) {
	for i := range z.threads {
		if t := &z.threads[i]; t.state == stopped {
			return z.p.pokeThrough(t.tid, b, at)
		}
	}
	return 0, z.p.fail("write", at, target.ErrGone)
}

// pokeRunning stops one thread to write through it.
func (p *process) pokeRunning(b []byte, at target.Addr) (int, error) {
	var poked struct {
		n   int
		err error
	}
	own := bytes.Clone(b)
	if err := p.withThread("write", func(t *held) error {
		poked.n, poked.err = p.pokeThrough(t.tid, own, at)
		return nil
	}); err != nil {
		return 0, err // it may still use what it has
	}
	return poked.n, poked.err
}

// pokeThrough writes whole aligned words; those at the ends keep what they had.
func (p *process) pokeThrough(tid int, b []byte, at target.Addr) (int, error) {
	var word [8]byte
	for n := 0; n < len(b); {
		first := (uint64(at) + uint64(n)) &^ 7
		skip := int(uint64(at) + uint64(n) - first)
		old, e := peek(tid, first)
		if e == 0 {
			binary.LittleEndian.PutUint64(word[:], old)
			k := copy(word[skip:], b[n:])
			if e = poke(tid, first, binary.LittleEndian.Uint64(word[:])); e == 0 {
				n += k
				continue
			}
		}
		if e == unix.EFAULT {
			e = unix.EIO // what the memory file says of an unmapped address
		}
		return n, p.fail("write", at+target.Addr(n), e)
	}
	return len(b), nil
}
