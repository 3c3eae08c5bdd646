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

// write is one place in live code: what stands there, what shall, as many bytes.
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

// thawError: threads may still be held. swapped tells whether the writes stand.
type thawError struct {
	swapped bool
	err     error
}

func (e *thawError) Error() string { return e.err.Error() }

// swap freezes the process, checks everything again, writes, reads back and
// thaws. It is all or nothing: an error means that memory is as before, but
// for a *tornError and a *thawError. This is the only place that writes live code.
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
	var torn *tornError
	if thawErr == nil || errors.Is(thawErr, target.ErrGone) || errors.As(err, &torn) {
		return pause, err
	}
	return pause, &thawError{swapped: err == nil, err: errors.Join(thawErr, err)}
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
	late := !timer.Stop()
	late = !stop() || late
	if err != nil {
		cancel()
		return held{}, err
	}
	h := held{Frozen: f, cancel: cancel}
	if late { // by a hair: it may run out at any moment
		thawErr := thaw(h)
		if thawErr != nil && !errors.Is(thawErr, target.ErrGone) {
			return held{}, &thawError{err: thawErr}
		}
		return held{}, &target.Error{Op: "freeze", ID: p.Info().ID, Note: "its threads were not stopped in time", Err: target.ErrBusy}
	}
	return h, nil
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
	if err := tookEffect(p, c.writes); err != nil {
		return putBack(p, c.writes, err)
	}
	return nil
}

// tookEffect reads all of it back.
func tookEffect(p target.Process, writes []write) error {
	have, err := readPlaces(p, writes)
	if err != nil {
		return err
	}
	for i, w := range writes {
		if !bytes.Equal(have[i], w.to) {
			return fmt.Errorf("write %d of %d: %s at %s reads back % x after % x was written", i+1, len(writes), w.name, w.at, have[i], w.to)
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

// putBack restores what was written, in reverse, and reads it back. What cannot
// be restored does not keep the rest from being restored.
func putBack(p target.Process, writes []write, cause error) error {
	var torn *tornError
	for i := len(writes) - 1; i >= 0; i-- {
		w := writes[i]
		err := restore(p, w)
		if errors.Is(err, target.ErrGone) {
			return err
		}
		if err != nil && torn == nil {
			torn = &tornError{w.at, errors.Join(cause, err)}
		}
	}
	if torn != nil {
		return torn
	}
	return cause
}

// restore tries until a place reads as it did. Where writes are refused, as by
// a freeze that ran out, what was never changed is still as it was.
func restore(p target.Process, w write) (err error) {
	for range putBackTries {
		_, err = p.WriteAt(w.from, w.at)
		if errors.Is(err, target.ErrGone) {
			return err
		}
		have, rerr := read(p, w.at, len(w.from))
		switch {
		case errors.Is(rerr, target.ErrGone):
			return rerr
		case rerr == nil && bytes.Equal(have, w.from):
			if err = p.Flush(w.at, len(w.from)); err == nil || errors.Is(err, target.ErrGone) {
				return err
			}
		case err == nil && rerr != nil:
			err = rerr
		case err == nil:
			err = fmt.Errorf("reads back % x", have)
		}
	}
	return err
}

// sameModule compares the base's headers and the annex's nonce under the
// freeze: the module may have been unloaded, and another put there.
func sameModule(p target.Process, r *Record) error {
	if err := sameHeader(p, *r); err != nil {
		return err
	}
	fixed, err := read(p, r.Annex, annexFixed)
	if err != nil {
		return &unreadable{r.Annex, "the annex", err}
	}
	// The sum covers the header, nonce included.
	if string(fixed[:8]) != annexMagic || hex.EncodeToString(fixed[16:]) != r.AnnexSum {
		return goneAt(p, r.Annex, fixed, "the annex at %s is gone", r.Annex)
	}
	return nil
}

// sameHeader: the module must still be the one the record speaks of.
func sameHeader(p target.Process, r Record) error {
	b, err := read(p, r.Base, headerProbe)
	if err != nil {
		return &unreadable{r.Base, r.Image, err}
	}
	if sum := sha256.Sum256(b); hexOf(sum) != r.Header {
		return goneAt(p, r.Base, b, "another module stands at %s", r.Base)
	}
	return nil
}

// goneAt looks twice before it says so: what is lost is forgotten.
func goneAt(p target.Process, at target.Addr, seen []byte, format string, a ...any) error {
	again, err := read(p, at, len(seen))
	if err == nil && !bytes.Equal(again, seen) {
		err = errors.New("it reads differently each time")
	}
	if err != nil {
		return &unreadable{at, "what identifies it", err}
	}
	return fmt.Errorf("%w: %s", errLost, fmt.Sprintf(format, a...))
}

// errLost: what the record speaks of is not there any more. Touch nothing.
var errLost = errors.New("the image is not there any more")

// unreadable: a place that should be mapped could not be read.
type unreadable struct {
	at   target.Addr
	what string
	err  error
}

func (e *unreadable) Error() string {
	return fmt.Sprintf("cannot read %s at %s: %v", e.what, e.at, e.err)
}

func (e *unreadable) Unwrap() error { return e.err }

// missing tells a place that is not mapped any more, which is lost, from one
// that could not be read this time. Not under a freeze: it lists all mappings.
func missing(p target.Process, err error) error {
	var u *unreadable
	if !errors.As(err, &u) || errors.Is(err, target.ErrGone) || errors.Is(err, target.ErrDenied) {
		return err
	}
	regions, rerr := p.Regions()
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	if _, ok := regionAt(regions, u.at); ok {
		return err
	}
	return fmt.Errorf("%w: %s at %s is not mapped any more", errLost, u.what, u.at)
}

// standsAt compares every place with what the plan saw there.
func standsAt(p target.Process, writes []write) error {
	have, err := readPlaces(p, writes)
	if err != nil {
		return err
	}
	for i, w := range writes {
		if !bytes.Equal(have[i], w.from) {
			return drifted(w.at, w.from, have[i], w.name)
		}
	}
	return nil
}

// touch reads every page that will be written, so that it is present.
func touch(p target.Process, writes []write) error {
	_, err := readPlaces(p, writes)
	return err
}

func headerSum(p target.Process, base target.Addr) (string, error) {
	b, err := read(p, base, headerProbe)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
