package patcher

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// lay computes every byte for an annex at at.
func (x *Plan) lay(at target.Addr) error {
	head := x.headRoom()
	imageAt := at + target.Addr(head)
	placed, err := x.patch.image.Place(uint64(imageAt))
	if err != nil {
		return fmt.Errorf("cannot place hotpatch image for %s: %w", x.Image, err)
	}
	for _, b := range x.Binds {
		if err := placed.Put64(b.Slot, b.Value); err != nil {
			return fmt.Errorf("cannot bind %s: %w", b.What, err)
		}
	}
	slotsAt := imageAt + target.Addr(pages(uint64(len(placed.Bytes))))
	size := uint64(slotsAt-at) + pages(uint64(len(x.patch.Functions)*slotSize))
	b := make([]byte, size)
	copy(b[head:], placed.Bytes)
	copy(b[head:], "\x00\x00") // not an image of its own for those who look for MZ, us included
	for _, r := range x.patch.inverse {
		if r.Type == pe.HotPatchFunction {
			if !executable(placed, r.Place) || r.Target >= x.Size {
				return fmt.Errorf("hotpatch image for %s: record at %#x of the table names a place that is not code", x.Image, r.Offset)
			}
			from := imageAt + target.Addr(r.Place)
			copy(b[head+uint64(r.Place):], jump(from, x.Base+target.Addr(r.Target)))
		}
	}
	for i := range x.patch.Functions {
		s := &x.Sites[i]
		if !executable(placed, x.patch.Functions[i].Target) {
			return fmt.Errorf("hotpatch image for %s: the new %s is not code", x.Image, s.Function)
		}
		s.Target = imageAt + target.Addr(x.patch.Functions[i].Target)
		s.Slot = slotsAt + target.Addr(i*slotSize)
		slot := append(jump(s.Slot, s.Target), 0xcc, 0xcc, 0xcc)
		copy(b[s.Slot-at:], slot)
		s.write()
	}
	x.Annex, x.AnnexEnd = at, at+target.Addr(size)
	x.parts = nil
	x.addPart(at, imageAt, target.Read)
	for _, g := range placed.Segments {
		prot := target.Read
		if g.Exec {
			prot |= target.Exec
		} else if g.Write {
			prot |= target.Write
		}
		x.addPart(imageAt+target.Addr(g.Begin), imageAt+target.Addr(pages(uint64(g.End))), prot)
	}
	x.addPart(slotsAt, x.AnnexEnd, target.Read|target.Exec)
	x.Parts = nil
	for _, p := range x.parts {
		x.Parts = append(x.Parts, p.Span)
	}
	h, err := x.header().encode()
	if err != nil {
		return err
	}
	if uint64(len(h)) > head {
		return fmt.Errorf("annex header needs %d bytes, %d were kept for it", len(h), head)
	}
	copy(b, h)
	x.AnnexSum = hex.EncodeToString(h[16:annexFixed])
	x.image = b
	return nil
}

// headRoom is the length of the header's pages: fixed before the addresses
// inside the header are known.
func (x *Plan) headRoom() uint64 {
	ranges := 0
	for _, f := range x.patch.Functions {
		ranges += len(f.Ranges)
	}
	const fields, site, span = 4096, 1024, 48 // bytes of JSON, at most
	return pages(annexFixed + fields + uint64(len(x.Sites))*site + uint64(ranges)*span)
}

func executable(placed *pe.Placed, rva uint32) bool {
	for _, s := range placed.Segments {
		if rva >= s.Begin && rva+longJump <= s.End {
			return s.Exec
		}
	}
	return false
}

func (x *Plan) addPart(start, end target.Addr, prot target.Prot) {
	if n := len(x.parts); n > 0 && x.parts[n-1].prot == prot && x.parts[n-1].End == start {
		x.parts[n-1].End = end
		return
	}
	if end > start {
		x.parts = append(x.parts, part{target.Span{Start: start, End: end}, prot})
	}
}

func (x *Plan) header() annexHeader {
	var ranges []pe.Span
	for _, f := range x.patch.Functions {
		for _, r := range f.Ranges {
			ranges = append(ranges, pe.Span{Begin: r.RVA, End: r.RVA + r.Length})
		}
	}
	return annexHeader{
		Nonce: x.Nonce, Base: x.Base, Size: uint64(x.AnnexEnd - x.Annex), Identity: x.Identity, Image: x.Image,
		Product: x.Product, Release: x.Release, Sequence: x.Sequence, Hash: x.Hash,
		Sites: x.Sites, Ranges: ranges, Parts: x.Parts, Header: x.Header,
	}
}

// write computes the new bytes of a site from its slot.
func (s *Site) write() {
	if s.Pad == nil {
		s.New = jump(s.At, s.Slot)
		return
	}
	s.Pad.New = jump(s.Pad.At, s.Slot)
	s.New = []byte{0xeb, byte(int8(int64(s.Pad.At) - int64(s.At) - shortJump))}
}

// jump encodes E9 rel32 at from to to. Plans keep everything within reach.
func jump(from, to target.Addr) []byte {
	b := make([]byte, longJump)
	b[0] = 0xe9
	binary.LittleEndian.PutUint32(b[1:], uint32(int64(to)-int64(from)-longJump))
	return b
}
