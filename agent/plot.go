package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// plotOf gathers what the story rests on. It belongs to a publication: what it
// asks for stands since it was first asked for.
func (a *Agent) plotOf(v View, w wishes, intents []Intent, s *snapshot) plot {
	p := plot{Now: v.Now, Looks: a.factsAt.Add(factsEvery), Paused: v.Paused.Text, Scanned: !a.scannedAt.IsZero(), Restarts: s.files.restart, Repository: a.repositoryPlot(v.Now)}
	for _, c := range a.verdict.Checks {
		if c.Open() {
			p.Checks = append(p.Checks, openCheck{c, a.requirements[c.ID].Open, c.Source == a.policyPlace()})
		}
	}
	if p.Paused != "" {
		p.PausedAt = a.sinceOf(sincePaused + p.Paused)
	}
	stood := func(code string) (at time.Time) {
		for _, x := range s.status.Attention {
			if x.Code == code && (at.IsZero() || x.Since.Before(at)) {
				at = x.Since.Time
			}
		}
		return at
	}
	if v.Lost.Code != "" {
		p.Lost = stood("state-damaged")
	}
	if a.policy != nil && !a.policy.Absent {
		p.Good = a.sinceOf(sinceGood + digest(fmt.Sprint(a.shownPolicy)))
	}
	if a.policyErr != nil {
		p.Refused = stood("policy")
	}
	for _, h := range s.status.Holds {
		if !h.Decisive {
			continue
		}
		if h.Since.IsZero() {
			h.Since = control.At(a.sinceOf("held " + h.ID))
		}
		p.Holds = append(p.Holds, heldBack{h, h.By == healthGuard.User, a.policy != nil && a.policy.Held(h.ID)})
	}
	for _, o := range a.allOffers() {
		if o.Rollout.Halt && w.InForce[o.Product] == o.ID {
			p.Halted = append(p.Halted, haltedHere{o.Product, o.ID, halted(o).Text, a.sinceOf("halted " + o.ID)})
		}
	}
	for _, b := range s.files.behind {
		if len(p.Behind) > 0 && p.Behind[len(p.Behind)-1].product == b.product && p.Behind[len(p.Behind)-1].baseline == b.baseline {
			continue // one of them is enough
		}
		p.Behind = append(p.Behind, behindSince{b, a.sinceOf(sinceBehind + b.product)})
	}
	p.Waits, p.Proofs = a.waitsNow(v, w), a.proofs()
	a.plotIntents(&p, v, intents)
	p.Watched = a.watchedOver(v.Now)
	again := map[control.ImageState]time.Time{}
	for _, in := range intents {
		if at, ok := again[in.State]; !in.Again.IsZero() && (!ok || in.Again.Before(at)) {
			again[in.State] = in.Again
		}
	}
	p.Images = openOf(s.processes, again, func(state control.ImageState) time.Time { return stood(string(state)) })
	return p
}

// storyNow is the story as it is now: what it rests on is as of the last
// publication, times go on. It may be called from any goroutine.
func (a *Agent) storyNow(s *snapshot) []control.Chapter {
	p := s.plot
	p.Now, p.Repository.Asks = a.o.Now(), a.asks()
	p.Watched = slices.DeleteFunc(slices.Clone(p.Watched), func(x watchedOver) bool { return !x.Ends.After(p.Now) })
	return story(p)
}

