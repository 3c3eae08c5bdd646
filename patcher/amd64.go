package patcher

import "fmt"

// instruction is what planning needs to know of one x86-64 instruction.
type instruction struct {
	Len    int
	Flow   flow
	Rel    int32 // relative branches: distance from the end of the instruction
	HasRIP bool  // a RIP-relative memory operand: Disp counts from the end of the instruction
	HasAbs bool  // another memory operand with a displacement of 32 bits
	Disp   int32 // that displacement
	Lea    bool  // LEA: computes an address, reads nothing
}

type flow uint8

const (
	flowNext     flow = iota // goes on to the next instruction
	flowBranch               // conditional, relative: to the next or by Rel
	flowJump                 // unconditional, relative
	flowCall                 // relative call
	flowIndirect             // jump through register or memory
	flowReturn               // RET and its kin
	flowTrap                 // INT3, UD1, UD2, INT 29h (fast fail): never goes on
)

// errInstruction: the bytes are not on our list. It is a refusal, never a guess.
var errInstruction = fmt.Errorf("unknown or cut instruction")

// Attributes of an opcode, one letter each: its operands' encoding.
//
//	.  none             m  ModRM            b  ModRM + imm8     z  ModRM + imm16/32
//	1  imm8             4  imm16/32 (z)     2  imm16            r  rel8
//	R  rel32            o  moffs            v  imm16/32/64      e  imm16 + imm8
//	x  not on the list
//
// Source: Intel SDM volume 2, appendix A, 64-bit mode.
const oneByte = "" +
	"mmmm14xx" + "mmmm14xx" + "mmmm14xx" + "mmmm14xx" + // 00-1f (0f is an escape)
	"mmmm14xx" + "mmmm14xx" + "mmmm14xx" + "mmmm14xx" + // 20-3f (26 2e 36 3e are prefixes)
	"xxxxxxxx" + "xxxxxxxx" + // 40-4f: REX
	"........" + "........" + // 50-5f
	"xxxmxxxx" + "4z1b...." + // 60-6f (62 EVEX, 64-67 prefixes)
	"rrrrrrrr" + "rrrrrrrr" + // 70-7f
	"bzxbmmmm" + "mmmmmmmm" + // 80-8f
	"........" + "..x....." + // 90-9f
	"oooo...." + "14......" + // a0-af
	"11111111" + "vvvvvvvv" + // b0-bf
	"bb2.xxbz" + "e.2..1x." + // c0-cf (c4 c5 VEX)
	"mmmmxxx." + "mmmmmmmm" + // d0-df
	"rrrr1111" + "RRxr...." + // e0-ef
	"x.xx..mm" + "......mm" // f0-ff (f0 f2 f3 prefixes)

const twoByte = "" + // 0f xx
	"mmmmx..." + "..x.xm.x" + // 00-0f
	"mmmmmmmm" + "mmmmmmmm" + // 10-1f
	"mmmmxxxx" + "mmmmmmmm" + // 20-2f
	"......x." + "xxxxxxxx" + // 30-3f (38 3a escapes)
	"mmmmmmmm" + "mmmmmmmm" + // 40-4f
	"mmmmmmmm" + "mmmmmmmm" + // 50-5f
	"mmmmmmmm" + "mmmmmmmm" + // 60-6f
	"bbbbmmm." + "mmxxmmmm" + // 70-7f
	"RRRRRRRR" + "RRRRRRRR" + // 80-8f
	"mmmmmmmm" + "mmmmmmmm" + // 90-9f
	"...mbmxx" + "...mbmmm" + // a0-af
	"mmmmmmmm" + "mmbmmmmm" + // b0-bf
	"mmbmbbbm" + "........" + // c0-cf
	"mmmmmmmm" + "mmmmmmmm" + // d0-df
	"mmmmmmmm" + "mmmmmmmm" + // e0-ef
	"mmmmmmmm" + "mmmmmmmx" // f0-ff (ff is UD0, of whose length vendors disagree)

// maxInstruction is the architecture's limit, bytes.
const maxInstruction = 15

// decodeAMD64 reads one instruction at the start of b.
func decodeAMD64(b []byte) (instruction, error) {
	if len(b) > maxInstruction {
		b = b[:maxInstruction]
	}
	d := decoder{b: b}
	return d.run()
}

