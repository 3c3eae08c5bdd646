package baseline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Recovered is what Recover has done to one set.
type Recovered struct {
	Was Record
	Now Record // Phase "" if its story is over
	Err error
}

// Recover ends what was under way when we died. It comes before anything else.
// A set that was being activated becomes active; only if that cannot be are all
// its old files brought back.
func (x *Area) Recover(now time.Time) []Recovered {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []Recovered
	for product, r := range x.records {
		var err error
		switch r.Phase {
		case Staging, Clearing:
			err = x.clear(r, now)
		case Scheduling:
			err = x.halfScheduled(r, now)
		case Activating:
			_, err = x.forward(r, now)
		case Reverting:
			err = x.revert(r, now)
		default:
			continue
		}
		out = append(out, Recovered{Was: r, Now: x.records[product], Err: err})
	}
	return out
}

// halfScheduled: the system knew of some moves when we died. If it was restarted
// since, some files may be new.
func (x *Area) halfScheduled(r Record, now time.Time) error {
	for _, e := range r.Files {
		if sum, err := hashOf(e.Destination); err == nil && sum == e.New {
			_, err := x.forward(r, now)
			return err
		}
	}
	return x.clear(r, now)
}

// Activate has a set take effect, or the old files of one that is Leaving. It
// is for the first start after a restart, before any process is touched: in the
// boot in which the set was staged it refuses with ErrSameBoot. A Refusal means
// that the destinations are as they were and the set is gone; ErrNotMoved that
// it waits for one more restart.
func (x *Area) Activate(product, boot string, now time.Time) (Record, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Staged && r.Phase != Leaving {
		return r, ErrNoSet
	}
	if boot == "" || boot == r.Boot {
		return r, ErrSameBoot
	}
	if r.Phase == Leaving {
		return x.leave(r, boot, now)
	}
	news, err := x.ready(r)
	if err != nil {
		return Record{}, errors.Join(err, x.clear(r, now))
	}
	if x.mover != nil && news == 0 {
		if r, err = x.schedule(r, boot, now); err != nil {
			return r, err
		}
		if r, err = x.reached(r, Staged, boot, now); err != nil {
			return r, err
		}
		return r, ErrNotMoved
	}
	if r, err = x.reached(r, Activating, boot, now); err != nil {
		return r, err
	}
	return x.forward(r, now)
}

// ready tells whether all of a set can take effect, touching nothing: every
// destination is as it was when it was staged, or new already; every new file
// is whole.
func (x *Area) ready(r Record) (news int, err error) {
	for _, e := range r.Files {
		isNew, err := x.readyFile(e)
		if err != nil {
			return 0, err
		}
		if isNew {
			news++
		}
	}
	return news, nil
}

// readyFile tells whether a file can take effect; isNew: it has already.
func (x *Area) readyFile(e Entry) (isNew bool, err error) {
	if err := checkPlace(e.Destination); err != nil {
		return false, err
	}
	sum, err := hashOf(e.Destination)
	if err != nil {
		return false, refuse(CodeIO, e.Destination, "%w", err)
	}
	if sum == e.New {
		return true, nil
	}
	if sum != e.Old {
		return false, refuse(CodeContent, e.Destination, "it was changed since the new file was staged (sha256 %s)", orNothing(sum))
	}
	if e.Old != absent {
		like, err := inspect(e.Destination)
		var no *Refusal
		// Second names are ours: kept by an activation that was cut off, or for the system.
		if errors.As(err, &no) && no.Code == CodeLink && sameFile(e.Destination, e.kept()) {
			like, err = e.Like, nil
		}
		if err != nil {
			return false, err
		}
		if like != e.Like {
			return false, refuse(CodeAttributes, e.Destination, "its owner or mode was changed since the new file was staged")
		}
	}
	if sum, err := hashOf(e.staged()); err != nil || sum != e.New {
		return false, refuse(CodeContent, e.Destination, "what was staged for it is gone or changed (sha256 %s, %v)", orNothing(sum), err)
	}
	return false, nil
}

func orNothing(sum string) string {
	if sum == absent {
		return "none: no file is there"
	}
	return sum
}

func sameFile(a, b string) bool {
	x, err := os.Lstat(a)
	if err != nil {
		return false
	}
	y, err := os.Lstat(b)
	return err == nil && os.SameFile(x, y)
}

// forward makes every destination new. The first that cannot be brings all back.
func (x *Area) forward(r Record, now time.Time) (Record, error) {
	for _, e := range r.Files {
		if err := x.swap(e); err != nil {
			back, rerr := x.reached(r, Reverting, r.Boot, now)
			if rerr != nil {
				return r, errors.Join(err, rerr)
			}
			return Record{}, errors.Join(err, x.revert(back, now))
		}
	}
	return x.reached(r, Active, r.Boot, now)
}

// swap makes one destination new. The old file has its second name, durable,
// before the first one is taken.
func (x *Area) swap(e Entry) error {
	isNew, err := x.readyFile(e)
	if err != nil || isNew {
		return err
	}
	if e.Old == absent {
		if err := x.step("appear " + e.Destination); err != nil {
			return refuse(CodeIO, e.Destination, "%w", err)
		}
		if err := appear(e.staged(), e.Destination); err != nil {
			return refuse(CodeIO, e.Destination, "cannot be put into place: %w", err)
		}
		return x.synced(e)
	}
	if !sameFile(e.Destination, e.kept()) {
		if err := remove(e.kept()); err != nil {
			return refuse(CodeIO, e.Destination, "the old file cannot be kept: %w", err)
		}
		if err := x.step("keep " + e.Destination); err != nil {
			return refuse(CodeIO, e.Destination, "%w", err)
		}
		if err := keepName(e.Destination, e.kept()); err != nil {
			return refuse(CodeIO, e.Destination, "the old file cannot be kept: %w", err)
		}
	}
	if err := x.synced(e); err != nil {
		return err
	}
	if err := x.step("replace " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if err := replace(e.staged(), e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "cannot be replaced: %w", err)
	}
	return x.synced(e)
}

