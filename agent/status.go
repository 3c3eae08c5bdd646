package agent

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// snapshot is what control reads: made once after each pass, never changed.
type snapshot struct {
	status      control.Status
	eligibility control.Eligibility
	offers      control.Offers
	processes   control.Processes
}

// rowKey names one image in one life, as one product sees it.
type rowKey struct {
	id      target.ID
	base    target.Addr
	product string
}

// row is what was last shown of an image, to tell since when it is so.
type row struct {
	state control.ImageState
	code  string
	since time.Time
}

// publish turns the loop's state into documents.
func (a *Agent) publish() {
	v, w := a.view("")
	intents := decide(v)
	a.again, a.hour = a.nextAgain(intents), a.hourOf(v.Now)
	s := &snapshot{}
	s.processes = a.showProcesses(v, intents)
	s.offers = a.showOffers(v, w)
	s.eligibility = a.showEligibility()
	s.status = a.showStatus(v, w, s)
	old := a.shown.Swap(s)
	if old != nil && old.status.State != s.status.State {
		a.hub.send(control.Event{Type: control.EventState, From: string(old.status.State), State: string(s.status.State),
			Text: fmt.Sprintf("device: %s, was %s", s.status.State, old.status.State), Scope: control.Scope{Public: true}})
	}
}

