package patcher

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// Plan is everything that will be written to one process, known before the
// first effect. It is what `hotpatch plan` prints and what Apply does.
type Plan struct {
	Record        // as it will be journaled; State is empty
	Binds  []Bind // slots of the hotpatch image
	Drops  int    // sites of an older sequence that go back to the original
	Reused bool   // the annex of an earlier attempt or an undone patch serves again
	patch  *Patch
	base   Loaded
	image  []byte // contents of the annex, from its first byte; nil if reused
	parts  []part
	others []target.Addr // further places for the annex, should this one be taken meanwhile
}

// part is a run of annex pages with one protection.
type part struct {
	target.Span
	prot target.Prot
}

// AlreadyApplied is returned by Prepare when this very patch is in force.
type AlreadyApplied struct{ Record Record }

func (a *AlreadyApplied) Error() string {
	return fmt.Sprintf("%s is in force already", a.Record.Release)
}

// headerProbe is how much of the base's headers is compared under the freeze, bytes.
const headerProbe = 512

// Prepare makes the plan for one image, or says why there is none (*Refusal,
// *AlreadyApplied, or an error of the process). It reads only.
func Prepare(p target.Process, base Loaded, patch *Patch) (*Plan, error) {
	if err := CheckGuards(p.Info()); err != nil {
		return nil, err
	}
	if err := supported(p, patch); err != nil {
		return nil, err
	}
	regions, err := p.Regions()
	if err != nil {
		return nil, err
	}
	found := findAnnexes(p, regions, base)
	code, err := identify(base, patch, found)
	if err != nil {
		return nil, err
	}
	// Found anew in each process: what another one's memory says, its owner can forge.
	shapes, err := findShapes(base.Image, code, patch.Functions)
	if err != nil {
		return nil, err
	}
	previous, err := inForce(p, found, patch)
	if err != nil {
		return nil, err
	}
	sites, err := makeSites(p, base, patch, shapes, code, found, previous)
	if err != nil {
		return nil, err
	}
	if err := checkRegions(regions, sites); err != nil {
		return nil, err
	}
	headers, err := read(p, base.Base, headerProbe)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(headers)
	x := &Plan{patch: patch, base: base, Record: Record{
		ID: p.Info().ID, Image: patch.Image, Base: base.Base, Size: base.Size, Identity: patch.Base,
		Product: patch.Product, Release: patch.Release, Sequence: patch.Sequence,
		Hash: hexOf(patch.Hash), Header: hexOf(sum), Sites: sites,
	}}
	if previous != nil {
		if previous.Hash == x.Hash && previous.Release == x.Release {
			r := previous.record(x.ID)
			r.Header = x.Header
			return nil, &AlreadyApplied{Record: r}
		}
		older := previous.record(x.ID)
		older.Header = x.Header
		x.Previous = &older
		x.drop(previous)
	}
	modules, err := imagesIn(p, regions)
	if err != nil {
		return nil, err
	}
	b := binder{p: p, base: base, modules: modules}
	if x.Binds, err = b.bind(patch); err != nil {
		return nil, err
	}
	if ok, err := x.reuse(p, found); err != nil || ok {
		return x, err
	}
	room := annexRoom(len(x.Sites)) + pages(uint64(patch.image.SizeOfImage)) + pages(uint64(len(patch.Functions)*slotSize))
	places := gaps(regions, base, room)
	if len(places) == 0 {
		return nil, blocked("no-space", RestartProcess, "no free %d KiB within 2 GiB of %s", room>>10, base.Name)
	}
	var nonce [16]byte
	rand.Read(nonce[:])
	x.Nonce = hex.EncodeToString(nonce[:])
	x.others = places[1:]
	return x, x.lay(places[0])
}

