package patcher

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// The annex is memory of ours near an image: header, hotpatch image, jump slots.
//
//	offset 0   header pages, r--: 8 bytes magic and version, 4 bytes length of
//	           the JSON, 4 bytes zero, 32 bytes SHA-256 of the JSON, the JSON
//	then       the hotpatch image, placed, a segment's protection each
//	last       jump slots, r-x: 8 bytes each, a five-byte jump and filler
//
// The header repeats what is needed to undo, so that a fork child, a lost
// store or a second installation finds its way.
const (
	annexMagic     = "HPANNEX\x01"
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
	body, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
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

// annexRoom is the length of header pages for n sites: fixed before the
// addresses inside the header are known.
func annexRoom(n int) uint64 { return pages(annexFixed + 4096 + uint64(n)*1024) }

// annex is a header found in a process.
type annex struct {
	annexHeader
	At  target.Addr
	sum string // SHA-256 of the header's JSON, hex
}

// findAnnexes lists the annexes that belong to the image at base. What they
// say is only a claim until it is checked against a verified release.
func findAnnexes(p target.Process, regions []target.Region, base Loaded) []annex {
	found := annexesIn(p, regions, func(at target.Addr) bool { return near(at, base) })
	return slices.DeleteFunc(found, func(a annex) bool { return a.Base != base.Base })
}

func annexesIn(p target.Process, regions []target.Region, where func(target.Addr) bool) []annex {
	var found []annex
	for _, r := range regions {
		if r.Kind != target.Private || r.Inode != 0 || r.Prot != target.Read || r.Shared || !where(r.Start) {
			continue
		}
		// Neighbouring mappings of one protection may be joined by the kernel:
		// look at every place where an annex could begin.
		last := min(r.End, r.Start+maxProbes*annexAlign)
		for at := alignUp(r.Start, annexAlign); at < last && len(found) < maxAnnexes; at += annexAlign {
			if a, ok := annexAt(p, at, uint64(r.End-at)); ok {
				found = append(found, a)
			}
		}
	}
	return found
}

// maxAnnexes bounds the annexes of one process: one a sequence that ever ran in an image.
const maxAnnexes = 256

// maxProbes bounds the places looked at in one region.
const maxProbes = 1024

func annexAt(p target.Process, at target.Addr, room uint64) (annex, bool) {
	var fixed [annexFixed]byte
	if _, err := p.ReadAt(fixed[:], at); err != nil || string(fixed[:8]) != annexMagic {
		return annex{}, false
	}
	n := binary.LittleEndian.Uint32(fixed[8:])
	if n > maxAnnexHeader || uint64(n)+annexFixed > room {
		return annex{}, false
	}
	body := make([]byte, n)
	if _, err := p.ReadAt(body, at+annexFixed); err != nil {
		return annex{}, false
	}
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], fixed[16:48]) {
		return annex{}, false
	}
	a := annex{At: at, sum: hex.EncodeToString(fixed[16:])}
	if json.Unmarshal(body, &a.annexHeader) != nil || !a.sane() {
		return annex{}, false
	}
	return a, true
}

// sane checks what later code relies on: lengths and places inside the image and the annex.
func (a annex) sane() bool {
	if a.Size == 0 || a.Size > maxReach || len(a.Sites) == 0 || len(a.Sites) > 2*maxFunctions || len(a.Nonce) != 32 {
		return false
	}
	end := a.Base + target.Addr(a.Identity.SizeOfImage)
	inside := func(at target.Addr, n int) bool {
		return at >= a.Base && at+target.Addr(n) <= end && n > 0
	}
	for _, s := range a.Sites {
		n := len(s.Original)
		if n > longJump || n < shortJump || len(s.New) != n || len(s.Prev) != n || len(s.Canonical) != n || !inside(s.At, n) {
			return false
		}
		if p := s.Pad; p != nil && (len(p.Original) != longJump || len(p.New) != longJump || len(p.Prev) != longJump || !inside(p.At, longJump)) {
			return false
		}
	}
	for _, s := range a.Parts {
		if s.Start < a.At || s.End > a.At+target.Addr(a.Size) || s.End <= s.Start {
			return false
		}
	}
	return true
}

// inForce tells whether every entry in memory is as this annex left it.
func (a annex) inForce(p target.Process) (bool, error) {
	for _, s := range a.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return false, err
		}
		if !bytes.Equal(have, s.New) {
			return false, nil
		}
	}
	return true, nil
}

// record is what the annex tells of the patch, for Adopt.
func (a annex) record(id target.ID) Record {
	return Record{
		ID: id, Image: a.Image, Base: a.Base, Size: a.Identity.SizeOfImage, Identity: a.Identity,
		Product: a.Product, Release: a.Release, Sequence: a.Sequence, Hash: a.Hash, State: Applied,
		Annex: a.At, AnnexSum: a.sum, AnnexEnd: a.At + target.Addr(a.Size), Parts: a.Parts, Nonce: a.Nonce, Header: a.Header, Sites: a.Sites, Adopted: true,
	}
}

// overlays are the canonical bytes under the annexes' writes. A claim: the
// hashes of the verified release decide whether it is believed.
func overlays(found []annex) []pe.Overlay {
	var o []pe.Overlay
	seen := map[uint32]bool{}
	add := func(rva uint32, b []byte) {
		if !seen[rva] {
			o = append(o, pe.Overlay{RVA: rva, Bytes: b})
		}
		seen[rva] = true
	}
	for _, a := range found {
		for _, s := range a.Sites {
			add(uint32(s.At-a.Base), s.Canonical)
			if s.Pad != nil {
				add(uint32(s.Pad.At-a.Base), s.Pad.Original) // filler is never relocated
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
	for _, a := range annexesIn(p, regions, func(target.Addr) bool { return true }) {
		ok, err := a.inForce(p)
		if err != nil {
			return nil, err
		}
		if ok {
			claims = append(claims, Claim{a.Base, a.Product, a.Release, a.Sequence, a.Hash})
		}
	}
	return claims, nil
}
