package patcher

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

// Recover brings a record and memory together after our death: memory is the
// truth. All entries new: applied. All as before: the older sequence stands, or
// nothing. Mixed, which only our death between two writes leaves: a swap goes
// back to what was before, an undo goes on to the original. Neither: drift,
// nothing is written.
func (x *Patcher) Recover(ctx context.Context, p target.Process, rec Record) (Record, error) {
	switch rec.State {
	case Undone, Gave, Lost:
		return rec, nil
	case Staging:
		// No entry was ever written. The annex, whole or not, is left: whether all
		// of it is ours cannot be told, and nothing points at it.
		return x.outcome(&rec, nil, Gave, Gave)
	}
	if rec.Header == "" {
		return rec, fmt.Errorf("record of process %d has no header hash", rec.ID.PID)
	}
	kind, err := standing(p, rec)
	if err == nil {
		err = sameHeader(p, rec)
	}
	if err != nil {
		return x.outcome(&rec, err, rec.State, rec.State)
	}
	switch kind {
	case allNew:
		if rec.State == Applied {
			return rec, nil // nothing happened: nothing to note
		}
		return x.outcome(&rec, nil, Applied, Applied)
	case allPrev, allOriginal:
		done := Undone
		if rec.State == Staged || rec.State == Swapping {
			done = Gave
		}
		return x.outcome(&rec, nil, done, done)
	}
	if err := CheckGuards(p.Info()); err != nil {
		return rec, err
	}
	undoing := rec.State == Undoing
	to := func(s Site) []byte {
		if undoing {
			return s.Original
		}
		return s.Prev
	}
	c, err := partial(p, &rec, to)
	if err == nil {
		err = x.attempt(ctx, p, c, &rec)
	}
	done := Gave
	if undoing {
		done = Undone
	}
	return x.outcome(&rec, err, done, rec.State)
}

// sameHeader: the module must still be the one the record speaks of.
func sameHeader(p target.Process, rec Record) error {
	sum, err := headerSum(p, rec.Base)
	if err != nil {
		return lost(err, "%s at %s is not mapped any more", rec.Image, rec.Base)
	}
	if sum != rec.Header {
		return lost(nil, "another module stands at %s", rec.Base)
	}
	return nil
}

// Adopt finds a patch of ours that is in force in an image without a record: a
// fork child, a lost store, a second installation. It is believed only if the
// hotpatch image is the verified release's and every function body, with the
// annex's old bytes put back, has the hash the release names. ErrNotOurs if
// there is nothing to adopt.
func (x *Patcher) Adopt(ctx context.Context, p target.Process, base Loaded, patch *Patch) (Record, error) {
	regions, err := p.Regions()
	if err != nil {
		return Record{}, err
	}
	found := findAnnexes(p, regions, base)
	for _, a := range found {
		if a.Hash != hexOf(patch.Hash) || a.Release != patch.Release || a.Product != patch.Product {
			continue
		}
		ok, err := a.inForce(p)
		if err != nil {
			return Record{}, err
		}
		if !ok {
			continue
		}
		code, err := identify(base, patch, found)
		if err != nil {
			return Record{}, err
		}
		if err := vouched(a, patch, code); err != nil {
			return Record{}, err
		}
		rec := a.record(p.Info().ID)
		if rec.Header, err = headerSum(p, base.Base); err != nil {
			return Record{}, err
		}
		rec.Size = base.Size
		return x.outcome(&rec, nil, Applied, Applied)
	}
	return Record{}, ErrNotOurs
}

// ErrNotOurs: no patch of this release is in force there.
var ErrNotOurs = errors.New("no patch of this release is in force there")

// vouched: the entries the annex speaks of must be entries of the release, so
// that a forged header cannot make us write elsewhere. A site taken out by this
// sequence stands at its original and needs no word.
func vouched(a annex, patch *Patch, code originals) error {
	known := map[uint32]Function{}
	for _, f := range patch.Functions {
		known[f.RVA] = f
	}
	for _, s := range a.Sites {
		original, err := code.relocated(uint32(s.At-a.Base), len(s.Original))
		if err != nil {
			return err
		}
		if !bytes.Equal(original, s.Original) {
			return drifted(s.At, original, s.Original, "the annex's copy of "+s.Function)
		}
		if s.Target == 0 {
			continue
		}
		f, ok := known[s.RVA]
		if !ok {
			return drifted(s.At, nil, s.New, "the annex names a function that the release does not: it")
		}
		off := int64(s.At) - int64(a.Base) - int64(f.RVA)
		if off < 0 || off+int64(len(s.Original)) > int64(f.Length) || s.Length != f.Length {
			return drifted(s.At, nil, s.New, "the annex names a place outside "+f.Name+": it")
		}
		if s.Pad != nil && int64(s.Pad.At) != int64(a.Base)+int64(f.RVA)-longJump {
			return drifted(s.Pad.At, nil, s.New, "the annex names a pad outside "+f.Name+": it")
		}
	}
	return nil
}

// Mismatch is one place that is not as its record says.
type Mismatch struct {
	Function   string
	At         target.Addr
	Want, Have []byte
}

// Verify reads every entry of an applied record from memory. It changes nothing.
func Verify(p target.Process, rec Record) ([]Mismatch, error) {
	var out []Mismatch
	for _, s := range rec.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return out, err
		}
		if string(have) != string(s.New) {
			out = append(out, Mismatch{s.Function, s.At, s.New, have})
		}
		if s.Pad != nil {
			have, err := read(p, s.Pad.At, len(s.Pad.New))
			if err != nil {
				return out, err
			}
			if string(have) != string(s.Pad.New) {
				out = append(out, Mismatch{s.Function + " (pad)", s.Pad.At, s.Pad.New, have})
			}
		}
	}
	return out, nil
}
