package patcher

import (
	"bytes"
	"context"
	"fmt"

	"hotpatchd/patcher/target"
)

// Undo restores the original entries of a record in force. Pads stay, recorded
// as ours, and so does the annex: threads may still be in it. A record that is
// undone already, or never came into force, is returned as it is.
func (x *Patcher) Undo(ctx context.Context, p target.Process, rec Record) (Record, error) {
	if !rec.Live() {
		return rec, nil
	}
	if err := CheckGuards(p.Info()); err != nil {
		return rec, err
	}
	kind, err := standing(p, rec)
	if err != nil {
		return x.outcome(&rec, err, rec.State, rec.State)
	}
	if kind == allOriginal {
		return x.outcome(&rec, nil, Undone, Undone)
	}
	back := rec.State
	if err := x.journal(&rec, Undoing); err != nil {
		return rec, fmt.Errorf("cannot write the journal: %w", err)
	}
	c, err := partial(p, &rec, func(s Site) []byte { return s.Original })
	if err == nil {
		err = x.attempt(ctx, p, c, &rec)
	}
	if back == Undoing || back == Swapping {
		back = Applied
	}
	return x.outcome(&rec, err, Undone, back)
}

// kindOfMemory is what the entries of a record look like taken together.
type kindOfMemory int

const (
	allNew kindOfMemory = iota
	allPrev
	allOriginal
	mixed
)

// standing reads every entry of a record. An entry that is none of ours is drift.
func standing(p target.Process, rec Record) (kindOfMemory, error) {
	news, prevs, originals := 0, 0, 0
	for _, s := range rec.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return 0, lost(err, "%s at %s is not mapped any more", rec.Image, rec.Base)
		}
		known := false
		if bytes.Equal(have, s.New) {
			news, known = news+1, true
		}
		if bytes.Equal(have, s.Prev) {
			prevs, known = prevs+1, true
		}
		if bytes.Equal(have, s.Original) {
			originals, known = originals+1, true
		}
		if !known {
			if err := sameModule(p, &rec); err != nil {
				return 0, err
			}
			return 0, drifted(s.At, s.New, have, s.Function)
		}
	}
	switch n := len(rec.Sites); {
	case news == n:
		return allNew, nil
	case originals == n:
		return allOriginal, nil
	case prevs == n:
		return allPrev, nil
	}
	return mixed, nil
}

// partial lists the writes that bring whatever of ours stands at each entry to
// the wanted bytes.
func partial(p target.Process, rec *Record, to func(Site) []byte) (change, error) {
	c := change{rec: rec}
	for _, s := range rec.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return c, err
		}
		if !bytes.Equal(have, to(s)) {
			c.writes = append(c.writes, write{s.At, have, to(s), s.Function})
		}
	}
	return c, nil
}
