package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
)

// settingBaselines is JSON: product → standing, the baselines in force.
const settingBaselines = "baseline/in-force"

// standing is the baseline that one product's files on this device are those of.
type standing struct {
	ID       string            `json:"id"`
	Month    string            `json:"month"`
	Sequence uint32            `json:"sequence"`
	Since    control.Time      `json:"since"`
	Builds   []repository.Base `json:"builds,omitempty"`
	Places   []string          `json:"places,omitempty"`   // destinations
	Previous *standing         `json:"previous,omitempty"` // as long as its files are kept
}

// staging is what a set of files carries along in its journal.
type staging struct {
	Kind     string   `json:"kind"` // of the release
	Standing standing `json:"standing"`
}

const (
	// proveFor is how long processes run the new files without trouble before the
	// old ones are removed.
	proveFor = 10 * time.Minute
	// proveIdle is the same where no process is seen that runs them.
	proveIdle = 7 * 24 * time.Hour
	// stageAgain is how long a set that could not be staged is left alone.
	stageAgain = 10 * time.Minute
)

// baselines is what the loop knows of whole files.
type baselines struct {
	area     *baseline.Area // nil: its journals cannot be read
	areaErr  error
	standing map[string]standing // by product
	busy     map[string]bool     // products whose set is being written
	refused  map[string]refusedSet
	inPlace  map[string]bool      // releases whose files were found in their places
	seen     map[string]time.Time // releases → since when a process runs their files, without trouble
	ahead    map[string]time.Time // releases that took effect at a time which is yet to come → when that was found
	proveFor time.Duration
}

// refusedSet is why a release's files were not staged.
type refusedSet struct {
	why   reason
	since time.Time
	again time.Time
}

func newBaselines() baselines {
	return baselines{standing: map[string]standing{}, busy: map[string]bool{}, refused: map[string]refusedSet{},
		inPlace: map[string]bool{}, seen: map[string]time.Time{}, ahead: map[string]time.Time{}, proveFor: proveFor}
}

// openBaselines reads what is staged, and which baselines are in force.
func (a *Agent) openBaselines() {
	a.bases = newBaselines()
	a.store.View(func(tx *store.Tx) error {
		if b, ok := tx.Get(settingBaselines); ok && json.Unmarshal(b, &a.bases.standing) != nil {
			a.bases.standing = map[string]standing{} // found again: its files are in their places
		}
		return nil
	})
	area, damaged, err := baseline.Open(filepath.Join(a.o.Config.StateDir, "baselines"))
	if err != nil {
		a.bases.areaErr = err
		a.log.Error("cannot read what is staged", zap.Error(err))
		return
	}
	a.bases.area = area
	for _, text := range damaged {
		a.notice("baseline-damaged", control.SeverityError, "what was staged, or which old files are kept, is not known any more: its journal was damaged and is set aside", text)
	}
}

// restartBaselines is the first thing of a start: what was cut off is brought to
// its end, and if the device was restarted, what was staged takes effect. No
// process is touched before.
func (a *Agent) restartBaselines() {
	if a.bases.area == nil {
		return
	}
	for _, r := range a.bases.area.Recover(a.o.Now()) {
		a.log.Warn("work on files was cut off and is ended now", zap.String("release", r.Was.Release), zap.String("was", string(r.Was.Phase)),
			zap.String("now", string(r.Now.Phase)), zap.Error(r.Err))
		if r.Err != nil {
			a.tookNoEffect(r.Was, r.Err)
		}
		if r.Was.Phase == baseline.Activating && r.Now.Phase == baseline.Active {
			a.tookEffect(r.Now)
		}
		if r.Was.Phase == baseline.Reverting && r.Now.Phase == "" {
			a.wentOut(r.Was)
		}
	}
	for _, r := range a.bases.area.Records() {
		switch r.Phase {
		case baseline.Staged, baseline.Leaving:
			a.takeEffect(r)
		case baseline.Active:
			if s, _ := stagingOf(r); s.Kind == release.KindBaseline && a.bases.standing[r.Product].ID != r.Release {
				a.stand(r.Product, s.Standing) // we died before it was noted
			}
		}
	}
	a.dirty = true
}

