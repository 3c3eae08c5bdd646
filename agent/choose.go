package agent

import (
	"cmp"
	"fmt"
	"slices"
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
	Place    int    // in rollouts, 0 to 99
}

// wishes are the operator's and the owner's words, and what they led to so far.
type wishes struct {
	Products  []Glob
	Hold      func(id string) (reason, bool)
	Mode      Mode
	Installed map[string]bool   // ids the operator asked for, for mode manual and for releases off their ring
	InForce   map[string]string // product → id in force
	Floors    map[string]uint32 // product and baseline → highest sequence ever in force
}

// choice is what one product should come to on this device.
type choice struct {
	Product string
	Want    *repository.Offer // nil: nothing should be in force
	Latest  *repository.Offer // the highest that is for this device, wanted or not
	Why     reason            // why Latest is not Want
	Undo    bool              // Want is nil by somebody's word: what is applied is taken out
}

// fits tells why an offer is not for this device at all; ok means it is.
func fits(o repository.Offer, d device, w wishes) (reason, bool) {
	switch {
	case o.Kind != release.KindHotpatch:
		return because("baseline-kind", "it is a baseline: not available yet"), false
	case len(w.Products) > 0 && !MatchAny(w.Products, o.Product):
		return because("out-of-scope", "product %s is outside [repository] products", o.Product), false
	case len(o.OS) > 0 && !slices.Contains(o.OS, d.OS):
		return because("os", "it is for %v, this is %s", o.OS, d.OS), false
	case len(o.Arch) > 0 && !slices.Contains(o.Arch, d.Arch):
		return because("arch", "it is for %v, this is %s", o.Arch, d.Arch), false
	case o.Baseline != "" && o.Baseline != d.Baseline:
		return because("baseline", "it needs the baseline %s, this device has %q", o.Baseline, d.Baseline), false
	}
	return reason{}, true
}

// allowed tells whether an offer that fits may come into force here and now.
func allowed(o repository.Offer, d device, w wishes, now time.Time, fresh bool) (reason, bool) {
	if r, held := w.Hold(o.ID); held {
		return r, false
	}
	if o.Rollout.Halt {
		return because("halted", "its publisher halted it: %s", cmp.Or(o.Rollout.Reason, "no reason given")), false
	}
	if w.InForce[o.Product] == o.ID || w.Installed[o.ID] && fresh {
		return reason{}, true
	}
	switch {
	case !fresh:
		return because("expired", "the repository's metadata has ended: nothing new comes into force"), false
	case w.Mode == Manual:
		return because("manual", "the policy says mode = \"manual\": hotpatch install %s", o.ID), false
	case o.Rollout.NotBefore != nil && now.Before(*o.Rollout.NotBefore):
		return because("not-before", "its publisher releases it on %s", o.Rollout.NotBefore.UTC().Format(time.RFC3339)), false
	case d.Place >= o.Rollout.Percent:
		return because("ring", "its rollout has reached %d %% of devices, this one is at %d", o.Rollout.Percent, d.Place), false
	}
	return reason{}, true
}

// choose decides for each product which release should be in force. It is
// pure. A hotpatch is cumulative: the highest sequence that fits and is
// allowed replaces all lower ones. Below the highest sequence ever in force
// only somebody's word leads: a hold or a halt.
func choose(offers []repository.Offer, d device, w wishes, now time.Time, fresh bool) map[string]choice {
	byProduct := map[string][]repository.Offer{}
	for _, o := range offers {
		if _, ok := fits(o, d, w); ok {
			byProduct[o.Product] = append(byProduct[o.Product], o)
		}
	}
	out := map[string]choice{}
	for product, list := range byProduct {
		slices.SortFunc(list, func(a, b repository.Offer) int { return cmp.Compare(b.Sequence, a.Sequence) })
		c := choice{Product: product, Latest: &list[0]}
		worded := false // a release above was taken out by a word
		for i := range list {
			o := &list[i]
			r, ok := allowed(*o, d, w, now, fresh)
			if ok && !worded && w.InForce[product] != o.ID && o.Sequence < w.Floors[floorKey(*o)] {
				r, ok = because("rollback", "sequence %d is below %d, which was in force here", o.Sequence, w.Floors[floorKey(*o)]), false
			}
			if ok {
				c.Want = o
				break
			}
			if r.Code == "held" || r.Code == "halted" && o.Rollout.Undo {
				worded, c.Undo = true, true
			}
			if i == 0 {
				c.Why = r
			}
			// What is in force stays while the network, the clock or a halt without undo speak.
			if w.InForce[product] == o.ID && r.Code == "halted" && !o.Rollout.Undo {
				c.Want = o
				break
			}
		}
		out[product] = c
	}
	return out
}

// floorKey names the line within which sequences grow.
func floorKey(o repository.Offer) string { return "sequence/" + o.Product + "/" + o.Baseline }
