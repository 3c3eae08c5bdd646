package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/calendar"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
)

// plot is all that the story of a device rests on, as of one moment. Times that
// are zero are not known.
type plot struct {
	Now        time.Time
	Looks      time.Time // when the device is looked at anew
	Checks     []openCheck
	Paused     string // who: pausedBy…, "" if nobody
	PausedAt   time.Time
	Lost       time.Time // since when holds may be lost, and nobody has looked
	Refused    time.Time // since when the policy is refused
	Good       time.Time // since when the one in force is; zero: there is none
	Holds      []heldBack
	Halted     []haltedHere
	Behind     []behindSince
	Restarts   []restart
	Waits      []wait
	Trials     []onTrial
	Watched    []watchedOver
	Proofs     []proof
	Hours      hoursWait
	Loading    []string // ids of releases
	Images     []openImages
	Scanned    bool
	Repository repositoryPlot
}

// openCheck is a requirement that stands in the way.
type openCheck struct {
	eligibility.Check
	Since    time.Time
	ByPolicy bool // read from the policy
}

// heldBack is a release that a hold alone keeps out.
type heldBack struct {
	control.Hold
	Guard, Policy bool // whose hold it is; the operator's else
}

// haltedHere is a release in force that its publisher halted.
type haltedHere struct {
	Product, ID, Why string
	Since            time.Time // when it was first seen
}

// behindSince is a product whose hotpatches need a baseline that is not here.
type behindSince struct {
	behind
	Since time.Time
}

// wait is a product's newest release of a kind that does not come into force now.
type wait struct {
	Product, ID, Severity string
	Kind                  string // of the release
	Why                   reason
	Since                 time.Time
	Opens                 time.Time // when it comes by itself
}

// onTrial is a release that runs in one process first.
type onTrial struct {
	ID          string
	Since, Ends time.Time // zero: no process has come for it yet
	Images      int       // that wait
}

// watchedOver is a release whose processes the health guard watches.
type watchedOver struct {
	Product, ID string
	Since, Ends time.Time
	Processes   int
	Acts        bool // it takes the release out; else it tells
}

// proof is a set of files whose old ones are kept.
type proof struct {
	Product, ID string
	Since, Ends time.Time
}

type hoursWait struct {
	Images       int
	Since, Opens time.Time
}

// openImages are those of one state that the same ends.
type openImages struct {
	State             control.ImageState
	Remedy            control.Remedy
	Images, Processes int
	Since, Again      time.Time
	Kept              string // where the remedy is the policy: who keeps them so, see keptBy
}

type repositoryPlot struct {
	Configured, Polled, Verified bool
	Checked, Asks, Ended         time.Time // Ended: of the metadata, zero if it has not
	Trouble                      *control.RepositoryError
	Passing                      bool      // it is of the kind that passes by itself
	Alarm                        time.Time // when that becomes something wrong
}

// story tells a device's next steps: what is so and since when, what comes next,
// and when or what it waits for. It is pure. The gravest comes first.
func story(p plot) []control.Chapter {
	t := &teller{plot: p, out: []control.Chapter{}}
	t.words()
	t.files()
	t.releases()
	t.repository()
	t.images()
	t.watches()
	t.poll()
	return t.out
}

type teller struct {
	plot
	out []control.Chapter
}

func (t *teller) tell(code, product, what string, since time.Time, next string, at time.Time, waits string) {
	t.out = append(t.out, control.Chapter{Code: code, Product: product, What: what, Since: control.At(since), Next: next, At: control.At(at), WaitsFor: waits,
		Scope: control.Scope{Public: true}})
}

// stopped tells what keeps everything new out, so that a date alone promises nothing.
func (p plot) stopped() (waits string, is bool) {
	switch {
	case !p.Lost.IsZero(), p.Paused == pausedByOperator:
		return control.WaitsForOperator, true
	case p.Paused != "":
		return control.WaitsForPolicy, true
	case len(p.Checks) > 0:
		return control.WaitsForRequirement, true
	}
	return "", false
}

// stopEnds says what ends what keeps everything new out.
func (p plot) stopEnds() string {
	switch {
	case !p.Lost.IsZero(), p.Paused == pausedByOperator:
		return "hotpatch resume"
	case p.Paused != "":
		return "the policy says pause = false"
	}
	return "the eligibility checks pass"
}

