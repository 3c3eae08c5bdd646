package agent

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// recheckEvery is how long a record may go without being compared with memory.
// A module that is loaded anew at its old place leaves no other trace, and its
// code is the old one; somebody else may write over an entry.
const recheckEvery = time.Minute

// recheck compares some records with memory in each pass, so that all have had
// their turn within recheckEvery and no pass is long. It reports whether
// anything was not as recorded.
func (a *Agent) recheck(ctx context.Context) (changed bool) {
	now := a.o.Now()
	live := a.allRecords()
	live = slices.DeleteFunc(live, func(r patcher.Record) bool { return r.State != patcher.Applied })
	keys := make(map[string]patcher.Record, len(live))
	for _, r := range live {
		keys[r.Key()] = r
	}
	for key := range a.checked {
		if _, ok := keys[key]; !ok {
			delete(a.checked, key)
		}
	}
	batch := 1 + len(live)*int(a.o.Config.Backend.ScanEvery)/int(recheckEvery)
	order := slices.SortedFunc(maps.Keys(keys), func(x, y string) int { return a.checked[x].Compare(a.checked[y]) })
	began := time.Now()
	for _, key := range order[:min(batch, len(order))] {
		if time.Since(began) > scanMost {
			break // those of a process that is slow to answer
		}
		r := keys[key]
		switch last, known := a.checked[key]; {
		case a.left[r.ID] != nil:
		case !known:
			a.checked[key] = now // written or recovered just now
		case now.Sub(last) >= recheckEvery:
			a.checked[key] = now
			changed = a.recheckOne(ctx, r) || changed
		}
	}
	return changed
}

// recheckOne asks memory about one record. Entries that are original again are
// no record's any more, and the image has its turn like a new one.
func (a *Agent) recheckOne(ctx context.Context, r patcher.Record) bool {
	got, err := aside(ctx, a, target.Info{ID: r.ID, Image: r.Image}, "comparing", openTimeout, func(octx context.Context) (patcher.Record, error) {
		p, err := a.o.Backend.Open(octx, r.ID)
		if err != nil {
			return r, errNotOpened
		}
		defer p.Close()
		return a.patcherFor(p.Info(), own).Recover(ctx, p, r)
	})
	if errors.Is(err, errNotOpened) || errors.Is(err, errLeft) {
		return false // the scan tells of processes that are over
	}
	if err == nil && got.State == patcher.Applied {
		return a.remember(r, nil)
	}
	a.log.Warn("memory is not as recorded", zap.Int("pid", r.ID.PID), zap.String("image", r.Image), zap.String("is", string(got.State)), zap.Error(err))
	var refusal *patcher.Refusal
	if errors.As(err, &refusal) && refusal.Reason == patcher.Drifted {
		return a.remember(r, &Try{Release: "recheck " + r.Release, State: control.Drifted, Reason: reason{refusal.Code, refusal.Text},
			Detail: refusal.Detail, Remedy: control.Remedy(cmp.Or(refusal.Remedy, patcher.RestartProcess)), Since: a.o.Now(), Attempts: 1})
	}
	return !errors.Is(err, target.ErrGone)
}

var errNotOpened = errors.New("the process could not be opened")

// remember keeps what a recheck found at an image, or that all is well again.
func (a *Agent) remember(r patcher.Record, t *Try) bool {
	p := a.procs[r.ID]
	if p == nil {
		return false
	}
	for _, im := range p.images {
		if im.Base != r.Base {
			continue
		}
		old, had := im.Tried[r.Product]
		if t == nil {
			if had && old.Release == "recheck "+r.Release {
				delete(im.Tried, r.Product)
				return true
			}
			return false
		}
		if had && old.Release == t.Release {
			return false
		}
		im.Tried[r.Product] = *t
		return true
	}
	return false
}
