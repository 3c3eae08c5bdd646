package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
)

// waits tells why an offer that an operator may install does not come into
// force, or is not applied, by itself now; nil: it is, or install would refuse it too.
func (a *Agent) waits(o repository.Offer) *control.Refusal {
	v, w := a.view("")
	d := a.deviceFor()
	if _, ok := installable(o, d, w); !ok {
		return nil
	}
	r, ok := allowed(o, d, w, v.Now, a.fresh(v.Now))
	if c := v.Choices[o.Product]; ok && c.Want != nil && c.Want.ID != o.ID {
		r, ok = because("superseded", "%s, sequence %d, replaces it", c.Want.ID, c.Want.Sequence), false
	}
	if in := (Intent{Product: o.Product, Offer: &o}); ok && v.Closed && !v.graceOver(in) {
		r, ok = v.outsideHours(in).Reason, false
	}
	if ok {
		return nil
	}
	return &control.Refusal{Code: r.Code, Text: r.Text}
}

// byWord are the reasons that somebody's word ends, the operator's among them.
var byWord = map[string]bool{"manual": true, "not-approved": true, "ring": true}

// waiting tells of each product's newest hotpatch, and of its newest baseline, what keeps it back, also where
// an older one is applied everywhere and nothing seems open.
func (a *Agent) waiting(v View, w wishes) (out []control.Attention) {
	for _, x := range a.waitsNow(v, w) {
		if !byWord[x.Why.Code] && !timed[x.Why.Code] {
			continue
		}
		todo := "it comes by itself; now: hotpatch install " + x.ID
		if x.Why.Code == "manual" || x.Why.Code == "not-approved" {
			todo = "hotpatch install " + x.ID
		}
		out = append(out, control.Attention{Code: "waiting", Severity: control.SeverityInfo, Since: control.At(x.Since), Scope: control.Scope{Public: true},
			Text: x.name() + " is not taken yet: " + x.Why.Text, Remedy: todo, Product: x.Product, About: sinceWaits + x.Product + " " + x.ID})
	}
	return out
}

// maxNamed bounds the ids in one sentence.
const maxNamed = 5

// notOffered lists the approved ids that no verified metadata names and that are
// not in force either: misspelt, or not published yet. Nothing tells the two apart.
func (a *Agent) notOffered(w wishes) []string {
	if a.policy == nil || !a.verified {
		return nil
	}
	var out []string
	for _, id := range a.policy.Approve {
		_, ok := a.offerOf(id)
		for _, inForce := range w.InForce {
			ok = ok || inForce == id
		}
		if !ok && !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

// approvedInVain is what a person should know of such ids.
func (a *Agent) approvedInVain(now time.Time, w wishes) []control.Attention {
	ids := a.notOffered(w)
	if len(ids) == 0 {
		return nil
	}
	named := strings.Join(ids[:min(len(ids), maxNamed)], ", ")
	if more := len(ids) - maxNamed; more > 0 {
		named += fmt.Sprintf(" and %d more", more)
	}
	return []control.Attention{{Code: "approve-unknown", Severity: control.SeverityInfo, Since: control.At(now), Scope: control.Scope{Public: true},
		Text:   "the policy approves what the repository does not offer: " + named,
		Remedy: "hotpatch list has the ids as they are; nothing to do if they are yet to be published"}}
}
