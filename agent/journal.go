package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// Keys of single settings in the store.
const (
	settingLocal   = "releases/local"     // JSON: id → Offer, of releases that came as files
	settingFloors  = "repository/floors"  // JSON: repository.Floors
	settingContact = "repository/contact" // JSON: contact
	settingInForce = "releases/in-force"  // JSON: product → inForce
)

// inForce is the release of one product that this device has come to.
type inForce struct {
	ID       string       `json:"id"`
	Sequence uint32       `json:"sequence"`
	Month    string       `json:"month"`
	Title    string       `json:"title"`
	Severity string       `json:"severity"`
	CVEs     []string     `json:"cves"`
	Since    control.Time `json:"since"`
	// Before is what was in force before, and was had by somebody: it goes on
	// if this one is kept out before anybody has it.
	Before string `json:"before,omitempty"`
	// OnDisk: its files took effect, and proved themselves.
	OnDisk bool `json:"on_disk,omitempty"`
}

// state is the state file: all of what is kept over a restart.
type state interface {
	View(func(*store.Tx) error) error
	Update(func(*store.Tx) error) error
	Broken() <-chan struct{} // closed when it must be opened anew
	Err() error              // why
	Close() error
}

// stateFile is where the state lies.
func (c *Config) stateFile() string { return filepath.Join(c.StateDir, "state.db") }

// CheckState tells whether the daemon would refuse its state folder, or what
// lies in it under the state's name. It makes and changes nothing.
func (c *Config) CheckState() error { return store.Check(c.stateFile()) }

// errState is why nothing is done when the state cannot be written.
var errState = errors.New("the state cannot be written")

// update changes the state, and remembers whether that works: status says so.
// What fn itself refuses is not the state's trouble.
func (a *Agent) update(fn func(*store.Tx) error) error {
	var refused error
	err := a.store.Update(func(tx *store.Tx) error { refused = fn(tx); return refused })
	if err != nil && refused == nil {
		err = fmt.Errorf("%w: %w", errState, err)
	}
	a.recMu.Lock()
	defer a.recMu.Unlock()
	switch broken := errors.Is(err, errState); {
	case broken && a.stateErr == nil:
		a.stateErr, a.stateSince = err, a.o.Now()
		a.log.Error("the state cannot be written", zap.Error(err))
	case !broken && a.stateErr != nil:
		a.stateErr = nil
		a.log.Info("the state can be written again")
	}
	return err
}

// own is the daemon as its own caller.
var own = control.Caller{UID: os.Getuid(), GID: os.Getgid(), PID: os.Getpid(), User: "hotpatchd", Admin: true}

// patcherFor makes the patcher of one process: each of its records is durable
// before the next effect, with a line of history for each outcome.
func (a *Agent) patcherFor(info target.Info, by control.Caller) *patcher.Patcher {
	return &patcher.Patcher{Now: a.o.Now, Journal: func(r patcher.Record) error { return a.journal(r, info, by) }}
}

