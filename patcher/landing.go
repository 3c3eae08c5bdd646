package patcher

import (
	"cmp"
	"encoding/binary"
	"slices"
	"sort"

	"hotpatchd/pe"
)

// landing is a place in the base that something other than falling through may
// reach or refers to.
type landing struct {
	rva  uint32
	what string // for people: "export Foo", "a jump at 1234"
}

// landingSet knows the landings inside the ranges it was asked for, and what
// the unwind records and guard tables say about them.
type landingSet struct {
	marks []landing // sorted by rva once sealed
	spans []pe.UnwindSpan
	ends  []uint32 // ends of unwind spans, sorted
	xfg   map[uint32]bool
	dirty bool
}

func sortBy[T any, K cmp.Ordered](s []T, key func(T) K) {
	slices.SortFunc(s, func(a, b T) int { return cmp.Compare(key(a), key(b)) })
}

// in finds a landing in [begin, end).
func (s *landingSet) in(begin, end uint32) (landing, bool) {
	if s.dirty {
		sortBy(s.marks, func(m landing) uint32 { return m.rva })
		s.dirty = false
	}
	i := sort.Search(len(s.marks), func(i int) bool { return s.marks[i].rva >= begin })
	if i < len(s.marks) && s.marks[i].rva < end {
		return s.marks[i], true
	}
	return landing{}, false
}

// covered tells whether any unwind record claims a byte of [begin, end).
func (s *landingSet) covered(begin, end uint32) bool {
	i := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].End > begin })
	return i < len(s.spans) && s.spans[i].Begin < end
}

// endsAt tells whether an unwind record ends in [begin, end]: what follows it is not its code.
func (s *landingSet) endsAt(begin, end uint32) bool {
	i := sort.Search(len(s.ends), func(i int) bool { return s.ends[i] >= begin })
	return i < len(s.ends) && s.ends[i] <= end
}

func (s *landingSet) add(rva uint32, want []pe.Span, what string) {
	for _, w := range want {
		if rva >= w.Begin && rva < w.End {
			s.marks, s.dirty = append(s.marks, landing{rva, what}), true
			return
		}
	}
}

// landings collects what reaches into the wanted ranges: exports, unwind
// records and their handlers, guard tables, relocated pointers, and the
// relative branches of all code. Short branches (one byte of distance) are
// found by decoding around each range, long ones by looking at every byte:
// a false find only refuses, a missed one kills.
func landings(im *pe.Image, code codeReader, want []pe.Span) (*landingSet, error) {
	sorted := slices.Clone(want)
	sortBy(sorted, func(w pe.Span) uint32 { return w.Begin })
	s := &landingSet{xfg: map[uint32]bool{}}
	exports, err := im.Exports()
	if err != nil {
		return nil, err
	}
	for _, e := range exports {
		if e.Forward == "" {
			s.add(e.RVA, sorted, "export "+e.Name)
		}
	}
	if s.spans, err = im.UnwindSpans(); err != nil {
		return nil, err
	}
	sortBy(s.spans, func(u pe.UnwindSpan) uint32 { return u.Begin })
	for _, u := range s.spans {
		s.add(u.Begin, sorted, "an unwind record")
		s.add(u.Handler, sorted, "an exception handler")
		s.ends = append(s.ends, u.End)
	}
	slices.Sort(s.ends)
	lc, err := im.LoadConfig()
	if err != nil {
		return nil, err
	}
	if lc != nil {
		for _, g := range lc.GuardFunctions {
			s.add(g.RVA, sorted, "a control flow guard entry")
			if g.XFG() {
				s.xfg[g.RVA] = true
			}
		}
		for _, r := range lc.GuardEHCont {
			s.add(r, sorted, "an exception continuation")
		}
	}
	if err := s.addPointers(im, sorted); err != nil {
		return nil, err
	}
	return s, s.addBranches(im, code, sorted)
}

// addPointers marks the targets of relocated 8-byte pointers.
func (s *landingSet) addPointers(im *pe.Image, want []pe.Span) error {
	relocs, err := im.Relocs()
	if err != nil {
		return err
	}
	var chunk []byte
	var at uint32
	for _, r := range relocs {
		if r.Width() != 8 {
			continue
		}
		if chunk == nil || r.RVA < at || uint64(r.RVA)+8 > uint64(at)+uint64(len(chunk)) {
			n := min(uint32(codeChunk), im.SizeOfImage-r.RVA)
			chunk, at = make([]byte, n), r.RVA
			if err := im.ReadRVA(chunk, at); err != nil {
				// The chunk runs past this section; the pointer alone must be readable.
				chunk = chunk[:8]
				if err := im.ReadRVA(chunk, at); err != nil {
					return err
				}
			}
		}
		v := binary.LittleEndian.Uint64(chunk[r.RVA-at:]) - im.Base
		if v < uint64(im.SizeOfImage) {
			s.add(uint32(v), want, "a pointer")
		}
	}
	return nil
}

// codeChunk is how much code is looked at in one go, bytes.
const codeChunk = 1 << 20

