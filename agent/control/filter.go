package control

import (
	"net/url"
	"regexp"
	"strings"
)

// This file decides what anyone but root and the configured group may read.
// It copies what is allowed, field by field; what it does not name stays here.
// TestStrangersSeeOnlyWhatIsListed holds the resulting keys against a list.

// filter returns what the caller may see of a document, nil if nothing.
func filter(c Caller, doc any) any {
	if c.Admin {
		return doc
	}
	switch d := doc.(type) {
	case *Status:
		return strangersStatus(c, d)
	case *Eligibility:
		return strangersEligibility(d)
	case *Report: // made for everybody
		return d
	case *Offers:
		return strangersOffers(d)
	case *Calendar:
		return strangersCalendar(d)
	case *Processes:
		return strangersProcesses(c, d)
	case *Event:
		return strangersEvent(c, d)
	}
	return nil
}

// readable tells whether a text about something is for this caller.
func (s Scope) readable(c Caller) bool {
	return s.Public || s.OfUser && s.UID == c.UID
}

func strangersStatus(c Caller, d *Status) *Status {
	out := &Status{
		Header:          d.Header,
		Eligible:        d.Eligible,
		State:           d.State,
		Baseline:        Baseline{ID: d.Baseline.ID, Month: d.Baseline.Month, Current: d.Baseline.Current},
		Coverage:        counts(d.Coverage),
		RestartRequired: d.RestartRequired,
		Repository:      Repository{URL: publicURL(d.Repository.URL), LastCheck: d.Repository.LastCheck, Expires: d.Repository.Expires},
		Next:            Next{Hotpatch: d.Next.Hotpatch, Baseline: d.Next.Baseline},
		Device: Device{Name: d.Device.Name, OS: d.Device.OS, Arch: d.Device.Arch, Build: d.Device.Build,
			Edition: d.Device.Edition, ID: d.Device.ID},
		Backend: Backend{Name: d.Backend.Name, Freeze: scrub(d.Backend.Freeze)},
		Paused:  d.Paused, PausedBy: d.PausedBy,
		Mode:    d.Mode,
		Waived:  d.Waived,
		Fails:   d.Fails,
		Scanned: d.Scanned,
		Unseen:  d.Unseen,
		Latency: Latency{Quantiles: d.Latency.Quantiles, Late: d.Latency.Late, Watch: d.Latency.Watch, Why: scrub(d.Latency.Why), ScanEveryMS: d.Latency.ScanEveryMS},
	}
	if e := d.Repository.Error; e != nil {
		out.Repository.Error = &RepositoryError{Code: e.Code, Text: scrub(e.Text), Since: e.Since}
	}
	for _, r := range d.Releases {
		out.Releases = append(out.Releases, strangersRelease(r))
	}
	if d.Release != nil {
		r := strangersRelease(*d.Release)
		out.Release = &r
	}
	for _, a := range d.Attention {
		if a.Scope.readable(c) {
			out.Attention = append(out.Attention, Attention{Code: a.Code, Severity: a.Severity, Since: a.Since,
				Text: scrub(a.Text), Remedy: scrub(a.Remedy), Product: a.Product})
		}
	}
	for _, x := range d.Story {
		if x.Scope.readable(c) {
			out.Story = append(out.Story, Chapter{Code: x.Code, What: scrub(x.What), Since: x.Since, Next: scrub(x.Next), At: x.At, WaitsFor: x.WaitsFor, Product: x.Product})
		}
	}
	for _, h := range d.Holds { // who and why is the operators' affair
		out.Holds = append(out.Holds, Hold{ID: h.ID, Product: h.Product, Since: h.Since, CVEs: h.CVEs, Decisive: h.Decisive})
	}
	return out
}

func strangersRelease(r ActiveRelease) ActiveRelease {
	return ActiveRelease{Product: r.Product, ID: r.ID, Sequence: r.Sequence, Month: r.Month, Since: r.Since,
		Title: r.Title, Severity: r.Severity, CVEs: r.CVEs}
}

func strangersEligibility(d *Eligibility) *Eligibility {
	out := &Eligibility{Header: d.Header, Eligible: d.Eligible, Looked: d.Looked, Again: d.Again}
	for _, c := range d.Checks {
		out.Checks = append(out.Checks, Check{ID: c.ID, Title: c.Title, Result: c.Result, Waived: c.Waived,
			Wanted: scrub(c.Wanted), Found: scrub(c.Found), Source: scrub(c.Source), Since: c.Since, Remedy: scrub(c.Remedy)})
	}
	return out
}

func strangersOffers(d *Offers) *Offers {
	out := &Offers{Header: d.Header, Eligible: d.Eligible}
	for _, o := range d.Releases {
		out.Releases = append(out.Releases, Offer{ID: o.ID, Product: o.Product, Kind: o.Kind, Sequence: o.Sequence,
			Month: o.Month, Baseline: o.Baseline, Title: o.Title, Severity: o.Severity, CVEs: o.CVEs, Fits: o.Fits,
			ReasonCode: o.ReasonCode, Reason: strangersReason(o.ReasonCode, o.Reason), InForce: o.InForce, Held: o.Held, Halted: o.Halted,
			Published: o.Published})
	}
	return out
}

