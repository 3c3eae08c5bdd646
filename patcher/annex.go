package patcher

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

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
	annexMagic     = "HPANNEX\x01"
	annexUnwind    = 12
	annexFixed     = 48
	maxAnnexHeader = 4 << 20 // 4095 functions at under 1 KiB each
	slotSize       = 8
	// annexAlign is the granularity of addresses we take: Windows reserves by it.
	annexAlign = 64 << 10
)

// annexHeader is the JSON of the header. Keys are stable: an older daemon's
// annex must be read by a newer one.
type annexHeader struct {
	Nonce    string        `json:"nonce"`
	Base     target.Addr   `json:"base"`
	Size     uint64        `json:"size"` // bytes of the whole annex
	Identity pe.Identity   `json:"identity"`
	Image    string        `json:"image"`
	Product  string        `json:"product"`
	Release  string        `json:"release"`
	Sequence uint32        `json:"sequence"`
	Hash     string        `json:"hash"`
	Sites    []Site        `json:"sites"`
	Ranges   []pe.Span     `json:"ranges,omitempty"` // further parts of replaced functions
	Parts    []target.Span `json:"parts"`
	Header   string        `json:"header"`
}

func (h annexHeader) encode() ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false) // names would outgrow the room kept for them
	if err := e.Encode(h); err != nil {
		return nil, err
	}
	body := out.Bytes()
	if len(body) > maxAnnexHeader {
		return nil, fmt.Errorf("annex header of %d bytes is over the limit of %d", len(body), maxAnnexHeader)
	}
	b := make([]byte, annexFixed, annexFixed+len(body))
	copy(b, annexMagic)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	sum := sha256.Sum256(body)
	copy(b[16:], sum[:])
	return append(b, body...), nil
}

// annex is a header found in a process.
type annex struct {
	annexHeader
	At    target.Addr
	sum   string // SHA-256 of the header's JSON, hex
	live  bool   // in force: every entry and pad is as this annex left it
	ours  []bool // site by site: what stands at the entry is what this annex wrote
	padIs []bool // likewise, for pads
}

// findAnnexes lists the annexes that belong to the image at base. What they
// say is only a claim until it is checked against a verified release.
func findAnnexes(p target.Process, regions []target.Region, base Loaded) ([]annex, error) {
	found, err := annexesIn(p, regions, func(at target.Addr) bool { return near(at, base) })
	if err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(a annex) bool { return a.Base != base.Base || a.Identity.SizeOfImage != base.Size })
	for i := range found {
		if err := found[i].look(p); err != nil {
			return nil, err
		}
	}
	return found, nil
}

const (
	// maxAnnexes bounds the annexes of one process: one a sequence that ever ran in an image.
	maxAnnexes = 256
	// maxProbes bounds the places looked at in one process: a thousand images
	// have some ten thousand pages where a header could begin.
	maxProbes = 64 << 10
	// maxHeaders bounds what is read as headers of one process, bytes.
	maxHeaders = 64 << 20
)

func annexesIn(p target.Process, regions []target.Region, where func(target.Addr) bool) ([]annex, error) {
	var found []annex
	probes, budget := 0, uint64(maxHeaders)
	for _, r := range regions {
		if r.Kind != target.Private || r.Inode != 0 || r.Prot != target.Read || r.Shared {
			continue
		}
		// Neighbouring mappings of one protection may be joined by the kernel:
		// look at every place where an annex could begin.
		for at := alignUp(r.Start, annexAlign); at < r.End && at >= r.Start; at += annexAlign {
			if !where(at) {
				continue
			}
			if probes++; probes > maxProbes || len(found) == maxAnnexes {
				return found, nil
			}
			a, err := annexAt(p, at, uint64(r.End-at), &budget)
			switch {
			case err == nil:
				found = append(found, a)
			case errors.Is(err, target.ErrGone), errors.Is(err, target.ErrDenied):
				return nil, err
			}
		}
	}
	return found, nil
}

var errNoAnnex = errors.New("no annex here")

func annexAt(p target.Process, at target.Addr, room uint64, budget *uint64) (annex, error) {
	var fixed [annexFixed]byte
	if _, err := p.ReadAt(fixed[:], at); err != nil {
		return annex{}, err
	}
	n := uint64(binary.LittleEndian.Uint32(fixed[8:]))
	if string(fixed[:8]) != annexMagic || n > maxAnnexHeader || n+annexFixed > room || n > *budget {
		return annex{}, errNoAnnex
	}
	*budget -= n
	body, err := read(p, at+annexFixed, int(n))
	if err != nil {
		return annex{}, err
	}
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], fixed[16:48]) {
		return annex{}, errNoAnnex
	}
	a := annex{At: at, sum: hex.EncodeToString(fixed[16:])}
	if json.Unmarshal(body, &a.annexHeader) != nil || !a.sane() {
		return annex{}, errNoAnnex
	}
	return a, nil
}

// sane checks what later code relies on: lengths, places inside the image and
// the annex, and that what the sites write leads into this annex and nowhere else.
func (a annex) sane() bool {
	if a.Size == 0 || a.Size > maxReach || len(a.Sites) == 0 || len(a.Sites) > 2*maxFunctions || len(a.Nonce) != 32 {
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

// Claims lists the annexes in force in a process, whoever put them there: a
// former life of ours, the parent of a fork, another installation.
func Claims(p target.Process) ([]Claim, error) {
	regions, err := p.Regions()
	if err != nil {
		return nil, err
	}
	var claims []Claim
	found, err := annexesIn(p, regions, func(target.Addr) bool { return true })
	if err != nil {
		return nil, err
	}
	for _, a := range found {
		if err := a.look(p); err != nil {
			return nil, err
		}
		if a.live {
			claims = append(claims, Claim{a.Base, a.Product, a.Release, a.Sequence, a.Hash})
		}
	}
	return claims, nil
}
