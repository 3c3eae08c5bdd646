package patcher

import (
	"encoding/binary"
	"sort"

	"hotpatchd/pe"
)

// codeChunk is how much code is looked at in one go, bytes.
const codeChunk = 1 << 20

// addBranches looks at every byte of code for something that reads as a
// relative branch of 32 bits, or as the computation of an address, and leads to
// a wanted place. To filler nothing may refer at all: there every four bytes
// are taken for a displacement.
func (s *landingSet) addBranches(im *pe.Image, code codeReader) error {
	const overlap = 6 // the longest form, less one, and a byte
	for _, sec := range im.Sections {
		if !sec.Exec() {
			continue
		}
		end := sec.RVA + sec.Extent()
		for at := sec.RVA; at < end; at += codeChunk {
			b := make([]byte, min(codeChunk+overlap, end-at))
			if err := code.canonical(b, at); err != nil {
				return err
			}
			for i := 0; i+4 <= len(b) && i < codeChunk; i++ {
				s.refer(b, i, at)
				rel := 0
				switch {
				case b[i]&0xfe == 0xe8: // CALL, JMP
					rel = i + 1
				case b[i] == 0x0f && b[i+1]&0xf0 == 0x80, // Jcc
					b[i] == 0x8d && b[i+1]&0xc7 == 0x05, // LEA, RIP-relative
					b[i] == 0xc7 && b[i+1] == 0xf8:      // XBEGIN
					rel = i + 2
				default:
					continue
				}
				if rel+4 <= len(b) {
					next := int64(at) + int64(rel) + 4
					s.addJump(next+int64(int32(binary.LittleEndian.Uint32(b[rel:]))), at+uint32(i))
				}
			}
		}
	}
	return nil
}

// refer takes the four bytes at b[i] for a RIP-relative displacement, behind
// which an immediate of up to four bytes may follow.
func (s *landingSet) refer(b []byte, i int, at uint32) {
	to := int64(at) + int64(i) + 4 + int64(int32(binary.LittleEndian.Uint32(b[i:])))
	for _, immediate := range [...]int64{0, 1, 2, 4} {
		pad, ok := s.pads.find(to + immediate)
		if !ok {
			continue
		}
		if own := at + uint32(i); own < pad.End && own+4 > pad.Begin {
			continue // the filler itself
		}
		s.refs = append(s.refs, uint32(to+immediate))
	}
}

const (
	shortReach = 128 // of a distance of one byte, bytes
	// runUp is how far before the first place of interest decoding begins, from
	// each of fifteen neighbouring bytes: one of them is the start of an
	// instruction, and the others fall into step with it long before it matters.
	runUp = 128
)

// addShortBranches decodes the code around each wanted place and marks the
// branches of one byte that lead there. Looking at every byte, as for long ones,
// would find one in every third function by chance.
func (s *landingSet) addShortBranches(im *pe.Image, code codeReader, want []pe.Span) error {
	for _, w := range want {
		sec := im.SectionAt(w.Begin)
		if sec == nil {
			continue
		}
		begin := max(int64(sec.RVA), int64(w.Begin)-shortReach-maxInstruction-runUp)
		end := min(int64(sec.RVA)+int64(sec.Extent()), int64(w.End)+shortReach+maxInstruction)
		x := sweep{set: s, want: w, at: uint32(begin), code: make([]byte, end-begin)}
		if err := code.canonical(x.code, x.at); err != nil {
			return err
		}
		x.seen = make([]bool, len(x.code))
		i := sort.Search(len(s.known), func(i int) bool { return int64(s.known[i]) >= begin })
		for ; i < len(s.known) && int64(s.known[i]) < end; i++ {
			x.run(int(int64(s.known[i])-begin), true)
		}
		for i := range min(maxInstruction, len(x.code)) {
			x.run(i, false)
		}
	}
	return nil
}

// sweep decodes a stretch of code along every way through it that is known.
type sweep struct {
	set  *landingSet
	want pe.Span // other places are not marked: what is read in a run-up is not to be believed
	at   uint32
	code []byte
	seen []bool
}