// words are what requirements and people say.
func (t *teller) words() {
	if !t.Lost.IsZero() {
		t.tell("state-damaged", "", "holds may be lost with a damaged state", t.Lost, "nothing new is applied until hotpatch resume", time.Time{}, control.WaitsForOperator)
	}
	for _, c := range t.Checks {
		next, at, waits := "no new fixes until it passes; it is looked at again", t.Looks, control.WaitsForRequirement
		if c.ByPolicy {
			next, at, waits = "no new fixes until the policy says otherwise, which counts at once", time.Time{}, control.WaitsForPolicy
		}
		t.tell("ineligible", "", standsInTheWay(c.Check), c.Since, next, at, waits)
	}
	if !t.Refused.IsZero() {
		next := "there was none before, so that the device is not enrolled; the file is read again when it changes"
		if !t.Good.IsZero() {
			next = fmt.Sprintf("the last good one, in force since %s, stays; the file is read again when it changes", stamp(t.Good))
		}
		t.tell("policy", "", "the policy is refused", t.Refused, next, time.Time{}, control.WaitsForPolicy)
	}
	switch t.Paused {
	case "":
	case pausedByPolicy:
		t.tell("paused", "", t.Paused, t.PausedAt, "nothing new is applied until it says pause = false", time.Time{}, control.WaitsForPolicy)
	default:
		t.tell("paused", "", t.Paused, t.PausedAt, "nothing new is applied until hotpatch resume", time.Time{}, control.WaitsForOperator)
	}
	for _, h := range t.Holds {
		code, next, waits := "held", "it stays out until hotpatch release-hold; a newer one comes by itself", control.WaitsForOperator
		what := heldText(h.Hold)
		switch {
		case h.Guard:
			code, what = "guard", "the health guard took "+h.ID+" out: "+what
		case h.Policy:
			next, waits = "it stays out until the policy lets it in; a newer one comes by itself", control.WaitsForPolicy
		}
		t.tell(code, h.Product, what, h.Since.Time, next, time.Time{}, waits)
	}
}

// files are baselines, and what else takes effect at a restart.
func (t *teller) files() {
	stops, stopped := t.stopped()
	for _, b := range t.Behind {
		next, at, waits := "it is staged by itself, for the restart after", b.opens, control.WaitsForTime
		switch {
		case !b.offered:
			next, at, waits = "no hotpatches until the repository has it; the next baseline is planned", calendar.Next(calendar.Baseline, t.Now), control.WaitsForPublisher
		case stopped:
			next, at, waits = "no hotpatches until "+t.stopEnds()+"; then the baseline is staged", time.Time{}, stops
		case b.why.Code != "" && b.opens.IsZero():
			next, waits = waitEnds(b.why.Code, b.baseline)
		}
		t.tell("baseline-required", b.product, b.text, b.Since, next, at, waits)
	}
	for _, r := range t.Restarts {
		next, waits := r.effect, control.WaitsForRestart
		if stopped && !r.leaves {
			next, waits = r.effect+" after "+t.stopEnds(), stops
		}
		t.tell("restart-required", r.product, r.text, r.since, next, time.Time{}, waits)
	}
}

// releases are those that do not come into force now.
func (t *teller) releases() {
	stops, stopped := t.stopped()
	for _, h := range t.Halted {
		t.tell("halted", h.Product, h.ID+" is in force, and "+h.Why, h.Since, "it stays where it is; a newer one replaces it", time.Time{}, control.WaitsForPublisher)
	}
	for _, w := range t.Waits {
		if slices.ContainsFunc(t.Behind, func(b behindSince) bool { return b.baseline == w.ID }) {
			continue // it is told already
		}
		next, waits := waitEnds(w.Why.Code, w.ID)
		at := w.Opens
		switch {
		case timed[w.Why.Code] && stopped:
			next, waits = "it comes after "+t.stopEnds()+", at the soonest", stops
		case at.IsZero():
		case w.Why.Code == codeFetch:
			next, waits = "it is fetched again", control.WaitsForTime
		default:
			next, waits = "it comes by itself", control.WaitsForTime
		}
		t.tell("waiting", w.Product, w.what(), w.Since, next, at, waits)
	}
	for _, id := range t.Loading {
		t.tell("loading", "", id+" is being fetched and verified", time.Time{}, "it is applied as soon as it is", time.Time{}, control.WaitsForTime)
	}
}

func (w wait) name() string {
	name := w.ID
	if w.Kind == release.KindBaseline {
		name = "the baseline " + name
	}
	if w.Severity != "" {
		name += " (" + w.Severity + ")"
	}
	return name
}

// what names the release and why it waits; the time is told apart from it.
func (w wait) what() string {
	why := w.Why.Text
	switch w.Why.Code {
	case "deferred":
		why = "the policy defers it"
	case "not-before":
		why = "its publisher has set its day"
	case "returns":
		why = "its publisher has halted and released it again and again"
	}
	return w.name() + " is not taken yet: " + why
}