// takeEffect activates a set after a restart, unless somebody's word is against it now.
func (a *Agent) takeEffect(r baseline.Record) {
	now := a.o.Now()
	if a.o.Boot == "" || r.Boot == a.o.Boot {
		return
	}
	w := a.wishes()
	word, out := w.word(r.Release, a.allOffers())
	// The word that was against it may have ended while we were away. Who does not
	// offer it cannot tell. Windows has moved the files by now.
	_, offered := a.offerOf(r.Release)
	if r.Phase == baseline.Leaving && !out && offered && a.lost().Code == "" && runtime.GOOS != "windows" {
		if a.keepFiles(r); a.setOf(r.Release).Phase == baseline.Active {
			return
		}
	}
	if r.Phase == baseline.Staged {
		if !out {
			word, out = a.barred(w, r.Release)
		}
		if out {
			a.unstage(r, word)
			return
		}
		if why, stops := a.stopsFiles(w, r.Release); stops {
			if err := a.bases.area.Postpone(r.Product, a.o.Boot, now); err != nil {
				a.log.Error("cannot postpone a staged release", zap.String("release", r.Release), zap.Error(err))
			}
			a.history(own, control.HistoryEntry{Action: "baseline-postponed", Product: r.Product, Release: r.Release,
				Text: "the device was restarted, but " + why.Text + ": its files wait for the next restart"})
			return
		}
	}
	a.heart.at("putting files into place")
	after, err := a.bases.area.Activate(r.Product, a.o.Boot, now)
	switch {
	case err != nil:
		a.tookNoEffect(r, err)
	case after.Phase == baseline.Active:
		a.tookEffect(after)
	default:
		a.wentOut(r)
	}
}

// stopsFiles tells what keeps new files from being staged, and from taking effect.
func (a *Agent) stopsFiles(w wishes, id string) (reason, bool) {
	lost := a.lost()
	switch p := a.paused(); {
	case p.Code != "":
		return p, true
	case lost.Code != "" && !w.Installed[id]:
		return lost, true
	case !a.verdict.Eligible:
		return because("not-eligible", "the device is not eligible: %s", strings.Join(openChecks(a.verdict), ", ")), true
	}
	return reason{}, false
}

func (a *Agent) tookEffect(r baseline.Record) {
	s, err := stagingOf(r)
	if err == nil && s.Kind == release.KindBaseline {
		if old, ok := a.bases.standing[r.Product]; ok && old.ID != s.Standing.ID {
			old.Previous = nil
			s.Standing.Previous = &old
		}
		s.Standing.Since = control.At(a.o.Now())
		a.stand(r.Product, s.Standing)
	}
	delete(a.bases.refused, r.Release)
	text := fmt.Sprintf("%s of %s in force since this restart; the old ones are kept until it has proved itself", counted(len(r.Files), "file", "files"), r.Release)
	a.history(own, control.HistoryEntry{Action: "baseline-activated", Product: r.Product, Release: r.Release, Text: text})
	a.log.Info("files took effect", zap.String("release", r.Release), zap.Int("files", len(r.Files)))
}

func (a *Agent) wentOut(r baseline.Record) {
	if s, err := stagingOf(r); err == nil && s.Kind == release.KindBaseline && a.bases.standing[r.Product].ID == r.Release {
		if p := a.bases.standing[r.Product].Previous; p != nil {
			a.stand(r.Product, *p)
		} else {
			a.stand(r.Product, standing{})
		}
	}
	delete(a.bases.inPlace, r.Release)
	a.history(own, control.HistoryEntry{Action: "baseline-reverted", Product: r.Product, Release: r.Release,
		Text: fmt.Sprintf("the old %s are in force again", counted(len(r.Files), "file", "files"))})
	a.log.Info("the old files took effect again", zap.String("release", r.Release))
}

func (a *Agent) tookNoEffect(r baseline.Record, err error) {
	code := "baseline-refused"
	if errors.Is(err, baseline.ErrNotMoved) {
		code = "baseline-postponed"
	}
	a.refuseSet(r.Product, r.Release, code, err)
}

// stand notes the baseline in force; one without id ends it.
func (a *Agent) stand(product string, s standing) {
	if s.ID == "" {
		delete(a.bases.standing, product)
	} else {
		a.bases.standing[product] = s
	}
	a.dirty = true
	if err := a.update(func(tx *store.Tx) error { return setting(tx, settingBaselines, a.bases.standing) }); err != nil {
		a.log.Error("cannot note the baseline in force", zap.Error(err))
	}
}

