package agent

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

// filesShown is what is shown of whole files on this device.
type filesShown struct {
	staged  []control.StagedFiles
	restart []restart // why a restart is needed
	current control.Baseline
	behind  []behind // hotpatches that need a baseline which this device has not
}

// restart is why a restart of the device is needed.
type restart struct {
	product, text string
	since         time.Time
	effect        string // of the restart
	leaves        bool   // files go out, which nothing keeps back
}

// behind is a hotpatch that needs a baseline.
type behind struct {
	product, release, baseline string
	text                       string    // a sentence
	why                        reason    // why the baseline is not staged; Code "" if it is offered, or about to be
	offered                    bool      // the baseline is
	opens                      time.Time // when time alone lets it be staged, or it is tried again; zero: not known
}

// showFiles tells what is staged and why a restart is needed.
func (a *Agent) showFiles(choices map[string]choice, offers []control.Offer) filesShown {
	f := filesShown{staged: []control.StagedFiles{}}
	stagedOf := map[string]string{}
	if a.bases.area != nil {
		for _, r := range a.bases.area.Records() {
			s, _ := stagingOf(r)
			x := control.StagedFiles{Product: r.Product, ID: r.Release, Kind: s.Kind, Month: s.Standing.Month, Phase: string(r.Phase), Since: control.At(r.Since), Files: len(r.Files)}
			switch r.Phase {
			case baseline.Staged:
				x.Text = fmt.Sprintf("%s of %s take effect at the next restart", counted(len(r.Files), "file", "files"), r.Release)
				if s.Kind == release.KindBaseline {
					stagedOf[r.Product] = r.Release
					f.restart = append(f.restart, restart{r.Product, fmt.Sprintf("the baseline %s is staged, %s", r.Release, counted(len(r.Files), "file", "files")), r.Since,
						"it takes effect at the next restart of the device", false})
				}
			case baseline.Leaving:
				x.Text = fmt.Sprintf("the files before %s take effect again at the next restart", r.Release)
				f.restart = append(f.restart, restart{r.Product, "the files of " + r.Release + " are to go out", r.Since, x.Text + " of the device", true})
			case baseline.Active:
				x.Text = fmt.Sprintf("%s in force; the old files are kept until it has proved itself, %s at the latest", r.Release, stamp(a.proved(r)))
				if _, seen := a.bases.seen[r.Release]; seen || len(s.Standing.Builds) == 0 {
					x.Text = fmt.Sprintf("%s in force; the old files are kept until it has proved itself, about %s", r.Release, stamp(a.proved(r)))
				}
			default:
				x.Text = fmt.Sprintf("work on the files of %s was cut off; it is ended at the next start of the daemon", r.Release)
			}
			if s.Kind == release.KindHotpatch && r.Phase == baseline.Staged {
				x.Text += ", so that programs started after it need no patch"
			}
			f.staged = append(f.staged, x)
		}
	}
	f.current = a.showBaseline()
	for _, o := range offers {
		if o.Kind != release.KindHotpatch || o.ReasonCode != "baseline" || !a.isBehind(o, choices) {
			continue
		}
		if stagedOf[o.Product] == o.Baseline {
			continue // a restart is what it needs
		}
		b := behind{product: o.Product, release: o.ID, baseline: o.Baseline, text: fmt.Sprintf("%s needs the baseline %s%s", o.ID, o.Baseline, a.whyNotStaged(o.Baseline, offers))}
		b.why, b.opens, b.offered = a.whenStaged(o.Baseline, offers)
		f.behind = append(f.behind, b)
	}
	slices.SortFunc(f.behind, func(x, y behind) int { return cmp.Compare(x.text, y.text) })
	f.behind = slices.CompactFunc(f.behind, func(x, y behind) bool { return x.text == y.text })
	return f
}

// isBehind: a hotpatch that needs a newer baseline than this device has, not one
// for an older device; where nothing else of the product fits, any.
func (a *Agent) isBehind(o control.Offer, choices map[string]choice) bool {
	in := a.bases.standing[o.Product]
	if b, ok := a.offerOf(o.Baseline); ok && b.Kind == release.KindBaseline {
		return in.ID == "" || rank(b) > rankOf(in)
	}
	_, other := choices[o.Product]
	return !other
}

// whyNotStaged is the rest of a sentence.
func (a *Agent) whyNotStaged(id string, offers []control.Offer) string {
	for _, o := range offers {
		switch {
		case o.ID != id:
		case a.bases.busy[o.Product]:
			return ", which is being staged"
		case a.bases.refused[id].why.Code != "":
			return ", which cannot be staged here"
		case !o.Fits && o.Reason != "":
			return ", which is not staged: " + o.Reason
		default:
			return ", which is not staged yet"
		}
	}
	return ", which is not offered here"
}

