package sim

import (
	"bytes"
	"errors"
	"slices"
	"sort"

	"hotpatchd/patcher/target"
)

const pageSize = target.PageSize

// The user address space of x86-64 and of most ARM64 kernels, and Linux's
// vm.mmap_min_addr.
const (
	lowest  target.Addr = 0x10000
	highest target.Addr = 0x7fff_ffff_f000
)

var (
	errUnmapped = errors.New("nothing readable is mapped there")
	errOutside  = errors.New("outside the address space")
	errMisfit   = errors.New("not a multiple of the page size")
	errWX       = errors.New("write and execute together")
	errForeign  = errors.New("that memory is not of our allocation")
)

type page [pageSize]byte

// zeros is what a page holds that was never written. Nothing writes to it.
var zeros page

// frame is a page's memory and what the instruction cache holds of it. The
// arrays may be shared with another process (after a fork) or be the same one;
// they are replaced, never changed, unless owned. What is owned is neither.
type frame struct {
	mem, cache         *page
	ownsMem, ownsCache bool
}

// mapping is a run of pages of a process.
type mapping struct {
	target.Region
	ours   bool   // of our Alloc
	module string // of this module of the target
}

// memory is an address space. The zero value is empty.
type memory struct {
	maps   []*mapping // sorted by Start, not overlapping
	frames map[target.Addr]*frame
}

// index is the position of the first mapping that ends after a.
func (s *memory) index(a target.Addr) int {
	return sort.Search(len(s.maps), func(i int) bool { return s.maps[i].End > a })
}

// at is the mapping that holds a, nil if none does.
func (s *memory) at(a target.Addr) *mapping {
	if i := s.index(a); i < len(s.maps) && s.maps[i].Start <= a {
		return s.maps[i]
	}
	return nil
}

// free tells whether nothing is mapped in the span.
func (s *memory) free(sp target.Span) bool {
	i := s.index(sp.Start)
	return i == len(s.maps) || s.maps[i].Start >= sp.End
}

// spanOf checks what Alloc, Protect, Free and scenes hand over.
func spanOf(at target.Addr, size uint64) (target.Span, error) {
	if at%pageSize != 0 || size%pageSize != 0 || size == 0 {
		return target.Span{}, errMisfit
	}
	if at < lowest || at >= highest || size > uint64(highest-at) {
		return target.Span{}, errOutside
	}
	return target.Span{Start: at, End: at + target.Addr(size)}, nil
}

// add maps a region where nothing is.
func (s *memory) add(m mapping) error {
	sp, err := spanOf(m.Start, m.Size())
	if err != nil {
		return err
	}
	if m.Prot&target.Write != 0 && m.Prot&target.Exec != 0 {
		return errWX
	}
	if !s.free(sp) {
		return target.ErrTaken
	}
	s.maps = slices.Insert(s.maps, s.index(sp.Start), &m)
	return nil
}

// split makes a a border between two mappings, if a mapping holds it inside.
func (s *memory) split(a target.Addr) {
	i := s.index(a)
	if i == len(s.maps) || s.maps[i].Start >= a {
		return
	}
	upper := *s.maps[i]
	upper.Start = a
	if upper.Inode != 0 {
		upper.Offset += uint64(a - s.maps[i].Start)
	}
	s.maps[i].End = a
	s.maps = slices.Insert(s.maps, i+1, &upper)
}

// covered gives the mappings of a span, split at its borders; nil if there is
// any hole in it.
func (s *memory) covered(sp target.Span) []*mapping {
	for a := sp.Start; a < sp.End; {
		m := s.at(a)
		if m == nil {
			return nil
		}
		a = m.End
	}
	s.split(sp.Start)
	s.split(sp.End)
	return s.maps[s.index(sp.Start) : s.index(sp.End-1)+1]
}

// remove unmaps all of the span, whatever is there.
func (s *memory) remove(sp target.Span) {
	s.split(sp.Start)
	s.split(sp.End)
	s.maps = slices.DeleteFunc(s.maps, func(m *mapping) bool { return m.Start >= sp.Start && m.End <= sp.End })
	if sp.End-sp.Start > target.Addr(len(s.frames))*pageSize {
		for a := range s.frames {
			if sp.Contains(a) {
				delete(s.frames, a)
			}
		}
		return
	}
	for a := sp.Start; a < sp.End; a += pageSize {
		delete(s.frames, a)
	}
}

