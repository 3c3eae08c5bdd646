package agent

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

// reason says why something is not done: a stable code and a sentence.
type reason struct{ Code, Text string }

func because(code, format string, a ...any) reason { return reason{code, fmt.Sprintf(format, a...)} }

// device is what choosing needs to know of this machine.
type device struct {
	OS, Arch string // as releases spell them: "linux", "amd64"
	Baseline string // id of the baseline in force, "" if none was ever installed
	// Baselines are those in force by product, where files of that product are ours to replace.
	Baselines map[string]string
	Place     int // in rollouts, 0 to 99
}

// wishes are the operator's and the owner's words, and what they led to so far.
type wishes struct {
	Products  []Glob
	Hold      func(id string) (reason, bool)
	Mode      Mode
	Approve   []string             // ids, for mode approved
	Defer     time.Duration        // after publication
	Installed map[string]bool      // ids the operator asked for, for what mode, deferral and rollouts hold back
	InForce   map[string]string    // product → id in force
	Before    map[string]string    // product → id that was in force before, where nobody has yet what is
	Begun     map[string]bool      // ids that came into a process here
	OnDisk    map[string]bool      // hotpatches in force whose files took effect here
	Floors    map[string]uint32    // product and baseline → highest sequence ever in force
	Ends      time.Time            // of the metadata
	Returns   map[string]time.Time // id → when it may come back after its publisher took it out again and again
	Broken    map[string]reason    // id → why a release that metadata names cannot be used here
}

// word tells whether somebody's word takes a release out: a hold, or a halt
// that says so. Nothing else ever does.
func (w wishes) word(id string, offers []repository.Offer) (reason, bool) {
	if r, held := w.Hold(id); held {
		return r, true
	}
	for i := range offers {
		if o := &offers[i]; o.ID == id && o.Rollout.Halt && o.Rollout.Undo {
			return halted(*o), true
		}
	}
	return reason{}, false
}

func halted(o repository.Offer) reason {
	return because("halted", "its publisher halted it: %s", cmp.Or(o.Rollout.Reason, "no reason given"))
}

// choice is what one product should come to on this device.
type choice struct {
	Product string
	Want    *repository.Offer // nil: nothing should be in force
	Latest  *repository.Offer // the highest that is for this device, wanted or not
	Why     reason            // why Latest is not Want
	Opens   time.Time         // when time alone lets one in that is above Want; zero: no such one
	Held    *repository.Offer // the one that a hold alone keeps out, nil if none: what is older than Want is not missed
	Never   reason            // why the one in force may not stay so, that nobody has yet; Code "" if it may
}

// baseline is the baseline in force for a product.
func (d device) baseline(product string) string {
	if id, ok := d.Baselines[product]; ok {
		return id
	}
	return d.Baseline
}

// fits tells why an offer is not for this device at all; ok means it is.
func fits(o repository.Offer, d device) (reason, bool) {
	switch {
	case o.Kind != release.KindHotpatch:
		return because("baseline-kind", "it is a baseline: whole files, in force after a restart"), false
	case len(o.OS) > 0 && !slices.Contains(o.OS, d.OS):
		return because("os", "it is for %v, this is %s", o.OS, d.OS), false
	case len(o.Arch) > 0 && !slices.Contains(o.Arch, d.Arch):
		return because("arch", "it is for %v, this is %s", o.Arch, d.Arch), false
	case o.Baseline != "" && o.Baseline != d.baseline(o.Product):
		return because("baseline", "it needs the baseline %s, this device has %s", o.Baseline, cmp.Or(d.baseline(o.Product), "none")), false
	}
	return reason{}, true
}

// installable tells whether an operator may bring an offer into force: his word
// is enough for what rollouts, deferral and the modes hold back.
func installable(o repository.Offer, d device, w wishes) (reason, bool) {
	if r, ok := fits(o, d); !ok {
		return r, false
	}
	if r, held := w.Hold(o.ID); held {
		return r, false
	}
	if o.Rollout.Halt {
		return halted(o), false
	}
	if !w.inScope(o.Product) {
		return outOfScope(o.Product), false
	}
	r, broken := w.Broken[o.ID]
	return r, !broken
}

func (w wishes) inScope(product string) bool {
	return len(w.Products) == 0 || MatchAny(w.Products, product)
}

func outOfScope(product string) reason {
	return because("out-of-scope", "product %s is outside [repository] products", product)
}

// had tells of a release in force whether it came to anybody: into a process, by
// the operator's word, or as files. What is only staged nobody has.
func (w wishes) had(o repository.Offer) bool {
	return w.Begun[o.ID] || w.Installed[o.ID] || w.OnDisk[o.ID] || o.Kind == release.KindBaseline
}

// allowed tells whether an offer that fits may come into force here and now.
func allowed(o repository.Offer, d device, w wishes, now time.Time, fresh bool) (reason, bool) {
	if r, held := w.Hold(o.ID); held {
		return r, false
	}
	if !w.inScope(o.Product) {
		return outOfScope(o.Product), false
	}
	if r, broken := w.Broken[o.ID]; broken {
		return r, false
	}
	// What is in force stays so while its publisher only says that nobody else should take it.
	// In force is not yet had: it may wait for hours, or for a process.
	inForce := w.InForce[o.Product] == o.ID
	stays := w.Before[o.Product] == o.ID
	has := inForce && w.had(o) || stays
	if o.Rollout.Halt && (o.Rollout.Undo || !has) {
		return halted(o), false
	}
	if at := w.Returns[o.ID]; now.Before(at) && !inForce && !stays {
		return because("returns", "its publisher has halted it, undone it and released it again and again: it comes back %s", stamp(at)), false
	}
	// Nor does a policy that wants to be asked let in what nobody has yet.
	ask, asked := w.asked(o.ID)
	if has || inForce && !asked || w.Installed[o.ID] && fresh {
		return reason{}, true
	}
	switch {
	case !fresh && !inForce:
		return because("expired", "the repository's metadata ended %s: nothing new comes into force", stamp(w.Ends)), false
	case asked:
		return ask, false
	case d.Place >= o.Rollout.Percent:
		return because("ring", "its rollout has reached %d %% of devices, this one is at %d", o.Rollout.Percent, d.Place), false
	}
	if r := early(o, w.Defer, now); r.Code != "" {
		return r, false
	}
	return reason{}, true
}

