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
		err = missing(p, sameHeader(p, rec))
	}
	if err == nil {
		err = flushAll(p, rec)
	}
	if err != nil {
		return x.outcome(&rec, err, rec.State, rec.State)
	}
	undoing := rec.State == Undoing
	// A swap that goes back was given up, and the older sequence is in force
	// again; what was in force and is not any more was undone.
	done := Undone
	if rec.State == Staged || rec.State == Swapping || rec.Previous != nil && !undoing {
		done = Gave
	}
	switch {
	case m.new:
		return x.outcome(&rec, nil, Applied, Applied)
	case m.prev && !undoing:
		return x.outcome(&rec, nil, done, done)
	case m.original:
		return x.outcome(&rec, nil, Undone, Undone)
	}
	if err := CheckGuards(p.Info()); err != nil {
		return rec, err
	}
	err = x.attempt(ctx, p, m.back(&rec, undoing), &rec)
	return x.outcome(&rec, err, done, rec.State)
}

// flushAll: our death may have come between a write and its flush.
func flushAll(p target.Process, rec Record) error {
	for _, s := range rec.Sites {
		if s.Pad != nil {
			if err := p.Flush(s.Pad.At, len(s.Pad.New)); err != nil {
				return err
			}
		}
		if err := p.Flush(s.At, len(s.New)); err != nil {
			return err
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
