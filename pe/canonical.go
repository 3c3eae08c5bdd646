package pe

import (
	"cmp"
	"slices"
	"sort"
)

// Overlay is a run of canonical bytes (as in the file, relocations undone) to
// take instead of what memory holds: a site of ours, undone.
type Overlay struct {
	RVA   uint32
	Bytes []byte
}

func (o Overlay) end() uint32 { return o.RVA + uint32(len(o.Bytes)) }

// Canonical fills p with the bytes at rva as they are in the file: base
// relocations undone (by Base less the preferred base, see SetPreferredBase),
// the header's ImageBase too. Relocated fields that straddle the ends of p are
// handled whole.
func (im *Image) Canonical(p []byte, rva uint32) error { return im.CanonicalWith(p, rva) }

// CanonicalWith is Canonical with the bytes of overlays in place of memory's. A
// relocated field that an overlay covers in part is undone by the carry that the
// overlay's true bytes give, not by those that happen to lie in memory.
func (im *Image) CanonicalWith(p []byte, rva uint32, overlays ...Overlay) error {
	over, err := sortOverlays(overlays)
	if err != nil {
		return err
	}
	return im.canonical(p, rva, over)
}

// sortOverlays refuses overlaps: which bytes are true would be a guess.
func sortOverlays(list []Overlay) ([]Overlay, error) {
	if len(list) == 0 {
		return nil, nil
	}
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b Overlay) int { return cmp.Compare(a.RVA, b.RVA) })
	for i, o := range list {
		if uint64(o.RVA)+uint64(len(o.Bytes)) > MaxImageSize {
			return nil, badRVA("overlay", o.RVA, "%d bytes end outside any image", len(o.Bytes))
		}
		if i > 0 && list[i-1].end() > o.RVA {
			return nil, badRVA("overlay", o.RVA, "overlaps the one at 0x%x", list[i-1].RVA)
		}
	}
	return list, nil
}

func (im *Image) canonical(p []byte, rva uint32, over []Overlay) error {
	if err := im.ReadRVA(p, rva); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	end := rva + uint32(len(p)) // cannot wrap: ReadRVA accepted it
	if delta := im.Base - im.preferred; im.Mapped && delta != 0 {
		list, err := im.Relocs()
		if err != nil {
			return err
		}
		for _, r := range relocsIn(list, rva, end) {
			var whole [8]byte
			field := whole[:r.Width()]
			if err := im.ReadRVA(field, r.RVA); err != nil {
				return err
			}
			undo(field, delta, r.RVA, over)
			if r.RVA < rva {
				copy(p, field[rva-r.RVA:])
			} else {
				copy(p[r.RVA-rva:], field)
			}
		}
	}
	if im.Mapped {
		var base [8]byte
		le.PutUint64(base[:], im.preferred)
		paste(p, rva, Overlay{uint32(im.optional) + 24, base[:]})
	}
	for _, o := range overlaysIn(over, rva, end) {
		paste(p, rva, o)
	}
	return nil
}

// undo takes delta off the field at rva, lowest byte first: byte i of memory is
// byte i of the file plus byte i of delta plus the carry from below. Where an
// overlay knows the file's byte, the carry comes from it.
func undo(field []byte, delta uint64, rva uint32, over []Overlay) {
	over = overlaysIn(over, rva, rva+uint32(len(field)))
	carry := uint16(0)
	for i := range field {
		d := uint16(byte(delta >> (8 * i)))
		c := byte(uint16(field[i]) - d - carry)
		for _, o := range over {
			if at := rva + uint32(i); at >= o.RVA && at < o.end() {
				c = o.Bytes[at-o.RVA]
			}
		}
		field[i] = c
		carry = (uint16(c) + d + carry) >> 8
	}
}

// overlaysIn are those of the sorted list that touch rva…end.
func overlaysIn(list []Overlay, rva, end uint32) []Overlay {
	i := sort.Search(len(list), func(i int) bool { return list[i].end() > rva })
	j := sort.Search(len(list), func(j int) bool { return list[j].RVA >= end })
	return list[i:max(i, j)]
}

// paste copies the part of o that lies in p, the bytes at rva.
func paste(p []byte, rva uint32, o Overlay) {
	switch {
	case o.RVA >= rva && o.RVA-rva < uint32(len(p)):
		copy(p[o.RVA-rva:], o.Bytes)
	case o.RVA < rva && rva-o.RVA < uint32(len(o.Bytes)):
		copy(p, o.Bytes[rva-o.RVA:])
	}
}
