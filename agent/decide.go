package agent

import (
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
	Fails    []string // checks that stand in the way
	Paused   reason   // Code "" = not paused
	Closed   bool     // outside the policy's hours
	Forced   string   // product whose release an operator asked for just now: hours do not matter
	Choices  map[string]choice
	Deny     func(info target.Info, image string) (reason, bool)
	InScope  func(image string) bool
	Procs    []Proc
}

// Proc is one process and the images found in it.
type Proc struct {
	Info   target.Info
	Images []ImageView
	Err    error // why its images are not known
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
	Release  string // release it was for
	State    control.ImageState
	Reason   reason
	Detail   string // with addresses and bytes: for administrators
	Remedy   control.Remedy
	Since    time.Time
	Attempts int
	Change   uint64 // of the process, at the time
	Next     time.Time
}

// Kind of an Intent.
type Kind string

const (
	DoNothing Kind = ""
	DoApply   Kind = "apply"
	DoUndo    Kind = "undo"
	DoAdopt   Kind = "adopt"
)

// Intent is what should be done to one image for one product, and why; or what
// its state is if nothing should.
type Intent struct {
	Kind    Kind
	Proc    *Proc
	Image   *ImageView
	Product string
	Offer   *repository.Offer // apply; or the release the image is judged by
	Claim   *patcher.Claim    // adopt
	State   control.ImageState
	Reason  reason
	Remedy  control.Remedy
	Since   time.Time
}

// decide is pure: what should be done about every image that a release names.
func decide(v View) []Intent {
	var out []Intent
	for i := range v.Procs {
		p := &v.Procs[i]
		for j := range p.Images {
			out = append(out, decideImage(v, p, &p.Images[j])...)
		}
	}
	return out
}

func decideImage(v View, p *Proc, im *ImageView) []Intent {
	var out []Intent
	seen := map[string]bool{}
	for product, c := range v.Choices {
		seen[product] = true
		if in, ok := decideProduct(v, p, im, c); ok {
			out = append(out, in)
		}
	}
	// Products that the repository no longer offers, or never did: what is
	// applied stays, and what claims to be ours is looked into.
	for product, r := range im.Records {
		if !seen[product] && r.Live() {
			seen[product] = true
			out = append(out, standing(p, im, r, nil))
		}
	}
	for k := range im.Claims {
		if cl := &im.Claims[k]; !seen[cl.Product] {
			out = append(out, Intent{Kind: DoAdopt, Proc: p, Image: im, Product: cl.Product, Claim: cl, State: control.PendingImage})
		}
	}
	return out
}

// decideProduct judges one image by one product; false if the product does not name it.
func decideProduct(v View, p *Proc, im *ImageView, c choice) (Intent, bool) {
	in := Intent{Proc: p, Image: im, Product: c.Product, Offer: c.Want}
	judged := c.Want
	if judged == nil {
		judged, in.Offer = c.Latest, c.Latest
	}
	named, same := match(judged, im)
	rec, has := im.Records[c.Product]
	live := has && rec.Live()
	if !named && !same && !live {
		for k := range im.Claims {
			if im.Claims[k].Product == c.Product {
				in.Kind, in.Claim, in.State = DoAdopt, &im.Claims[k], control.PendingImage
				return in, true
			}
		}
		return in, false
	}
	// A patch of ours without a record comes first: memory is the truth.
	if !live {
		for k := range im.Claims {
			if im.Claims[k].Product == c.Product {
				if t, tried := im.Tried[c.Product]; tried && t.Release == "adopt "+im.Claims[k].Release && t.Change == p.Info.Change {
					return in.as(t), true
				}
				in.Kind, in.Claim, in.State = DoAdopt, &im.Claims[k], control.PendingImage
				return in, true
			}
		}
	}
	if live && rec.State == patcher.TornUp {
		return standing(p, im, rec, judged), true
	}
	if c.Want == nil {
		if live && c.Undo {
			in.Kind, in.Reason = DoUndo, c.Why
			return in.unless(v, rec), true
		}
		if live {
			return standing(p, im, rec, judged), true
		}
		in.State, in.Reason, in.Remedy = control.Unpatched, c.Why, remedyFor(c.Why)
		if !same {
			in.otherBuild(im)
		}
		return in, true
	}
	if live && rec.Release == c.Want.ID {
		return standing(p, im, rec, judged), true
	}
	if live && !same {
		in.Kind, in.Reason = DoUndo, because("replaced", "%s no longer names this image", c.Want.ID)
		return in.unless(v, rec), true
	}
	if !same {
		in.otherBuild(im)
		return in, true
	}
	return decideApply(v, p, im, in, rec, live), true
}

