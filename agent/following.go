package agent

import (
	"cmp"
	"context"
	"slices"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/baseline"
	"hotpatchd/patcher/target"
)

// Where the system tells how a process ended only to those who have hold of it,
// the lives are chosen that the guard is about: those that run an image which a
// release names. Who is not held counts for nothing: an end that nobody
// could see would be taken for none.

// followEnds asks the backend for the ends of chosen lives, if that is its way.
func (a *Agent) followEnds(ctx context.Context) {
	f, ok := a.o.Backend.(target.Follower)
	if !ok {
		return
	}
	a.followed = map[target.ID]bool{}
	ends, err := f.Ends(ctx)
	if err != nil {
		a.log.Warn("how processes end is not known: the health guard has a canary only", zap.Error(err))
		return
	}
	a.ends = ends
}

// takeEnd notes what is told of a life that is followed.
func (a *Agent) takeEnd(e target.Event, now time.Time) {
	if e.Kind == target.Exited {
		a.heardOfEnd(e)
	}
	a.takeEvent(e, now)
}

// follow takes hold of those that a decision is about, before anything is done
// to them: one may crash at once. There is a bound to it, and who runs a release is
// before who does not.
func (a *Agent) follow(work []Intent) {
	f, ok := a.o.Backend.(target.Follower)
	if !ok || a.ends == nil {
		return
	}
	var ids []target.ID
	if a.policy != nil && a.policy.Guard != GuardOff || a.proving() {
		ids = followable(work)
	}
	clear(a.followed)
	for _, id := range f.Follow(ids) {
		a.followed[id] = true
	}
}

// proving tells whether files have yet to prove themselves: a crash counts with
// them whatever the policy says of the guard.
func (a *Agent) proving() bool {
	return a.bases.area != nil && slices.ContainsFunc(a.bases.area.Records(), func(r baseline.Record) bool { return r.Phase == baseline.Active })
}

func followable(work []Intent) []target.ID {
	const runs, first, may = 0, 1, 2
	rank := map[target.ID]int{}
	for _, in := range work {
		r := may
		switch {
		case in.Image.Records[in.Product].Live():
			r = runs
		case in.Kind == DoApply:
			r = first
		}
		if was, ok := rank[in.Proc.Info.ID]; !ok || r < was {
			rank[in.Proc.Info.ID] = r
		}
	}
	ids := make([]target.ID, 0, len(rank))
	for id := range rank {
		ids = append(ids, id)
	}
	// In the same order each time: of too many the same are followed.
	slices.SortFunc(ids, func(x, y target.ID) int {
		return cmp.Or(cmp.Compare(rank[x], rank[y]), cmp.Compare(x.Start, y.Start), cmp.Compare(x.PID, y.PID))
	})
	return ids
}

// hears tells whether the end of a life will be told: of those that are followed,
// or of all where the system has events.
func (a *Agent) hears(id target.ID) bool {
	if a.followed != nil {
		return a.followed[id]
	}
	return a.starts.events != nil
}
