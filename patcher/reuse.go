package patcher

import (
	"bytes"
	"encoding/binary"
	"errors"

	"hotpatchd/patcher/target"
)

// reuse takes an annex of the same hotpatch image that is not in force: one of
// an attempt that found threads in the way, or of an undone patch. Its code and
// constants must be what would be written anew, and its slots bound as they
// would be now; its data stays as the functions left it.
func (x *Plan) reuse(p target.Process, regions []target.Region, found []annex) (bool, error) {
	for _, a := range found {
		if a.Hash != x.Hash || a.Release != x.Release || a.Product != x.Product || (x.Previous != nil && x.Previous.Annex == a.At) {
			continue
		}
		trial := *x
		trial.Sites = cloneSites(x.Sites)
		trial.Nonce = a.Nonce
		if trial.lay(a.At) != nil || len(trial.parts) != len(a.Parts) || uint64(len(trial.image)) != a.Size {
			continue
		}
		if !trial.mapped(regions) || !sameSites(trial.Sites, a.Sites) {
			continue
		}
		same, err := trial.sameContents(p)
		if err != nil {
			return false, err
		}
		if same {
			trial.image, trial.Reused, trial.AnnexSum = nil, true, a.sum
			*x = trial
			return true, nil
		}
	}
	return false, nil
}

// mapped tells whether every part of the annex is private memory of the
// protection it was given.
func (x *Plan) mapped(regions []target.Region) bool {
	for _, part := range x.parts {
		for at := part.Start; at < part.End; {
			r, ok := regionAt(regions, at)
			if !ok || r.Prot != part.prot || r.Shared || r.Kind != target.Private {
				return false
			}
			at = r.End
		}
	}
	return true
}

// sameContents compares what must not differ: all parts behind the header that
// cannot be written to, and the bound slots of those that can.
func (x *Plan) sameContents(p target.Process) (bool, error) {
	image := x.Annex + target.Addr(x.headRoom())
	for _, part := range x.parts {
		if part.prot&target.Write != 0 {
			continue
		}
		at := max(part.Start, image) // the header is compared site by site
		if ok, err := x.sameBytes(p, at, int(part.End)-int(at)); err != nil || !ok {
			return false, err
		}
	}
	for _, b := range x.Binds {
		have, err := read(p, image+target.Addr(b.Slot), 8)
		if errors.Is(err, target.ErrGone) {
			return false, err
		}
		if err != nil || binary.LittleEndian.Uint64(have) != b.Value {
			return false, nil
		}
	}
	return true, nil
}

func (x *Plan) sameBytes(p target.Process, at target.Addr, n int) (bool, error) {
	if n <= 0 {
		return true, nil
	}
	have, err := read(p, at, n)
	if errors.Is(err, target.ErrGone) {
		return false, err
	}
	return err == nil && bytes.Equal(have, x.image[at-x.Annex:][:n]), nil
}

// sameSites: the header in memory must tell how to undo what will be written.
func sameSites(plan, header []Site) bool {
	if len(plan) != len(header) {
		return false
	}
	for i, s := range plan {
		h := header[i]
		if s.RVA != h.RVA || s.Length != h.Length || s.At != h.At || !bytes.Equal(s.New, h.New) ||
			!bytes.Equal(s.Original, h.Original) || !bytes.Equal(s.Canonical, h.Canonical) || (s.Pad == nil) != (h.Pad == nil) {
			return false
		}
		if s.Pad != nil && (s.Pad.At != h.Pad.At || !bytes.Equal(s.Pad.New, h.Pad.New) || !bytes.Equal(s.Pad.Original, h.Pad.Original)) {
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
