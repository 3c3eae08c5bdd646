package agent

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"time"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher/target"
)

// snapshot is what control reads: made once after each pass, never changed.
type snapshot struct {
	status      control.Status
	eligibility control.Eligibility
	offers      control.Offers
	processes   control.Processes
	files       filesShown
	announced   []repository.Offer // for the calendar, which is worked out when it is asked for
	plot        plot               // for the story, likewise
}

// rowKey names one image in one life, as one product sees it.
type rowKey struct {
	id      target.ID
	base    target.Addr
	product string
}

// row is what was last shown of an image, to tell since when it is so.
type row struct {
	state   control.ImageState
	code    string
	release string // that it runs, if it is patched
	since   time.Time
}

// publish turns the loop's state into documents.
func (a *Agent) publish() {
	v, w := a.view("")
	intents := decide(v)
	a.again, a.hour = a.nextAgain(v, intents), a.hourOf(v.Now)
	s := &snapshot{}
	s.processes = a.showProcesses(v, intents)
	s.offers, s.announced = a.showOffers(v, w), a.allOffers()
	s.eligibility = a.showEligibility()
	s.status = a.showStatus(v, w, s)
	s.plot = a.plotOf(v, w, intents, s)
	s.status.Story = story(s.plot)
	a.endSinces()
	old := a.shown.Swap(s)
	if a.reporting != nil {
		a.reporting.reporter.Changed()
	}
	if old != nil && old.status.State != s.status.State {
		a.hub.send(control.Event{Type: control.EventState, From: string(old.status.State), State: string(s.status.State),
			Text: fmt.Sprintf("device: %s, was %s", s.status.State, old.status.State), Scope: control.Scope{Public: true}})
	}
	if old != nil && old.status.Paused != s.status.Paused {
		text := "device: goes on, the pause has ended"
		if s.status.Paused {
			text = "device: paused: nothing new is applied, what is applied stays"
		}
		a.hub.send(control.Event{Type: control.EventState, Text: text, Scope: control.Scope{Public: true}})
	}
}

// nextAgain is when the first of the attempts that wait for time is due.
func (a *Agent) nextAgain(v View, intents []Intent) time.Time {
	var first time.Time
	sooner := func(t time.Time) {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	for _, in := range intents {
		sooner(in.Again)
		switch {
		case in.Kind == DoNothing:
		case in.Try != nil:
			sooner(in.Try.Next) // its turn came after the round was decided: it is due now
		default: // time made it another wish since then
			sooner(v.Now.Add(busyAgain))
		}
	}
	for _, c := range v.Choices {
		sooner(c.Opens)
	}
	sooner(a.nextFiles(v.Now))
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
	for _, ps := range a.hosts {
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
		State: in.State, ReasonCode: in.Reason.Code, Reason: in.Reason.Text, Remedy: in.Remedy, ToDo: a.toDo(in)}
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
		im.PauseUS, im.Annex = rec.Pause.Microseconds(), showAnnex(rec, a.releases[rec.Release])
		if im.State == control.Patched {
			im.Release, im.Sequence, im.Attempts = rec.Release, int64(rec.Sequence), rec.Attempts
		}
	}
	im.Since = control.At(a.since(rows, rowKey{in.Proc.Info.ID, in.Image.Base, in.Product}, in.Proc.Info.UID, im))
	return im
}

// since is when an image came into the state it is in. What is news of it is
// sent: another state, reason or release, and one that nobody has seen before.
func (a *Agent) since(rows map[rowKey]row, k rowKey, uid int, im control.Image) time.Time {
	old, ok := a.rows[k]
	now := row{state: im.State, code: im.ReasonCode, since: a.o.Now()}
	if im.State == control.Patched {
		now.release = im.Release
	}
	switch same := old.state == now.state && old.code == now.code; {
	case ok && same && old.release == now.release:
		now.since = old.since
	case ok, a.rows != nil && now.state != control.PendingImage: // at the start of a life all is seen for the first time, and is no news
		a.tell(k, uid, im, old, now)
	}
	rows[k] = now
	return now.since
}

// tell sends the event of one image. old is zero if it was not seen before.
func (a *Agent) tell(k rowKey, uid int, im control.Image, old, now row) {
	why := im.Reason
	if im.ReasonCode == "held" {
		why = "held on this device" // who and why is the operators' affair
	}
	text := fmt.Sprintf("%s in process %d: %s", im.Name, k.id.PID, im.State)
	if now.release != "" {
		text += " by " + now.release
	}
	switch {
	case old.state == now.state && old.release != now.release && old.release != "":
		text += ", was by " + old.release
	case old.state != "" && old.state != now.state:
		text += ", was " + string(old.state)
	}
	a.hub.send(control.Event{Type: control.EventImage, PID: k.id.PID, Image: im.Name, Release: im.Release, From: string(old.state), State: string(im.State), Reason: why,
		Scope: control.Scope{OfUser: true, UID: uid}, Text: text})
}

