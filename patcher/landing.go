package patcher

import (
	"cmp"
	"encoding/binary"
	"fmt"
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
	want  spanSet   // entries and pads: what leads there is marked
	pads  spanSet   // what merely refers there is kept in refs
	refs  []uint32  // places in pads
	marks []landing // sorted by rva unless dirty
	dirty bool
	spans []pe.UnwindSpan // sorted by Begin
	reach []uint32        // the highest End among spans up to here: they may overlap
	ends  []uint32        // of spans, sorted
	known []uint32        // places where an instruction begins for certain, sorted
	xfg   map[uint32]bool
}

func sortBy[T any, K cmp.Ordered](s []T, key func(T) K) {
	slices.SortFunc(s, func(a, b T) int { return cmp.Compare(key(a), key(b)) })
}

// spanSet answers quickly whether an RVA lies in one of many spans.
type spanSet struct {
	list  []pe.Span // sorted, disjoint
	pages []bool    // a page that holds some of them
}

func makeSpanSet(spans []pe.Span) spanSet {
	spans = slices.Clone(spans)
	sortBy(spans, func(s pe.Span) uint32 { return s.Begin })
	var x spanSet
	for _, s := range spans {
		if n := len(x.list); n > 0 && s.Begin <= x.list[n-1].End {
			x.list[n-1].End = max(x.list[n-1].End, s.End)
			continue
		}
		x.list = append(x.list, s)
	}
	if n := len(x.list); n > 0 {
		x.pages = make([]bool, x.list[n-1].End>>12+1)
	}
	for _, s := range x.list {
		for p := s.Begin >> 12; p <= s.End>>12; p++ {
			x.pages[p] = true
		}
	}
	return x
}

// find gives the span that holds rva, which may be negative or beyond any image.
func (x spanSet) find(rva int64) (pe.Span, bool) {
	if p := rva >> 12; p < 0 || p >= int64(len(x.pages)) || !x.pages[p] {
		return pe.Span{}, false
	}
	i := sort.Search(len(x.list), func(i int) bool { return int64(x.list[i].End) > rva })
	if i < len(x.list) && int64(x.list[i].Begin) <= rva {
		return x.list[i], true
	}
	return pe.Span{}, false
}

// in finds a landing in [begin, end).
func (s *landingSet) in(begin, end uint32) (landing, bool) {
	if s.dirty {
		slices.SortStableFunc(s.marks, func(a, b landing) int { return cmp.Compare(a.rva, b.rva) })
		s.dirty = false
	}
	i := sort.Search(len(s.marks), func(i int) bool { return s.marks[i].rva >= begin })
	if i < len(s.marks) && s.marks[i].rva < end {
		return s.marks[i], true
	}
	return landing{}, false
}

// referred tells whether code refers to a place in [begin, end), part of a pad.
func (s *landingSet) referred(begin, end uint32) bool {
	return slices.ContainsFunc(s.refs, func(r uint32) bool { return r >= begin && r < end })
}

// covered tells whether any unwind record claims a byte of [begin, end).
func (s *landingSet) covered(begin, end uint32) bool {
	i := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].Begin >= end })
	return i > 0 && s.reach[i-1] > begin
}

// endsAt tells whether an unwind record ends in [begin, end]: what follows it is not its code.
func (s *landingSet) endsAt(begin, end uint32) bool {
	i := sort.Search(len(s.ends), func(i int) bool { return s.ends[i] >= begin })
	return i < len(s.ends) && s.ends[i] <= end
}

func (s *landingSet) add(rva int64, what string) {
	if _, ok := s.want.find(rva); ok {
		s.marks, s.dirty = append(s.marks, landing{uint32(rva), what}), true
	}
}

func (s *landingSet) addJump(rva int64, from uint32) {
	if _, ok := s.want.find(rva); ok {
		s.add(rva, fmt.Sprintf("a jump at %x", from))
	}
}

// landings collects what reaches into the first bytes of the functions, or the
// filler before them: exports, unwind records and their handlers, guard tables,
// relocated pointers, branches of all code, and the jump tables of the
// functions. A false find only refuses, a missed one kills.
func landings(im *pe.Image, code codeReader, functions []Function) (*landingSet, error) {
	s := &landingSet{xfg: map[uint32]bool{}}
	var want, pads []pe.Span
	for _, f := range functions {
		pads = append(pads, pe.Span{Begin: f.RVA - min(longJump, f.RVA), End: f.RVA})
		want = append(want, pe.Span{Begin: f.RVA + 1, End: f.RVA + uint32(len(endbr64)) + longJump})
		s.known = append(s.known, f.RVA)
	}
	s.pads, s.want = makeSpanSet(pads), makeSpanSet(append(want, pads...))
	if err := s.addDirectories(im); err != nil {
		return nil, err
	}
	slices.Sort(s.known)
	if err := s.addPointers(im); err != nil {
		return nil, err
	}
	if err := s.addBranches(im, code); err != nil {
		return nil, err
	}
	if err := s.addShortBranches(im, code, append(want, pads...)); err != nil {
		return nil, err
	}
	for _, f := range functions {
		if err := s.addTables(im, code, f); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// addDirectories marks what the image's own tables name.
func (s *landingSet) addDirectories(im *pe.Image) error {
	exports, err := im.Exports()
	if err != nil {
		return err
	}
	for _, e := range exports {
		if e.Forward == "" {
			s.add(int64(e.RVA), "export "+e.Name)
			if sec := im.SectionAt(e.RVA); sec != nil && sec.Exec() {
				s.known = append(s.known, e.RVA)
			}
		}
	}
	if s.spans, err = im.UnwindSpans(); err != nil {
		return err
	}
	sortBy(s.spans, func(u pe.UnwindSpan) uint32 { return u.Begin })
	reach := uint32(0)
	for _, u := range s.spans {
		reach = max(reach, u.End)
		s.reach = append(s.reach, reach)
		s.add(int64(u.Begin), "an unwind record")
		s.add(int64(u.Handler), "an exception handler")
		s.ends = append(s.ends, u.End)
		s.known = append(s.known, u.Begin)
	}
	slices.Sort(s.ends)
	lc, err := im.LoadConfig()
	if err != nil || lc == nil {
		return err
	}
	for _, g := range lc.GuardFunctions {
		s.add(int64(g.RVA), "a control flow guard entry")
		if g.XFG() {
			s.xfg[g.RVA] = true
		}
	}
	for _, r := range lc.GuardEHCont {
		s.add(int64(r), "an exception continuation")
	}
	return nil
}

// addPointers marks the targets of relocated pointers.
func (s *landingSet) addPointers(im *pe.Image) error {
	relocs, err := im.Relocs()
	if err != nil {
		return err
	}
	var chunk []byte
	var at uint32
	for _, r := range relocs {
		n := uint32(r.Width())
		if chunk == nil || r.RVA < at || r.RVA+n > at+uint32(len(chunk)) {
			size := n // a field may straddle two sections: then it is read alone
			if sec := im.SectionAt(r.RVA); sec != nil {
				size = max(n, min(codeChunk, sec.RVA+sec.Extent()-r.RVA))
			}
			chunk, at = make([]byte, size), r.RVA
			if err := im.ReadRVA(chunk, at); err != nil {
				return err
			}
		}
		b := chunk[r.RVA-at:]
		if n == 8 {
			s.add(int64(binary.LittleEndian.Uint64(b)-im.Base), "a pointer")
		} else {
			s.add(int64(binary.LittleEndian.Uint32(b)-uint32(im.Base)), "a pointer")
		}
	}
	return nil
}