func (x *Area) synced(e Entry) error {
	dir := filepath.Dir(e.Destination)
	err := x.step("sync folder " + dir)
	if err == nil {
		err = syncFolder(dir)
	}
	if err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	return nil
}

// revert makes every destination old again, and ends the set's story. What
// somebody else has put there meanwhile stays: it is neither ours nor the old one.
func (x *Area) revert(r Record, now time.Time) error {
	for _, e := range r.Files {
		if err := x.bringBack(e); err != nil {
			return err
		}
	}
	if err := x.syncFolders(r); err != nil {
		return refuse(CodeIO, r.Files[0].Destination, "%w", err)
	}
	return x.clear(r, now)
}

func (x *Area) bringBack(e Entry) error {
	sum, err := hashOf(e.Destination)
	if err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if sum != e.New {
		return nil
	}
	if err := x.step("bring back " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if e.Old == absent {
		err = remove(e.Destination)
	} else if kept, kerr := hashOf(e.kept()); kerr != nil || kept != e.Old {
		err = fmt.Errorf("the old file that was kept is gone or changed (sha256 %s, %v)", orNothing(kept), kerr)
	} else {
		err = replace(e.kept(), e.Destination)
	}
	if err != nil {
		return refuse(CodeIO, e.Destination, "the old file cannot be brought back: %w", err)
	}
	return nil
}

// Leave has the old files of an active set take effect at the next restart.
func (x *Area) Leave(product, boot string, now time.Time) (Record, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	switch {
	case ok && r.Phase == Leaving:
		return r, nil
	case !ok || r.Phase != Active:
		return r, ErrNoSet
	}
	if err := x.leavable(r); err != nil {
		return r, err
	}
	if x.mover != nil {
		for _, e := range r.Files {
			if err := x.scheduleBack(e); err != nil {
				return r, err
			}
		}
	}
	return x.reached(r, Leaving, boot, now)
}

// scheduleBack asks the system to bring one old file back.
func (x *Area) scheduleBack(e Entry) error {
	from, to := e.back(), e.Destination
	var err error
	if e.Old == absent {
		from, to = e.Destination, ""
	} else if err = remove(from); err == nil {
		err = keepName(e.kept(), from)
	}
	if err == nil {
		err = x.mover.AtRestart(from, to)
	}
	if err != nil {
		return refuse(CodeIO, e.Destination, "the system does not take it for its restart: %w", err)
	}
	return nil
}

// leavable tells whether every old file can be brought back.
func (x *Area) leavable(r Record) error {
	for _, e := range r.Files {
		if err := checkPlace(e.Destination); err != nil {
			return err
		}
		if sum, err := hashOf(e.Destination); err != nil || sum != e.New {
			return refuse(CodeContent, e.Destination, "it was changed since it was put there (sha256 %s, %v)", orNothing(sum), err)
		}
		if e.Old == absent {
			continue
		}
		if sum, err := hashOf(e.kept()); err != nil || sum != e.Old {
			return refuse(CodeContent, e.Destination, "the old file that was kept is gone or changed (sha256 %s, %v)", orNothing(sum), err)
		}
	}
	return nil
}

// leave brings the old files of a set back, all or none.
func (x *Area) leave(r Record, boot string, now time.Time) (Record, error) {
	if x.mover != nil && x.isOld(r) {
		return Record{}, x.clear(r, now) // the system has done it
	}
	if err := x.leavable(r); err != nil {
		r.Note = err.Error()
		r, werr := x.reached(r, Active, boot, now)
		return r, errors.Join(err, werr)
	}
	r, err := x.reached(r, Reverting, boot, now)
	if err != nil {
		return r, err
	}
	if err := x.revert(r, now); err != nil {
		return x.records[r.Product], err
	}
	return Record{}, nil
}

func (x *Area) isOld(r Record) bool {
	for _, e := range r.Files {
		if sum, err := hashOf(e.Destination); err != nil || sum != e.Old {
			return false
		}
	}
	return true
}

// Stay calls Leave back: the set stays active.
func (x *Area) Stay(product, boot string, now time.Time) (Record, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Leaving {
		return r, ErrNoSet
	}
	if x.mover != nil {
		for _, e := range r.Files {
			if e.Old == absent {
				return r, refuse(CodeIO, e.Destination, "the system has been asked to remove it, and cannot be asked not to")
			}
		}
		for _, e := range r.Files {
			if err := remove(e.back()); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return r, refuse(CodeIO, e.Destination, "%w", err)
			}
		}
	}
	return x.reached(r, Active, r.Boot, now)
}

// Postpone has a staged or leaving set wait for one more restart, because
// somebody's word is against it now.
func (x *Area) Postpone(product, boot string, now time.Time) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Staged && r.Phase != Leaving {
		return ErrNoSet
	}
	r.Boot = boot
	return x.write(r)
}

// Prove ends the story of an active set: its old files are removed.
func (x *Area) Prove(product string, now time.Time) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Active {
		return ErrNoSet
	}
	return x.clear(r, now)
}