func (a *Agent) showOffers(v View, w wishes) control.Offers {
	doc := control.Offers{Eligible: a.verdict.Eligible, Releases: []control.Offer{}}
	d := a.deviceFor()
	for _, o := range a.allOffers() {
		x := control.Offer{ID: o.ID, Product: o.Product, Kind: o.Kind, Sequence: int64(o.Sequence), Month: o.Month, Baseline: o.Baseline,
			Title: o.Title, Severity: o.Severity, CVEs: nonNil(o.CVEs), Published: control.At(o.Published), Halted: o.Rollout.Halt, InForce: w.InForce[o.Product] == o.ID}
		if o.Kind == release.KindBaseline {
			r, inForce, ok := a.showBaselineOffer(o, v, w)
			if inForce && o.Rollout.Halt {
				r = halted(o)
			}
			x.Fits, x.ReasonCode, x.Reason, x.InForce = ok, r.Code, r.Text, inForce
			_, x.Held = w.Hold(o.ID)
			doc.Releases = append(doc.Releases, x)
			continue
		}
		r, ok := fits(o, d)
		if r.Code == "baseline" && a.setOf(o.Baseline).Phase == baseline.Staged {
			r.Text = fmt.Sprintf("it needs the baseline %s, which is staged: it comes after the next restart of the device", o.Baseline)
		}
		if ok {
			r, ok = allowed(o, d, w, v.Now, a.fresh(v.Now))
		}
		if c := v.Choices[o.Product]; ok && c.Want != nil && c.Want.ID != o.ID {
			r, ok = because("superseded", "%s, sequence %d, replaces it", c.Want.ID, c.Want.Sequence), false
		}
		if ok && o.Rollout.Halt { // it stays in force, and people should know
			r = halted(o)
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
	doc := control.Eligibility{Eligible: a.verdict.Eligible, Checks: []control.Check{}, Looked: control.At(a.factsAt), Again: control.At(a.factsAt.Add(factsEvery))}
	for _, c := range a.verdict.Checks {
		x := control.Check{ID: string(c.ID), Title: c.Title, Result: control.Result(c.Result), Waived: c.Waived, Wanted: c.Wanted,
			Found: c.Found, Source: c.Source, Remedy: c.Remedy, Since: control.At(a.requirements[c.ID].Since)}
		if a.policyErr != nil && a.policy != nil && c.Source == a.policyPlace() {
			x.Found += "; that is its last good state, which counts: it is refused as it stands now"
			x.Remedy = "mend " + a.policyFault() + " (hotpatch policy shows the place, or hotpatchd check-config)"
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
		Unseen:     a.denied + a.unread,
		Latency:    a.showLatency(),
		Repository: control.Repository{URL: a.o.Config.Repository.URL, LastCheck: control.At(a.checkedAt), Expires: control.At(a.expires), Error: a.repoErr},
		Device:     control.Device{OS: a.device.OS, Arch: a.device.Arch, Build: a.device.Build, Edition: a.device.Edition, ID: a.device.ID},
		Backend:    control.Backend{Name: a.o.Backend.Name(), Freeze: a.method},
	}
	switch v.Paused.Text {
	case pausedByOperator:
		st.PausedBy = "operator"
	case pausedByPolicy:
		st.PausedBy = "policy"
	}
	st.Device.Name, _ = os.Hostname()
	st.Next = next(s.announced, s.offers, v.Now)
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
			st.Holds = append(st.Holds, control.Hold{ID: h.ID, Product: h.Product, By: h.By, Since: control.At(h.Since), Reason: h.Reason})
		}
		return err
	})
	if a.policy != nil {
		for _, id := range a.policy.Hold {
			if !slices.ContainsFunc(st.Holds, func(h control.Hold) bool { return h.ID == id }) {
				st.Holds = append(st.Holds, control.Hold{ID: id, By: "policy"})
			}
		}
	}
	for i := range st.Holds {
		a.weighHold(&st.Holds[i], v, st.Releases)
	}
	slices.SortFunc(st.Holds, func(x, y control.Hold) int { return cmp.Compare(x.ID, y.ID) })
	slices.SortFunc(st.Releases, func(x, y control.ActiveRelease) int {
		return cmp.Or(cmp.Compare(severityRank(x.Severity), severityRank(y.Severity)), cmp.Compare(x.Product, y.Product))
	})
	if len(st.Releases) > 0 {
		st.Release = &st.Releases[0]
		s.processes.Release, s.processes.Sequence = st.Release.ID, st.Release.Sequence
	}
	s.files = a.showFiles(v.Choices, s.offers.Releases)
	st.Baseline, st.Staged, st.RestartRequired = s.files.current, s.files.staged, len(s.files.restart) > 0
	st.Attention = a.attention(v, w, s, st.Holds)
	st.State = a.state(v, w, s)
	return st
}

// weighHold tells what a hold costs: the CVEs that are open because of it. A
// hotpatch is cumulative: what is in force fixes all that an older one does.
func (a *Agent) weighHold(h *control.Hold, v View, inForce []control.ActiveRelease) {
	h.CVEs = []string{}
	o, ok := a.offerOf(h.ID)
	if !ok {
		return
	}
	h.Product = o.Product
	c := v.Choices[o.Product]
	h.Decisive = c.Held != nil && c.Held.ID == h.ID || a.heldFiles(o, v.Now)
	fixed := map[string]bool{}
	for _, r := range inForce {
		if r.Product != o.Product {
			continue
		}
		if r.Sequence > int64(o.Sequence) {
			return
		}
		for _, x := range r.CVEs {
			fixed[x] = true
		}
	}
	for _, x := range o.CVEs {
		if !fixed[x] {
			h.CVEs = append(h.CVEs, x)
		}
	}
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
	if len(s.files.behind) > 0 {
		return control.BaselineRequired
	}
	for _, ch := range v.Choices {
		held = held || ch.Held != nil
	}
	for _, o := range a.allOffers() {
		held = held || a.heldFiles(o, v.Now)
	}
	pendingOnly := c.Open() == c.Pending
	switch {
	case held:
		return control.Held
	case len(s.files.restart) > 0:
		return control.RestartRequired
	case c.Open() > 0 && !pendingOnly:
		return control.Incomplete
	case c.Pending > 0:
		return control.Pending
	case a.denied > 0, a.unread > 0, len(a.left) > 0: // what is not seen is not called well
		return control.Incomplete
	case c.Patched > 0:
		return control.Hotpatched
	}
	return control.UpToDate
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
