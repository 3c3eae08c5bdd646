package patcher

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sort"

	"hotpatchd/patcher/target"
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
	survey *Survey // that it was made with: to be told what is mapped
	image  []byte  // contents of the annex, from its first byte; nil if reused
	parts  []part
	unwind *unwindTable  // to be registered before the swap
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

// Prepare makes the plan for one image of a process; see [Survey.Prepare].
func Prepare(p target.Process, base Loaded, patch *Patch) (*Plan, error) {
	return Look(context.Background(), p).Prepare(base, patch)
}

// Prepare makes the plan for one image, or says why there is none (*Refusal,
// *AlreadyApplied, or an error of the process). It reads only.
func (s *Survey) Prepare(base Loaded, patch *Patch) (*Plan, error) {
	p := s.p
	if err := CheckGuards(p.Info()); err != nil {
		return nil, err
	}
	if err := supported(p, patch); err != nil {
		return nil, err
	}
	regions, err := s.now()
	if err != nil {
		return nil, err
	}
	found, err := s.annexesOf(base)
	if err != nil {
		return nil, err
	}
	code, err := identify(base, patch, found)
	if err != nil {
		return nil, err
	}
	// Found anew in each process: what another one's memory says, its owner can forge.
	shapes, err := findShapes(base.Image, code, patch.Functions)
	if err != nil {
		return nil, err
	}
	previous, err := inForce(found, patch)
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
	x := &Plan{patch: patch, base: base, survey: s, Record: Record{
		ID: p.Info().ID, Image: patch.Image, Base: base.Base, Size: base.Size, Identity: patch.Base,
		Product: patch.Product, Release: patch.Release, Sequence: patch.Sequence,
		Hash: hexOf(patch.Hash), Header: hexOf(sum), Sites: sites,
	}}
	if previous != nil {
		older := previous.record(x.ID)
		older.Header = x.Header
		if previous.Hash == x.Hash && previous.Release == x.Release {
			return nil, &AlreadyApplied{Record: older}
		}
		if err := vouchPrevious(base, patch, code, older.Sites); err != nil {
			return nil, err
		}
		x.Previous = &older
		x.drop(older.Sites)
	}
	b := binder{Survey: s, base: base}
	if x.Binds, err = b.bind(patch); err != nil {
		return nil, err
	}
	if x.unwind, err = b.unwindTable(patch); err != nil {
		return nil, err
	}
	if ok, err := x.reuse(p, regions, found); err != nil || ok {
		return x, err
	}
	room := x.headRoom() + pages(uint64(patch.image.SizeOfImage)) + pages(uint64(len(patch.Functions)*slotSize))
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
func inForce(found []annex, patch *Patch) (*annex, error) {
	functions := map[uint32]string{}
	for _, f := range patch.Functions {
		functions[f.RVA] = f.Name
	}
	var mine *annex
	for i := range found {
		a := &found[i]
		if a.live && a.Product == patch.Product {
			mine = a
		}
		if a.Product == patch.Product {
			continue
		}
		for k, s := range a.Sites {
			if name, ok := functions[s.RVA]; ok && a.ours[k] && s.Target != 0 {
				return nil, blocked("product", Author, "%s is replaced by %s of product %s already", name, a.Release, a.Product)
			}
		}
	}
	return mine, nil
}

// makeSites reads what stands at every entry and pad now. It must be the
// original, or what the annex in force put there.
func makeSites(p target.Process, base Loaded, patch *Patch, shapes []shape, code originals, found []annex, previous *annex) ([]Site, error) {
	live := map[target.Addr]Site{}
	if previous != nil {
		for _, s := range previous.Sites {
			live[s.At] = s
		}
	}
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
		if bytes.Equal(s.Prev, s.Original) {
			for _, rva := range sh.interior {
				s.Interior = append(s.Interior, base.Base+target.Addr(rva))
			}
		} else if was, ok := live[s.At]; !ok || !bytes.Equal(s.Prev, was.New) {
			// Another annex's, another length's, or nobody's we know.
			return nil, drifted(s.At, s.Original, s.Prev, f.Name)
		}
		if sh.kind == shapeShort {
			if s.Pad, err = makePad(p, base, sh.pad, code, found, f.Name); err != nil {
				return nil, err
			}
		}
		sites[i] = s
	}
	return sites, nil
}

// makePad: filler must stand there, or what an annex of ours wrote there. A pad
// stays when a patch is taken out.
func makePad(p target.Process, base Loaded, rva uint32, code originals, found []annex, name string) (*Pad, error) {
	pad := &Pad{At: base.Base + target.Addr(rva)}
	var err error
	if pad.Original, err = code.relocated(rva, longJump); err != nil {
		return nil, err
	}
	if pad.Prev, err = read(p, pad.At, longJump); err != nil {
		return nil, err
	}
	if bytes.Equal(pad.Prev, pad.Original) {
		return pad, nil
	}
	for _, a := range found {
		for _, s := range a.Sites {
			if s.Pad != nil && s.Pad.At == pad.At && bytes.Equal(s.Pad.New, pad.Prev) && bytes.Equal(s.Pad.Original, pad.Original) {
				return pad, nil
			}
		}
	}
	return nil, drifted(pad.At, pad.Original, pad.Prev, "the filler before "+name)
}

// checkRegions refuses sites in memory that is shared, writable or not code.
func checkRegions(regions []target.Region, sites []Site) error {
	for _, s := range sites {
		if err := checkRegion(regions, s.At, len(s.Original), s.Function); err != nil {
			return err
		}
		if s.Pad != nil {
			if err := checkRegion(regions, s.Pad.At, longJump, "the filler before "+s.Function); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkRegion(regions []target.Region, at target.Addr, n int, what string) error {
	r, ok := regionAt(regions, at)
	switch {
	case !ok || r.End < at+target.Addr(n):
		return &Refusal{Reason: Drifted, Code: "unmapped", Remedy: RestartProcess, At: at, Text: what + " is not mapped", Detail: "at " + at.String()}
	case r.Shared:
		return blocked("shared", RestartProcess, "%s lies in memory shared with other processes", what)
	case r.Prot&target.Write != 0:
		return blocked("writable", RestartProcess, "%s lies in writable memory", what)
	case r.Prot&target.Exec == 0:
		return blocked("not-code", RestartProcess, "%s lies in memory that is not executable", what)
	}
	return nil
}

// drop adds the sites of the older sequence that this one no longer names:
// they go back to the original in the same freeze.
func (x *Plan) drop(older []Site) {
	kept := map[uint32]bool{}
	for _, s := range x.Sites {
		kept[s.RVA] = true
	}
	for _, s := range older {
		if kept[s.RVA] || s.Target == 0 {
			continue
		}
		s.Prev, s.New = s.New, s.Original
		s.Pad, s.Target, s.Slot, s.Interior = nil, 0, 0, nil // the pad stays ours
		x.Sites = append(x.Sites, s)
		x.Drops++
	}
}

// regionAt finds the region that an address lies in; they are sorted.
func regionAt(regions []target.Region, at target.Addr) (target.Region, bool) {
	i := sort.Search(len(regions), func(i int) bool { return regions[i].End > at })
	if i < len(regions) && regions[i].Start <= at {
		return regions[i], true
	}
	return target.Region{}, false
}
