package agent

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/guard"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// healthGuard is who takes a release out when processes end badly with it.
var healthGuard = control.Caller{UID: own.UID, GID: own.GID, PID: own.PID, User: "the health guard", Admin: true}

const (
	// settingPrograms is JSON: program → how it fared without a release on trial.
	settingPrograms = "guard/programs"
	// programsEvery is how often that is stored: to lose some of it costs little.
	programsEvery = 10 * time.Minute
)

// heardOfEnd is told that a process ended.
func (a *Agent) heardOfEnd(e target.Event) {
	how, text := ending(e)
	inside := false
	id, ok := a.lives[e.PID]
	if e.Start != 0 && id.Start != e.Start { // the pid is another life's by now, or nobody's
		a.vigil.endOf(a.vigil.lives[target.ID{PID: e.PID, Start: e.Start}], how, text, false, a.o.Now())
		if d := a.departed[e.PID]; d != nil && d.proc.info.ID.Start == e.Start {
			delete(a.departed, e.PID)
			a.endedWithFiles(d.proc, e)
		}
		return
	}
	p, records := a.procs[id], a.recordsOfLife(id)
	if d := a.departed[e.PID]; !ok && d != nil && !e.At.After(d.at) { // else it is another life's end
		p, records, ok = d.proc, d.records, true
		delete(a.departed, e.PID)
	}
	if ok && len(e.Faults) > 0 {
		var where string
		inside, where = faultOf(records, e.Faults)
		text += where
	}
	a.vigil.end(e.PID, how, text, inside, a.o.Now())
	a.endedWithFiles(p, e)
}

// departed is what was known of a process that a list did not tell of any more,
// before it was told how it ended.
type departed struct {
	proc    *procState
	records []patcher.Record
	at      time.Time
}

const (
	// departedFor is how late it may be told how a process ended.
	departedFor = 5 * time.Second
	// maxDeparted bounds them.
	maxDeparted = 1024
)

// depart keeps what is known of a process that is forgotten, for a while.
func (a *Agent) depart(p *procState) {
	now := time.Now()
	for pid, d := range a.departed {
		if now.Sub(d.at) > departedFor {
			delete(a.departed, pid)
		}
	}
	if len(p.images) > 0 && len(a.departed) < maxDeparted {
		a.departed[p.info.PID] = &departed{p, a.recordsOfLife(p.info.ID), now}
	}
}

// faultOf tells whether one of some faults was in code of ours in a process, by
// its records. The place of an annex is random: a fault of another process hardly
// lies there.
func faultOf(records []patcher.Record, faults []target.Addr) (inside bool, where string) {
	for _, r := range records {
		for _, at := range faults {
			if r.Live() && at >= r.Annex && at < r.AnnexEnd {
				return true, fmt.Sprintf(" at %s, inside %s", at, r.Release)
			}
		}
	}
	return false, ", at no address inside our code"
}

// ending words how a process ended.
func ending(e target.Event) (guard.Ending, string) {
	switch {
	case e.Signal != 0:
		return guard.OfSignal(e.Signal, 0), fmt.Sprintf("ended by signal %d", e.Signal)
	case e.Status && e.Code >= 0x80000000: // an NTSTATUS
		return guard.OfStatus(e.Code), fmt.Sprintf("ended with status 0x%08x", e.Code)
	case e.Status:
		return guard.OfStatus(e.Code), fmt.Sprintf("ended with exit code %d", e.Code)
	}
	return guard.OfSignal(0, int(e.Code)), fmt.Sprintf("ended with exit code %d", e.Code)
}

// guardTurn keeps the accounts, and has taken out what harms.
func (a *Agent) guardTurn() {
	if a.policy == nil || a.policy.Guard == GuardOff {
		a.vigil.lives, a.vigil.byPID = map[target.ID]*vita{}, map[int]*vita{}
		return
	}
	now := a.o.Now()
	a.vigil.window = a.policy.GuardWindow
	hurt := a.vigil.turn(func(id target.ID) bool { return a.procs[id] != nil }, now)
	for _, key := range hurt {
		a.weigh(key, now)
	}
	a.storePrograms(now)
}

// countLives tells who lives, and what runs in whom. Called right after the work:
// who crashes at once must be known to have been patched.
func (a *Agent) countLives(now time.Time) {
	if a.policy == nil || a.policy.Guard == GuardOff {
		return
	}
	runs := map[target.ID]map[string]time.Time{}
	for _, r := range a.allRecords() {
		if r.Live() {
			if runs[r.ID] == nil {
				runs[r.ID] = map[string]time.Time{}
			}
			runs[r.ID][r.Release] = r.At
		}
	}
	for id, p := range a.hosts {
		switch {
		case len(p.images) == 0:
		case !a.hears(id): // any more: it would be taken for one that ends well
			a.vigil.leave(id)
		default:
			a.vigil.living(id, ownerOf(p.info), programOf(p.info), runs[id], now)
		}
	}
}