type decoder struct {
	b      []byte
	i      int
	size16 bool // operand size prefix
	addr32 bool
	rep    byte // f2 or f3
	rexW   bool
	in     instruction
}

func (d *decoder) run() (instruction, error) {
	rex := false
	for {
		c, ok := d.next()
		if !ok {
			return d.in, errInstruction
		}
		switch {
		case c == 0x66 && !rex:
			d.size16 = true
			continue
		case c == 0x67 && !rex:
			d.addr32 = true
			continue
		case (c == 0xf2 || c == 0xf3) && !rex:
			d.rep = c
			continue
		case (c == 0xf0 || c == 0x2e || c == 0x36 || c == 0x3e || c == 0x26 || c == 0x64 || c == 0x65) && !rex:
			continue
		case c&0xf0 == 0x40 && !rex:
			rex, d.rexW = true, c&8 != 0
			continue // the opcode must follow
		case c == 0x0f:
			return d.escape()
		case c == 0xc5 || c == 0xc4 || c == 0x62:
			if rex || d.size16 || d.rep != 0 {
				return d.in, errInstruction
			}
			return d.vector(c)
		}
		return d.opcode(c, oneByte[c])
	}
}

func (d *decoder) next() (byte, bool) {
	if d.i >= len(d.b) {
		return 0, false
	}
	c := d.b[d.i]
	d.i++
	return c, true
}

func (d *decoder) escape() (instruction, error) {
	c, ok := d.next()
	if !ok {
		return d.in, errInstruction
	}
	switch c {
	case 0x38, 0x3a:
		if _, ok := d.next(); !ok {
			return d.in, errInstruction
		}
		if c == 0x3a {
			return d.finish('b', 0)
		}
		return d.finish('m', 0)
	case 0x78, 0x79:
		if d.size16 || d.rep != 0 {
			return d.in, errInstruction // SSE4a: other operands
		}
	case 0xb8:
		if d.rep != 0xf3 {
			return d.in, errInstruction
		}
	case 0x20, 0x21, 0x22, 0x23:
		// Control and debug registers: the processor takes any mod for 3.
		if d.i < len(d.b) && d.b[d.i] < 0xc0 {
			return d.in, errInstruction
		}
	case 0x0b, 0xb9:
		d.in.Flow = flowTrap
	}
	a := twoByte[c]
	if a == 'R' {
		d.in.Flow = flowBranch
	}
	return d.finish(a, 0)
}

// vector reads VEX (c5, c4) and EVEX (62) forms.
func (d *decoder) vector(c byte) (instruction, error) {
	var kind byte
	switch c {
	case 0xc5:
		kind, d.i = 1, d.i+1
	case 0xc4:
		p, ok := d.next()
		if !ok {
			return d.in, errInstruction
		}
		kind, d.i = p&0x1f, d.i+1
	case 0x62:
		p, ok := d.next()
		if !ok || p&0x08 != 0 {
			return d.in, errInstruction
		}
		kind, d.i = p&0x07, d.i+2
	}
	op, ok := d.next()
	if !ok {
		return d.in, errInstruction
	}
	// The map tells what follows, but for a few of the first.
	switch {
	case kind == 1 && op == 0x77 && c != 0x62:
		return d.finish('.', 0) // VZEROUPPER, VZEROALL
	case kind == 1 && (op >= 0x70 && op <= 0x73 || op == 0xc2 || op >= 0xc4 && op <= 0xc6):
		return d.finish('b', 0)
	case kind == 1 && op >= 0x10 && op>>2 != 0x20>>2 && (twoByte[op] == 'm' || c == 0x62 && (op == 0x7a || op == 0x7b)),
		kind == 2, c == 0x62 && (kind == 5 || kind == 6):
		return d.finish('m', 0)
	case kind == 3:
		return d.finish('b', 0)
	}
	return d.in, errInstruction
}

