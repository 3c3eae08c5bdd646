package patcher

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sort"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// The two ways an x86-64 entry is rewritten.
const (
	// shapeShort: a two-byte jump over the first instruction (two bytes or
	// longer) into the five filler bytes before the entry, which hold the long jump.
	shapeShort = "two-byte jump into owned filler"
	// shapeLong: a five-byte jump over the first instructions.
	shapeLong = "five-byte jump"
)

const (
	shortJump = 2 // EB rel8
	longJump  = 5 // E9 rel32
)

// shape is how the entry of one function is rewritten, in RVAs of the base.
type shape struct {
	kind     string
	at       uint32   // first byte rewritten at the entry
	length   uint32   // bytes rewritten there: shortJump or longJump
	pad      uint32   // shapeShort: first of the longJump filler bytes
	interior []uint32 // instruction boundaries strictly inside [at, at+length)
}

// endbr64 is kept: an indirect branch may require it where the processor
// enforces landing pads, so the jump goes behind it.
var endbr64 = []byte{0xf3, 0x0f, 0x1e, 0xfa}

// findShapes chooses for each function how its entry is rewritten, from the
// canonical bytes of the base (relocations and sites of ours undone) that code
// supplies. The first function that cannot be rewritten safely refuses the
// whole image, by name: a fix is applied as a whole.
func findShapes(im *pe.Image, code codeReader, functions []Function) ([]shape, error) {
	if im.Machine != machineAMD64 {
		return nil, blocked("machine", Author, "no entry rewriting for machine %#x yet", im.Machine)
	}
	bodies := make([][]byte, len(functions))
	for i, f := range functions {
		sec := im.SectionAt(f.RVA)
		if sec == nil || !sec.Exec() || uint64(f.RVA)+uint64(f.Length) > uint64(sec.RVA)+uint64(sec.Extent()) {
			return nil, blocked("not-code", Author, "%s: %d bytes at %x do not lie in one section of code", f.Name, f.Length, f.RVA)
		}
		bodies[i] = make([]byte, f.Length)
		if err := code.canonical(bodies[i], f.RVA); err != nil {
			return nil, err
		}
	}
	marks, err := landings(im, code, functions)
	if err != nil {
		return nil, err
	}
	shapes := make([]shape, len(functions))
	for i, f := range functions {
		s, err := findShape(im, code, marks, f, bodies[i])
		if err != nil {
			return nil, err
		}
		shapes[i] = s
	}
	return shapes, checkOverlap(functions, shapes)
}

const machineAMD64 = 0x8664

func findShape(im *pe.Image, code codeReader, marks *landingSet, f Function, body []byte) (shape, error) {
	skip := uint32(0)
	if bytes.HasPrefix(body, endbr64) {
		skip = uint32(len(endbr64))
	}
	at := f.RVA + skip
	if skip > 0 {
		// The entry proper may be jumped to, the byte behind the landing pad may not:
		// that jump would find new code where it expects the middle of the old.
		if m, hit := marks.in(at, at+1); hit {
			return shape{}, blocked("jump-into-entry", Author, "%s: %s reaches %x, behind the landing pad", f.Name, m.what, at)
		}
	}
	first, err := decodeAMD64(body[skip:])
	if err != nil {
		return shape{}, blocked("unknown-instruction", Author, "%s: cannot read the instruction at %x: % x", f.Name, at, head(body[skip:]))
	}
	if first.Len >= shortJump && uint32(first.Len)+skip <= f.Length {
		_, jumped := marks.in(at+1, at+shortJump)
		if !jumped && !crossesPage(at, shortJump) && ownsFiller(im, code, marks, f) {
			return shape{kind: shapeShort, at: at, length: shortJump, pad: f.RVA - longJump}, nil
		}
	}
	return findLong(marks, f, body, skip)
}

func findLong(marks *landingSet, f Function, body []byte, skip uint32) (shape, error) {
	at := f.RVA + skip
	if f.Length < skip+longJump {
		return shape{}, blocked("too-short", Author, "%s: %d bytes at %x, no room for a jump and no filler of its own before it", f.Name, f.Length, f.RVA)
	}
	if crossesPage(at, longJump) {
		return shape{}, blocked("crosses-page", Author, "%s: its first bytes at %x cross a page", f.Name, at)
	}
	if m, hit := marks.in(at+1, at+longJump); hit {
		return shape{}, blocked("jump-into-entry", Author, "%s: %s reaches %x, inside the bytes to be replaced", f.Name, m.what, m.rva)
	}
	s := shape{kind: shapeLong, at: at, length: longJump}
	for n := uint32(0); n < longJump; {
		in, err := decodeAMD64(body[skip+n:])
		if err != nil {
			return shape{}, blocked("unknown-instruction", Author, "%s: cannot read the instruction at %x: % x", f.Name, at+n, head(body[skip+n:]))
		}
		n += uint32(in.Len)
		if n < longJump {
			s.interior = append(s.interior, at+n)
			if in.Flow == flowReturn || in.Flow == flowJump || in.Flow == flowIndirect || in.Flow == flowTrap {
				// What follows may belong to somebody else; the body's length is the author's word.
				return shape{}, blocked("too-short", Author, "%s: its code ends %d bytes after %x", f.Name, n, at)
			}
		}
	}
	return s, nil
}