// supported refuses what this engine does not reach, by name.
func supported(p target.Process, patch *Patch) error {
	if patch.Consistency != "" && patch.Consistency != "entry" {
		return blocked("consistency", Author, "the release asks for consistency %q; this engine reaches \"entry\"", patch.Consistency)
	}
	if patch.Unwind == "required" {
		if _, ok := p.(target.Unwinder); !ok {
			return blocked("unwind", Baseline, "the release needs unwind tables registered in the process; this backend cannot")
		}
	}
	return nil
}

// inForce finds the annex of this product whose writes stand in memory now. An
// annex of another product that stands on the same bytes refuses the plan.
func inForce(p target.Process, found []annex, patch *Patch) (*annex, error) {
	var mine *annex
	for i := range found {
		a := &found[i]
		ok, err := a.inForce(p)
		if err != nil {
			return nil, err
		}
		if ok && a.Product == patch.Product {
			mine = a
		}
		if ok && a.Product != patch.Product {
			for _, s := range a.Sites {
				for _, f := range patch.Functions {
					if s.RVA == f.RVA {
						return nil, blocked("product", Author, "%s is replaced by %s of product %s already", f.Name, a.Release, a.Product)
					}
				}
			}
		}
	}
	return mine, nil
}

// makeSites reads what stands at every entry and pad now. It must be the
// original, or what an annex of ours put there.
func makeSites(p target.Process, base Loaded, patch *Patch, shapes []shape, code originals, found []annex, previous *annex) ([]Site, error) {
	sites := make([]Site, len(patch.Functions))
	for i, f := range patch.Functions {
		sh := shapes[i]
		s := Site{Function: f.Name, RVA: f.RVA, Length: f.Length, Kind: sh.kind, At: base.Base + target.Addr(sh.at)}
		s.Canonical = make([]byte, sh.length)
		if err := code.canonical(s.Canonical, sh.at); err != nil {
			return nil, err
		}
		var err error
		if s.Prev, err = read(p, s.At, int(sh.length)); err != nil {
			return nil, err
		}
		if s.Original, err = code.relocated(sh.at, int(sh.length)); err != nil {
			return nil, err
		}
		var old, live *Site
		for k := range found {
			for j := range found[k].Sites {
				o := &found[k].Sites[j]
				if o.RVA != f.RVA {
					continue
				}
				old = o
				if previous != nil && found[k].At == previous.At {
					live = o
				}
			}
		}
		if old != nil {
			if old.At != s.At || len(old.Original) != len(s.Prev) {
				return nil, drifted(s.At, old.Original, s.Prev, f.Name+" was written in another way before")
			}
		}
		standsOriginal := bytes.Equal(s.Prev, s.Original)
		if !standsOriginal && (live == nil || !bytes.Equal(s.Prev, live.New)) {
			return nil, drifted(s.At, s.Original, s.Prev, f.Name)
		}
		if standsOriginal {
			for _, rva := range sh.interior {
				s.Interior = append(s.Interior, base.Base+target.Addr(rva))
			}
		}
		if sh.kind == shapeShort {
			if s.Pad, err = makePad(p, base.Base+target.Addr(sh.pad), old); err != nil {
				return nil, err
			}
		}
		sites[i] = s
	}
	return sites, nil
}

func makePad(p target.Process, at target.Addr, old *Site) (*Pad, error) {
	have, err := read(p, at, longJump)
	if err != nil {
		return nil, err
	}
	pad := &Pad{At: at, Original: bytes.Clone(have), Prev: have}
	if old != nil && old.Pad != nil {
		pad.Original = bytes.Clone(old.Pad.Original)
	}
	return pad, nil
}

// checkRegions refuses sites in memory that is shared, writable or not code.
func checkRegions(regions []target.Region, sites []Site) error {
	for _, s := range sites {
		r, ok := regionAt(regions, s.At)
		switch {
		case !ok || r.End < s.At+target.Addr(len(s.Original)):
			return &Refusal{Reason: Drifted, Code: "unmapped", Remedy: RestartProcess, At: s.At, Text: s.Function + " is not mapped", Detail: "at " + s.At.String()}
		case r.Shared:
			return blocked("shared", RestartProcess, "%s lies in memory shared with other processes", s.Function)
		case r.Prot&target.Write != 0:
			return blocked("writable", RestartProcess, "%s lies in writable memory", s.Function)
		case r.Prot&target.Exec == 0:
			return blocked("not-code", RestartProcess, "%s lies in memory that is not executable", s.Function)
		}
	}
	return nil
}

