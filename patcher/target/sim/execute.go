package sim

import (
	"encoding/binary"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

// jumpLimit bounds a chain of jumps: an entry, a pad, a slot, and those of others.
const jumpLimit = 16

// Peek reads memory as the process itself sees its data.
func (m *Machine) Peek(pid int, at target.Addr, n int) ([]byte, error) {
	return m.look(pid, at, n, false)
}

// Fetch reads what the processor would execute: the instruction cache. It
// refuses memory that is not executable.
func (m *Machine) Fetch(pid int, at target.Addr, n int) ([]byte, error) {
	return m.look(pid, at, n, true)
}

func (m *Machine) look(pid int, at target.Addr, n int, code bool) ([]byte, error) {
	b := make([]byte, n)
	err := m.with(pid, "look into", func(p *process) error {
		if code {
			got := p.fetch(b, at)
			if got < n {
				return fmt.Errorf("at %s: nothing executable is mapped there", at+target.Addr(got))
			}
			return nil
		}
		if got := p.mem.reach(at, n, false); got < n {
			return fmt.Errorf("at %s: %w", at+target.Addr(got), errUnmapped)
		}
		p.mem.read(b, at, false)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// fetch fills b as far as memory is executable and tells how far.
func (p *process) fetch(b []byte, at target.Addr) int {
	n := 0
	eachPage(at, len(b), func(a target.Addr, from, to int) bool {
		if x := p.mem.at(a); x == nil || x.Prot&target.Exec == 0 {
			return false
		}
		n = to
		return true
	})
	p.mem.read(b[:n], at, true)
	return n
}

// Poke is the process, or somebody who is not us, writing to its memory. Code
// is flushed with it. Nothing is counted and nothing is a violation.
func (m *Machine) Poke(pid int, at target.Addr, b []byte) error {
	return m.with(pid, "write to", func(p *process) error {
		if n := p.mem.reach(at, len(b), false); n < len(b) {
			return fmt.Errorf("at %s: %w", at+target.Addr(n), errUnmapped)
		}
		p.mem.write(b, at)
		p.mem.flush(at, len(b))
		return nil
	})
}

// Executes follows the jumps the processor would follow from at and tells the
// first place where something else than a jump is executed: the function that
// a call of at runs. Known are the direct jumps (EB, E9, FF 25 on x86-64; B,
// and LDR X16/X17 with BR on ARM64) behind an endbr64 or bti too.
func (m *Machine) Executes(pid int, at target.Addr) (target.Addr, error) {
	var end target.Addr
	err := m.with(pid, "execute", func(p *process) (err error) {
		end, err = p.executes(at)
		return err
	})
	return end, err
}

func (p *process) executes(at target.Addr) (target.Addr, error) {
	for range jumpLimit {
		next, jumps, err := p.jump(at)
		if err != nil {
			return 0, fmt.Errorf("at %s: %w", at, err)
		}
		if !jumps {
			return at, nil
		}
		at = next
	}
	return 0, fmt.Errorf("at %s: more than %d jumps", at, jumpLimit)
}

var (
	errNotCode        = errors.New("nothing executable is mapped there")
	errBadJump        = errors.New("the jump reads what is not mapped")
	endbr64           = [4]byte{0xf3, 0x0f, 0x1e, 0xfa}
	btiC       uint32 = 0xd503245f
)

// jump tells where the instruction at at jumps to, if it is a jump.
func (p *process) jump(at target.Addr) (next target.Addr, jumps bool, err error) {
	var b [12]byte
	n := p.fetch(b[:], at)
	if n == 0 {
		return 0, false, errNotCode
	}
	if p.info.Arch == target.ARM64 {
		return p.jumpARM64(at, b[:n])
	}
	c := b[:n]
	if n > 4 && [4]byte(c) == endbr64 {
		// The landing pad itself is passed over only if a jump follows it.
		next, jumps, err = p.jumpAMD64(at+4, c[4:])
		return next, jumps, err
	}
	return p.jumpAMD64(at, c)
}

func (p *process) jumpAMD64(at target.Addr, c []byte) (target.Addr, bool, error) {
	switch {
	case c[0] == 0xeb && len(c) >= 2:
		return at + 2 + target.Addr(int8(c[1])), true, nil
	case c[0] == 0xe9 && len(c) >= 5:
		return at + 5 + target.Addr(int32(binary.LittleEndian.Uint32(c[1:]))), true, nil
	case c[0] == 0xff && len(c) >= 6 && c[1] == 0x25 && p.info.Arch == target.AMD64:
		slot := at + 6 + target.Addr(int32(binary.LittleEndian.Uint32(c[2:])))
		return p.slot(slot)
	case c[0] == 0xeb || c[0] == 0xe9:
		return 0, false, errNotCode // it runs on into what is not executable
	}
	return 0, false, nil
}

// slot reads a jump's target from memory.
func (p *process) slot(at target.Addr) (target.Addr, bool, error) {
	var b [8]byte
	if p.mem.reach(at, len(b), false) < len(b) {
		return 0, false, errBadJump
	}
	p.mem.read(b[:], at, false)
	return target.Addr(binary.LittleEndian.Uint64(b[:])), true, nil
}

func (p *process) jumpARM64(at target.Addr, c []byte) (target.Addr, bool, error) {
	if len(c) < 4 {
		return 0, false, errNotCode
	}
	in := binary.LittleEndian.Uint32(c)
	if in == btiC && len(c) >= 8 {
		at, c = at+4, c[4:]
		in = binary.LittleEndian.Uint32(c)
	}
	if in>>26 == 0b000101 { // B imm26
		return at + target.Addr(int64(int32(in<<6)>>6)*4), true, nil
	}
	// LDR Xt, literal; BR Xt with the veneer registers X16 or X17.
	if in>>24 == 0x58 && (in&31 == 16 || in&31 == 17) && len(c) >= 8 {
		if br := binary.LittleEndian.Uint32(c[4:]); br == 0xd61f0000|in&31<<5 {
			return p.slot(at + target.Addr(int64(int32(in<<8)>>13)*4))
		}
	}
	return 0, false, nil
}