// decideApply: the image is the base of the wanted release and does not run it.
func decideApply(v View, p *Proc, im *ImageView, in Intent, rec patcher.Record, live bool) Intent {
	in.State = control.Unpatched
	if live {
		in.State = control.Patched // an older sequence goes on meanwhile
	}
	switch {
	case !v.InScope(im.Name):
		in.State, in.Reason, in.Remedy = control.Blocked, because("out-of-scope", "%s is outside [repository] images", im.Name), control.RemedyPolicy
		return in
	case v.Paused.Code != "":
		in.Reason, in.Remedy = v.Paused, control.RemedyPolicy
		return in
	case !v.Eligible:
		in.Reason, in.Remedy = because("not-eligible", "the device is not eligible: %v", v.Fails), control.RemedyPolicy
		return in
	}
	if r, denied := v.Deny(p.Info, im.Name); denied {
		in.State, in.Reason, in.Remedy = control.Blocked, r, control.RemedyPolicy
		return in
	}
	if v.Closed && v.Forced != in.Product {
		in.State, in.Reason, in.Remedy = control.PendingImage, because("hours", "outside the policy's hours"), control.RemedyWait
		return in
	}
	if t, ok := im.Tried[in.Product]; ok && t.Release == in.Offer.ID && t.Change == p.Info.Change && v.Now.Before(t.Next) && v.Forced != in.Product {
		return in.as(t)
	}
	in.Kind, in.State = DoApply, control.PendingImage
	return in
}

// as repeats how the last attempt ended.
func (in Intent) as(t Try) Intent {
	in.State, in.Reason, in.Remedy, in.Since = t.State, t.Reason, t.Remedy, t.Since
	return in
}

// unless holds an undo back while its last attempt is recent.
func (in Intent) unless(v View, rec patcher.Record) Intent {
	in.State = control.PendingImage
	if t, ok := in.Image.Tried[in.Product]; ok && t.Release == "undo "+rec.Release && v.Now.Before(t.Next) && v.Forced != in.Product {
		in.Kind = DoNothing
		return in.as(t)
	}
	return in
}

func (in *Intent) otherBuild(im *ImageView) {
	in.State, in.Remedy = control.OtherBuild, control.RemedyAuthor
	in.Reason = because("identity", "this build (time stamp %08x) is not one that %s names", im.Identity.TimeDateStamp, in.Offer.ID)
}

// standing reports a record in force.
func standing(p *Proc, im *ImageView, rec patcher.Record, judged *repository.Offer) Intent {
	in := Intent{Proc: p, Image: im, Product: rec.Product, Offer: judged, State: control.Patched, Since: rec.At}
	switch rec.State {
	case patcher.TornUp:
		in.State, in.Remedy = control.Torn, control.RemedyRestartProcess
		in.Reason = because("torn", "an entry could not be written back: restart the process")
	case patcher.Swapping, patcher.Undoing:
		in.State = control.PendingImage
	}
	if t, ok := im.Tried[rec.Product]; ok && t.State == control.Drifted {
		return in.as(t)
	}
	return in
}

func remedyFor(r reason) control.Remedy {
	switch r.Code {
	case "not-before", "ring", "expired":
		return control.RemedyWait
	case "baseline":
		return control.RemedyBaseline
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