// journal stores a record, or drops one whose story is over, in one
// transaction with the history. Memory is as before where a swap was given up:
// then the older sequence is in force again.
func (a *Agent) journal(r patcher.Record, info target.Info, by control.Caller) error {
	r.Boot = a.o.Boot
	keep := true
	stored := r
	switch r.State {
	case patcher.Undone, patcher.Lost:
		keep = false
	case patcher.Gave:
		if keep = r.Previous != nil; keep {
			stored = former(r)
		}
	}
	if a.stands(stored) {
		return nil // memory was asked, and is as recorded
	}
	err := a.update(func(tx *store.Tx) error {
		if keep {
			b, err := json.Marshal(stored)
			if err != nil {
				return err
			}
			if err := tx.PutRecord(r.Key(), b); err != nil {
				return err
			}
		} else if err := tx.DeleteRecord(r.Key()); err != nil {
			return err
		}
		if e, ok := historyOf(r, info); ok {
			_, err := tx.Append(stamped(e, by, a))
			return err
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.recMu.Lock()
	defer a.recMu.Unlock()
	if keep {
		a.records[r.Key()] = stored
	} else {
		delete(a.records, r.Key())
	}
	return nil
}

// stands tells whether this very patch is recorded as applied already.
func (a *Agent) stands(r patcher.Record) bool {
	a.recMu.Lock()
	defer a.recMu.Unlock()
	old, ok := a.records[r.Key()]
	return ok && old.State == patcher.Applied && r.State == patcher.Applied && old.AnnexSum == r.AnnexSum && old.Boot == r.Boot
}

// historyOf tells an outcome in one line; steps on the way leave no line.
func historyOf(r patcher.Record, info target.Info) (control.HistoryEntry, bool) {
	e := control.HistoryEntry{Product: r.Product, Release: r.Release, PID: r.ID.PID, Exe: programOf(info), Image: r.Image}
	switch r.State {
	case patcher.Applied:
		e.Action = "patched"
		if r.Adopted {
			e.Action = "adopted"
		}
		e.Text = fmt.Sprintf("%s of %s", counted(len(r.Sites), "function", "functions"), r.Image)
		e.Detail = map[string]string{"pause_us": strconv.FormatInt(r.Pause.Microseconds(), 10), "attempts": strconv.Itoa(r.Attempts)}
	case patcher.Undone:
		e.Action, e.Text = "undone", fmt.Sprintf("%s runs its original code again", r.Image)
	case patcher.TornUp:
		e.Action, e.Text = "torn", r.Note
	case patcher.Lost:
		e.Action, e.Text = "over", cmp.Or(r.Note, "the process or the image is not there any more")
	case patcher.Gave:
		e.Action, e.Text = "given-up", r.Note
	default:
		return e, false
	}
	return e, true
}

func stamped(e control.HistoryEntry, by control.Caller, a *Agent) control.HistoryEntry {
	e.Time = control.At(a.o.Now())
	e.Caller = control.HistoryCaller{UID: by.UID, GID: by.GID, User: by.User, SID: by.SID, PID: by.PID}
	return e
}

// history appends one line. It cannot stop what has happened: an error is loud, not fatal.
func (a *Agent) history(by control.Caller, e control.HistoryEntry) {
	err := a.update(func(tx *store.Tx) error {
		_, err := tx.Append(stamped(e, by, a))
		return err
	})
	if err != nil {
		a.log.Error("cannot write the history", zap.String("action", e.Action), zap.Error(err))
	}
}

// setting stores a JSON value under a key.
func setting(tx *store.Tx, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.Set(key, b)
}

// imageKey names one place in one life where an image lies.
type imageKey struct {
	id   target.ID
	base target.Addr
}

// recordsByImage sorts the records by image, then by product. Where an annex
// waits for its turn, nothing of it is in force: the older sequence is.
func (a *Agent) recordsByImage() map[imageKey]map[string]patcher.Record {
	a.recMu.Lock()
	defer a.recMu.Unlock()
	out := map[imageKey]map[string]patcher.Record{}
	for _, r := range a.records {
		k := imageKey{r.ID, r.Base}
		if out[k] == nil {
			out[k] = map[string]patcher.Record{}
		}
		if r.State == patcher.Staged && r.Previous != nil {
			r = former(r)
		}
		out[k][r.Product] = r
	}
	return out
}

// recordsOfLife are the records of one process.
func (a *Agent) recordsOfLife(id target.ID) []patcher.Record {
	a.recMu.Lock()
	defer a.recMu.Unlock()
	var out []patcher.Record
	for _, r := range a.records {
		if r.ID == id {
			out = append(out, r)
		}
	}
	return out
}

// former is the record of the older sequence that r replaces: in force as long as r is not.
func former(r patcher.Record) patcher.Record {
	p := *r.Previous
	p.Boot, p.State, p.At, p.Adopted = r.Boot, patcher.Applied, r.At, false
	return p
}

func (a *Agent) allRecords() []patcher.Record {
	a.recMu.Lock()
	defer a.recMu.Unlock()
	out := make([]patcher.Record, 0, len(a.records))
	for _, r := range a.records {
		out = append(out, r)
	}
	return out
}

// maxForgotten bounds the records that are dropped in one transaction.
const maxForgotten = 256

// forgetAll drops records of lives that are over, many in one transaction: each
// waits for the disk, and the loop for it.
func (a *Agent) forgetAll(list []patcher.Record, why string) {
	for some := range slices.Chunk(list, maxForgotten) {
		err := a.update(func(tx *store.Tx) error {
			for _, r := range some {
				if err := tx.DeleteRecord(r.Key()); err != nil {
					return err
				}
				r.State, r.Note = patcher.Lost, why
				e, _ := historyOf(r, target.Info{ID: r.ID})
				if _, err := tx.Append(stamped(e, own, a)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			a.log.Error("cannot drop records", zap.Int("count", len(some)), zap.Error(err))
			return
		}
		a.recMu.Lock()
		for _, r := range some {
			delete(a.records, r.Key())
		}
		a.recMu.Unlock()
	}
}

// forget drops the record of a life that is over.
func (a *Agent) forget(r patcher.Record, why string) {
	r.State, r.Note = patcher.Lost, why
	if err := a.journal(r, target.Info{ID: r.ID}, own); err != nil {
		a.log.Error("cannot drop a record", zap.Int("pid", r.ID.PID), zap.Error(err))
	}
}
