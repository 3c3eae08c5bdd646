package patcher

import (
	"fmt"

	"golang.org/x/arch/x86/x86asm"

	"hotpatchd/patcher/target"
)

// Line is one instruction for people.
type Line struct {
	At    target.Addr
	Bytes []byte
	Text  string
}

// Disassemble prints x86-64 code at an address. What cannot be read is printed
// as bytes: this is for eyes, decisions rest on the patcher's own decoder.
func Disassemble(b []byte, at target.Addr) []Line {
	var out []Line
	for len(b) > 0 {
		n, text := 1, fmt.Sprintf("db %02xh", b[0])
		if in, err := decodeAMD64(b); err == nil {
			n = in.Len
			text = fmt.Sprintf("(%d bytes)", n)
			if a, err := x86asm.Decode(b, 64); err == nil && a.Op != 0 && a.Len == n {
				text = x86asm.IntelSyntax(a, uint64(at), nil)
			} else if n == len(endbr64) && string(b[:n]) == string(endbr64) {
				text = "endbr64"
			}
		}
		out = append(out, Line{at, b[:n], text})
		b, at = b[n:], at+target.Addr(n)
	}
	return out
}

// Place is one place a plan writes in live code, in the order of writing.
type Place struct {
	Function string
	RVA      uint32
	At       target.Addr
	Kind     string // "pad" or "entry"
	Old, New []byte
}

// Places lists what a plan writes in live code, in order.
func (x *Plan) Places() []Place {
	rva := map[string]uint32{}
	for _, s := range x.Sites {
		rva[s.Function] = s.RVA
	}
	var out []Place
	pads := map[target.Addr]bool{}
	for _, s := range x.Sites {
		if s.Pad != nil {
			pads[s.Pad.At] = true
		}
	}
	for _, w := range forward(&x.Record).writes {
		kind := "entry"
		if pads[w.at] {
			kind = "pad"
		}
		out = append(out, Place{w.name, rva[w.name], w.at, kind, w.from, w.to})
	}
	return out
}

// ThreadsInside counts the threads of a process, and those that stand in the
// way of a plan at this moment. It stops the process as shortly as a swap
// would, and changes nothing.
func (x *Plan) ThreadsInside(p target.Process, f target.Frozen, regions []target.Region) (threads int, err error) {
	list, err := f.Threads()
	if err != nil {
		return 0, err
	}
	return len(list), checkThreads(p, f, forward(&x.Record), regions)
}

// Protections are those of the annex's parts, in their order; empty if it is reused.
func (x *Plan) Protections() []target.Prot {
	var out []target.Prot
	for _, p := range x.parts {
		out = append(out, p.prot)
	}
	return out
}
