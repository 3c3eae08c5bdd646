package build

import (
	"bytes"
	"encoding/binary"
	"slices"

	"golang.org/x/arch/x86/x86asm"
)

const (
	shortJump = 2 // EB rel8, over the first instruction, into the filler before it
	longJump  = 5 // E9 rel32
	branch    = 4 // ARM64 B
)

// checkEntry refuses a function that no memory writer could redirect, judged
// from the file with a decoder of its own: the patcher judges again, from the
// running process, and more strictly.
func (f *file) checkEntry(name string, e extent) error {
	length := e.End - e.Begin
	if f.Machine == machineARM64 {
		if length < branch {
			return refuse(CodeShort, f.role, name, e.Begin, "%d bytes, a branch needs %d", length, branch)
		}
		return nil
	}
	body := make([]byte, length)
	if err := f.Canonical(body, e.Begin); err != nil {
		return damaged(f.role, err)
	}
	at := e.Begin
	if bytes.HasPrefix(body, endbr64) {
		body, at = body[len(endbr64):], at+uint32(len(endbr64))
	}
	first, err := decode(body)
	if err != nil {
		return refuse(CodeInstruction, f.role, name, at, "cannot read its first instruction % x", body[:min(len(body), 15)])
	}
	hit, what, err := f.landing(at+1, at+longJump, e)
	if err != nil {
		return err
	}
	if first.Len >= shortJump && (hit == 0 || hit >= at+shortJump) && f.fillerBefore(e.Begin) {
		return nil
	}
	if len(body) < longJump {
		return refuse(CodeShort, f.role, name, at, "%d bytes, a jump needs %d, and there is no filler before it", len(body), longJump)
	}
	if hit != 0 {
		return refuse(CodeJump, f.role, name, hit, "%s reaches its first bytes", what)
	}
	for i := 0; i < longJump; {
		in, err := decode(body[i:])
		if err != nil {
			return refuse(CodeInstruction, f.role, name, at+uint32(i), "cannot read the instruction % x", body[i:min(len(body), i+15)])
		}
		i += in.Len
		if i < longJump && endsFlow(in) {
			return refuse(CodeShort, f.role, name, at, "its code ends after %d bytes, a jump needs %d, and there is no filler before it", i, longJump)
		}
	}
	return nil
}

// fillerBefore tells whether five equal filler bytes lie before the entry and belong to nobody.
func (f *file) fillerBefore(entry uint32) bool {
	var b [longJump]byte
	if entry < longJump || f.Canonical(b[:], entry-longJump) != nil {
		return false
	}
	if b[0] != 0xcc && b[0] != 0x90 && b[0] != 0 || b != [longJump]byte{b[0], b[0], b[0], b[0], b[0]} {
		return false
	}
	for _, u := range f.spans {
		if u.Begin < entry && u.End > entry-longJump {
			return false
		}
	}
	return f.boundIn(entry-longJump, entry, 0) == 0
}

// landings are places that something refers to, each list sorted.
type landings struct {
	pointers []uint32 // targets of relocated pointers
	branches []uint32 // targets of what may be far branches
}

// landing finds a place in [begin, end) that something refers to: a relocated
// pointer, a far branch from anywhere, any branch of the body itself. It
// returns the lowest, 0 if there is none. Symbols and unwind records cannot
// begin there: extentOf would have refused.
func (f *file) landing(begin, end uint32, e extent) (at uint32, what string, err error) {
	if f.lands == nil {
		if f.lands, err = f.findLandings(); err != nil {
			return 0, "", err
		}
	}
	add := func(rva uint32, by string) {
		if rva >= begin && rva < end && (at == 0 || rva < at) {
			at, what = rva, by
		}
	}
	first := func(list []uint32, by string) {
		if i, _ := slices.BinarySearch(list, begin); i < len(list) {
			add(list[i], by)
		}
	}
	first(f.lands.pointers, "a pointer")
	first(f.lands.branches, "a jump or call")
	body := make([]byte, e.End-e.Begin)
	if err := f.Canonical(body, e.Begin); err != nil {
		return 0, "", damaged(f.role, err)
	}
	for i := 0; i < len(body); {
		in, err := decode(body[i:])
		if err != nil {
			i++
			continue
		}
		i += in.Len
		if rel, ok := in.Args[0].(x86asm.Rel); ok {
			add(e.Begin+uint32(i)+uint32(rel), "a jump of its own")
		}
	}
	return at, what, nil
}

// findLandings looks at every pointer and every byte of code. Any byte may
// begin a branch: a false find only refuses.
func (f *file) findLandings() (*landings, error) {
	l := new(landings)
	for _, r := range f.relocs {
		var p [8]byte
		if r.Width() == 8 && f.Canonical(p[:], r.RVA) == nil {
			if to := binary.LittleEndian.Uint64(p[:]) - f.ImageBase; to < uint64(f.SizeOfImage) {
				l.pointers = append(l.pointers, uint32(to))
			}
		}
	}
	for _, s := range f.Sections {
		if !s.Exec() {
			continue
		}
		code := make([]byte, s.Extent())
		if err := f.Canonical(code, s.RVA); err != nil {
			return nil, damaged(f.role, err)
		}
		for i := 0; i+6 <= len(code); i++ {
			n := 0
			switch {
			case code[i]&0xfe == 0xe8:
				n = 5
			case code[i] == 0x0f && code[i+1]&0xf0 == 0x80:
				n = 6
			default:
				continue
			}
			if to := s.RVA + uint32(i+n) + binary.LittleEndian.Uint32(code[i+n-4:]); to < f.SizeOfImage {
				l.branches = append(l.branches, to)
			}
		}
	}
	slices.Sort(l.pointers)
	slices.Sort(l.branches)
	return l, nil
}