// asked tells whether the policy wants to be asked before it lets a release in.
func (w wishes) asked(id string) (reason, bool) {
	switch {
	case w.Mode == Manual:
		return because("manual", "the policy says mode = \"manual\""), true
	case w.Mode == Approved && !slices.Contains(w.Approve, id):
		return because("not-approved", "the policy's approve does not list it"), true
	}
	return reason{}, false
}

// opens is when neither its publisher nor the policy's deferral keeps an offer
// back any more; the zero time if neither ever did.
func opens(o repository.Offer, deferral time.Duration) (at time.Time) {
	if o.Rollout.NotBefore != nil {
		at = *o.Rollout.NotBefore
	}
	if deferral > 0 && o.Published.Add(deferral).After(at) {
		at = o.Published.Add(deferral)
	}
	return at
}

// early tells of the two the one that ends later, so that the time it names is
// the time it comes. How bad it is what the release fixes makes no exception:
// the policy's owner knows the severity and can install.
func early(o repository.Offer, deferral time.Duration, now time.Time) reason {
	at := opens(o, deferral)
	switch {
	case !now.Before(at):
		return reason{}
	case o.Rollout.NotBefore != nil && at.Equal(*o.Rollout.NotBefore):
		return because("not-before", "its publisher releases it on %s", stamp(at))
	}
	text := fmt.Sprintf("the policy defers it until %s, %s after its publication", stamp(at), short(deferral))
	if severityRank(o.Severity) == 0 {
		text += "; it is critical"
	}
	return reason{"deferred", text}
}

// choose decides for each product which release should be in force. It is
// pure. A hotpatch is cumulative: the highest sequence that fits and is
// allowed replaces all lower ones. Below the highest sequence ever in force
// only somebody's word leads, about what is in force: one that takes it out, or
// that keeps it out where nobody has it yet. What was in force before that then
// goes on, as if the other had never come.
func choose(offers []repository.Offer, d device, w wishes, now time.Time, fresh bool) map[string]choice {
	byProduct := map[string][]repository.Offer{}
	for _, o := range offers {
		if _, ok := fits(o, d); ok {
			byProduct[o.Product] = append(byProduct[o.Product], o)
		}
	}
	unheld := w
	unheld.Hold = func(string) (reason, bool) { return reason{}, false }
	out := map[string]choice{}
	for product, list := range byProduct {
		slices.SortFunc(list, highest)
		c := choice{Product: product, Latest: &list[0]}
		_, down := w.word(w.InForce[product], offers) // what is in force is taken out
		for _, o := range list {
			if w.InForce[product] != o.ID || w.had(o) {
				continue
			}
			if r, ok := allowed(o, d, w, now, fresh); !ok {
				_, broken := w.Broken[o.ID] // that is nobody's word
				c.Never, down = r, down || !broken
			}
		}
		for i := range list {
			o := &list[i]
			r, ok := allowed(*o, d, w, now, fresh)
			floor := w.Floors[floorKey(*o)]
			below := !down && w.InForce[product] != o.ID && w.Before[product] != o.ID && o.Sequence < floor
			if ok && below {
				r, ok = because("rollback", "sequence %d is below %d, which was in force here", o.Sequence, floor), false
			}
			if ok {
				c.Want = o
				break
			}
			if timed[r.Code] && !below {
				at := opens(*o, w.Defer)
				if r.Code == "returns" {
					at = w.Returns[o.ID]
				}
				if c.Opens.IsZero() || at.Before(c.Opens) {
					c.Opens = at
				}
			}
			if c.Held == nil && r.Code == "held" && !below {
				if _, would := installable(*o, d, unheld); would {
					c.Held = o
				}
			}
			if i == 0 {
				c.Why = r
			}
			if _, worded := w.word(o.ID, offers); worded && w.InForce[product] == "" {
				down = true // what was in force was taken out before
			}
		}
		out[product] = c
	}
	return out
}

// short is a duration as people write it: "72h", not "72h0m0s".
func short(d time.Duration) string {
	s := d.String()
	for _, end := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, end) {
			s = s[:len(s)-2]
		}
	}
	return s
}

// timed are the reasons that end at a time known beforehand.
var timed = map[string]bool{"not-before": true, "deferred": true, "returns": true}

// highest orders the offers of one product that fit a device: first those made
// for its baseline, for sequences begin anew with each; then the highest sequence.
func highest(a, b repository.Offer) int {
	anyBaseline := func(o repository.Offer) int {
		if o.Baseline == "" {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(anyBaseline(a), anyBaseline(b)), cmp.Compare(b.Sequence, a.Sequence), cmp.Compare(a.ID, b.ID))
}

// floorKey names the line within which sequences grow.
func floorKey(o repository.Offer) string { return "sequence/" + o.Product + "/" + o.Baseline }