// whenStaged is the same for the story: why a baseline is not staged, and when that ends.
func (a *Agent) whenStaged(id string, offers []control.Offer) (why reason, opens time.Time, offered bool) {
	o, ok := a.offerOf(id)
	if !ok {
		return reason{}, opens, false
	}
	if r := a.bases.refused[id]; r.why.Code != "" {
		return r.why, r.again, true
	}
	i := slices.IndexFunc(offers, func(x control.Offer) bool { return x.ID == id })
	if i < 0 || offers[i].Fits {
		return reason{}, opens, true
	}
	why = reason{offers[i].ReasonCode, offers[i].Reason}
	return why, a.opensAt(o, why.Code), true
}

// showBaseline is the baseline of status: that of the most recent month.
func (a *Agent) showBaseline() control.Baseline {
	var out control.Baseline
	var top standing
	for _, s := range a.bases.standing {
		if out.ID == "" || rankOf(s) > rankOf(top) {
			top, out = s, control.Baseline{ID: s.ID, Month: s.Month, Current: true}
		}
	}
	for _, o := range a.allOffers() { // of any product: one that is behind is enough
		if in, ok := a.bases.standing[o.Product]; ok && o.Kind == release.KindBaseline && !o.Rollout.Halt && rank(o) > rankOf(in) {
			if r, fits := fitsFiles(o, a.deviceFor(), in); fits || r.Code == "baseline" {
				out.Current = false
			}
		}
	}
	return out
}

// showBaselineOffer tells of a baseline in the list of what is offered.
func (a *Agent) showBaselineOffer(o repository.Offer, v View, w wishes) (r reason, inForce, ok bool) {
	if a.bases.standing[o.Product].ID == o.ID {
		return reason{}, true, true
	}
	r, ok = a.allowsFiles(o, a.deviceFor(), w, v.Now)
	if !ok {
		return r, false, false
	}
	if refused := a.bases.refused[o.ID].why; refused.Code != "" {
		return refused, false, false
	}
	if a.setOf(o.ID).Phase == baseline.Staged {
		return because("staged", "it is staged: it takes effect at the next restart of the device"), false, true
	}
	if a.bases.area != nil {
		for _, rec := range a.bases.area.Records() {
			if rec.Product == o.Product && rec.Release != o.ID && rec.Phase != baseline.Staged {
				return because("waits", "%s has to prove itself first", rec.Release), false, true
			}
		}
	}
	return reason{}, false, true
}

// beforeRestart is what has to be done first for a restart to bring staged files.
func (a *Agent) beforeRestart() string {
	switch p := a.paused(); {
	case p.Text == pausedByPolicy:
		return "set pause = false in " + a.o.Config.Policy.File
	case p.Code != "", a.lost().Code != "":
		return "hotpatch resume"
	case !a.verdict.Eligible:
		return "mend what hotpatch eligibility shows"
	}
	return ""
}

// attendFiles is what a person should know of whole files. A time that is zero is
// since it was first said.
func (a *Agent) attendFiles(f filesShown, add func(code, severity, text, remedy string, since control.Time, scope control.Scope)) {
	public := control.Scope{Public: true}
	for _, r := range f.restart {
		todo := string(control.RemedyRestartDevice)
		if first := a.beforeRestart(); first != "" && !r.leaves {
			todo = first + ", then restart the device"
		}
		add("restart-required", control.SeverityWarning, r.text+": "+r.effect, todo, control.At(r.since), public)
	}
	for _, b := range f.behind {
		todo := string(control.RemedyBaseline)
		if !b.offered {
			todo = "nothing here: its publisher has to publish " + b.baseline + " for this device, or " + b.release + " for the baseline that is here"
		}
		add("baseline-required", control.SeverityWarning, b.text, todo, control.At(a.sinceOf(sinceBehind+b.product)), public)
	}
	for id, r := range a.bases.refused {
		if _, offered := a.offerOf(id); offered {
			add(r.why.Code, control.SeverityError, r.why.Text, "it is tried again by itself", control.At(r.since), public)
		}
	}
	if a.bases.areaErr != nil {
		add("baseline", control.SeverityError, "what is staged cannot be read: no baseline is staged", "see the log", control.Time{}, public)
	}
	if a.o.Boot == "" && len(f.staged) > 0 {
		add("boot", control.SeverityError, "this system does not tell when it was restarted: staged files do not take effect", "see the log", control.Time{}, public)
	}
}
