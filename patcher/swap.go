package patcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"hotpatchd/patcher/target"
)

// write is one place in live code: what stands there, what shall.
type write struct {
	at       target.Addr
	from, to []byte
	name     string
}

// change is everything done under one freeze.
type change struct {
	rec      *Record
	writes   []write       // in order; the smallest of a site last
	interior []target.Addr // no thread may be there or return there
}

// forward lists the writes that bring a process from Prev to New.
func forward(r *Record) change {
	c := change{rec: r}
	for _, s := range r.Sites {
		if p := s.Pad; p != nil && !bytes.Equal(p.Prev, p.New) {
			c.writes = append(c.writes, write{p.At, p.Prev, p.New, s.Function})
			for i := range p.New {
				c.interior = append(c.interior, p.At+target.Addr(i))
			}
		}
	}
	for _, s := range r.Sites {
		c.writes = append(c.writes, write{s.At, s.Prev, s.New, s.Function})
		c.interior = append(c.interior, s.Interior...)
	}
	return c
}

// tornError: a place could not be written back.
type tornError struct {
	at  target.Addr
	err error
}

func (e *tornError) Error() string {
	return fmt.Sprintf("%s could not be written back: %v", e.at, e.err)
}

// swap freezes the process, checks everything again, writes, reads back and
// thaws. It is all or nothing: an error means that memory is as before, but
// for a *tornError. This is the only place that writes live code.
func swap(ctx context.Context, p target.Process, c change, regions []target.Region) (pause time.Duration, err error) {
	if err := touch(p, c.writes); err != nil { // page faults belong before the freeze
		return 0, err
	}
	f, err := freeze(ctx, p)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	err = swapFrozen(p, f, c, regions)
	thawErr := thaw(f)
	pause = time.Since(began)
	if m, ok := f.Frozen.(target.Pauser); ok {
		pause = m.Pause()
	}
	if err == nil {
		err = thawErr
	}
	return pause, err
}

// freezeDeadline bounds a freeze whatever the number of threads; backends keep
// to target.FreezeLimit within it.
const freezeDeadline = 5 * time.Second

// freeze bounds the stopping alone. Once all threads stand, neither a deadline
// nor a caller who goes away may let them run between two writes: what follows
// is bounded by itself.
func freeze(ctx context.Context, p target.Process) (held, error) {
	fctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	timer := time.AfterFunc(freezeDeadline, cancel)
	stop := context.AfterFunc(ctx, cancel)
	f, err := p.Freeze(fctx)
	timer.Stop()
	stop()
	if err != nil {
		cancel()
		return held{}, err
	}
	return held{Frozen: f, cancel: cancel}, nil
}

// held ends the freeze's context with the freeze.
type held struct {
	target.Frozen
	cancel context.CancelFunc
}

func (h held) Thaw() error {
	err := h.Frozen.Thaw()
	h.cancel()
	return err
}

// thaw insists: a thread held by us must never stay so.
func thaw(f held) (err error) {
	for range 3 {
		if err = f.Thaw(); err == nil {
			return nil
		}
	}
	return err
}

func swapFrozen(p target.Process, f held, c change, regions []target.Region) error {
	if err := sameModule(p, c.rec); err != nil {
		return err
	}
	if err := standsAt(p, c.writes); err != nil {
		return err
	}
	if err := checkThreads(p, f.Frozen, c, regions); err != nil {
		return err
	}
	for i, w := range c.writes {
		if err := put(p, w.at, w.to); err != nil {
			return putBack(p, c.writes[:i+1], err)
		}
	}
	for i, w := range c.writes {
		have, err := read(p, w.at, len(w.to))
		if err == nil && !bytes.Equal(have, w.to) {
			err = fmt.Errorf("%s at %s reads back % x after % x was written", w.name, w.at, have, w.to)
		}
		if err != nil {
			return putBack(p, c.writes, fmt.Errorf("write %d of %d: %w", i+1, len(c.writes), err))
		}
	}
	return nil
}

// put writes and flushes one place.
func put(p target.Process, at target.Addr, b []byte) error {
	if _, err := p.WriteAt(b, at); err != nil {
		return err
	}
	return p.Flush(at, len(b))
}

// putBackTries: a write that failed once may fail once more (a page swapped in
// under memory pressure), hardly three times.
const putBackTries = 3

// putBack restores what was written, in reverse, and reads it back.
func putBack(p target.Process, writes []write, cause error) error {
	for i := len(writes) - 1; i >= 0; i-- {
		w := writes[i]
		var err error
		for range putBackTries {
			if err = put(p, w.at, w.from); err != nil {
				continue
			}
			var have []byte
			if have, err = read(p, w.at, len(w.from)); err == nil && bytes.Equal(have, w.from) {
				break
			}
			if err == nil {
				err = fmt.Errorf("reads back % x", have)
			}
		}
		if err != nil {
			if errors.Is(err, target.ErrGone) {
				return err
			}
			return &tornError{w.at, errors.Join(cause, err)}
		}
	}
	return cause
}

// sameModule compares the base's headers and the annex's nonce under the
// freeze: the module may have been unloaded, and another put there.
func sameModule(p target.Process, r *Record) error {
	headers, err := read(p, r.Base, headerProbe)
	if err != nil {
		return lost(err, "%s at %s is not mapped any more", r.Image, r.Base)
	}
	if sum := sha256.Sum256(headers); hexOf(sum) != r.Header {
		return lost(nil, "another module stands at %s", r.Base)
	}
	fixed, err := read(p, r.Annex, annexFixed)
	if err != nil {
		return lost(err, "the annex at %s is not mapped any more", r.Annex)
	}
	// The sum covers the header, nonce included.
	if string(fixed[:8]) != annexMagic || hex.EncodeToString(fixed[16:]) != r.AnnexSum {
		return lost(nil, "the annex at %s is gone", r.Annex)
	}
	return nil
}

// errLost: what the record speaks of is not there any more. Touch nothing.
var errLost = errors.New("the image is not there any more")

func lost(err error, format string, a ...any) error {
	if errors.Is(err, target.ErrGone) {
		return err
	}
	return fmt.Errorf("%w: %s", errLost, fmt.Sprintf(format, a...))
}

// standsAt compares every place with what the plan saw there.
func standsAt(p target.Process, writes []write) error {
	for _, w := range writes {
		have, err := read(p, w.at, len(w.from))
		if err != nil {
			return err
		}
		if !bytes.Equal(have, w.from) {
			return drifted(w.at, w.from, have, w.name)
		}
	}
	return nil
}

// touch reads every page that will be written, so that it is present.
func touch(p target.Process, writes []write) error {
	for _, w := range writes {
		if _, err := read(p, w.at, len(w.from)); err != nil {
			return err
		}
	}
	return nil
}

func headerSum(p target.Process, base target.Addr) (string, error) {
	b, err := read(p, base, headerProbe)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
