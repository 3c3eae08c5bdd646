package pe

import (
	"cmp"
	"slices"
	"sort"
)

// Base relocation types (IMAGE_REL_BASED_*) that occur in 64-bit images.
const (
	relAbsolute = 0
	relHighLow  = 3
	relDir64    = 10
)

// Relocs are the base relocations that change bytes, sorted by RVA. Unknown
// types, overlaps, and places outside the image are refused. The slice is
// shared: do not change it.
func (im *Image) Relocs() ([]Reloc, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.relocsOK {
		return im.relocs, nil
	}
	list, err := im.readRelocs()
	if err != nil {
		return nil, err
	}
	im.relocs, im.relocsOK = list, true
	return list, nil
}

func (im *Image) readRelocs() ([]Reloc, error) {
	const where = "base relocations"
	d := im.Directories[dirReloc]
	if d.RVA == 0 || d.Size == 0 {
		return nil, nil
	}
	if err := im.checkDirectory(where, d); err != nil {
		return nil, err
	}
	var list []Reloc
	w := im.window(where)
	sorted := true
	for at, end := d.RVA, d.RVA+d.Size; at < end; {
		if end-at < 8 {
			return nil, badRVA(where, at, "%d stray bytes at the end", end-at)
		}
		b, err := w.bytes(at, 8)
		if err != nil {
			return nil, err
		}
		page, size := le.Uint32(b), le.Uint32(b[4:])
		if size < 8 || size%2 != 0 || size > end-at {
			return nil, badRVA(where, at, "block of %d bytes, %d are left", size, end-at)
		}
		if page%pageSize != 0 || page >= im.SizeOfImage {
			return nil, badRVA(where, at, "page 0x%x is not aligned or outside the image", page)
		}
		for p := at + 8; p < at+size; p += 2 {
			b, err := w.bytes(p, 2)
			if err != nil {
				return nil, err
			}
			e := le.Uint16(b)
			r := Reloc{RVA: page + uint32(e&0xfff), Type: uint8(e >> 12)}
			switch r.Type {
			case relAbsolute:
				continue // padding
			case relHighLow, relDir64:
			default:
				return nil, badRVA(where, p, "type %d is unknown", r.Type)
			}
			if uint64(r.RVA)+uint64(r.Width()) > uint64(im.SizeOfImage) {
				return nil, badRVA(where, p, "place 0x%x outside the image", r.RVA)
			}
			if n := len(list); n > 0 && r.RVA < list[n-1].RVA {
				sorted = false
			}
			list = append(list, r)
		}
		at += size
	}
	if !sorted {
		slices.SortFunc(list, func(a, b Reloc) int { return cmp.Compare(a.RVA, b.RVA) })
	}
	for i := 1; i < len(list); i++ {
		if a := list[i-1]; list[i].RVA < a.RVA+uint32(a.Width()) {
			return nil, badRVA(where, list[i].RVA, "overlaps the relocation at 0x%x", a.RVA)
		}
	}
	return list, nil
}

// checkDirectory refuses a directory of a size out of proportion or outside the image.
func (im *Image) checkDirectory(where string, d Directory) error {
	if d.Size > MaxDirectory {
		return badRVA(where, d.RVA, "%d bytes, at most %d", d.Size, MaxDirectory)
	}
	if uint64(d.RVA)+uint64(d.Size) > uint64(im.SizeOfImage) {
		return badRVA(where, d.RVA, "%d bytes end outside the image", d.Size)
	}
	return nil
}

// relocsIn are the relocations that touch at least one byte of rva…end.
func relocsIn(list []Reloc, rva, end uint32) []Reloc {
	i := sort.Search(len(list), func(i int) bool { return list[i].RVA+uint32(list[i].Width()) > rva })
	j := sort.Search(len(list), func(j int) bool { return list[j].RVA >= end })
	return list[i:max(i, j)]
}

// apply adds delta to the relocated field b.
func (r Reloc) apply(b []byte, delta uint64) {
	if r.Type == relHighLow {
		le.PutUint32(b, le.Uint32(b)+uint32(delta))
		return
	}
	le.PutUint64(b, le.Uint64(b)+delta)
}
