package repository

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"hotpatchd/agent/release"
)

// maxReason bounds the reason of a halt, in bytes: every device shows it.
const maxReason = 500

// RolloutChange is what a publisher says anew of one release. What is nil stays.
type RolloutChange struct {
	Percent   *int       // of devices, 0 to 100
	NotBefore *time.Time // the zero time takes it away
	Halt      *bool
	Undo      *bool // only with a halt; ends with it
	Reason    *string
}

// RolloutResult is Result with what became of the release.
type RolloutResult struct {
	Result
	ID       string   `json:"id"`
	Before   Rollout  `json:"before"`
	After    Rollout  `json:"after"`
	Changes  []string `json:"changes"`  // sentences; none: it was so already
	Warnings []string `json:"warnings"` // Result's, and what the change does not do
}

// ErrUnknownRelease: the repository names no such release.
var ErrUnknownRelease = errors.New("no such release")

// SetRollout signs the publisher's word on a published release anew, and
// nothing else of it: published stays, so that no device's deferral begins
// again. What is so already is not signed again.
func SetRollout(dir string, keys Keys, id string, c RolloutChange, opts PublishOptions) (RolloutResult, error) {
	p, unlock, err := open(dir, keys, opts, false)
	if err != nil {
		return RolloutResult{}, err
	}
	defer unlock()
	name := targetName(id)
	t := p.set.targets.Signed.Targets[name]
	if t == nil {
		return RolloutResult{}, fmt.Errorf("%w: %.64q is not published in %s", ErrUnknownRelease, id, dir)
	}
	if _, err := readOffer(name, t); err != nil {
		return RolloutResult{}, fmt.Errorf("cannot change the rollout of %s: %w", id, err)
	}
	var word custom
	if err := release.Decode(*t.Custom, &word); err != nil {
		return RolloutResult{}, fmt.Errorf("cannot change the rollout of %s: it %w", id, err)
	}
	res := RolloutResult{ID: id, Before: word.Rollout, Changes: []string{}}
	if res.After, err = c.apply(word.Rollout); err != nil {
		return RolloutResult{}, err
	}
	res.Changes = append(res.Changes, differences(res.Before, res.After)...)
	if len(res.Changes) == 0 {
		res.Result = p.report()
		res.Warnings = append(append([]string{}, res.Result.Warnings...), cautions(res.Before, res.After, c, p.opts.Now)...)
		return res, nil
	}
	word.Rollout = res.After
	text, err := json.Marshal(word)
	if err != nil {
		return RolloutResult{}, err
	}
	raw := json.RawMessage(text)
	t.Custom = &raw
	if _, err := readOffer(name, t); err != nil {
		return RolloutResult{}, fmt.Errorf("release %s would not be read by devices: %w", id, err)
	}
	if res.Result, err = p.finish(true); err != nil {
		return RolloutResult{}, err
	}
	res.Warnings = append(append([]string{}, res.Result.Warnings...), cautions(res.Before, res.After, c, p.opts.Now)...)
	return res, nil
}

// apply is the rollout after the change.
func (c RolloutChange) apply(r Rollout) (Rollout, error) {
	if c.Percent != nil {
		r.Percent = *c.Percent
	}
	if c.NotBefore != nil {
		r.NotBefore = nil
		if !c.NotBefore.IsZero() {
			at := c.NotBefore.UTC().Truncate(time.Second)
			r.NotBefore = &at
		}
	}
	if c.Halt != nil {
		r.Halt = *c.Halt
	}
	if c.Undo != nil {
		r.Undo = *c.Undo
	}
	if c.Reason != nil {
		r.Reason = *c.Reason
	}
	if c.Halt != nil && !*c.Halt { // with the halt its order and its reason are over
		if c.Undo != nil && *c.Undo {
			return r, errors.New("undo needs a halt: what is not halted would come back at once")
		}
		r.Undo, r.Reason = false, ""
	}
	return r, r.check()
}

// check tells what a rollout cannot say.
func (r Rollout) check() error {
	switch {
	case r.Percent < 0 || r.Percent > 100:
		return fmt.Errorf("a rollout of %d percent is not between 0 and 100", r.Percent)
	case r.Undo && !r.Halt:
		return errors.New("undo needs a halt: what is not halted would come back at once")
	case r.Halt && r.Reason == "":
		return errors.New("a halt needs a reason: every device shows it")
	case len(r.Reason) > maxReason:
		return fmt.Errorf("the reason has %d bytes, at most %d are shown", len(r.Reason), maxReason)
	case !r.Halt && r.Reason != "":
		return errors.New("a reason needs a halt: nothing else shows it")
	}
	return nil
}

// differences says what changed, in the order in which it matters.
func differences(a, b Rollout) []string {
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch {
	case b.Halt && !a.Halt && b.Undo:
		add("halted, and undone where it is: %s", b.Reason)
	case b.Halt && !a.Halt:
		add("halted, where it is in force it stays: %s", b.Reason)
	case a.Halt && !b.Halt:
		add("not halted any more")
	case b.Undo && !a.Undo:
		add("undone where it is")
	case a.Undo && !b.Undo:
		add("halted only: not undone any more where it still is")
	}
	if a.Halt && b.Halt && a.Reason != b.Reason {
		add("reason: %s", b.Reason)
	}
	if a.Percent != b.Percent {
		add("%d percent of devices, was %d", b.Percent, a.Percent)
	}
	switch was, is := moment(deref(a.NotBefore)), moment(deref(b.NotBefore)); {
	case deref(a.NotBefore).Equal(deref(b.NotBefore)):
	case b.NotBefore == nil:
		add("at once, was not before %s", was)
	case a.NotBefore == nil:
		add("not before %s", is)
	default:
		add("not before %s, was %s", is, was)
	}
	return out
}

func deref(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return *t
}

// cautions says what a change does not do, where one could think that it does.
func cautions(a, b Rollout, c RolloutChange, now time.Time) []string {
	var out []string
	stays := !b.Undo && (b.Percent < a.Percent || deref(b.NotBefore).After(now) && !deref(a.NotBefore).After(now) && a.Percent > 0)
	if stays {
		out = append(out, "devices that have it keep it: only --halt --undo takes it out")
	}
	if b.Halt && !b.Undo && !a.Halt {
		out = append(out, "devices that have it keep it: --halt --undo takes it out")
	}
	if b.Halt && (c.Percent != nil || c.NotBefore != nil) {
		out = append(out, "it is halted: no device takes it, whatever its percent and time; --halt=false ends that")
	}
	if c.NotBefore != nil && b.NotBefore != nil && !b.NotBefore.After(now) {
		out = append(out, "that time is past: it keeps no device back")
	}
	return slices.Compact(out)
}