// waitEnds says what ends a wait that no known time ends.
func waitEnds(code, id string) (next, waits string) {
	switch code {
	case "manual":
		return "it comes with hotpatch install " + id, control.WaitsForApproval
	case "not-approved":
		return "it comes when the policy approves it, or with hotpatch install " + id, control.WaitsForApproval
	case "held":
		return "it stays out until its hold ends", control.WaitsForOperator
	case "rollback":
		return "it stays out: a newer one was in force; hotpatch install " + id + " takes it all the same", control.WaitsForOperator
	case "ring":
		return "it comes when its publisher rolls it out further", control.WaitsForPublisher
	case "halted":
		return "it comes when its publisher releases it again, or a newer one does", control.WaitsForPublisher
	case "expired":
		return "it comes when its publisher has signed anew", control.WaitsForPublisher
	case "feature", "consistency":
		return "another release, or a newer hotpatchd, is needed", control.WaitsForPublisher
	case "damaged":
		return "its publisher has to publish it again", control.WaitsForPublisher
	case "out-of-scope":
		return "it stays out, as the configuration says", control.WaitsForConfig
	}
	return "it is tried again by itself", control.WaitsForTime
}

func (t *teller) repository() {
	r := t.Repository
	asked := "it is asked again"
	if !r.Ended.IsZero() {
		waits := control.WaitsForPublisher
		if r.Trouble != nil && r.Passing {
			waits = control.WaitsForNetwork
		}
		t.tell("expired", "", "the repository's metadata has ended", r.Ended, "nothing new is applied until its publisher signs anew; "+asked, r.Asks, waits)
	}
	switch {
	case !r.Configured && !r.Verified:
		t.tell("no-repository", "", "no repository is configured", time.Time{}, "nothing comes until one is, or with hotpatch install FILE", time.Time{}, control.WaitsForConfig)
	case r.Trouble == nil:
	case !r.Polled:
		t.tell("repository", "", r.Trouble.Text, r.Trouble.Since.Time, "nothing new comes until the configuration is mended and the daemon restarted", time.Time{}, control.WaitsForConfig)
	case r.Passing && t.Now.Before(r.Alarm):
		t.tell("repository", "", r.Trouble.Text, r.Trouble.Since.Time, "from "+stamp(r.Alarm)+" on this is called wrong; "+asked, r.Asks, control.WaitsForNetwork)
	case r.Passing:
		t.tell("repository", "", r.Trouble.Text, r.Trouble.Since.Time, asked, r.Asks, control.WaitsForNetwork)
	default:
		t.tell("repository", "", r.Trouble.Text, r.Trouble.Since.Time, asked, r.Asks, troubleEnds(r.Trouble.Code))
	}
}

// troubleEnds is what a repository's trouble waits for that does not pass by itself.
func troubleEnds(code string) string {
	switch code {
	case repository.CodeClock, repository.CodeStorage, repository.CodeConfig, repository.CodeProxyAuth, repository.CodeInspection:
		return control.WaitsForConfig
	}
	return control.WaitsForPublisher
}

// images are the ones that are not well, or not yet.
func (t *teller) images() {
	if !t.Scanned {
		t.tell("scan", "", "the processes have not all been looked at yet", time.Time{}, "they are looked at now", time.Time{}, control.WaitsForTime)
	}
	if h := t.Hours; h.Images > 0 {
		t.tell("hours", "", counted(h.Images, "image waits", "images wait")+" for the policy's hours", h.Since, "work begins", h.Opens, control.WaitsForTime)
	}
	for _, i := range t.Images {
		what := openState{state: i.State, images: i.Images, processes: i.Processes}.text()
		next, at, waits := "nothing by itself", time.Time{}, control.WaitsForPublisher
		switch i.Remedy {
		case control.RemedyWait:
			next, at, waits = "tried again", i.Again, control.WaitsForProcess
		case control.RemedyRestartProcess:
			next, waits = "nothing by itself: a restart of the process ends it", control.WaitsForEnd
		case control.RemedyRestartDevice:
			next, waits = "nothing by itself: a restart of the device ends it", control.WaitsForRestart
		case control.RemedyBaseline:
			next, waits = "nothing by itself: the baseline ends it", control.WaitsForRestart
		case control.RemedyPolicy:
			next, waits = keptEnds(i.Kept)
		case control.RemedyAuthor:
			next = "nothing by itself: a release that fits ends it"
		}
		t.tell(string(i.State), "", what, i.Since, next, at, waits)
	}
}

