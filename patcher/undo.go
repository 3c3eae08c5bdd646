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
	err = x.attempt(ctx, p, m.change(&rec, func(s Site) []byte { return s.Original }), &rec)
	return x.outcome(&rec, err, Undone, back)
}

// stood is what stands at the entries of a record, each of them known to be
// of its making, and what that is taken together. More than one may be true.
type stood struct {
	have                [][]byte
	new, prev, original bool
}

// standing reads every entry of a record. An entry that is none of ours is drift.
func standing(p target.Process, rec Record) (stood, error) {
	m := stood{new: true, prev: true, original: true}
	for _, s := range rec.Sites {
		have, err := read(p, s.At, len(s.New))
		if err != nil {
			return m, missing(p, &unreadable{s.At, rec.Image, err})
		}
		isNew, isPrev, isOriginal := bytes.Equal(have, s.New), bytes.Equal(have, s.Prev), bytes.Equal(have, s.Original)
		if !isNew && !isPrev && !isOriginal {
			if err := sameModule(p, &rec); err != nil {
				return m, missing(p, err)
			}
			return m, drifted(s.At, s.New, have, s.Function)
		}
		m.have = append(m.have, have)
		m.new, m.prev, m.original = m.new && isNew, m.prev && isPrev, m.original && isOriginal
	}
	return m, nil
}

// change lists the writes that bring what stood at each entry to the wanted
// bytes. Where an original gives way, nothing may stand anywhere inside it:
// what the plan knew of its instructions was for another moment.
func (m stood) change(rec *Record, to func(Site) []byte) change {
	c := change{rec: rec}
	for i, s := range rec.Sites {
		if bytes.Equal(m.have[i], to(s)) {
			continue
		}
		c.writes = append(c.writes, write{s.At, m.have[i], to(s), s.Function})
		if bytes.Equal(m.have[i], s.Original) {
			for k := 1; k < len(s.Original); k++ {
				c.interior = append(c.interior, s.At+target.Addr(k))
			}
		}
	}
	return c
}
