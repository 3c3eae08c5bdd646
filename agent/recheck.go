package agent

import (
	"cmp"
	"context"
	"errors"
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
	for key := range a.checked {
		if !slices.ContainsFunc(live, func(r patcher.Record) bool { return r.Key() == key }) {
			delete(a.checked, key)
		}
	}
	batch := 1 + len(live)*int(a.o.Config.Backend.ScanEvery)/int(recheckEvery)
	slices.SortFunc(live, func(x, y patcher.Record) int { return a.checked[x.Key()].Compare(a.checked[y.Key()]) })
	for _, r := range live[:min(batch, len(live))] {
		switch last, known := a.checked[r.Key()]; {
		case !known:
			a.checked[r.Key()] = now // written or recovered just now
		case now.Sub(last) >= recheckEvery:
			a.checked[r.Key()] = now
			changed = a.recheckOne(ctx, r) || changed
		}
	}
	return changed
}

// recheckOne asks memory about one record. Entries that are original again are
// no record's any more, and the image has its turn like a new one.
func (a *Agent) recheckOne(ctx context.Context, r patcher.Record) bool {
	octx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	p, err := a.o.Backend.Open(octx, r.ID)
	if err != nil {
		return false // the scan tells of processes that are over
	}
	defer p.Close()
	got, err := a.patcherFor(p.Info(), own).Recover(ctx, p, r)
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