// drop adds the sites of the older sequence that this one no longer names:
// they go back to the original in the same freeze.
func (x *Plan) drop(previous *annex) {
	kept := map[uint32]bool{}
	for _, s := range x.Sites {
		kept[s.RVA] = true
	}
	for _, s := range previous.Sites {
		if kept[s.RVA] || bytes.Equal(s.New, s.Original) {
			continue
		}
		s.Prev, s.New = s.New, s.Original
		s.Pad, s.Target, s.Slot, s.Interior = nil, 0, 0, nil // the pad stays ours
		x.Sites = append(x.Sites, s)
		x.Drops++
	}
}

// lay computes every byte for an annex at at.
func (x *Plan) lay(at target.Addr) error {
	head := annexRoom(len(x.Sites))
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
			if !executable(placed, r.Place) {
				return fmt.Errorf("hotpatch image for %s: record at %#x of the table names a place that is not code", x.Image, r.Offset)
			}
			from := imageAt + target.Addr(r.Place)
			copy(b[head+uint64(r.Place):], jump(from, x.Base+target.Addr(r.Target)))
		}
	}
	for i := range x.patch.Functions {
		s := &x.Sites[i]
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

// reuse takes an annex of the same hotpatch image that is not in force: one of
// an attempt that found threads in the way, or of an undone patch. Its code
// must be what would be written anew; its data stays as the functions left it.
func (x *Plan) reuse(p target.Process, found []annex) (bool, error) {
	for _, a := range found {
		if a.Hash != x.Hash || a.Release != x.Release || (x.Previous != nil && x.Previous.Annex == a.At) {
			continue
		}
		trial := *x
		trial.Sites = cloneSites(x.Sites)
		trial.Nonce = a.Nonce
		if trial.lay(a.At) != nil || len(trial.parts) != len(a.Parts) || uint64(len(trial.image)) != a.Size {
			continue
		}
		same, err := trial.sameCode(p)
		if err != nil {
			return false, err
		}
		if same && sameSites(trial.Sites, a.Sites) {
			trial.image, trial.Reused, trial.AnnexSum = nil, true, a.sum
			*x = trial
			return true, nil
		}
	}
	return false, nil
}

// sameCode compares the executable parts of an annex in memory with the plan's.
func (x *Plan) sameCode(p target.Process) (bool, error) {
	for _, part := range x.parts {
		if part.prot&target.Exec == 0 {
			continue
		}
		have, err := read(p, part.Start, int(part.End-part.Start))
		if errors.Is(err, target.ErrGone) {
			return false, err
		}
		if err != nil || !bytes.Equal(have, x.image[part.Start-x.Annex:part.End-x.Annex]) {
			return false, nil
		}
	}
	return true, nil
}

// sameSites: the header in memory must tell how to undo what will be written.
func sameSites(plan, header []Site) bool {
	if len(plan) != len(header) {
		return false
	}
	for i, s := range plan {
		h := header[i]
		if s.At != h.At || !bytes.Equal(s.New, h.New) || !bytes.Equal(s.Original, h.Original) {
			return false
		}
	}
	return true
}

func cloneSites(in []Site) []Site {
	out := make([]Site, len(in))
	for i, s := range in {
		if s.Pad != nil {
			pad := *s.Pad
			s.Pad = &pad
		}
		out[i] = s
	}
	return out
}

func regionAt(regions []target.Region, at target.Addr) (target.Region, bool) {
	for _, r := range regions {
		if at >= r.Start && at < r.End {
			return r, true
		}
	}
	return target.Region{}, false
}
