package patcher

import (
	"bytes"
	"context"

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
	m, err := standing(p, rec)
	if err != nil {
		return x.outcome(&rec, err, rec.State, rec.State)
	}
	if m.original {
		return x.outcome(&rec, nil, Undone, Undone)
	}
	back := rec.State
	if m.new {
		back = Applied
	}
	if err := x.intend(&rec, Undoing); err != nil {
		return rec, err
	}
	err = x.attempt(ctx, p, m.back(&rec, true), &rec)
	return x.outcome(&rec, err, Undone, back)
}

// stood is what stands at the entries of a record and in the pads they lead
// through, all of it known to be of our making, and what that is taken
// together. More than one may be true.
type stood struct {
	entries, pads       [][]byte // as the sites; a pad is nil where there is none
	new, prev, original bool
}

// standing reads every entry and pad of a record. What is none of ours is
// drift. Where our death may have come in the middle of a write, the start of
// one of our byte strings and the end of another are ours, too.
func standing(p target.Process, rec Record) (stood, error) {
	m := stood{new: true, prev: true, original: true}
	torn := rec.State == Swapping || rec.State == Undoing || rec.State == TornUp
	known := func(have []byte, ours ...[]byte) bool {
		for _, a := range ours {
			for _, b := range ours {
				for i := range have {
					if bytes.Equal(have[:i], a[:i]) && bytes.Equal(have[i:], b[i:]) && (torn || i == 0) {
						return true
					}
				}
			}
		}
		return false
	}
	for _, s := range rec.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return m, missing(p, &unreadable{s.At, rec.Image, err})
		}
		var pad []byte
		if s.Pad != nil {
			if pad, err = read(p, s.Pad.At, len(s.Pad.New)); err != nil {
				return m, missing(p, &unreadable{s.Pad.At, rec.Image, err})
			}
		}
		isOriginal := bytes.Equal(have, s.Original) // whatever is in the pad: nothing leads there
		if !known(have, s.New, s.Prev, s.Original) || pad != nil && !isOriginal && !known(pad, s.Pad.New, s.Pad.Prev) {
			if err := sameModule(p, &rec); err != nil {
				return m, missing(p, err)
			}
			return m, drifted(s.At, s.New, have, s.Function)
		}
		m.entries, m.pads = append(m.entries, have), append(m.pads, pad)
		m.new = m.new && bytes.Equal(have, s.New) && (pad == nil || bytes.Equal(pad, s.Pad.New))
		m.prev = m.prev && bytes.Equal(have, s.Prev) && (pad == nil || isOriginal || bytes.Equal(pad, s.Pad.Prev))
		m.original = m.original && isOriginal
	}
	return m, nil
}

// back lists the writes that bring what stood at each entry back: to the
// original, or to what stood there before the record, pads included. Where
// anything but a whole jump of ours gives way, nothing may stand anywhere
// inside it: what the plan knew of its instructions was for another moment.
func (m stood) back(rec *Record, original bool) change {
	c := change{rec: rec}
	for i, s := range rec.Sites {
		to := s.Prev
		if original {
			to = s.Original
		}
		if pad := m.pads[i]; pad != nil && !bytes.Equal(to, s.Original) && !bytes.Equal(pad, s.Pad.Prev) {
			c.writes = append(c.writes, write{s.Pad.At, pad, s.Pad.Prev, s.Function})
			for k := range pad {
				c.interior = append(c.interior, s.Pad.At+target.Addr(k))
			}
		}
	}
	for i, s := range rec.Sites {
		to, have := s.Prev, m.entries[i]
		if original {
			to = s.Original
		}
		if bytes.Equal(have, to) {
			continue
		}
		c.writes = append(c.writes, write{s.At, have, to, s.Function})
		jump := !bytes.Equal(have, s.Original) && (bytes.Equal(have, s.New) || bytes.Equal(have, s.Prev))
		for k := 1; !jump && k < len(have); k++ {
			c.interior = append(c.interior, s.At+target.Addr(k))
		}
	}
	return c
}