// run decodes from i on and, where i is known for an instruction's start, from
// where the branches met there lead. A guess's branches would breed guesses.
func (x *sweep) run(i int, known bool) {
	todo := []int{i}
	for len(todo) > 0 {
		i, todo = todo[len(todo)-1], todo[:len(todo)-1]
		for i < len(x.code) && !x.seen[i] {
			x.seen[i] = true
			in, err := decodeAMD64(x.code[i:])
			if err != nil {
				i++ // data, or an instruction we do not know: look at every byte from here
				continue
			}
			from := i
			i += in.Len
			switch in.Flow {
			case flowBranch, flowJump, flowCall:
				to := i + int(in.Rel)
				if rva := int64(x.at) + int64(to); rva >= int64(x.want.Begin) && rva < int64(x.want.End) {
					x.set.addJump(rva, x.at+uint32(from))
				}
				if known && to >= 0 && to < len(x.code) {
					todo = append(todo, to)
				}
			}
		}
	}
}

const (
	// tableEntries are read of whatever may be a jump table, more as long as
	// they lead into the function.
	tableEntries    = 256
	maxTableEntries = 64 << 10
)

// addTables finds what may be jump tables of a function: GCC and clang compute
// a table's address and add distances read from it, MSVC reads RVAs from a
// displacement off the image's base.
func (s *landingSet) addTables(im *pe.Image, code codeReader, f Function) error {
	parts := []pe.Span{{Begin: f.RVA, End: f.RVA + f.Length}}
	filler := pe.Span{Begin: f.RVA - min(longJump, f.RVA), End: f.RVA}
	for _, r := range f.Ranges {
		parts = append(parts, pe.Span{Begin: r.RVA, End: r.RVA + r.Length})
	}
	own := makeSpanSet(append(parts[:len(parts):len(parts)], filler))
	for _, p := range parts {
		b := make([]byte, p.End-p.Begin)
		if err := code.canonical(b, p.Begin); err != nil {
			return err
		}
		for i := 0; i+6 <= len(b); i++ {
			switch modrm := b[i+1] & 0xc7; {
			case b[i] == 0x8d && modrm == 0x05: // LEA, RIP-relative
				s.addTable(im, own, int64(p.Begin)+int64(i)+6+int64(int32(binary.LittleEndian.Uint32(b[i+2:]))))
			case (b[i] == 0x8b || b[i] == 0x63) && modrm == 0x84 && i+7 <= len(b): // MOV, MOVSXD with index and displacement
				s.addTable(im, own, int64(int32(binary.LittleEndian.Uint32(b[i+3:]))))
			}
		}
	}
	return nil
}

func (s *landingSet) addTable(im *pe.Image, own spanSet, table int64) {
	if table < 0 || table >= int64(im.SizeOfImage) {
		return
	}
	sec := im.SectionAt(uint32(table))
	if sec == nil || sec.Writable() {
		return
	}
	end := min(table+4*maxTableEntries, int64(sec.RVA)+int64(sec.Extent()))
	for at, inside := table, true; inside && at+4 <= end; {
		b := make([]byte, min(4*tableEntries, end-at))
		if im.ReadRVA(b, uint32(at)) != nil {
			return
		}
		for i := 0; i+4 <= len(b); i += 4 {
			v := binary.LittleEndian.Uint32(b[i:])
			distance, rva := table+int64(int32(v)), int64(v)
			inside = false
			for _, to := range [...]int64{distance, rva} {
				// Into the function itself or the filler before it: else any data taken
				// for a table would reach into one of many functions by chance.
				if _, ok := own.find(to); ok {
					s.add(to, "a jump table")
					inside = true
				}
			}
		}
		at += int64(len(b))
	}
}

// before gives the n bytes of code before rva, fewer where its section begins.
func before(im *pe.Image, code codeReader, rva, n uint32) (b []byte, whole bool, err error) {
	sec := im.SectionAt(rva)
	if sec == nil {
		return nil, false, nil
	}
	whole = rva-sec.RVA <= n
	b = make([]byte, min(n, rva-sec.RVA))
	return b, whole, code.canonical(b, rva-uint32(len(b)))
}
