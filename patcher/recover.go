package patcher

import (
	"context"
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
	m, err := standing(p, rec)
	if err == nil {
		err = sameHeader(p, rec)
	}
	if err != nil {
		return x.outcome(&rec, err, rec.State, rec.State)
	}
	undoing, pending := rec.State == Undoing, rec.State == Staged || rec.State == Swapping
	switch {
	case m.new:
		return x.outcome(&rec, nil, Applied, Applied)
	case m.prev && (pending || rec.Previous != nil && !undoing):
		return x.outcome(&rec, nil, Gave, Gave)
	case m.original:
		return x.outcome(&rec, nil, Undone, Undone)
	}
	if err := CheckGuards(p.Info()); err != nil {
		return rec, err
	}
	to, done := func(s Site) []byte { return s.Prev }, Gave
	if undoing {
		to, done = func(s Site) []byte { return s.Original }, Undone
	}
	err = x.attempt(ctx, p, m.change(&rec, to), &rec)
	return x.outcome(&rec, err, done, rec.State)
}

// sameHeader: the module must still be the one the record speaks of.
func sameHeader(p target.Process, rec Record) error {
	sum, err := headerSum(p, rec.Base)
	if err != nil {
		return missing(p, &unreadable{rec.Base, rec.Image, err})
	}
	if sum != rec.Header {
		return fmt.Errorf("%w: another module stands at %s", errLost, rec.Base)
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
