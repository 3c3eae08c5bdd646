package pe

import (
	"cmp"
	"slices"
)

const unwindWhere = "exception directory"

// UnwindSpans reads .pdata, sorted by Begin: x64 RUNTIME_FUNCTIONs, chained
// records joined to the function they belong to; ARM64 begin and length, a
// packed fragment joined to the record it continues. Functions without unwind
// data (leaf functions) have none: silence says nothing.
func (im *Image) UnwindSpans() ([]UnwindSpan, error) {
	d := im.Directories[dirException]
	if d.RVA == 0 || d.Size == 0 {
		return nil, nil
	}
	if err := im.checkDirectory(unwindWhere, d); err != nil {
		return nil, err
	}
	if d.Size/8 > MaxUnwindRecords {
		return nil, badRVA(unwindWhere, d.RVA, "%d bytes, at most %d records", d.Size, MaxUnwindRecords)
	}
	u := unwindReader{im: im, w: im.window(unwindWhere), x: im.window("unwind information")}
	record, size := u.amd64, uint32(12)
	if im.Machine == MachineARM64 {
		record, size = u.arm64, 8
	}
	for at := d.RVA; d.RVA+d.Size-at >= size; at += size {
		b, err := u.w.bytes(at, int(size))
		if err != nil {
			return nil, err
		}
		if le.Uint32(b) == 0 && le.Uint32(b[4:]) == 0 {
			continue // room left by the linker
		}
		s, err := record(b, at)
		if err != nil {
			return nil, err
		}
		if s.Begin >= s.End || s.End > im.SizeOfImage {
			return nil, badRVA(unwindWhere, at, "record spans 0x%x to 0x%x", s.Begin, s.End)
		}
		u.list = append(u.list, s)
	}
	slices.SortStableFunc(u.list, func(a, b UnwindSpan) int { return cmp.Compare(a.Begin, b.Begin) })
	return u.list, nil
}

type unwindReader struct {
	im   *Image
	w, x *window
	list []UnwindSpan
	hops int // records read for the sake of others
}

// Flags of UNWIND_INFO.
const (
	unwEHandler = 1
	unwUHandler = 2
	unwChain    = 4
)

func (u *unwindReader) amd64(b []byte, at uint32) (UnwindSpan, error) {
	s := UnwindSpan{Span: Span{le.Uint32(b), le.Uint32(b[4:])}, Primary: le.Uint32(b)}
	info := le.Uint32(b[8:])
	for range MaxUnwindChain {
		var next uint32 // rva of the RUNTIME_FUNCTION to go on with
		if info&1 != 0 {
			next = info &^ 1 // indirect: the record lies elsewhere in .pdata
		} else {
			h, err := u.x.bytes(info, 4)
			if err != nil {
				return s, err
			}
			version, flags, codes := h[0]&7, h[0]>>3, uint32(h[2])
			if version != 1 && version != 2 {
				return s, badRVA("unwind information", info, "version %d, want 1 or 2", version)
			}
			tail := info + 4 + (codes+1)&^1*2
			if flags&unwChain == 0 {
				if flags&(unwEHandler|unwUHandler) != 0 {
					h, err := u.x.u32(tail)
					if err != nil {
						return s, err
					}
					if h >= u.im.SizeOfImage {
						return s, badRVA("unwind information", tail, "handler 0x%x outside the image", h)
					}
					s.Handler = h
				}
				return s, nil
			}
			next = tail
		}
		// Chains are rare and short: all of them long would cost hours.
		if u.hops++; u.hops > 2*len(u.list)+1024 {
			return s, badRVA(unwindWhere, at, "more chained records than functions")
		}
		b, err := u.x.bytes(next, 12)
		if err != nil {
			return s, err
		}
		s.Primary, info = le.Uint32(b), le.Uint32(b[8:])
		if s.Primary >= u.im.SizeOfImage {
			return s, badRVA("unwind information", next, "chained to 0x%x outside the image", s.Primary)
		}
	}
	return s, badRVA(unwindWhere, at, "chain longer than %d records", MaxUnwindChain)
}

func (u *unwindReader) arm64(b []byte, at uint32) (UnwindSpan, error) {
	begin, word := le.Uint32(b), le.Uint32(b[4:])
	s := UnwindSpan{Span: Span{begin, begin}, Primary: begin}
	switch word & 3 {
	case 1, 2: // packed
		s.End = begin + word>>2&0x7ff*4
		if word&3 == 2 {
			// A fragment continues a function: the one before it, if nothing lies
			// between. Where else it may belong the record does not say.
			if n := len(u.list); n > 0 && u.list[n-1].End == begin {
				s.Primary, s.Handler = u.list[n-1].Primary, u.list[n-1].Handler
			}
		}
		return s, nil
	case 3:
		return s, badRVA(unwindWhere, at+4, "reserved kind 3")
	}
	h, err := u.x.bytes(word, 8)
	if err != nil {
		// The second word is not there for the shortest record.
		if h, err = u.x.bytes(word, 4); err != nil {
			return s, err
		}
		h = append(slices.Clone(h), 0, 0, 0, 0)
	}
	first, second := le.Uint32(h), le.Uint32(h[4:])
	s.End = begin + first&0x3ffff*4
	if v := first >> 18 & 3; v != 0 {
		return s, badRVA("unwind information", word, "version %d, want 0", v)
	}
	if first>>20&1 == 0 {
		return s, nil
	}
	epilogs, codes, tail := first>>22&31, first>>27&31, word+4
	if epilogs == 0 && codes == 0 {
		epilogs, codes, tail = second&0xffff, second>>16&0xff, word+8
	}
	if first>>21&1 == 0 {
		tail += 4 * epilogs // one scope each; with E set the number is an index
	}
	tail += 4 * codes
	if s.Handler, err = u.x.u32(tail); err != nil {
		return s, err
	}
	if s.Handler >= u.im.SizeOfImage {
		return s, badRVA("unwind information", tail, "handler 0x%x outside the image", s.Handler)
	}
	return s, nil
}

// UnwindTable is where the records of .pdata lie in the image and how many there
// are, as a call of RtlAddFunctionTable wants it. What the linker left empty
// behind the last one is not counted. Zero records: the image has none.
func (im *Image) UnwindTable() (rva uint32, count int, err error) {
	spans, err := im.UnwindSpans() // a table that cannot be read is not for an unwinder
	if err != nil || len(spans) == 0 {
		return 0, 0, err
	}
	d := im.Directories[dirException]
	size := uint32(12)
	if im.Machine == MachineARM64 {
		size = 8
	}
	w := im.window(unwindWhere)
	for n := d.Size / size; n > 0; n-- {
		b, err := w.bytes(d.RVA+(n-1)*size, 8)
		if err != nil {
			return 0, 0, err
		}
		if le.Uint32(b) != 0 || le.Uint32(b[4:]) != 0 {
			return d.RVA, int(n), nil
		}
	}
	return 0, 0, nil
}
