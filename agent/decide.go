package agent

import (
	"maps"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// View is everything a decision rests on, gathered at one moment.
type View struct {
	Now      time.Time
	Eligible bool
	Fails    []string         // checks that stand in the way
	Paused   reason           // Code "" = not paused
	Lost     reason           // Code "" = the operator's word is whole; else it went with a damaged state
	Chosen   map[string]bool  // releases that the operator asked for: a loss does not hold them back
	Closed   bool             // outside the policy's hours
	Opens    time.Time        // when they open again, if Closed
	Grace    map[string]grace // by product, when what is in force stops keeping to the hours; none: never
	Forced   string           // product whose release an operator asked for just now: hours do not matter
	Trial    Trial
	Harms    harms
	Choices  map[string]choice
	Scope    func(product string) bool           // products that concern this installation
	Word     func(release string) (reason, bool) // somebody's word takes this release out
	Ready    func(release string) bool           // verified and loaded
	Builds   map[string][]fixedBuild             // by product: what is fixed on disk
	Standing map[string]standing                 // by product: the baselines in force
	Deny     func(info target.Info, name, path string) (reason, bool)
	InScope  func(image string) bool
	Procs    []Proc
}

// Proc is one process and the images found in it.
type Proc struct {
	Info   target.Info
	Images []ImageView
	Err    error     // why its images are not known
	Used   int       // how many times in a row it has used up its share of a pass
	Rest   time.Time // its turn does not come before
	Left   bool      // a step on it does not end
}

// ImageView is one image in one process, what is known of it and what was tried.
type ImageView struct {
	Name     string
	Path     string
	Base     target.Addr
	Identity pe.Identity // of the headers: no hash of the code
	Records  map[string]patcher.Record
	Claims   []patcher.Claim
	Tried    map[string]Try // by product
}

// Try is how the last attempt on an image ended.
type Try struct {
	Release  string // what it was: an id, or one of the words below and an id
	State    control.ImageState
	Reason   reason
	Detail   string // with addresses and bytes: for administrators
	Remedy   control.Remedy
	Since    time.Time
	Attempts int
	Change   uint64 // of the process, at the time
	Next     time.Time
	Soonest  time.Time // even if the process changes
}

// Kind of an Intent.
type Kind string

const (
	DoNothing Kind = ""
	DoRecover Kind = "recover" // a record says that work was under way: memory decides how it ended
	DoAdopt   Kind = "adopt"
	DoUndo    Kind = "undo"
	DoApply   Kind = "apply"
)

// Intent is what should be done to one image for one product, and why; or what
// its state is if nothing should.
type Intent struct {
	Kind    Kind
	Proc    *Proc
	Image   *ImageView
	Product string
	Offer   *repository.Offer // apply; or the release the image is judged by, nil if none
	Claim   *patcher.Claim    // adopt
	State   control.ImageState
	Reason  reason
	Remedy  control.Remedy
	Since   time.Time
	Try     *Try      // the last attempt, where it is what State tells of
	Again   time.Time // when it is tried again, zero if nothing waits for time

	release *loaded // that is applied or adopted, set when it is begun
}

// what names the attempt that an intent is, as Try.Release does.
func (in Intent) what() string {
	switch in.Kind {
	case DoRecover:
		return "recover " + in.Image.Records[in.Product].Release
	case DoAdopt:
		return "adopt " + in.Claim.Release
	case DoUndo:
		return "undo " + in.Image.Records[in.Product].Release
	}
	return in.Offer.ID
}

// decide is pure: what should be done about every image that a release names.
// The order is that of the processes and images, then of the products' names.
func decide(v View) []Intent {
	var out []Intent
	for i := range v.Procs {
		p := &v.Procs[i]
		first := len(out)
		for j := range p.Images {
			im := &p.Images[j]
			for _, product := range productsOf(v, im) {
				if in, ok := decideProduct(v, p, im, product); ok {
					out = append(out, in)
				}
			}
		}
		limit(out[first:])
	}
	canaryFirst(v, out)
	return out
}

// maxPatched bounds the images of one process that one product patches. A
// program has a few, one of very many plug-ins some dozens; who maps one image
// hundreds of times does so to keep us at work, or by mistake.
const maxPatched = 64

// limit refuses, by name, what goes beyond maxPatched in one process: the
// images at the lowest addresses have their turn. What is patched stays and
// counts, and is replaced and undone like any other.
func limit(list []Intent) {
	live := func(in Intent) bool { return in.Image.Records[in.Product].Live() }
	wanted := func(in Intent) bool {
		return !live(in) && in.Offer != nil && (in.Kind == DoApply || in.Try != nil && in.Try.Release == in.Offer.ID)
	}
	n := map[string]int{}
	for _, in := range list {
		if live(in) {
			n[in.Product]++
		}
	}
	for i, in := range list {
		if !wanted(in) {
			continue
		}
		if n[in.Product]++; n[in.Product] <= maxPatched {
			continue
		}
		list[i].Kind, list[i].State, list[i].Remedy, list[i].Try, list[i].Again = DoNothing, control.Blocked, control.RemedyPolicy, nil, time.Time{}
		list[i].Reason = because("too-many", "the process has mapped more than %d images that %s names", maxPatched, in.Offer.ID)
	}
}

// productsOf lists what could concern an image: what is offered, and what was
// once, as far as it left something behind.
func productsOf(v View, im *ImageView) []string {
	all := map[string]bool{}
	for product := range v.Choices {
		all[product] = true
	}
	for product := range im.Records {
		all[product] = true
	}
	for product := range v.Builds {
		all[product] = true
	}
	for i := range im.Claims {
		all[im.Claims[i].Product] = true
	}
	return slices.Sorted(maps.Keys(all))
}

// decideProduct judges one image by one product; false if the product has
// nothing to do with it. Memory comes first: what was under way is brought to
// an end, what is ours without a record is adopted, and only then the wish counts.
func decideProduct(v View, p *Proc, im *ImageView, product string) (Intent, bool) {
	c := v.Choices[product]
	in := Intent{Proc: p, Image: im, Product: product, Offer: c.Want}
	if in.Offer == nil {
		in.Offer = c.Latest
	}
	rec := im.Records[product]
	live := rec.Live()
	if !live && len(im.Records) == 0 && v.Scope != nil && !v.Scope(product) && c.Product == "" {
		return in, false // another installation's line of releases
	}
	if unsettled(rec) {
		return in.do(v, DoRecover), true
	}
	if !live {
		for k := range im.Claims {
			if in.Claim = &im.Claims[k]; in.Claim.Product == product {
				return in.do(v, DoAdopt), true
			}
		}
		in.Claim = nil
	}
	if live {
		return decideLive(v, in, rec, c), true
	}
	named, same := match(in.Offer, im)
	if id := v.fixed(product, im); id != "" && !same {
		in.State, in.Reason = control.Fixed, because("fixed", "its file is the one of %s", id)
		return in, true
	}
	if id := v.outdated(product, im); id != "" && !same {
		in.State, in.Remedy = control.Blocked, control.RemedyRestartProcess
		in.Reason = because("older-file", "it started before %s took effect and runs the older file", id)
		return in, true
	}
	waits := c.Want == nil
	if !same && !waits { // what only a release names that waits is as open as where nothing is in force
		if _, waits = match(c.Latest, im); waits {
			in.Offer, named, same = c.Latest, true, true
		}
	}
	switch {
	case !named:
		return in, false
	case !same:
		return in.otherBuild(), true
	case waits:
		in.State, in.Reason, in.Remedy = control.Unpatched, c.Why, remedyFor(c.Why)
		if blocks[c.Why.Code] {
			in.State = control.Blocked
		}
		return in, true
	}
	in.State = control.Unpatched
	if r, out := v.harmed(p.Info, c.Want.ID); out {
		in.Reason, in.Remedy = r, control.RemedyPolicy
		return in, true
	}
	if in, stands := v.gate(in); stands {
		return in, true
	}
	return in.do(v, DoApply), true
}

// decideLive: a patch of ours is in force in the image. It stays, unless
// somebody's word takes it out or the wanted release, in force here and now, replaces it.
func decideLive(v View, in Intent, rec patcher.Record, c choice) Intent {
	in.State, in.Since = control.Patched, rec.At
	if rec.State == patcher.TornUp { // it may be written back yet: the least that is owed to the process
		in = in.do(v, DoRecover)
		in.State, in.Remedy = control.Torn, control.RemedyRestartProcess
		in.Reason = because("torn", "an entry could not be written back: restart the process")
		return in
	}
	_, same := match(c.Want, in.Image)
	if r, out := v.Word(rec.Release); out {
		return takeOut(v, in, rec, c.Want, same, r)
	}
	if r, out := v.harmed(in.Proc.Info, rec.Release); out {
		in.State, in.Reason = control.PendingImage, r
		return in.do(v, DoUndo)
	}
	if c.Want != nil {
		if _, out := v.harmed(in.Proc.Info, c.Want.ID); out {
			return in // it keeps what it has
		}
	}
	if c.Want == nil || rec.Release == c.Want.ID {
		if t, ok := in.Image.Tried[in.Product]; ok && t.State == control.Drifted {
			return in.as(t) // an undo that was called off found somebody else's bytes
		}
		in.Reason, _ = v.Deny(in.Proc.Info, in.Image.Name, in.Image.Path) // well, but the rule came too late
		return in
	}
	if in, stands := v.gate(in); stands {
		return in
	}
	if !same && v.outdated(in.Product, in.Image) != "" {
		return in // what is for the file on disk says nothing of the older one
	}
	if !same {
		in.Reason = because("replaced", "%s no longer names this image", c.Want.ID)
		return in.do(v, DoUndo)
	}
	return in.do(v, DoApply)
}

// takeOutWithin is how long the release before may find threads in its way
// before what was taken out is undone without it: an operator stops a bad fix.
const takeOutWithin = 10 * time.Second

// takeOut obeys a word: pause, hours, rules and eligibility hold back what is
// new, never this. The release before comes back if it can; if it is refused
// here, or the owner denied us the process, nothing is better than what was taken out.
func takeOut(v View, in Intent, rec patcher.Record, want *repository.Offer, same bool, word reason) Intent {
	in.State, in.Reason = control.PendingImage, word
	t := in.Image.Tried[in.Product]
	refused := t.Release == "undo "+rec.Release
	if want != nil && t.Release == want.ID {
		switch t.State {
		case control.Blocked, control.OtherBuild, control.Failed:
			refused = true
		case control.Busy:
			refused = v.Now.Sub(t.Since) > takeOutWithin
		}
	}
	// A hold on the release before may be among what was lost.
	unsure := want != nil && v.Lost.Code != "" && !v.Chosen[want.ID]
	// What the owner denied us is taken back to what it was, and no further.
	_, denied := v.Deny(in.Proc.Info, in.Image.Name, in.Image.Path)
	if want == nil || !same || refused || unsure || denied {
		return in.do(v, DoUndo)
	}
	if want.Sequence > rec.Sequence { // not back but on: that is new work
		if held, stands := v.gate(in); stands && held.Reason.Code != "loading" {
			return in.do(v, DoUndo)
		}
	}
	if !v.Ready(want.ID) {
		return in // its load ends, well or not
	}
	return in.do(v, DoApply)
}

// stopped tells what stops all new work with a release.
func (v View) stopped(release string) (reason, bool) {
	switch {
	case v.Paused.Code != "":
		return v.Paused, true
	case v.Lost.Code != "" && !v.Chosen[release]:
		return v.Lost, true
	}
	return reason{}, false
}

// gate tells what holds back new work on an image. The intent comes in with
// the state that the image keeps meanwhile.
func (v View) gate(in Intent) (Intent, bool) {
	info, im := in.Proc.Info, in.Image
	denied, isDenied := v.Deny(info, im.Name, im.Path)
	stop, isStopped := v.stopped(in.Offer.ID)
	switch {
	case !v.InScope(im.Name):
		in.State, in.Reason, in.Remedy = control.Blocked, because("out-of-scope", "%s is outside [repository] images", im.Name), control.RemedyPolicy
	case isStopped:
		in.Reason, in.Remedy = stop, control.RemedyPolicy
	case !v.Eligible:
		in.Reason, in.Remedy = because("not-eligible", "the device is not eligible: %s", strings.Join(v.Fails, ", ")), control.RemedyPolicy
	case isDenied:
		in.State, in.Reason, in.Remedy = control.Blocked, denied, control.RemedyPolicy
	case v.Closed && v.Forced != in.Product && !v.graceOver(in):
		in = v.outsideHours(in)
	case !v.Ready(in.Offer.ID):
		in.State, in.Reason, in.Remedy = control.PendingImage, because("loading", "%s is being fetched and verified", in.Offer.ID), control.RemedyWait
	default:
		return in, false
	}
	return in, true
}

// do makes the intent an action, or, while the last attempt of the same is
// recent and nothing has changed since, repeats how that one ended.
func (in Intent) do(v View, kind Kind) Intent {
	in.Kind, in.State, in.Remedy = kind, control.PendingImage, control.RemedyWait
	if in.Proc.Left {
		in.Kind, in.State, in.Remedy = DoNothing, control.Busy, control.RemedyRestartProcess
		in.Reason = because("hangs", "work on the process does not end: it does not let itself be read or stopped")
		return in
	}
	t, ok := in.Image.Tried[in.Product]
	rests := v.Now.Before(in.Proc.Rest) && v.Forced != in.Product
	if !ok || t.Release != in.what() {
		if rests {
			in.Kind, in.Again = DoNothing, in.Proc.Rest
			in.Reason = because("share", "the process has used up its share of the time: others come first")
		}
		return in
	}
	// A change of the process is a reason to look again, but not after an attempt
	// that came far enough to have changed it itself.
	changed := t.Change != in.Proc.Info.Change && t.State != control.Busy && t.State != control.Failed
	next := t.Next
	if changed && t.Soonest.Before(next) {
		next = t.Soonest
	}
	waits := v.Now.Before(next) && v.Forced != in.Product
	in = in.as(t)
	switch {
	case waits:
		in.Kind, in.Again = DoNothing, next
	case rests:
		in.Kind, in.Again = DoNothing, in.Proc.Rest
	}
	return in
}

// as tells how the last attempt ended: also while its turn has come again.
func (in Intent) as(t Try) Intent {
	in.State, in.Reason, in.Remedy, in.Since, in.Try = t.State, t.Reason, t.Remedy, t.Since, &t
	return in
}

func (in Intent) otherBuild() Intent {
	in.State, in.Remedy = control.OtherBuild, control.RemedyAuthor
	in.Reason = because("identity", "this build (time stamp %08x) is not one that %s names", in.Image.Identity.TimeDateStamp, in.Offer.ID)
	return in
}

// unsettled: work was under way when we died, or when the state could not be written.
func unsettled(r patcher.Record) bool {
	switch r.State {
	case patcher.Staging, patcher.Swapping, patcher.Undoing:
		return true
	}
	return false
}

// blocks are the reasons that no word of an operator stands behind.
var blocks = map[string]bool{"out-of-scope": true, "feature": true, "consistency": true, "damaged": true, "fetch": true}

func remedyFor(r reason) control.Remedy {
	switch r.Code {
	case "not-before", "deferred", "returns", "ring", "expired", "fetch":
		return control.RemedyWait
	case "baseline":
		return control.RemedyBaseline
	case "feature", "consistency", "damaged", "halted":
		return control.RemedyAuthor
	}
	return control.RemedyPolicy
}

// match tells whether a release names an image, by label, and whether the
// image is one of its bases, by headers. Identity alone is enough: a name is
// a label.
func match(o *repository.Offer, im *ImageView) (named, same bool) {
	if o == nil {
		return false, false
	}
	for _, b := range o.Bases {
		if foldEqual(b.Name, im.Name) || im.Path != "" && foldEqual(b.Name, lastElement(im.Path)) {
			named = true
		}
		if sameHeaders(b.Identity, im.Identity) {
			same = true
		}
	}
	return named || same, same
}

// sameHeaders compares what headers tell of a build; the patcher compares the
// code before it touches anything.
func sameHeaders(a, b pe.Identity) bool {
	return a.Machine == b.Machine && a.SizeOfImage == b.SizeOfImage && a.TimeDateStamp == b.TimeDateStamp && a.RSDS == b.RSDS
}