// addBranches looks at every byte of code for something that reads as a
// relative branch with a 32-bit distance into a wanted range.
func (s *landingSet) addBranches(im *pe.Image, code codeReader, want []pe.Span) error {
	if len(want) == 0 {
		return nil
	}
	low, high := want[0].Begin, want[0].End
	for _, w := range want {
		high = max(high, w.End)
	}
	for _, sec := range im.Sections {
		if !sec.Exec() {
			continue
		}
		end := sec.RVA + sec.VirtualSize
		const overlap = 6
		for at := sec.RVA; at < end; at += codeChunk {
			b := make([]byte, min(codeChunk+overlap, end-at))
			if err := code.canonical(b, at); err != nil {
				return err
			}
			for i := 0; i+5 <= len(b) && i < codeChunk; i++ {
				var rel, next int
				switch {
				case b[i]&0xfe == 0xe8:
					rel, next = i+1, i+5
				case b[i] == 0x0f && b[i+1]&0xf0 == 0x80 && i+6 <= len(b):
					rel, next = i+2, i+6
				default:
					continue
				}
				to := int64(at) + int64(next) + int64(int32(binary.LittleEndian.Uint32(b[rel:])))
				if to >= int64(low) && to < int64(high) {
					s.add(uint32(to), want, "a jump")
				}
			}
		}
	}
	return s.addShortBranches(im, code, want)
}

// addShortBranches decodes the code around each wanted range, from the nearest
// place known to be the start of an instruction.
func (s *landingSet) addShortBranches(im *pe.Image, code codeReader, want []pe.Span) error {
	const reach = 128 // of a one-byte distance, bytes
	for _, w := range want {
		sec, ok := sectionOf(im, w.Begin)
		if !ok {
			continue
		}
		from := max(int64(sec.RVA), int64(w.Begin)-reach-maxInstruction)
		start := s.startBefore(uint32(from), sec.RVA)
		end := min(uint64(w.End)+reach, uint64(sec.RVA)+uint64(sec.VirtualSize))
		b := make([]byte, end-uint64(start))
		if err := code.canonical(b, start); err != nil {
			return err
		}
		for i := 0; i < len(b); {
			in, err := decodeAMD64(b[i:])
			if err != nil {
				i++ // data between functions, or an unknown instruction: look at every byte from here
				continue
			}
			next := i + in.Len
			if (in.Flow == flowBranch || in.Flow == flowJump) && in.Rel >= -reach && in.Rel < reach {
				to := int64(start) + int64(next) + int64(in.Rel)
				if to >= int64(w.Begin) && to < int64(w.End) {
					s.add(uint32(to), want, "a jump")
				}
			}
			i = next
		}
	}
	return nil
}

// startBefore is the last known function start at or before rva, not farther
// than a bounded distance, else rva itself.
func (s *landingSet) startBefore(rva, low uint32) uint32 {
	const far = 64 << 10
	i := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].Begin > rva })
	if i > 0 && rva-s.spans[i-1].Begin < far && s.spans[i-1].Begin >= low {
		return s.spans[i-1].Begin
	}
	return max(rva, low)
}

// addBody decodes a function to be replaced: its own branches, and the jump
// tables it computes the address of.
func (s *landingSet) addBody(im *pe.Image, code codeReader, body []byte, rva uint32, want []pe.Span) error {
	for i := 0; i < len(body); {
		in, err := decodeAMD64(body[i:])
		if err != nil {
			i++
			continue
		}
		next := i + in.Len
		switch {
		case in.Flow == flowBranch || in.Flow == flowJump:
			to := int64(rva) + int64(next) + int64(in.Rel)
			if to >= 0 && to < int64(im.SizeOfImage) {
				s.add(uint32(to), want, "its own jump")
			}
		case in.Lea && in.HasRIP:
			table := int64(rva) + int64(next) + int64(in.Disp)
			if table >= 0 && table < int64(im.SizeOfImage) {
				s.addTable(im, uint32(table), want)
			}
		}
		i = next
	}
	return nil
}

// addTable reads a table whose address a replaced function computes as what
// compilers make of switch statements: 32-bit distances from the table (GCC,
// clang) or RVAs (MSVC).
func (s *landingSet) addTable(im *pe.Image, table uint32, want []pe.Span) {
	const entries = 256
	sec, ok := sectionOf(im, table)
	if !ok || sec.Writable() {
		return
	}
	n := min(uint64(entries*4), uint64(sec.RVA)+uint64(sec.VirtualSize)-uint64(table))
	b := make([]byte, n)
	if im.ReadRVA(b, table) != nil {
		return
	}
	for i := 0; i+4 <= len(b); i += 4 {
		v := binary.LittleEndian.Uint32(b[i:])
		s.add(table+v, want, "a jump table")
		s.add(v, want, "a jump table")
	}
}

func sectionOf(im *pe.Image, rva uint32) (pe.Section, bool) {
	for _, s := range im.Sections {
		if rva >= s.RVA && uint64(rva) < uint64(s.RVA)+uint64(s.VirtualSize) {
			return s, true
		}
	}
	return pe.Section{}, false
}