// digest names a text in few bytes.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// plotIntents takes from what is decided what waits for a trial, for the hours, or to be fetched.
func (a *Agent) plotIntents(p *plot, v View, intents []Intent) {
	trials := map[string]*onTrial{}
	loading := map[string]bool{}
	for _, in := range intents {
		switch in.Reason.Code {
		case "canary":
			x := trials[in.Offer.ID]
			if x == nil {
				x = &onTrial{ID: in.Offer.ID, Since: v.Trial.Since[in.Offer.ID], Ends: in.Again}
				trials[in.Offer.ID] = x
			}
			x.Images++
		case "hours":
			if h := &p.Hours; h.Images == 0 || in.Again.Before(h.Opens) {
				h.Opens = in.Again
			}
			p.Hours.Images++
		case "loading":
			loading[in.Offer.ID] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(trials)) {
		p.Trials = append(p.Trials, *trials[id])
	}
	if p.Hours.Images > 0 {
		p.Hours.Since = a.sinces.of("hours", v.Now, false)
	}
	p.Loading = slices.Sorted(maps.Keys(loading))
}

func (a *Agent) repositoryPlot(now time.Time) repositoryPlot {
	r := repositoryPlot{Configured: a.o.Config.Repository.URL != "", Polled: a.polled(), Verified: a.verified, Checked: a.checkedAt, Asks: a.asks(), Trouble: a.repoErr}
	if a.client == nil && a.repoErr != nil { // nobody asks: it is so since it was first found, in any life
		r.Trouble = &control.RepositoryError{Code: a.repoErr.Code, Text: a.repoErr.Text, Since: control.At(a.sinceOf(sinceConfig))}
	}
	if !a.fresh(now) {
		r.Ended = a.expires
	}
	if a.repoErr != nil && repository.Passing(a.repoErr.Code) {
		r.Passing = true
		last := a.outside.contact.Checked
		if last.IsZero() {
			last = a.outside.contact.Tried
		}
		if !last.IsZero() {
			r.Alarm = last.Add(alarmAfter)
		}
	}
	return r
}

// opensAt is when a reason that keeps an offer out ends by itself, zero if no time is known.
func (a *Agent) opensAt(o repository.Offer, code string) (at time.Time) {
	switch {
	case code == codeFetch:
		return a.retryLoad[o.ID]
	case code == "returns":
		a.store.View(func(tx *store.Tx) error { at = haltsIn(tx)[o.ID].returns(); return nil })
	case timed[code]:
		deferral := time.Duration(0)
		if a.policy != nil {
			deferral = a.policy.Defer
		}
		at = opens(o, deferral)
	}
	return at
}

// proofs are the sets of files whose old ones are kept.
func (a *Agent) proofs() (out []proof) {
	if a.bases.area == nil {
		return nil
	}
	for _, r := range a.bases.area.Records() {
		if r.Phase == baseline.Active {
			out = append(out, proof{r.Product, r.Release, r.Since, a.proved(r)})
		}
	}
	return out
}

// watchedOver are the releases that the health guard watches, and how long it
// does. Where nobody tells how processes end it sees nothing.
func (a *Agent) watchedOver(now time.Time) (out []watchedOver) {
	if a.policy == nil || a.policy.Guard == GuardOff {
		return nil
	}
	young := map[string]*watchedOver{} // by release
	a.store.View(func(tx *store.Tx) error {
		for product, f := range inForceIn(tx) {
			if now.Sub(f.Since.Time) <= probation {
				young[f.ID] = &watchedOver{Product: product, ID: f.ID, Since: f.Since.Time, Acts: a.policy.Guard != GuardObserve}
			}
		}
		return nil
	})
	if len(young) == 0 {
		return nil
	}
	lives := map[string]map[target.ID]bool{}
	for _, r := range a.allRecords() {
		x, ends := young[r.Release], r.At.Add(a.policy.GuardWindow)
		if x == nil || r.State != patcher.Applied || !ends.After(now) || !a.hears(r.ID) {
			continue
		}
		if lives[x.ID] == nil {
			lives[x.ID] = map[target.ID]bool{}
		}
		lives[x.ID][r.ID] = true
		x.Processes = len(lives[x.ID])
		if ends.After(x.Ends) {
			x.Ends = ends
		}
	}
	for _, id := range slices.Sorted(maps.Keys(lives)) {
		out = append(out, *young[id])
	}
	return out
}

// waitsNow are the releases that would be this device's but for a reason that
// ends: of each product the newest hotpatch, and the newest baseline.
func (a *Agent) waitsNow(v View, w wishes) (out []wait) {
	for _, product := range slices.Sorted(maps.Keys(v.Choices)) {
		c := v.Choices[product]
		switch c.Why.Code {
		case "", "held", "expired", "out-of-scope", "superseded":
			continue
		}
		out = append(out, wait{Product: product, ID: c.Latest.ID, Severity: c.Latest.Severity, Kind: release.KindHotpatch, Why: c.Why,
			Since: a.sinceOf(sinceWaits + product + " " + c.Latest.ID), Opens: a.opensAt(*c.Latest, c.Why.Code)})
	}
	newest := map[string]repository.Offer{}
	for _, o := range a.allOffers() {
		if o.Kind != release.KindBaseline {
			continue
		}
		in := a.bases.standing[o.Product]
		if _, ok := fitsFiles(o, a.deviceFor(), in); !ok || in.ID == o.ID {
			continue
		}
		if best, ok := newest[o.Product]; !ok || rank(best) < rank(o) {
			newest[o.Product] = o
		}
	}
	for _, product := range slices.Sorted(maps.Keys(newest)) {
		o := newest[product]
		r, ok := a.allowsFiles(o, a.deviceFor(), w, v.Now)
		if ok || !byWord[r.Code] && !timed[r.Code] && r.Code != "halted" {
			continue
		}
		out = append(out, wait{Product: product, ID: o.ID, Severity: o.Severity, Kind: release.KindBaseline, Why: r,
			Since: a.sinceOf(sinceWaits + product + " " + o.ID), Opens: a.opensAt(o, r.Code)})
	}
	return out
}
