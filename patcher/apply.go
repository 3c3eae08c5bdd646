package patcher

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

// placeTries bounds how often the annex is planned anew because the process
// took the place meanwhile.
const placeTries = 4

// Apply does what the plan says: the annex while threads run, the entries
// under one freeze. The record returned says how far it came, error or not:
//
//	Applied   all entries lead to the new functions
//	Staged    a thread was in the way (*Refusal, Busy); the annex waits for the next try
//	failed    nothing of the live code is changed
//	lost      process or image are over
//	torn      see the error; the process should be restarted
func (x *Patcher) Apply(ctx context.Context, p target.Process, plan *Plan) (Record, error) {
	if err := CheckGuards(p.Info()); err != nil {
		return plan.Record, err
	}
	rec := &plan.Record
	if plan.Reused {
		// Whoever filled it may have died before the flush.
		for _, part := range plan.parts {
			if part.prot&target.Exec == 0 {
				continue
			}
			if err := p.Flush(part.Start, int(part.End-part.Start)); err != nil {
				return *rec, x.fail(rec, err)
			}
		}
	} else if err := x.stage(ctx, p, plan); err != nil {
		return *rec, err
	}
	if err := plan.register(p); err != nil {
		return x.outcome(rec, asUnregistered(rec.Image, err), Staged, Staged)
	}
	return x.swapIn(ctx, p, rec)
}

// stage maps, fills and verifies the annex. What it mapped and could not
// finish it gives back: no thread can be in it yet.
func (x *Patcher) stage(ctx context.Context, p target.Process, plan *Plan) error {
	rec := &plan.Record
	for try := 0; ; try++ {
		if err := x.intend(rec, Staging); err != nil {
			return err
		}
		plan.survey.mapped(plan.Annex)
		err := fill(p, plan)
		if err == nil {
			if err = x.intend(rec, Staged); err == nil {
				return nil
			}
			rec.State = Gave // the journal has it as staging, which comes to the same
			return errors.Join(err, giveBack(p, plan, len(plan.parts)))
		}
		if errors.Is(err, target.ErrTaken) && try < placeTries && len(plan.others) > 0 {
			at := plan.others[0]
			plan.others = plan.others[1:]
			if err := plan.lay(at); err != nil {
				return x.fail(rec, err)
			}
			continue
		}
		return x.fail(rec, err)
	}
}

// fail journals an outcome after which the live code is as before.
func (x *Patcher) fail(rec *Record, err error) error {
	rec.Note = err.Error()
	state := Gave
	if errors.Is(err, target.ErrGone) || errors.Is(err, errLost) {
		state = Lost
	}
	return errors.Join(err, x.journal(rec, state))
}

// fill maps the parts and writes the annex, header first, and reads it back.
func fill(p target.Process, plan *Plan) error {
	for i, part := range plan.parts {
		if err := p.Alloc(part.Start, uint64(part.End-part.Start), part.prot); err != nil {
			return errors.Join(err, giveBack(p, plan, i))
		}
		b := plan.image[part.Start-plan.Annex : part.End-plan.Annex]
		if err := fillPart(p, part, b); err != nil {
			return errors.Join(err, giveBack(p, plan, i+1))
		}
	}
	return nil
}

func fillPart(p target.Process, part part, b []byte) error {
	if _, err := p.WriteAt(b, part.Start); err != nil {
		return err
	}
	if part.prot&target.Exec != 0 {
		if err := p.Flush(part.Start, len(b)); err != nil {
			return err
		}
	}
	have, err := read(p, part.Start, len(b))
	if err == nil && !bytes.Equal(have, b) {
		err = fmt.Errorf("annex at %s does not read back as written", part.Start)
	}
	return err
}