func strangersProcesses(c Caller, d *Processes) *Processes {
	out := &Processes{Header: d.Header, Coverage: counts(d.Coverage), Others: d.Others, Release: d.Release,
		Sequence: d.Sequence, Scanned: d.Scanned}
	for _, p := range d.Processes {
		if p.UID != c.UID {
			continue
		}
		row := Process{PID: p.PID, Start: p.Start, Exe: p.Exe, Host: p.Host, User: p.User, Unit: p.Unit}
		for _, i := range p.Images {
			row.Images = append(row.Images, Image{Name: i.Name, Product: i.Product, Release: i.Release,
				Sequence: i.Sequence, State: i.State, ReasonCode: i.ReasonCode,
				Reason: strangersReason(i.ReasonCode, i.Reason), ToDo: scrub(i.ToDo), Since: i.Since, Remedy: i.Remedy, PauseUS: i.PauseUS, Attempts: i.Attempts})
		}
		out.Processes = append(out.Processes, row)
	}
	return out
}

// strangersReason keeps to itself who held a release, and why.
func strangersReason(code, text string) string {
	if code == "held" {
		return "held on this device"
	}
	return scrub(text)
}

// counts is all of Coverage: it has nothing but counts.
func counts(c Coverage) Coverage {
	return Coverage{Processes: c.Processes, Images: c.Images, Patched: c.Patched, Unpatched: c.Unpatched,
		Pending: c.Pending, Busy: c.Busy, Blocked: c.Blocked, Drifted: c.Drifted, OtherBuild: c.OtherBuild,
		Fixed: c.Fixed, Failed: c.Failed, Torn: c.Torn}
}

func strangersEvent(c Caller, d *Event) any {
	if !d.Scope.readable(c) {
		return nil
	}
	return &Event{Header: d.Header, Type: d.Type, Time: d.Time, Text: scrub(d.Text), PID: d.PID, Exe: d.Exe,
		Image: d.Image, Release: d.Release, From: d.From, State: d.State, Reason: scrub(d.Reason),
		Done: d.Done, Total: d.Total}
}

// strangersError keeps what a stranger's own request caused, and nothing of
// what went wrong inside.
func strangersError(e *Error) *Error {
	if e.Code == CodeInternal {
		return &Error{Code: CodeInternal, Text: "the daemon could not answer; its log says why"}
	}
	return &Error{Code: e.Code, Text: scrub(e.Text), Hint: scrub(e.Hint)}
}

var (
	// Runs of hex digits as long as an address; eight decimal digits alone are a date.
	hexRun = regexp.MustCompile(`\b(?:0[xX][0-9a-fA-F]{5,}|[0-9a-fA-F]{8,})\b`)
	// Three or more bytes in a row.
	byteRun = regexp.MustCompile(`\b[0-9a-fA-F]{2}(?: [0-9a-fA-F]{2}){2,}\b`)
	eight   = regexp.MustCompile(`^[0-9]{8}$`)
)

// scrub takes addresses and bytes out of a sentence. Such sentences should
// hold none; this is the second lock on the door.
func scrub(s string) string {
	s = hexRun.ReplaceAllStringFunc(s, func(m string) string {
		if eight.MatchString(m) {
			return m
		}
		return "…"
	})
	return byteRun.ReplaceAllString(s, "…")
}

// publicURL is an URL without what may be secret in it.
func publicURL(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}

// Labels that count and name nobody.
var publicLabels = map[string]bool{"state": true, "product": true, "release": true, "sequence": true, "month": true,
	"severity": true, "code": true, "result": true, "reason": true, "check": true, "backend": true, "version": true,
	"os": true, "arch": true, "le": true, "quantile": true, "kind": true, "action": true}

var (
	sample = regexp.MustCompile(`^[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{([^{}]*)\})? [-+.0-9eEInfNa]+(?: [0-9]+)?$`)
	label  = regexp.MustCompile(`^([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"$`)
)

// publicMetrics keeps the samples that only count.
func publicMetrics(text []byte) []byte {
	var out strings.Builder
next:
	for line := range strings.Lines(string(text)) {
		bare := strings.TrimRight(line, "\n")
		if strings.HasPrefix(bare, "# HELP ") || strings.HasPrefix(bare, "# TYPE ") {
			out.WriteString(line)
			continue
		}
		m := sample.FindStringSubmatch(bare)
		if m == nil {
			continue
		}
		for _, l := range splitLabels(m[1]) {
			n := label.FindStringSubmatch(l)
			if n == nil || !publicLabels[n[1]] {
				continue next
			}
		}
		out.WriteString(line)
	}
	return []byte(out.String())
}

// splitLabels cuts at the commas outside quotes.
func splitLabels(s string) []string {
	var out []string
	start, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == ',' && !quoted:
			out = append(out, s[start:i])
			start = i + 1
		}
	}
	if start < len(s) {
		out = append(out, s[start:])
	}
	return out
}
