package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/guard"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher/target"
)

// tendBaselines brings what is staged in line with what is wanted: stages it,
// takes it back before the restart, has old files come back at the next one,
// and ends what has proved itself. It touches no file that a program uses.
func (a *Agent) tendBaselines(v View, w wishes) {
	if a.bases.area == nil {
		return
	}
	now := a.o.Now()
	wanted := a.filesWanted(w, v.Choices, now)
	for _, r := range a.bases.area.Records() {
		if a.bases.busy[r.Product] {
			continue
		}
		word, out := v.Word(r.Release)
		if r.Phase == baseline.Staged && !out {
			word, out = a.barred(w, r.Release)
		}
		switch {
		case r.Phase == baseline.Staging || r.Phase == baseline.Clearing:
			a.tidy(r)
		case r.Phase == baseline.Staged && out:
			a.unstage(r, word)
		case r.Phase == baseline.Active && out:
			a.bringBack(r, word)
		case r.Phase == baseline.Leaving && !out:
			a.keepFiles(r)
		case r.Phase == baseline.Active:
			a.proveIfDue(r, now)
		}
	}
	there := map[string]bool{}
	for _, r := range a.bases.area.Records() {
		// What is staged for another release stays until that can take its place.
		there[r.Product] = r.Phase != baseline.Staged || r.Release == wanted[r.Product].ID
	}
	for product, o := range wanted {
		_, stops := a.stopsFiles(w, o.ID)
		if stops || there[product] || a.bases.busy[product] || a.bases.inPlace[o.ID] || now.Before(a.bases.refused[o.ID].again) {
			continue
		}
		a.bases.busy[product] = true
		go a.stage(o)
	}
}

// barred tells what keeps out files that are only staged: their publisher says
// that nobody else should take them, or the policy wants to be asked by now. What
// is staged has not been taken yet.
func (a *Agent) barred(w wishes, id string) (reason, bool) {
	o, ok := a.offerOf(id)
	switch had := o.Kind == release.KindHotpatch && w.InForce[o.Product] == id && w.had(o); {
	case !ok:
	case o.Rollout.Halt:
		return halted(o), true
	case had || w.Installed[id]:
	default:
		return w.asked(id)
	}
	return reason{}, false
}

// stage fetches a release and writes its files beside their destinations. It
// runs beside the loop: there may be much to write.
func (a *Agent) stage(o repository.Offer) {
	r, gone, err := a.stageSet(a.runCtx(), o)
	a.post(func() {
		delete(a.bases.busy, o.Product)
		a.dirty = true
		a.staged(o, r, gone, err)
		a.Wake()
	})
}

// stageSet stages a release's files. gone is what was staged of another one, and
// is taken back for it: only when nothing is known that keeps the new one out.
func (a *Agent) stageSet(ctx context.Context, o repository.Offer) (r, gone baseline.Record, err error) {
	b, err := a.bytesOf(ctx, o)
	if err != nil {
		return r, gone, err
	}
	rel, err := release.Open(b)
	if err != nil {
		return r, gone, err
	}
	if err := o.Agrees(&rel.Manifest); err != nil {
		return r, gone, err
	}
	if unknown := unknownFeatures(rel.Requires.Features); len(unknown) > 0 {
		return r, gone, fmt.Errorf("it needs the feature %q, which this daemon does not have", unknown[0])
	}
	stands := standing{ID: o.ID, Month: o.Month, Sequence: o.Sequence, Builds: o.Files}
	for _, f := range rel.Files {
		stands.Places = append(stands.Places, f.Destination)
	}
	info, err := json.Marshal(staging{Kind: o.Kind, Standing: stands})
	if err != nil {
		return r, gone, err
	}
	s := baseline.Set{Product: o.Product, Release: o.ID, Info: info}
	for i, f := range rel.Files {
		if own, is := a.ownFile(f.Destination); is {
			return r, gone, fmt.Errorf("%s: the daemon's own %s is nobody's to replace", f.Destination, own)
		}
		s.Files = append(s.Files, baseline.File{Destination: f.Destination, SHA256: f.SHA256, Replaces: f.Replaces, Content: rel.FileBytes(i)})
	}
	if old := a.stagedOf(o.Product); old.Release != "" && old.Release != o.ID {
		if err := a.bases.area.Weigh(s); err != nil && !errors.Is(err, baseline.ErrInPlace) {
			return r, gone, err
		}
		if err := a.bases.area.Unstage(o.Product, a.o.Now()); err != nil {
			return r, gone, err
		}
		gone = old
	}
	r, err = a.bases.area.Stage(s, a.o.Boot, a.o.Now())
	return r, gone, err
}