// nextAgain is when the first of the attempts that wait for time is due.
func (a *Agent) nextAgain(intents []Intent) time.Time {
	var first time.Time
	sooner := func(t time.Time) {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	for _, in := range intents {
		sooner(in.Again)
	}
	for id, r := range a.broken() {
		if r.Code == codeFetch && !a.loading[id] {
			sooner(a.retryLoad[id])
		}
	}
	return first
}

// showProcesses makes one row an image that a release names, or that we patched.
func (a *Agent) showProcesses(v View, intents []Intent) control.Processes {
	byLife := map[target.ID]*control.Process{}
	var order []target.ID
	get := func(info target.Info) *control.Process {
		p := byLife[info.ID]
		if p == nil {
			p = &control.Process{PID: info.PID, Start: info.Start, Exe: programOf(info), User: info.User, Unit: info.Unit, UID: info.UID}
			if info.Image != "" {
				p.Host = info.Host
			}
			byLife[info.ID] = p
			order = append(order, info.ID)
		}
		return p
	}
	rows := map[rowKey]row{}
	for _, in := range intents {
		p := get(in.Proc.Info)
		p.Images = append(p.Images, a.showImage(in, rows))
	}
	for _, ps := range a.procs {
		if im, ok := deniedRow(ps, v.Choices); ok {
			p := get(ps.info)
			im.Since = control.At(a.since(rows, rowKey{ps.info.ID, 0, im.Product}, ps.info.UID, im))
			p.Images = append(p.Images, im)
		}
	}
	a.rows = rows
	doc := control.Processes{Processes: []control.Process{}, Scanned: control.At(a.scannedAt), Others: len(a.procs) - len(order)}
	slices.SortFunc(order, func(x, y target.ID) int { return cmp.Compare(x.PID, y.PID) })
	for _, id := range order {
		p := byLife[id]
		slices.SortFunc(p.Images, func(x, y control.Image) int {
			return cmp.Or(cmp.Compare(x.Base, y.Base), cmp.Compare(x.Product, y.Product))
		})
		doc.Processes = append(doc.Processes, *p)
		doc.Coverage.Processes++
		for _, im := range p.Images {
			doc.Coverage.Add(im.State)
		}
	}
	return doc
}

// showImage tells the state of one image by what decide says of it now.
func (a *Agent) showImage(in Intent, rows map[rowKey]row) control.Image {
	im := control.Image{Name: in.Image.Name, Base: control.Addr(in.Image.Base), Product: in.Product, Path: in.Image.Path,
		State: in.State, ReasonCode: in.Reason.Code, Reason: in.Reason.Text, Remedy: in.Remedy}
	if in.Offer != nil {
		im.Release, im.Sequence = in.Offer.ID, int64(in.Offer.Sequence)
	}
	if in.Claim != nil {
		im.Release, im.Sequence = in.Claim.Release, int64(in.Claim.Sequence)
	}
	if in.Try != nil {
		im.Detail, im.Attempts = in.Try.Detail, in.Try.Attempts
	}
	if rec, ok := in.Image.Records[in.Product]; ok && rec.Live() {
		im.PauseUS, im.Annex = rec.Pause.Microseconds(), showAnnex(rec)
		if im.State == control.Patched {
			im.Release, im.Sequence, im.Attempts = rec.Release, int64(rec.Sequence), rec.Attempts
		}
	}
	im.Since = control.At(a.since(rows, rowKey{in.Proc.Info.ID, in.Image.Base, in.Product}, in.Proc.Info.UID, im))
	return im
}

// since is when an image came into the state it is in.
func (a *Agent) since(rows map[rowKey]row, k rowKey, uid int, im control.Image) time.Time {
	old, ok := a.rows[k]
	now := row{im.State, im.ReasonCode, a.o.Now()}
	if ok && old.state == now.state && old.code == now.code {
		now.since = old.since
	} else if ok {
		a.hub.send(control.Event{Type: control.EventImage, PID: k.id.PID, Image: im.Name, From: string(old.state), State: string(im.State), Reason: im.Reason,
			Scope: control.Scope{OfUser: true, UID: uid}, Text: fmt.Sprintf("%s in process %d: %s, was %s", im.Name, k.id.PID, im.State, old.state)})
	}
	rows[k] = now
	return now.since
}

func showAnnex(r patcher.Record) *control.Annex {
	x := &control.Annex{Address: control.Addr(r.Annex), Size: uint64(r.AnnexEnd - r.Annex), Segments: []control.Segment{}, Functions: []control.AnnexFunction{}}
	for _, p := range r.Parts {
		x.Segments = append(x.Segments, control.Segment{Address: control.Addr(p.Start), Size: uint64(p.End - p.Start)})
	}
	for _, s := range r.Sites {
		if s.Target != 0 {
			x.Functions = append(x.Functions, control.AnnexFunction{Name: s.Function, Address: control.Addr(s.Target)})
		}
	}
	return x
}

func (a *Agent) showOffers(v View, w wishes) control.Offers {
	doc := control.Offers{Releases: []control.Offer{}}
	d := a.deviceFor()
	for _, o := range a.allOffers() {
		x := control.Offer{ID: o.ID, Product: o.Product, Kind: o.Kind, Sequence: int64(o.Sequence), Month: o.Month, Baseline: o.Baseline,
			Title: o.Title, Severity: o.Severity, CVEs: nonNil(o.CVEs), Published: control.At(o.Published), Halted: o.Rollout.Halt, InForce: w.InForce[o.Product] == o.ID}
		r, ok := fits(o, d)
		if ok {
			r, ok = allowed(o, d, w, v.Now, a.fresh(v.Now))
		}
		if c := v.Choices[o.Product]; ok && c.Want != nil && c.Want.ID != o.ID {
			r, ok = because("superseded", "%s, sequence %d, replaces it", c.Want.ID, c.Want.Sequence), false
		}
		_, x.Held = w.Hold(o.ID)
		x.Fits, x.ReasonCode, x.Reason = ok, r.Code, r.Text
		doc.Releases = append(doc.Releases, x)
	}
	for _, s := range a.skipped {
		doc.Releases = append(doc.Releases, control.Offer{ID: lastElement(s.Target), CVEs: []string{}, ReasonCode: "skipped", Reason: s.Reason})
	}
	slices.SortStableFunc(doc.Releases, func(x, y control.Offer) int {
		return cmp.Or(cmp.Compare(x.Product, y.Product), cmp.Compare(y.Sequence, x.Sequence))
	})
	return doc
}

func (a *Agent) showEligibility() control.Eligibility {
	doc := control.Eligibility{Eligible: a.verdict.Eligible, Checks: []control.Check{}}
	var old map[string]control.Check
	if s := a.shown.Load(); s != nil {
		old = map[string]control.Check{}
		for _, c := range s.eligibility.Checks {
			old[c.ID] = c
		}
	}
	for _, c := range a.verdict.Checks {
		x := control.Check{ID: string(c.ID), Title: c.Title, Result: control.Result(c.Result), Waived: c.Waived, Wanted: c.Wanted,
			Found: c.Found, Source: c.Source, Remedy: c.Remedy, Since: control.At(a.o.Now())}
		if o, ok := old[x.ID]; ok && o.Result == x.Result && o.Waived == x.Waived {
			x.Since = o.Since
		}
		doc.Checks = append(doc.Checks, x)
	}
	return doc
}

func (a *Agent) showStatus(v View, w wishes, s *snapshot) control.Status {
	st := control.Status{
		Eligible: a.verdict.Eligible, Coverage: s.processes.Coverage, Releases: []control.ActiveRelease{}, Attention: []control.Attention{},
		Holds: []control.Hold{}, Waived: []string{}, Fails: openChecks(a.verdict), Paused: v.Paused.Code != "", Mode: string(w.Mode),
		Scanned:    control.At(a.scannedAt),
		Repository: control.Repository{URL: a.o.Config.Repository.URL, LastCheck: control.At(a.checkedAt), Expires: control.At(a.expires), Error: a.repoErr},
		Device:     control.Device{OS: a.device.OS, Arch: a.device.Arch, Build: a.device.Build, Edition: a.device.Edition, ID: a.device.ID},
		Backend:    control.Backend{Name: a.o.Backend.Name(), Freeze: a.method},
	}
	st.Device.Name, _ = os.Hostname()
	for _, c := range a.verdict.Checks {
		if c.Waived {
			st.Waived = append(st.Waived, string(c.ID))
		}
	}
	a.store.View(func(tx *store.Tx) error {
		for product, f := range inForceIn(tx) {
			st.Releases = append(st.Releases, control.ActiveRelease{Product: product, ID: f.ID, Sequence: int64(f.Sequence), Month: f.Month, Since: f.Since,
				Title: f.Title, Severity: f.Severity, CVEs: nonNil(f.CVEs)})
		}
		holds, err := tx.Holds()
		for _, h := range holds {
			x := control.Hold{ID: h.ID, Product: h.Product, By: h.By, Since: control.At(h.Since), Reason: h.Reason, CVEs: []string{}}
			if o, ok := a.offerOf(h.ID); ok {
				x.CVEs = nonNil(o.CVEs)
			}
			st.Holds = append(st.Holds, x)
		}
		return err
	})
	if a.policy != nil {
		for _, id := range a.policy.Hold {
			x := control.Hold{ID: id, By: "policy", CVEs: []string{}}
			if o, ok := a.offerOf(id); ok {
				x.Product, x.CVEs = o.Product, nonNil(o.CVEs)
			}
			if !slices.ContainsFunc(st.Holds, func(h control.Hold) bool { return h.ID == id }) {
				st.Holds = append(st.Holds, x)
			}
		}
	}
	slices.SortFunc(st.Holds, func(x, y control.Hold) int { return cmp.Compare(x.ID, y.ID) })
	slices.SortFunc(st.Releases, func(x, y control.ActiveRelease) int {
		return cmp.Or(cmp.Compare(severityRank(x.Severity), severityRank(y.Severity)), cmp.Compare(x.Product, y.Product))
	})
	if len(st.Releases) > 0 {
		st.Release = &st.Releases[0]
		s.processes.Release, s.processes.Sequence = st.Release.ID, st.Release.Sequence
	}
	st.Attention = a.attention(v, s)
	st.State = a.state(v, w, s)
	return st
}

// severityRank orders the authors' words, worst first; unknown ones last.
func severityRank(s string) int {
	for i, w := range []string{"critical", "important", "high", "moderate", "medium", "low"} {
		if foldEqual(s, w) {
			return i
		}
	}
	return 99
}

// state is the worst that holds.
func (a *Agent) state(v View, w wishes, s *snapshot) control.State {
	c := s.processes.Coverage
	switch {
	case c.Torn > 0:
		return control.Incomplete
	case !a.verified || a.scannedAt.IsZero():
		return control.Unknown
	case !a.verdict.Eligible:
		return control.Ineligible
	}
	held := false
	for _, o := range s.offers.Releases {
		if _, other := v.Choices[o.Product]; o.ReasonCode == "baseline" && !other {
			return control.BaselineRequired // nothing of this product fits without it
		}
	}
	for _, ch := range v.Choices {
		held = held || ch.Why.Code == "held"
	}
	pendingOnly := c.Open() == c.Pending
	switch {
	case held:
		return control.Held
	case c.Open() > 0 && !pendingOnly:
		return control.Incomplete
	case c.Pending > 0:
		return control.Pending
	case c.Patched > 0:
		return control.Hotpatched
	}
	return control.UpToDate
}

// expirySoon is when the end of the metadata becomes something to act on.
const expirySoon = 3 * 24 * time.Hour

// attention lists what a person should know or do, worst first.
func (a *Agent) attention(v View, s *snapshot) []control.Attention {
	out := slices.Clone(a.notices)
	add := func(code, severity, text, remedy string, since control.Time, scope control.Scope) {
		out = append(out, control.Attention{Code: code, Severity: severity, Text: text, Remedy: remedy, Since: since, Scope: scope})
	}
	public := control.Scope{Public: true}
	now := control.At(v.Now)
	for _, p := range s.processes.Processes {
		for _, im := range p.Images {
			if im.State == control.Torn {
				add("torn", control.SeverityError, fmt.Sprintf("%s in %s %d could not be written back: restart that process", im.Name, p.Exe, p.PID),
					string(control.RemedyRestartProcess), im.Since, control.Scope{OfUser: true, UID: p.UID})
			}
		}
	}
	a.recMu.Lock()
	broken, since := a.stateErr, a.stateSince
	a.recMu.Unlock()
	if broken != nil {
		add("state", control.SeverityError, "the state cannot be written: nothing is begun without it", "make room in "+a.o.Config.StateDir, control.At(since), public)
	}
	if a.policyErr != nil {
		add("policy", control.SeverityError, "the policy was refused, the last good one stays in force", "mend "+a.o.Config.Policy.File+" (hotpatchd check-config shows the place)", now, public)
	}
	if a.repoErr != nil {
		add("repository", control.SeverityWarning, "repository: "+a.repoErr.Text, "applied fixes stay; it is tried again by itself", a.repoErr.Since, public)
	}
	if !a.expires.IsZero() && v.Now.After(a.expires) {
		add("expired", control.SeverityWarning, fmt.Sprintf("the repository's metadata ended %s: nothing new is applied", a.expires.UTC().Format(time.RFC3339)), "the publisher has to sign it anew; or this clock is ahead", control.At(a.expires), public)
	} else if !a.expires.IsZero() && a.expires.Sub(v.Now) < expirySoon && a.repoErr != nil {
		add("expires-soon", control.SeverityWarning, fmt.Sprintf("the repository's metadata ends %s", a.expires.UTC().Format(time.RFC3339)), "mend the connection to the repository", now, public)
	}
	if a.denied > 0 {
		add("not-looked-into", control.SeverityWarning, fmt.Sprintf("processes that could not be looked into, because the system refuses access: %d", a.denied), "the backend may reach: "+a.freeze, now, public)
	}
	if a.scanErr != nil {
		add("scan", control.SeverityError, "the processes cannot be listed", "see the log", now, public)
	}
	for _, product := range slices.Sorted(maps.Keys(v.Choices)) {
		switch c := v.Choices[product]; {
		case c.Why.Code == "rollback":
			add("rollback", control.SeverityWarning, c.Latest.ID+": "+c.Why.Text, "hotpatch install "+c.Latest.ID, now, public)
		case c.Want != nil && blocks[c.Why.Code]:
			// What an older sequence fixes is fixed; the rest has no row to say so.
			add(c.Why.Code, control.SeverityWarning, fmt.Sprintf("%s cannot be used here, %s is: %s", c.Latest.ID, c.Want.ID, c.Why.Text), string(remedyFor(c.Why)), now, public)
		}
	}
	// What was said before stands since then.
	if old := a.shown.Load(); old != nil {
		for i := range out {
			for _, was := range old.status.Attention {
				if was.Code == out[i].Code && was.Text == out[i].Text && was.Since.Before(out[i].Since.Time) {
					out[i].Since = was.Since
				}
			}
		}
	}
	for i := range out {
		if out[i].Remedy == "" {
			out[i].Remedy = "none"
		}
	}
	rank := map[string]int{control.SeverityError: 0, control.SeverityWarning: 1, control.SeverityInfo: 2}
	slices.SortStableFunc(out, func(x, y control.Attention) int { return cmp.Compare(rank[x.Severity], rank[y.Severity]) })
	return out
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