// frame is the frame of the page at a, made if it is missing.
func (s *memory) frame(a target.Addr) *frame {
	a &^= pageSize - 1
	f := s.frames[a]
	if f == nil {
		if s.frames == nil {
			s.frames = map[target.Addr]*frame{}
		}
		f = &frame{mem: &zeros, cache: &zeros}
		s.frames[a] = f
	}
	return f
}

// eachPage cuts n bytes at at into runs inside one page; do returns false to stop.
func eachPage(at target.Addr, n int, do func(at target.Addr, from, to int) bool) {
	for from := 0; from < n; {
		a := at + target.Addr(from)
		to := min(n, from+int(pageSize-a%pageSize))
		if a < at || !do(a, from, to) {
			return
		}
		from = to
	}
}

// reach is how many of n bytes at at a backend may read or write: up to the
// first page that is not mapped, has no protection at all, or is special.
func (s *memory) reach(at target.Addr, n int, write bool) int {
	got := 0
	eachPage(at, n, func(a target.Addr, from, to int) bool {
		m := s.at(a)
		if m == nil || m.Prot == 0 || m.Kind == target.Special || write && m.Shared && m.Prot&target.Write == 0 {
			return false
		}
		got = to
		return true
	})
	return got
}

// read copies memory, or what the instruction cache holds, of mapped pages.
func (s *memory) read(p []byte, at target.Addr, cache bool) {
	eachPage(at, len(p), func(a target.Addr, from, to int) bool {
		src := &zeros
		if f := s.frames[a&^(pageSize-1)]; f != nil {
			if src = f.mem; cache {
				src = f.cache
			}
		}
		copy(p[from:to], src[a%pageSize:])
		return true
	})
}

// write changes memory of mapped pages and leaves the instruction cache alone.
func (s *memory) write(p []byte, at target.Addr) {
	eachPage(at, len(p), func(a target.Addr, from, to int) bool {
		f := s.frame(a)
		if !f.ownsMem {
			c := *f.mem
			f.mem, f.ownsMem = &c, true
		}
		copy(f.mem[a%pageSize:], p[from:to])
		return true
	})
}

// flush makes the instruction cache see n bytes of mapped pages.
func (s *memory) flush(at target.Addr, n int) {
	eachPage(at, n, func(a target.Addr, from, to int) bool {
		f := s.frames[a&^(pageSize-1)]
		if f == nil || f.mem == f.cache {
			return true
		}
		off := a % pageSize
		if !f.ownsCache {
			c := *f.cache
			f.cache, f.ownsCache = &c, true
		}
		copy(f.cache[off:], f.mem[off:off+target.Addr(to-from)])
		return true
	})
}

// stale finds the first executable byte that the instruction cache holds differently.
func (s *memory) stale() (target.Addr, bool) {
	for _, m := range s.maps {
		if m.Prot&target.Exec == 0 {
			continue
		}
		for a, f := range s.within(m.Region) {
			if f.mem == f.cache || bytes.Equal(f.mem[:], f.cache[:]) {
				continue
			}
			i := 0
			for f.mem[i] == f.cache[i] {
				i++
			}
			return a + target.Addr(i), true
		}
	}
	return 0, false
}

// within goes through the frames of a region, in no order.
func (s *memory) within(r target.Region) func(func(target.Addr, *frame) bool) {
	return func(yield func(target.Addr, *frame) bool) {
		if r.Size()/pageSize > uint64(len(s.frames)) {
			for a, f := range s.frames {
				if a >= r.Start && a < r.End && !yield(a, f) {
					return
				}
			}
			return
		}
		for a := r.Start; a < r.End; a += pageSize {
			if f := s.frames[a]; f != nil && !yield(a, f) {
				return
			}
		}
	}
}

// clone is the address space a forked child gets; neither sees the other's
// writes. Shared mappings are treated as private: the simulation has no shared
// pages, it only reports regions as shared.
func (s *memory) clone() memory {
	c := memory{maps: make([]*mapping, len(s.maps)), frames: make(map[target.Addr]*frame, len(s.frames))}
	for i, m := range s.maps {
		x := *m
		c.maps[i] = &x
	}
	for a, f := range s.frames {
		f.ownsMem, f.ownsCache = false, false
		c.frames[a] = &frame{mem: f.mem, cache: f.cache}
	}
	return c
}