func stagingOf(r baseline.Record) (s staging, err error) {
	err = json.Unmarshal(r.Info, &s)
	return s, err
}

// fitsFiles tells why a baseline is not for this device at all; ok means it is.
func fitsFiles(o repository.Offer, d device, in standing) (reason, bool) {
	o.Kind = release.KindHotpatch
	if r, ok := fits(o, d); !ok {
		return r, false
	}
	if in.ID != "" && in.ID != o.ID && rank(o) <= rankOf(in) {
		return because("superseded", "the baseline %s is in force here, which is not older", in.ID), false
	}
	return reason{}, true
}

// rank orders the baselines of a product: by month, then by sequence.
func rank(o repository.Offer) string { return fmt.Sprintf("%7s %010d", o.Month, o.Sequence) }

func rankOf(s standing) string { return fmt.Sprintf("%7s %010d", s.Month, s.Sequence) }

// filesWanted is, for each product, the release whose files should be on this
// device's disk: the highest baseline that fits and is allowed, above what is in force;
// else what the hotpatch in force brings for after the next restart.
func (a *Agent) filesWanted(w wishes, choices map[string]choice, now time.Time) map[string]repository.Offer {
	out := map[string]repository.Offer{}
	d := a.deviceFor()
	offers := a.allOffers()
	for _, o := range offers {
		if o.Kind != release.KindBaseline {
			continue
		}
		in := a.bases.standing[o.Product]
		if _, ok := a.allowsFiles(o, d, w, now); !ok || in.ID == o.ID {
			continue
		}
		if best, ok := out[o.Product]; !ok || cmp.Compare(rank(best), rank(o)) < 0 {
			out[o.Product] = o
		}
	}
	for product, c := range choices {
		// One that was halted stays where it is: what is staged of it is taken back.
		if _, ok := out[product]; !ok && c.Want != nil && len(c.Want.Files) > 0 && w.InForce[product] == c.Want.ID && !c.Want.Rollout.Halt {
			out[product] = *c.Want
		}
	}
	return out
}

// allowsFiles tells whether a baseline may come onto this device now.
func (a *Agent) allowsFiles(o repository.Offer, d device, w wishes, now time.Time) (reason, bool) {
	in := a.bases.standing[o.Product]
	if r, ok := fitsFiles(o, d, in); !ok {
		return r, false
	}
	w.InForce = map[string]string{o.Product: in.ID} // of baselines
	if r, ok := allowed(o, d, w, now, a.fresh(now)); !ok {
		return r, false
	}
	for _, b := range o.Files {
		if g := a.o.Config.Repository.Images; len(g) > 0 && !MatchAny(g, b.Name) {
			return because("out-of-scope", "%s is outside [repository] images", b.Name), false
		}
	}
	return reason{}, true
}

// builds lists, by product, the builds of images that are fixed on disk: a
// process that has mapped one needs no patch.
func (a *Agent) builds(choices map[string]choice, wanted map[string]repository.Offer) map[string][]fixedBuild {
	out := map[string][]fixedBuild{}
	add := func(product, id string, list []repository.Base) {
		for _, b := range list {
			out[product] = append(out[product], fixedBuild{id, b})
		}
	}
	for product, s := range a.bases.standing {
		add(product, s.ID, s.Builds)
	}
	for product, c := range choices {
		for _, o := range []*repository.Offer{c.Want, c.Latest} {
			if o != nil {
				add(product, o.ID, o.Files)
			}
		}
	}
	for product, o := range wanted {
		add(product, o.ID, o.Files)
	}
	return out
}

// outdated tells by which baseline in force an image is older than its file on
// disk: its process started before; "" if by none.
func (v View) outdated(product string, im *ImageView) string {
	path := strings.TrimSuffix(im.Path, " (deleted)") // proc_pid_maps(5): its name is another file's now
	if s, ok := v.Standing[product]; ok && path != "" && slices.Contains(s.Places, path) {
		return s.ID
	}
	return ""
}

// fixedBuild is a build that a release has put, or will put, on the disk.
type fixedBuild struct {
	release string
	base    repository.Base
}

// fixed tells by which release an image is the fixed one; "" if by none.
func (v View) fixed(product string, im *ImageView) string {
	i := slices.IndexFunc(v.Builds[product], func(b fixedBuild) bool { return sameHeaders(b.base.Identity, im.Identity) })
	if i < 0 {
		return ""
	}
	return v.Builds[product][i].release
}