func (d *decoder) opcode(c byte, a byte) (instruction, error) {
	switch c {
	case 0xc3, 0xc2, 0xcb, 0xca, 0xcf:
		d.in.Flow = flowReturn
	case 0xcc:
		d.in.Flow = flowTrap
	case 0xe8:
		d.in.Flow = flowCall
	case 0xe9, 0xeb:
		d.in.Flow = flowJump
	case 0x8d:
		d.in.Lea = true
	}
	if (a == 'R' || a == 'r') && d.in.Flow == flowNext {
		d.in.Flow = flowBranch
	}
	return d.finish(a, c)
}

// finish reads what follows the opcode. c is the one-byte opcode, 0 for others.
func (d *decoder) finish(a, c byte) (instruction, error) {
	if (a == 'R' || a == 'r') && d.size16 {
		return d.in, errInstruction // vendors disagree on its length or where it leads
	}
	imm := 0
	z := 4
	if d.size16 && !d.rexW { // REX.W wins
		z = 2
	}
	dispAt, rip := -1, false
	switch a {
	case 'x':
		return d.in, errInstruction
	case 'm', 'b', 'z':
		reg, mod, ok := byte(0), byte(0), false
		if reg, mod, dispAt, rip, ok = d.modrm(); !ok {
			return d.in, errInstruction
		}
		if a == 'b' {
			imm = 1
		} else if a == 'z' {
			imm = z
		}
		switch c {
		case 0x8f:
			if reg != 0 {
				return d.in, errInstruction // XOP
			}
		case 0xc6, 0xc7:
			if reg != 0 {
				return d.in, errInstruction // XABORT, XBEGIN
			}
		case 0xf6:
			if reg < 2 {
				imm = 1
			}
		case 0xf7:
			if reg < 2 {
				imm = z
			}
		case 0xfe:
			if reg > 1 {
				return d.in, errInstruction
			}
		case 0xff:
			switch reg {
			case 4, 5:
				d.in.Flow = flowIndirect
			case 7:
				return d.in, errInstruction
			}
		case 0x8d:
			if mod == 3 {
				return d.in, errInstruction
			}
		}
	case '1':
		imm = 1
		if c == 0xcd && d.i < len(d.b) && d.b[d.i] == 0x29 {
			d.in.Flow = flowTrap
		}
	case '4':
		imm = z
	case '2':
		imm = 2
	case 'e':
		imm = 3
	case 'v':
		imm = z
		if d.rexW {
			imm = 8
		}
	case 'o':
		imm = 8
		if d.addr32 {
			imm = 4
		}
	case 'r':
		v, ok := d.next()
		if !ok {
			return d.in, errInstruction
		}
		d.in.Rel = int32(int8(v))
	case 'R':
		v, ok := d.le32(d.i)
		if !ok {
			return d.in, errInstruction
		}
		d.in.Rel = v
		d.i += 4
	}
	d.i += imm
	if d.i > len(d.b) {
		return d.in, errInstruction
	}
	if dispAt >= 0 {
		d.in.HasRIP, d.in.HasAbs = rip, !rip
		d.in.Disp, _ = d.le32(dispAt)
	}
	d.in.Len = d.i
	return d.in, nil
}

func (d *decoder) le32(i int) (int32, bool) {
	if i+4 > len(d.b) {
		return 0, false
	}
	b := d.b[i:]
	return int32(uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24), true
}

// modrm reads ModRM, SIB and displacement. dispAt is the index of a
// displacement of 32 bits, -1 if there is none; rip tells whether it is
// RIP-relative.
func (d *decoder) modrm() (reg, mod byte, dispAt int, rip, ok bool) {
	m, ok := d.next()
	if !ok {
		return 0, 0, -1, false, false
	}
	mod, reg, rm := m>>6, m>>3&7, m&7
	if mod == 3 {
		return reg, mod, -1, false, true
	}
	wide := mod == 2
	if rm == 4 {
		sib, ok := d.next()
		if !ok {
			return 0, 0, -1, false, false
		}
		wide = wide || mod == 0 && sib&7 == 5
	} else if mod == 0 && rm == 5 {
		rip, wide = true, true
	}
	dispAt = -1
	switch {
	case wide:
		dispAt = d.i
		d.i += 4
	case mod == 1:
		d.i++
	}
	return reg, mod, dispAt, rip, d.i <= len(d.b)
}