// What keeps images as they are, where a person's word ends it.
const (
	keptByDeny   = "deny"         // a rule of the policy
	keptByGuard  = "guard"        // out of one user's processes
	keptByScope  = "out-of-scope" // the configuration
	keptByBounds = "too-many"     // images of the same kind in one process
	keptBySystem = ""             // it does not let the daemon in
)

// keptBy tells who keeps an image as it is.
func keptBy(im control.Image) string {
	switch {
	case im.Remedy != control.RemedyPolicy:
		return ""
	case im.ReasonCode == "denied" && strings.HasPrefix(im.Reason, byDeny):
		return keptByDeny
	case im.ReasonCode == keptByGuard, im.ReasonCode == keptByScope, im.ReasonCode == keptByBounds:
		return im.ReasonCode
	}
	return keptBySystem
}

// keptEnds says what ends that, and whom it waits for.
func keptEnds(by string) (next, waits string) {
	switch by {
	case keptByDeny:
		return "nothing by itself: stays so until deny is changed", control.WaitsForPolicy
	case keptByGuard:
		return "nothing by itself: stays so until hotpatch release-hold of the release, or a newer one", control.WaitsForOperator
	case keptByScope:
		return "nothing by itself: stays so until [repository] images says otherwise", control.WaitsForConfig
	case keptByBounds:
		return "nothing by itself: stays so until the process has fewer such images", control.WaitsForEnd
	}
	return "nothing by itself: stays so until somebody lets the daemon in", control.WaitsForPolicy
}

// watches are what runs, and ends well if nothing happens.
func (t *teller) watches() {
	for _, x := range t.Trials {
		what := fmt.Sprintf("%s is tried in one process first, %s", x.ID, counted(x.Images, "image waits", "images wait"))
		waits := control.WaitsForTime
		if x.Ends.IsZero() {
			waits = control.WaitsForProcess
		}
		t.tell("canary", "", what, x.Since, "the others get it, if that goes well,", x.Ends, waits)
	}
	for _, x := range t.Watched {
		next := "it is taken out if they crash with it, else the watch ends"
		if !x.Acts {
			next = "it is told if they crash with it, and the watch ends"
		}
		t.tell("guard-window", x.Product, fmt.Sprintf("the health guard watches %s with %s", counted(x.Processes, "process", "processes"), x.ID), x.Since, next, x.Ends, control.WaitsForTime)
	}
	for _, x := range t.Proofs {
		t.tell("baseline-proof", x.Product, "the old files are kept until "+x.ID+" has proved itself", x.Since, "they are removed", x.Ends, control.WaitsForTime)
	}
}

func (t *teller) poll() {
	if r := t.Repository; r.Polled && r.Trouble == nil && r.Ended.IsZero() {
		t.tell("poll", "", "the repository is in order", time.Time{}, "it is asked again", r.Asks, control.WaitsForTime)
	}
}

// elsewhere are the reasons of images that another chapter tells of.
var elsewhere = map[string]bool{"held": true, "manual": true, "not-approved": true, "ring": true, "deferred": true, "not-before": true, "returns": true, "paused": true,
	"not-eligible": true, "canary": true, "hours": true, "state-lost": true, "expired": true, "halted": true, "rollback": true, "loading": true, "fetch": true}

// openOf counts the images that no other chapter tells of, worst first; again is
// when those of a state are tried again.
func openOf(d control.Processes, again map[control.ImageState]time.Time, since func(control.ImageState) time.Time) []openImages {
	var out []openImages
	for _, p := range d.Processes {
		in := map[int]bool{}
		for _, im := range p.Images {
			if !im.State.Open() || elsewhere[im.ReasonCode] {
				continue
			}
			by := keptBy(im)
			k := slices.IndexFunc(out, func(o openImages) bool { return o.State == im.State && o.Remedy == im.Remedy && o.Kept == by })
			if k < 0 {
				k = len(out)
				out = append(out, openImages{State: im.State, Remedy: im.Remedy, Since: im.Since.Time, Again: again[im.State], Kept: by})
			}
			o := &out[k]
			if o.Images++; im.Since.Before(o.Since) {
				o.Since = im.Since.Time
			}
			if !in[k] {
				in[k] = true
				o.Processes++
			}
		}
	}
	for i := range out {
		if at := since(out[i].State); !at.IsZero() && at.Before(out[i].Since) {
			out[i].Since = at
		}
	}
	rank := func(s control.ImageState) int { return slices.Index(control.ImageStates, s) }
	slices.SortFunc(out, func(x, y openImages) int {
		return cmp.Or(cmp.Compare(rank(x.State), rank(y.State)), strings.Compare(string(x.Remedy), string(y.Remedy)), strings.Compare(x.Kept, y.Kept))
	})
	return out
}
