package patcher

import (
	"bytes"
	"context"
	"errors"

	"hotpatchd/patcher/target"
)

// Adopt finds a patch of ours that is in force in an image without a record: a
// fork child, a lost store, a second installation. It is believed only if the
// hotpatch image is the verified release's and every function body, with the
// annex's old bytes put back, has the hash the release names. ErrNotOurs if
// there is nothing to adopt.
func (x *Patcher) Adopt(ctx context.Context, p target.Process, base Loaded, patch *Patch) (Record, error) {
	return x.AdoptSeen(Look(ctx, p), base, patch)
}

// AdoptSeen is Adopt in the process of a survey.
func (x *Patcher) AdoptSeen(s *Survey, base Loaded, patch *Patch) (Record, error) {
	p := s.p
	found, err := s.annexesOf(base)
	if err != nil {
		return Record{}, err
	}
	refused := ErrNotOurs
	for _, a := range found {
		if !a.live || a.Hash != hexOf(patch.Hash) || a.Release != patch.Release || a.Product != patch.Product {
			continue
		}
		code, err := identify(base, patch, found)
		if err != nil {
			return Record{}, err
		}
		rec := a.record(p.Info().ID)
		if err := vouched(base, patch, code, rec.Sites); err != nil {
			refused = err // another one may be the true one
			continue
		}
		if rec.Header, err = headerSum(p, base.Base); err != nil {
			return Record{}, err
		}
		if err := sameHeader(p, rec); err != nil { // what is told apart by it later must be right
			return Record{}, err
		}
		rec.Image, rec.Size, rec.Identity, rec.Sequence = patch.Image, base.Size, patch.Base, patch.Sequence
		return x.outcome(&rec, nil, Applied, Applied)
	}
	return Record{}, refused
}

// ErrNotOurs: no patch of this release is in force there.
var ErrNotOurs = errors.New("no patch of this release is in force there")

// vouched: the entries the annex speaks of must be entries of the release, and
// their old bytes those whose hash the release names, so that a forged header
// cannot make us write anything else. A site taken out by this sequence stands
// at its original: nothing is ever written there.
func vouched(base Loaded, patch *Patch, code originals, sites []Site) error {
	for _, s := range sites {
		if s.Target == 0 {
			continue
		}
		if inBody(patch, base, s) == nil {
			return drifted(s.At, nil, s.New, "the annex names a function that the release does not: it")
		}
		if err := sameOriginal(base, code, s); err != nil {
			return err
		}
	}
	return nil
}

// vouchPrevious is vouched for an annex that an older sequence left and that
// this patch replaces. Functions that the patch does not name are beyond its
// hashes: there the hash of all code must show that the old bytes are true.
func vouchPrevious(base Loaded, patch *Patch, code originals, sites []Site) error {
	beyond := false
	for _, s := range sites {
		if s.Target == 0 {
			continue
		}
		if err := sameOriginal(base, code, s); err != nil {
			return err
		}
		beyond = beyond || inBody(patch, base, s) == nil
	}
	if !beyond {
		return nil
	}
	ok, err := code.textIs(patch.Base.TextSHA256)
	if err != nil {
		return err
	}
	if !ok {
		return &Refusal{Reason: Drifted, Code: "text", Remedy: RestartProcess,
			Text: "other code of the image was changed: what an older sequence replaced cannot be put back for certain"}
	}
	return nil
}

// inBody is the function of the patch that a site lies in.
func inBody(patch *Patch, base Loaded, s Site) *Function {
	for i := range patch.Functions {
		f := &patch.Functions[i]
		at := uint64(s.At - base.Base)
		if s.RVA == f.RVA && s.Length == f.Length && at >= uint64(f.RVA) && at+uint64(len(s.Original)) <= uint64(f.RVA)+uint64(f.Length) {
			return f
		}
	}
	return nil
}

// sameOriginal compares what the annex says stood there with what the code,
// our writes undone, says.
func sameOriginal(base Loaded, code originals, s Site) error {
	rva, n := uint32(s.At-base.Base), len(s.Original)
	original, err := code.relocated(rva, n)
	if err != nil {
		return err
	}
	canonical := make([]byte, n)
	if err := code.canonical(canonical, rva); err != nil {
		return err
	}
	if !bytes.Equal(original, s.Original) || !bytes.Equal(canonical, s.Canonical) {
		return drifted(s.At, original, s.Original, "the annex's copy of "+s.Function)
	}
	return nil
}