// giveBack unmaps the first n parts, mapped by this very call and never reached
// by any thread. The nonce and the base are read again first: this must still
// be our memory beside that image.
func giveBack(p target.Process, plan *Plan, n int) error {
	if n == 0 {
		return nil
	}
	if err := sameModule(p, &plan.Record); err != nil {
		return nil // the process is over, or the header never got there: a few pages are left, nothing points at them
	}
	var errs []error
	for i := n - 1; i >= 0; i-- {
		s := plan.parts[i].Span
		if err := p.Free(s.Start, uint64(s.End-s.Start)); err != nil && !errors.Is(err, target.ErrGone) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// swapIn brings a staged record into force.
func (x *Patcher) swapIn(ctx context.Context, p target.Process, rec *Record) (Record, error) {
	rec.Attempts = 0
	if err := x.intend(rec, Swapping); err != nil {
		return *rec, err
	}
	err := x.attempt(ctx, p, forward(rec), rec)
	return x.outcome(rec, err, Applied, Staged)
}

// attempt swaps, again and again while threads are in the way, within the budget.
func (x *Patcher) attempt(ctx context.Context, p target.Process, c change, rec *Record) error {
	attempts := x.Attempts
	if attempts == 0 {
		attempts = DefaultAttempts
	}
	wait := firstWait
	for i := 1; ; i++ {
		regions, err := p.Regions()
		if err != nil {
			return err
		}
		pause, err := swap(ctx, p, c, regions)
		rec.Attempts++
		var held *thawError
		if err == nil || errors.As(err, &held) && held.swapped {
			rec.Pause = pause
			return err
		}
		var torn *tornError
		if errors.As(err, &torn) { // of an image that went away nothing is torn
			if lost := missing(p, &unreadable{torn.at, rec.Image, err}); errors.Is(lost, errLost) {
				return lost
			}
			return err
		}
		if held != nil || !errors.Is(err, target.ErrBusy) {
			return missing(p, err)
		}
		if i >= attempts {
			return asBusy(err)
		}
		if x.sleep(ctx, wait) != nil {
			return asBusy(err)
		}
		wait = min(2*wait, longestWait)
	}
}

// asBusy gives a backend's ErrBusy the shape callers expect.
func asBusy(err error) error {
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return &Refusal{Reason: Busy, Code: "freeze", Remedy: Wait, Text: busyText(err), Detail: err.Error(), Err: err}
}

// busyText is the backend's note on the thread it could not stop.
func busyText(err error) string {
	var e *target.Error
	if errors.As(err, &e) && e.Note != "" {
		return e.Note
	}
	return "a thread could not be stopped in time"
}

// outcome journals how a swap ended. back is the state of a record whose swap
// did not happen.
func (x *Patcher) outcome(rec *Record, err error, done, back State) (Record, error) {
	var torn *tornError
	var held *thawError
	var refusal *Refusal
	state := done
	switch {
	case err == nil:
		rec.Note = ""
	case errors.As(err, &torn):
		state = TornUp
		err = &Refusal{Reason: Torn, Code: "torn", Remedy: RestartProcess, At: torn.at,
			Text: fmt.Sprintf("an entry of %s could not be written back: restart process %d", rec.Image, rec.ID.PID), Detail: err.Error(), Err: err}
	case errors.As(err, &held):
		if !held.swapped {
			state = back
		}
		err = &Refusal{Reason: Failed, Code: "thaw", Remedy: RestartProcess,
			Text: fmt.Sprintf("threads of process %d may still be held", rec.ID.PID), Detail: err.Error(), Err: err}
	case errors.Is(err, target.ErrGone), errors.Is(err, errLost):
		state = Lost
	case errors.As(err, &refusal):
		state = back
	default:
		state = back
		err = &Refusal{Reason: Failed, Code: "write", Remedy: Wait, Text: "the memory could not be changed, and is as before", Detail: err.Error(), Err: err}
	}
	if err != nil {
		rec.Note = err.Error()
	}
	if jerr := x.journal(rec, state); jerr != nil {
		err = errors.Join(err, jerr)
	}
	return *rec, err
}