// weigh judges one case in which something ended badly.
func (a *Agent) weigh(key caseKey, now time.Time) {
	v := guard.Judge(a.vigil.caseOf(key, now))
	signs := strings.Join(a.vigil.signs[key], "; ")
	a.log.Warn("a patched process ended badly", zap.String("release", key.release), zap.String("exe", key.program), zap.String("owner", key.owner),
		zap.Bool("guilty", v.Guilty), zap.String("text", v.Text), zap.String("seen", signs))
	// Whoever likes may crash a process of his own: that must not keep others waiting.
	if over, _ := a.trial().over(key.release, now); !over && key.owner == "" {
		a.trialAnew(key.release, now)
	}
	if !v.Guilty {
		return
	}
	product, _, _ := a.whatIs(key.release, a.shown.Load())
	why := v.Text + " (" + signs + ")"
	switch {
	case a.policy.Guard == GuardObserve:
		a.onlySay(key, product, why, "the policy says guard = \"observe\"")
	case a.proven(key.release, product, now):
		a.onlySay(key, product, why, "it has been in force here for more than "+probation.String())
	case key.owner == "":
		a.vigil.drop("", key.release)
		if held, err := a.hold(healthGuard, key.release, product, why, "guard"); err != nil {
			a.notice("guard", control.SeverityError, key.release+": "+why+". It could not be taken out: the state cannot be written", err.Error())
		} else if held {
			a.notice("guard", control.SeverityError, key.release+": "+why+". It is taken out everywhere on this device, and held", signs)
		}
	default:
		a.vigil.drop(key.owner, key.release)
		a.takeFrom(key.owner, key.release, product, why)
	}
}

// probation is how long after a release came into force here the guard may take
// it out. Later crashes tell of something else: of attacks, for one, that the fix turns into crashes.
const probation = 72 * time.Hour

func (a *Agent) proven(release, product string, now time.Time) (is bool) {
	a.store.View(func(tx *store.Tx) error {
		f, ok := inForceIn(tx)[product]
		is = !ok || f.ID != release || now.Sub(f.Since.Time) > probation
		return nil
	})
	return is
}

// maxObserved bounds of how many owners and releases it is remembered that the
// guard has spoken.
const maxObserved = 1000

// onlySay reports what the guard does not act on. Of a user's processes it says so
// once, and not to everybody: he may crash them as often as he likes.
func (a *Agent) onlySay(key caseKey, product, why, because string) {
	a.vigil.drop(key.owner, key.release)
	scope := control.Scope{Public: true}
	if key.owner != "" {
		said := caseKey{owner: key.owner, release: key.release}
		if a.observed[said] {
			return
		}
		if len(a.observed) == maxObserved {
			clear(a.observed)
		}
		a.observed[said], scope = true, control.Scope{}
	}
	text := key.release + ": " + why + ". It is not taken out: " + because
	a.noticeTo(scope, "guard", control.SeverityWarning, text, why)
	a.history(healthGuard, control.HistoryEntry{Action: "guard-observed", Product: product, Release: key.release, Text: text})
}

// trialAnew begins the trial of a release anew: its canary died.
func (a *Agent) trialAnew(release string, now time.Time) {
	next := map[string]time.Time{}
	for id, at := range a.trials {
		next[id] = at
	}
	next[release] = now
	a.setTrials(next)
}

// storePrograms keeps what is known of programs over our end, now and then.
func (a *Agent) storePrograms(now time.Time) {
	if !a.vigil.changed || now.Sub(a.programsAt) < programsEvery {
		return
	}
	if a.update(func(tx *store.Tx) error { return setting(tx, settingPrograms, a.vigil.without) }) == nil {
		a.vigil.changed, a.programsAt = false, now
	}
}

// readPrograms is for readState. What cannot be read is learned anew.
func readPrograms(tx *store.Tx) map[string]*guard.Tally {
	out := map[string]*guard.Tally{}
	if b, ok := tx.Get(settingPrograms); ok && json.Unmarshal(b, &out) != nil {
		return map[string]*guard.Tally{}
	}
	for program, t := range out {
		if t == nil {
			delete(out, program)
		}
	}
	return out
}
