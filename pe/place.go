package pe

// Placed is an image laid out for an address: what a loader would put there.
type Placed struct {
	Base     uint64
	Bytes    []byte // SizeOfImage, rounded up to pages
	Segments []Segment
}

// Segment is a run of pages with one protection. All are readable.
type Segment struct {
	Span
	Exec, Write bool
}

// Place lays the image out for base: headers and sections copied, relocated.
// Imports are not bound and nothing of the headers is changed. Gaps between
// sections are zero and read-only. Refused: a base that is not page-aligned,
// sections that are both writable and executable, relocations missing where
// base is not the preferred one, more than MaxPlaced bytes.
func (im *Image) Place(base uint64) (*Placed, error) {
	size := alignUp(uint64(im.SizeOfImage), pageSize)
	if size > MaxPlaced {
		return nil, badRVA("image", 0, "%d bytes to place, at most %d", size, MaxPlaced)
	}
	if base%pageSize != 0 || base+size < base {
		return nil, badRVA("image", 0, "base 0x%x is not page-aligned or the image wraps around", base)
	}
	const stripped = 0x0001 // IMAGE_FILE_RELOCS_STRIPPED
	delta := base - im.Base
	if delta != 0 && im.Characteristics&stripped != 0 {
		return nil, badRVA("image", 0, "relocations are stripped: it runs at 0x%x only", im.Base)
	}
	p := &Placed{Base: base, Bytes: make([]byte, size)}
	if err := im.ReadRVA(p.Bytes[:im.SizeOfHeaders], 0); err != nil {
		return nil, err
	}
	at := uint32(0)
	for _, s := range im.Sections {
		if s.Extent() == 0 {
			continue
		}
		if s.Exec() && s.Writable() {
			return nil, badRVA("section "+s.Name, s.RVA, "both writable and executable")
		}
		// Up to the end of the image: a last section may be cut by SizeOfImage.
		end := min(s.RVA+s.Extent(), uint32(size))
		if s.RVA >= end {
			return nil, badRVA("section "+s.Name, s.RVA, "outside the image")
		}
		if err := im.ReadRVA(p.Bytes[s.RVA:end], s.RVA); err != nil {
			return nil, err
		}
		p.add(Segment{Span: Span{at, s.RVA}})
		at = alignUp(end, pageSize)
		p.add(Segment{Span{s.RVA, at}, s.Exec(), s.Writable()})
	}
	p.add(Segment{Span: Span{at, uint32(size)}})
	if delta == 0 {
		return p, nil
	}
	list, err := im.Relocs()
	if err != nil {
		return nil, err
	}
	for _, r := range list {
		r.apply(p.Bytes[r.RVA:][:r.Width()], delta)
	}
	return p, nil
}

// add appends s, joined to the last segment where the protection is the same.
func (p *Placed) add(s Segment) {
	if s.Begin >= s.End {
		return
	}
	if n := len(p.Segments); n > 0 && p.Segments[n-1].Exec == s.Exec && p.Segments[n-1].Write == s.Write {
		p.Segments[n-1].End = s.End
		return
	}
	p.Segments = append(p.Segments, s)
}

// Put64 writes a bound slot. A slot outside the image or in an executable
// segment is refused: binding must never write code.
func (p *Placed) Put64(rva uint32, v uint64) error {
	if uint64(rva)+8 > uint64(len(p.Bytes)) {
		return badRVA("slot", rva, "outside the image of %d bytes", len(p.Bytes))
	}
	for _, s := range p.Segments {
		if s.Exec && rva < s.End && rva+8 > s.Begin {
			return badRVA("slot", rva, "in executable segment 0x%x to 0x%x", s.Begin, s.End)
		}
	}
	le.PutUint64(p.Bytes[rva:], v)
	return nil
}