// ownsFiller tells whether the five bytes before the entry are nobody's: equal
// filler bytes in the entry's own section, behind an unconditional end, no
// unwind record, export, branch, reference, table or XFG hash in them, within
// one page, and no return address: a call may end the function before.
func ownsFiller(im *pe.Image, code codeReader, marks *landingSet, f Function) bool {
	// Enough bytes to see the filler and the instruction before it.
	const back = 64
	b, whole, err := before(im, code, f.RVA, back)
	if err != nil || len(b) < longJump {
		return false
	}
	pad := f.RVA - longJump
	if crossesPage(pad, longJump) || marks.xfg[f.RVA] {
		return false
	}
	if _, hit := marks.in(pad, f.RVA); hit || marks.referred(pad, f.RVA) || marks.covered(pad, f.RVA) {
		return false
	}
	fill := b[len(b)-1]
	i := len(b)
	for i > 0 && b[i-1] == fill {
		i--
	}
	run := f.RVA - uint32(len(b)-i)
	if run > pad || run == pad && mayBeCall(b[:i]) {
		return false
	}
	ended := marks.endsAt(run, pad)
	switch fill {
	case 0xcc, 0x90:
		return ended || endsFlow(b[:i]) || i == 0 && (whole || len(b) == back)
	case 0x00:
		return ended // zeros can be the tail of an instruction, and data
	}
	return false
}

// mayBeCall tells whether b could end in a call: what follows is where it returns.
func mayBeCall(b []byte) bool {
	for n := 2; n <= min(len(b), maxInstruction); n++ {
		tail := b[len(b)-n:]
		in, err := decodeAMD64(tail)
		if err != nil || in.Len != n {
			continue
		}
		if in.Flow == flowCall || tail[0] == 0xff && (tail[1]>>3&7 == 2 || tail[1]>>3&7 == 3) {
			return true
		}
	}
	return false
}

// endsFlow tells whether b ends in an instruction after which nothing runs on.
// Bytes before filler cannot be decoded backwards for certain; a form that
// could be the tail of a longer instruction is accepted only because filler of
// five equal bytes follows and no reachable branch has such a displacement.
func endsFlow(b []byte) bool {
	at := func(back int) byte {
		if back > len(b) {
			return 0
		}
		return b[len(b)-back]
	}
	switch {
	case at(1) == 0xc3, at(1) == 0xcc: // ret, int3
		return true
	case at(5) == 0xe9, at(2) == 0xeb: // jmp rel32, rel8
		return true
	case at(3) == 0xc2: // ret imm16
		return true
	case at(2) == 0x0f && at(1) == 0x0b: // ud2
		return true
	case at(6) == 0xff && at(5) == 0x25: // jmp [rip+disp32]
		return true
	case at(2) == 0xff && at(1)&0xf8 == 0xe0: // jmp register
		return true
	}
	return false
}

func crossesPage(rva, n uint32) bool {
	return rva/target.PageSize != (rva+n-1)/target.PageSize
}

func head(b []byte) []byte { return b[:min(len(b), maxInstruction)] }

// checkOverlap refuses functions whose places touch: one write would change
// what another has verified.
func checkOverlap(functions []Function, shapes []shape) error {
	type place struct {
		begin, end uint32
		name       string
	}
	var places []place
	for i, s := range shapes {
		f := functions[i]
		begin := f.RVA
		if s.kind == shapeShort {
			begin = s.pad
		}
		places = append(places, place{begin, f.RVA + f.Length, f.Name})
	}
	sortBy(places, func(p place) uint32 { return p.begin })
	for i := 1; i < len(places); i++ {
		if places[i].begin < places[i-1].end {
			return blocked("overlap", Author, "%s and %s overlap at %x", places[i-1].name, places[i].name, places[i].begin)
		}
	}
	for _, f := range functions {
		for _, r := range f.Ranges {
			i := sort.Search(len(places), func(i int) bool { return places[i].end > r.RVA })
			if i < len(places) && places[i].begin < r.RVA+r.Length {
				return blocked("overlap", Author, "a further part of %s and %s overlap at %x", f.Name, places[i].name, max(places[i].begin, r.RVA))
			}
		}
	}
	return nil
}

// codeReader supplies canonical bytes of the base: relocations and our own sites undone.
type codeReader interface {
	canonical(p []byte, rva uint32) error
}

// originals is a codeReader over a mapped image with our former writes undone.
type originals struct {
	im        *pe.Image
	preferred uint64       // base the file's relocated fields are for
	overlays  []pe.Overlay // canonical bytes
}

func (o originals) canonical(p []byte, rva uint32) error {
	if err := o.im.CanonicalWith(p, rva, o.overlays...); err != nil {
		return fmt.Errorf("cannot read code of the base at %x: %w", rva, err)
	}
	return nil
}

// textIs tells whether the executable sections, our writes undone, have the
// hash the release names.
func (o originals) textIs(want string) (bool, error) {
	id, err := o.im.Identity(o.overlays...)
	if err != nil {
		return false, fmt.Errorf("cannot hash the code of the base: %w", err)
	}
	return id.TextSHA256 == want, nil
}

// relocated gives the n bytes at rva as the loader left them in this process:
// canonical, with base relocations applied. It never asks memory for the bytes
// themselves, so nobody can smuggle in others.
func (o originals) relocated(rva uint32, n int) ([]byte, error) {
	b := make([]byte, n)
	if err := o.canonical(b, rva); err != nil {
		return nil, err
	}
	delta := o.im.Base - o.preferred
	if delta == 0 {
		return b, nil
	}
	relocs, err := o.im.Relocs()
	if err != nil {
		return nil, err
	}
	for _, r := range relocs {
		if r.RVA >= rva+uint32(n) || r.RVA+uint32(r.Width()) <= rva {
			continue
		}
		var field [8]byte
		if err := o.canonical(field[:r.Width()], r.RVA); err != nil {
			return nil, err
		}
		binary.LittleEndian.PutUint64(field[:], binary.LittleEndian.Uint64(field[:])+delta)
		for i := range r.Width() {
			if at := int64(r.RVA) + int64(i) - int64(rva); at >= 0 && at < int64(n) {
				b[at] = field[i]
			}
		}
	}
	return b, nil
}
