package patcher

import (
	"bytes"
	"encoding/binary"
	"errors"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// The annex is memory of ours near an image: header, hotpatch image, jump slots.
//
//	offset 0   header pages, r--: 8 bytes magic and version, 4 bytes length of
//	           the JSON, 1 byte that is 1 once the unwind table of the hotpatch
//	           image is registered in the process, 3 bytes zero, 32 bytes
//	           SHA-256 of the JSON, the JSON
//	then       the hotpatch image, placed, a segment's protection each
//	last       jump slots, r-x: 8 bytes each, a five-byte jump and filler
//
// The header repeats what is needed to undo, so that a fork child, a lost
// store or a second installation finds its way.
const (
	annexMagic  = "HPANNEX\x01"
	annexUnwind = 12
	annexFixed  = 48
	slotSize    = 8
	// annexAlign is the granularity of addresses we take: Windows reserves by it.
	annexAlign = 64 << 10
)

// annex is a header found in a process.
type annex struct {
	annexHeader
	At    target.Addr
	sum   string // SHA-256 of the header's JSON, hex
	live  bool   // in force: every entry and pad is as this annex left it
	ours  []bool // site by site: what stands at the entry is what this annex wrote
	padIs []bool // likewise, for pads
}

// sane checks what later code relies on: lengths, places inside the image and
// the annex, and that what the sites write leads into this annex and nowhere else.
func (a annex) sane() bool {
	if a.Size == 0 || a.Size > maxReach || len(a.Sites) == 0 || len(a.Sites) > 2*maxFunctions || len(a.Nonce) != 32 || !a.brief() {
		return false
	}
	own := target.Span{Start: a.At, End: a.At + target.Addr(a.Size)}
	if own.End < own.Start || a.Identity.SizeOfImage > pe.MaxImageSize {
		return false
	}
	// place gives the RVA of n bytes inside the image.
	place := func(at target.Addr, n int) (uint32, bool) {
		off := uint64(at - a.Base)
		return uint32(off), at >= a.Base && off+uint64(n) <= uint64(a.Identity.SizeOfImage) && off+uint64(n) > off
	}
	var spans []pe.Span
	for _, s := range a.Sites {
		n := len(s.Original)
		at, ok := place(s.At, n)
		if !ok || (n != shortJump && n != longJump) || len(s.New) != n || len(s.Prev) != n || len(s.Canonical) != n ||
			(at != s.RVA && at != s.RVA+uint32(len(endbr64))) || uint64(at)+uint64(n) > uint64(s.RVA)+uint64(s.Length) {
			return false
		}
		spans = append(spans, pe.Span{Begin: at, End: at + uint32(n)})
		if s.Target == 0 { // taken out by this sequence
			if s.Pad != nil || !bytes.Equal(s.New, s.Original) {
				return false
			}
			continue
		}
		from, long := s.At, s.New
		if p := s.Pad; p != nil {
			pad, ok := place(p.At, longJump)
			if !ok || n != shortJump || pad+longJump != s.RVA || len(p.Original) != longJump || len(p.New) != longJump || len(p.Prev) != longJump ||
				s.New[0] != 0xeb || s.At+shortJump+target.Addr(int64(int8(s.New[1]))) != p.At {
				return false
			}
			spans = append(spans, pe.Span{Begin: pad, End: pad + longJump})
			from, long = p.At, p.New
		}
		if len(long) != longJump || long[0] != 0xe9 || !own.Contains(from+longJump+target.Addr(int64(int32(binary.LittleEndian.Uint32(long[1:]))))) {
			return false
		}
	}
	sortBy(spans, func(s pe.Span) uint32 { return s.Begin })
	for i := 1; i < len(spans); i++ {
		if spans[i].Begin < spans[i-1].End {
			return false
		}
	}
	for _, s := range a.Parts {
		if s.Start < own.Start || s.End > own.End || s.End <= s.Start {
			return false
		}
	}
	return true
}

// look reads every entry and pad and compares it with what this annex wrote.
// What cannot be read is not ours.
func (a *annex) look(p target.Process) error {
	is := func(at target.Addr, want []byte) (bool, error) {
		have, err := read(p, at, len(want))
		if errors.Is(err, target.ErrGone) || errors.Is(err, target.ErrDenied) {
			return false, err
		}
		return err == nil && bytes.Equal(have, want), nil
	}
	a.live = true
	a.ours, a.padIs = make([]bool, len(a.Sites)), make([]bool, len(a.Sites))
	for i, s := range a.Sites {
		var err error
		if a.ours[i], err = is(s.At, s.New); err != nil {
			return err
		}
		a.live = a.live && a.ours[i]
		if s.Pad != nil {
			if a.padIs[i], err = is(s.Pad.At, s.Pad.New); err != nil {
				return err
			}
			a.live = a.live && a.padIs[i] // another sequence's entry leads through the same pad
		}
	}
	return nil
}

// record is what the annex tells of the patch. What stood there before it is
// not believed: back is always the original.
func (a annex) record(id target.ID) Record {
	sites := cloneSites(a.Sites)
	for i := range sites {
		sites[i].Prev, sites[i].Interior = bytes.Clone(sites[i].Original), nil
	}
	return Record{
		ID: id, Image: a.Image, Base: a.Base, Size: a.Identity.SizeOfImage, Identity: a.Identity,
		Product: a.Product, Release: a.Release, Sequence: a.Sequence, Hash: a.Hash, State: Applied,
		Annex: a.At, AnnexSum: a.sum, AnnexEnd: a.At + target.Addr(a.Size), Parts: a.Parts, Nonce: a.Nonce, Header: a.Header, Sites: sites, Adopted: true,
	}
}

// overlays are the canonical bytes under the annexes' writes, where these
// stand. A claim: the hashes of the verified release decide whether it is believed.
func overlays(found []annex) []pe.Overlay {
	var o []pe.Overlay
	taken := map[uint32]bool{}
	add := func(rva uint32, b []byte) {
		for i := range b {
			if taken[rva+uint32(i)] {
				return
			}
		}
		for i := range b {
			taken[rva+uint32(i)] = true
		}
		o = append(o, pe.Overlay{RVA: rva, Bytes: b})
	}
	for _, live := range []bool{true, false} {
		for _, a := range found {
			for i, s := range a.Sites {
				if a.live != live {
					continue
				}
				if a.ours[i] && s.Target != 0 {
					add(uint32(s.At-a.Base), s.Canonical)
				}
				if s.Pad != nil && a.padIs[i] {
					add(uint32(s.Pad.At-a.Base), s.Pad.Original) // filler is never relocated
				}
			}
		}
	}
	return o
}

func near(at target.Addr, base Loaded) bool {
	low, high := min(at, base.Base), max(at, base.End())
	return uint64(high-low) < maxReach
}

func pages(n uint64) uint64 { return (n + target.PageSize - 1) &^ (target.PageSize - 1) }

func alignUp(a target.Addr, to target.Addr) target.Addr { return (a + to - 1) &^ (to - 1) }

func read(p target.Process, at target.Addr, n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := p.ReadAt(b, at)
	return b, err
}

// Claim is what an annex in force says of itself: enough to look for the
// release it names. Adopt decides whether it is believed.
type Claim struct {
	Base     target.Addr
	Product  string
	Release  string
	Sequence uint32
	Hash     string // of the hotpatch image, SHA-256, hex
}