// stagedOf is what is staged of a product, the zero record if nothing is.
func (a *Agent) stagedOf(product string) baseline.Record {
	for _, r := range a.bases.area.Records() {
		if r.Product == product && r.Phase == baseline.Staged {
			return r
		}
	}
	return baseline.Record{}
}

// ownFile: state, configuration, policy, what is trusted and the running program
// are the owner's word. Files are compared by what they are besides their names:
// short names of Windows and links spell one in several ways.
func (a *Agent) ownFile(destination string) (what string, is bool) {
	c := a.o.Config
	for dir := filepath.Clean(destination); c.StateDir != ""; dir = filepath.Dir(dir) {
		if baseline.SamePlace(dir, c.StateDir) {
			return "state", true
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	log, program := "", ""
	if c.File != "" {
		log = filepath.Join(filepath.Dir(c.File), "hotpatchd.log") // where the installed service of Windows writes it
	}
	if exe, err := os.Executable(); err == nil {
		program = exe
	}
	for path, what := range map[string]string{c.File: "configuration", c.Policy.File: "policy", c.Repository.Root: "root of trust",
		c.Repository.CAFile: "ca_file", c.Report.CAFile: "ca_file", c.Repository.ClientCert: "client_cert", c.Report.ClientCert: "client_cert",
		program: "program", log: "log"} {
		if path != "" && baseline.SamePlace(destination, path) {
			return what, true
		}
	}
	return "", false
}

// staged takes in what staging came to.
func (a *Agent) staged(o repository.Offer, r, gone baseline.Record, err error) {
	if gone.Release != "" {
		a.tookBack(gone, because("superseded", "%s replaces it", o.ID))
	}
	what := map[string]string{release.KindBaseline: "baseline", release.KindHotpatch: "what is on disk after it"}[o.Kind]
	switch {
	case errors.Is(err, baseline.ErrInPlace):
		a.foundInPlace(o.Product, o.ID)
		delete(a.bases.refused, o.ID)
		if o.Kind == release.KindBaseline {
			a.stand(o.Product, standing{ID: o.ID, Month: o.Month, Sequence: o.Sequence, Since: control.At(a.o.Now()), Builds: o.Files})
			a.history(own, control.HistoryEntry{Action: "baseline-found", Product: o.Product, Release: o.ID, Text: "every file of it is in its place already"})
		}
	case err != nil:
		a.refuseSet(o.Product, o.ID, "baseline-refused", err)
	default:
		delete(a.bases.refused, o.ID)
		a.history(own, control.HistoryEntry{Action: "baseline-staged", Product: o.Product, Release: o.ID,
			Text: fmt.Sprintf("%s (%s) staged; they take effect at the next restart of the device", counted(len(r.Files), "file", "files"), what)})
		a.log.Info("files staged for the next restart", zap.String("release", o.ID), zap.Int("files", len(r.Files)))
		a.hub.send(control.Event{Type: control.EventState, Text: o.ID + " is staged and takes effect at the next restart of the device", Scope: control.Scope{Public: true}})
	}
}

// foundInPlace notes that a release's files are in their places, and no old ones are kept.
func (a *Agent) foundInPlace(product, id string) {
	a.bases.inPlace[id] = true
	_ = a.update(func(tx *store.Tx) error { // an error is said by update
		all := inForceIn(tx)
		f := all[product]
		if f.ID != id || f.OnDisk {
			return nil
		}
		f.OnDisk = true
		all[product] = f
		return setting(tx, settingInForce, all)
	})
}

// refuseSet remembers why a release's files are not staged, or took no effect. It
// is said once as long as it stays so, and tried again after a while.
func (a *Agent) refuseSet(product, id, code string, err error) {
	now := a.o.Now()
	was := a.bases.refused[id]
	set := refusedSet{why: because(code, "the files of %s: %v", id, err), since: was.since, again: now.Add(stageAgain)}
	if was.why != set.why {
		set.since = now
		a.log.Error("files refused", zap.String("release", id), zap.String("code", code), zap.Error(err))
		a.history(own, control.HistoryEntry{Action: code, Product: product, Release: id, Text: set.why.Text})
	}
	a.bases.refused[id] = set
	a.dirty = true
}

// unstage takes back what was staged: the device does not change at its restart.
func (a *Agent) unstage(r baseline.Record, why reason) {
	if err := a.bases.area.Unstage(r.Product, a.o.Now()); err != nil {
		a.log.Error("cannot take back what is staged", zap.String("release", r.Release), zap.Error(err))
		a.leftOver(r, err)
		return
	}
	a.tookBack(r, why)
}

func (a *Agent) tookBack(r baseline.Record, why reason) {
	a.dirty = true
	a.history(own, control.HistoryEntry{Action: "baseline-unstaged", Product: r.Product, Release: r.Release, Text: "its files do not take effect: " + why.Text})
	a.log.Info("what was staged is taken back", zap.String("release", r.Release), zap.String("why", why.Text))
}

// bringBack has the old files come back at the next restart.
func (a *Agent) bringBack(r baseline.Record, why reason) {
	if a.o.Now().Before(a.bases.refused[r.Release].again) {
		return
	}
	if _, err := a.bases.area.Leave(r.Product, a.o.Boot, a.o.Now()); err != nil {
		a.refuseSet(r.Product, r.Release, "baseline-stays", err)
		return
	}
	a.dirty = true
	a.history(own, control.HistoryEntry{Action: "baseline-leaving", Product: r.Product, Release: r.Release,
		Text: "its old files take effect again at the next restart of the device: " + why.Text})
}

// tidy ends what could not be removed when it was over: nothing else of its
// product is staged before.
func (a *Agent) tidy(r baseline.Record) {
	if a.o.Now().Before(a.bases.refused[r.Release].again) {
		return
	}
	if err := a.bases.area.Tidy(r.Product, a.o.Now()); err != nil {
		a.leftOver(r, err)
		return
	}
	delete(a.bases.refused, r.Release)
	a.dirty = true
	a.history(own, control.HistoryEntry{Action: "baseline-cleared", Product: r.Product, Release: r.Release, Text: "what lay beside its files is removed"})
}

// leftOver says that something lies about of a set that is over.
func (a *Agent) leftOver(r baseline.Record, err error) {
	if p := a.setOf(r.Release).Phase; p == baseline.Staging || p == baseline.Clearing {
		a.refuseSet(r.Product, r.Release, "baseline-left", err)
	}
}

func (a *Agent) keepFiles(r baseline.Record) {
	if _, err := a.bases.area.Stay(r.Product, a.o.Boot, a.o.Now()); err != nil {
		a.refuseSet(r.Product, r.Release, "baseline-leaving", err)
		return
	}
	a.dirty = true
	a.history(own, control.HistoryEntry{Action: "baseline-stays", Product: r.Product, Release: r.Release, Text: "it is not held any more: its files stay"})
}

// proveIfDue removes the old files when processes have run the new ones long
// enough without trouble.
func (a *Agent) proveIfDue(r baseline.Record, now time.Time) {
	if now.Before(a.proved(r)) || a.guardHolds(r) {
		return
	}
	if err := a.bases.area.Prove(r.Product, now); err != nil {
		a.log.Error("cannot remove old files", zap.String("release", r.Release), zap.Error(err))
		a.leftOver(r, err)
		return
	}
	delete(a.bases.seen, r.Release)
	delete(a.bases.ahead, r.Release)
	a.foundInPlace(r.Product, r.Release)
	if s, ok := a.bases.standing[r.Product]; ok && s.ID == r.Release {
		s.Previous = nil
		a.stand(r.Product, s)
	}
	a.dirty = true
	a.history(own, control.HistoryEntry{Action: "baseline-proved", Product: r.Product, Release: r.Release, Text: "it has proved itself: the old files are removed"})
}

// proved is when an active set will have proved itself.
func (a *Agent) proved(r baseline.Record) time.Time {
	now := a.o.Now()
	since := r.Since
	if since.After(now) { // the clock was ahead when it took effect: it counts from when that is known
		if at, ok := a.bases.ahead[r.Release]; !ok || at.After(now) {
			a.bases.ahead[r.Release] = now
		}
		since = a.bases.ahead[r.Release]
	}
	s, err := stagingOf(r)
	if err != nil || len(s.Standing.Builds) == 0 { // no images: nothing that could be seen running
		return since.Add(a.bases.proveFor)
	}
	for _, p := range a.procs {
		if at, known := a.bases.seen[r.Release]; (!known || at.After(now)) && runsBuild(p, s.Standing.Builds) {
			a.bases.seen[r.Release] = now
		}
	}
	if at, ok := a.bases.seen[r.Release]; ok {
		return at.Add(a.bases.proveFor)
	}
	return since.Add(proveIdle)
}

func runsBuild(p *procState, builds []repository.Base) bool {
	return slices.ContainsFunc(p.images, func(im *imageState) bool {
		return slices.ContainsFunc(builds, func(b repository.Base) bool { return sameHeaders(b.Identity, im.Identity) })
	})
}

// guardHolds: the health guard has taken a release of this product out since.
func (a *Agent) guardHolds(r baseline.Record) (holds bool) {
	a.store.View(func(tx *store.Tx) error {
		all, err := tx.Holds()
		for _, h := range all {
			holds = holds || h.Product == r.Product && h.By == healthGuard.User && h.Since.After(r.Since)
		}
		return err
	})
	return holds
}

const proveLook = time.Minute // how soon a proof that is due, and cannot be had, is looked at again

// nextFiles is when something about files is due, zero if nothing waits for time.
func (a *Agent) nextFiles(now time.Time) time.Time {
	var first time.Time
	sooner := func(t time.Time) {
		if first.IsZero() || t.Before(first) {
			first = t
		}
	}
	if a.bases.area == nil {
		return first
	}
	for _, r := range a.bases.area.Records() {
		if r.Phase != baseline.Active {
			continue
		}
		at := a.proved(r)
		if !at.After(now) {
			at = now.Add(proveLook)
		}
		sooner(at)
	}
	for _, r := range a.bases.refused {
		if r.again.After(now) {
			sooner(r.again)
		}
	}
	return first
}

// endedWithFiles is told that a process ended: one that crashed with files that
// have not proved themselves begins their proof anew, and is said.
func (a *Agent) endedWithFiles(p *procState, e target.Event) {
	if how, _ := ending(e); how != guard.Crash || p == nil || a.bases.area == nil {
		return
	}
	for _, r := range a.bases.area.Records() {
		s, err := stagingOf(r)
		if r.Phase != baseline.Active || err != nil || !runsBuild(p, s.Standing.Builds) {
			continue
		}
		a.bases.seen[r.Release] = a.o.Now()
		a.notice("baseline-crash", control.SeverityWarning, fmt.Sprintf("%s crashed with the new files of %s, which have not proved themselves yet; hotpatch rollback %s brings the old ones back at the next restart",
			lastElement(programOf(p.info)), r.Release, r.Release), fmt.Sprintf("pid %d", e.PID))
	}
}
