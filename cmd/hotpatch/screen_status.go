package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
)

// statusColumn is where the text beside the labels of status begins.
const statusColumn = 13

// maxListed is how many images status lists by name before it counts the rest.
const maxListed = 10

// status shows the verdict, what is open, and what to do. open may be nil.
func (s *screen) status(st *control.Status, open *control.Processes) string {
	p := &page{}
	rows := exceptions(open)
	s.torn(p, rows)
	colour, text := s.sentence(st)
	p.verdict(s, colour, strings.ToUpper(string(st.State)), text)
	if st.Paused {
		until := "hotpatch resume"
		if st.PausedBy == "policy" {
			until = "the policy says pause = false"
		}
		since := " until: "
		if c := chapter(st, "paused"); c != nil && !c.Since.IsZero() {
			since = fmt.Sprintf(" since %s%s, until: ", s.date(c.Since, st.Generated), agoIn(c.Since, st.Generated))
		}
		p.verdict(s, fair, "PAUSED", "Nothing new is applied"+since+until+". What is applied stays.")
	}
	p.blank()
	s.openRows(p, rows, st)
	for _, r := range st.Releases {
		text := releaseName(r.ID, r.Sequence)
		if r.Severity != "" || r.Title != "" {
			text += ", " + strings.Trim(r.Severity+": "+r.Title, ": ")
		}
		p.field("Release", statusColumn, text)
		p.field("", statusColumn, s.since(r, st.Generated))
	}
	for _, h := range st.Holds {
		p.field("Held", statusColumn, s.held(h, st.Generated))
	}
	if st.Coverage.Images > 0 && st.Coverage.Images != st.Coverage.Patched {
		p.field("Coverage", statusColumn, fmt.Sprintf("%s in %s: %s", many(st.Coverage.Images, "image"), processes(st.Coverage.Processes), counts(st.Coverage)))
	}
	p.field("Device", statusColumn, device(st))
	if st.Baseline.ID != "" || st.Baseline.Month != "" {
		current := "current"
		if !st.Baseline.Current {
			current = "not current"
		}
		p.field("Baseline", statusColumn, strings.TrimPrefix(strings.TrimSuffix(st.Baseline.ID+", "+st.Baseline.Month, ", "), ", ")+", "+current)
	}
	label := "Files"
	for _, f := range st.Staged {
		if !filesTold(st, f) {
			p.field(label, statusColumn, s.localAt(f.Text, st.Generated))
			label = ""
		}
	}
	if text := starts(st.Latency); text != "" {
		p.field("Starts", statusColumn, text)
	}
	s.repository(p, st)
	s.story(p, st)
	s.toDo(p, st, rows)
	return p.String()
}

// torn comes before everything else, whatever the state.
func (s *screen) torn(p *page, rows []exception) {
	for _, r := range rows {
		if r.image.State == control.Torn {
			p.verdict(s, bad, "TORN", fmt.Sprintf("%s in %s %d could not be written back%s. Restart this process now.",
				r.image.Name, program(r.process.Exe), r.process.PID, at(r.image.Base)))
		}
	}
}

func at(a control.Addr) string {
	if a == 0 {
		return ""
	}
	return " (image at " + a.String() + ")"
}

func processes(n int) string {
	if n == 1 {
		return "1 process"
	}
	return fmt.Sprintf("%d processes", n)
}

// sentence is the verdict in words.
func (s *screen) sentence(st *control.Status) (colour, text string) {
	c := st.Coverage
	well, open := c.Patched+c.Fixed, c.Open()
	restart := " No restart needed."
	if st.RestartRequired {
		restart = " The device has to be restarted; hotpatchd does not do that by itself."
	}
	switch st.State {
	case control.Unknown:
		if st.Repository.LastCheck.IsZero() {
			return bad, "No release information could be verified yet, so nothing is known about this device's fixes."
		}
		return fair, "The first scan of this device's processes is under way."
	case control.Ineligible:
		why := ""
		if len(st.Fails) > 0 {
			why = " (" + strings.Join(st.Fails, ", ") + ")"
		}
		stay := ""
		if c.Patched > 0 {
			stay = fmt.Sprintf(" %s %s patched.", many(c.Patched, "image"), verb(c.Patched, "stays", "stay"))
		}
		return bad, fmt.Sprintf("This device gets no new fixes%s.%s", why, stay)
	case control.BaselineRequired:
		return fair, "The releases offered need a newer baseline, which takes one restart." + openPart(open, c.Images)
	case control.Held:
		return fair, heldSentence(st)
	case control.RestartRequired:
		if len(st.Staged) > 0 {
			return fair, "Files are staged that take effect at the next restart of the device; hotpatchd does not restart it." + openPart(open, c.Images)
		}
		return fair, "Only a restart of the device ends what is open; hotpatchd does not do that by itself." + openPart(open, c.Images)
	case control.Incomplete:
		if open == 0 && st.Unseen > 0 {
			return bad, fmt.Sprintf("%s could not be looked into: whether %s fixed code is not known. %d of %s that can be seen %s fixed code.",
				processes(st.Unseen), verb(st.Unseen, "it runs", "they run"), well, many(c.Images, "image"), verb(well, "runs", "run"))
		}
		return bad, fmt.Sprintf("%d of %s still %s vulnerable code.%s", open, many(c.Images, "image"), verb(open, "runs", "run"), restart)
	case control.Pending:
		return fair, fmt.Sprintf("%d of %s %s still to be patched; %s.%s", c.Pending, many(c.Images, "image"), verb(c.Pending, "is", "are"), s.work(st), restart)
	case control.Hotpatched:
		text := fmt.Sprintf("%d of %s in %s %s fixed code.", well, many(c.Images, "image"), processes(c.Processes), verb(well, "runs", "run"))
		if c.OtherBuild > 0 {
			text += fmt.Sprintf(" %s of a build that no release names.", isAre(c.OtherBuild))
		}
		return good, text + restart
	case control.UpToDate:
		text := "No release applies to this device."
		if len(st.Releases) > 0 {
			text = "No running process has loaded an image that a release fixes."
		}
		if c.OtherBuild > 0 {
			text += fmt.Sprintf(" %s of a build that no release names.", isAre(c.OtherBuild))
		}
		return good, text
	}
	return "", "This daemon knows a state that this command does not know; it may be older."
}

// work is what is done about what is pending: it waits where the policy's hours
// have not begun, and for the end of a trial.
func (s *screen) work(st *control.Status) string {
	if c := chapter(st, "hours"); c != nil && !c.At.IsZero() && c.At.After(st.Generated.Time) {
		return fmt.Sprintf("work waits for the policy's hours, until %s (%s)", s.date(c.At, st.Generated), ahead(c.At, st.Generated))
	}
	if c := chapter(st, "canary"); c != nil {
		if !c.At.IsZero() && c.At.After(st.Generated.Time) {
			return fmt.Sprintf("one process tries the fix first, until %s (%s)", s.date(c.At, st.Generated), ahead(c.At, st.Generated))
		}
		return "one process is to try the fix first"
	}
	return "work is under way"
}

// heldSentence names the releases that a hold alone keeps out, and what is open because of it.
func heldSentence(st *control.Status) string {
	var ids, cves []string
	for _, h := range st.Holds {
		cves = append(cves, h.CVEs...)
		if h.Decisive {
			ids = append(ids, h.ID)
		}
	}
	text := "A release is held on this device."
	if len(ids) > 0 {
		text = fmt.Sprintf("%s %s held on this device.", strings.Join(ids, " and "), verb(len(ids), "is", "are"))
	}
	slices.Sort(cves)
	if cves = slices.Compact(cves); len(cves) > 0 {
		text += " Open: " + strings.Join(cves, " ") + "."
	}
	return text
}

func verb(n int, one, several string) string {
	if n == 1 {
		return one
	}
	return several
}

func isAre(n int) string { return fmt.Sprintf("%d %s", n, verb(n, "is", "are")) }

func openPart(open, images int) string {
	if open == 0 {
		return ""
	}
	return fmt.Sprintf(" %d of %s %s open.", open, many(images, "image"), verb(open, "is", "are"))
}

// exception is one image that is not well.
type exception struct {
	process control.Process
	image   control.Image
}

// exceptions are the images that are not well, worst first.
func exceptions(d *control.Processes) []exception {
	if d == nil {
		return nil
	}
	var out []exception
	for _, p := range d.Processes {
		for _, i := range p.Images {
			if i.State != control.Patched && i.State != control.Fixed {
				out = append(out, exception{p, i})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b exception) int { return rank(a.image.State) - rank(b.image.State) })
	return out
}

func rank(s control.ImageState) int {
	if i := slices.Index(control.ImageStates, s); i >= 0 {
		return i
	}
	return -1 // unknown to this command: first
}

func (s *screen) openRows(p *page, rows []exception, st *control.Status) {
	var cells [][]string
	for _, r := range rows[:min(len(rows), maxListed)] {
		cells = append(cells, []string{"", string(r.image.State), fmt.Sprintf("%s %d, %s", program(r.process.Exe), r.process.PID, r.image.Name), s.why(r.image, st.Generated)})
	}
	if len(cells) > 0 {
		p.table(s, []column{{}, {limit: 12}, {limit: 36, least: 20}, {}}, cells, nil)
	}
	if n := len(rows) - maxListed; n > 0 {
		p.line("  and %d more: hotpatch processes --vulnerable", n)
	}
	hidden := st.Coverage.Open() + st.Coverage.OtherBuild - len(rows)
	if hidden > 0 && len(rows) > 0 {
		p.line("  and %s of other users", many(hidden, "image"))
	} else if hidden > 0 {
		p.line("  %s of other users: root and the daemon's group may see which", many(hidden, "image"))
	}
	if len(rows) > 0 || hidden > 0 {
		p.blank()
	}
}

// why is the reason of an image, with how long and how often.
func (s *screen) why(i control.Image, now control.Time) string {
	text := i.Reason
	if text == "" {
		text = i.ReasonCode
	}
	switch i.State {
	case control.Blocked, control.OtherBuild, control.Unpatched: // a decision, not a time that passes
	default:
		if !i.Since.IsZero() {
			text += ", for " + age(i.Since, now)
		}
	}
	switch {
	case i.Attempts > 1:
		text += fmt.Sprintf("; tried %d times", i.Attempts)
		if i.Remedy == control.RemedyWait {
			text += ", tries on"
		}
	case i.Attempts == 1 && i.Remedy == control.RemedyWait:
		text += "; tried once, tries on"
	}
	return s.localAt(strings.TrimPrefix(text, ", "), now)
}

func (s *screen) since(r control.ActiveRelease, now control.Time) string {
	var parts []string
	if len(r.CVEs) > 0 {
		parts = append(parts, "fixes "+strings.Join(r.CVEs, " "))
	}
	if !r.Since.IsZero() {
		parts = append(parts, fmt.Sprintf("in force since %s (%s)", s.date(r.Since, now), age(r.Since, now)))
	}
	return strings.Join(parts, "; ")
}

func (s *screen) held(h control.Hold, now control.Time) string {
	text := h.ID
	if h.By != "" {
		text += " by " + h.By
	}
	if !h.Since.IsZero() {
		text += fmt.Sprintf(" since %s (%s)", s.date(h.Since, now), age(h.Since, now))
	}
	if h.Reason != "" {
		text += ": " + h.Reason
	}
	if len(h.CVEs) > 0 {
		text += "; open because of it: " + strings.Join(h.CVEs, " ")
	}
	return text
}

func device(st *control.Status) string {
	d := st.Device
	var parts []string
	for _, x := range []string{d.Name, strings.TrimSpace(d.OS + " " + d.Edition), d.Build, d.Arch} {
		if x != "" {
			parts = append(parts, x)
		}
	}
	text := strings.Join(parts, ", ")
	word := "; eligible"
	if !st.Eligible {
		word = "; not eligible"
		if len(st.Fails) > 0 {
			word += " (" + strings.Join(st.Fails, ", ") + ")"
		}
	}
	if len(st.Waived) > 0 {
		word += " (" + strings.Join(st.Waived, ", ") + " waived by policy)"
	}
	return strings.TrimPrefix(text+word, "; ")
}

func (s *screen) repository(p *page, st *control.Status) {
	r := st.Repository
	url := r.URL
	if url == "" {
		url = "none configured"
	}
	var parts []string
	if !r.LastCheck.IsZero() {
		parts = append(parts, "checked "+age(r.LastCheck, st.Generated)+" ago")
	} else if r.URL != "" && r.Error == nil {
		parts = append(parts, "not checked yet")
	}
	if c := chapter(st, "poll"); c != nil && !c.At.IsZero() {
		parts = append(parts, "again "+ahead(c.At, st.Generated))
	}
	if !r.Expires.IsZero() {
		word := "good until "
		if r.Expires.Before(st.Generated.Time) {
			word = "ended "
		}
		parts = append(parts, word+s.date(r.Expires, st.Generated))
	}
	text := url
	if len(parts) > 0 {
		text += "; " + strings.Join(parts, ", ")
	}
	p.field("Repository", statusColumn, text)
	if r.Error != nil {
		text := r.Error.Text
		if !r.Error.Since.IsZero() {
			text = fmt.Sprintf("failing since %s%s: %s", s.date(r.Error.Since, st.Generated), agoIn(r.Error.Since, st.Generated), text)
		}
		if c := chapter(st, "repository"); c != nil && !c.At.IsZero() {
			text += "; " + s.localAt(s.comes(*c, st.Generated), st.Generated)
		}
		p.field("", statusColumn, text)
	}
}

// agoIn is how long ago in parentheses, "" for what was just now.
func agoIn(t, now control.Time) string {
	if now.Sub(t.Time) < time.Second {
		return ""
	}
	return " (" + age(t, now) + ")"
}

func (s *screen) next(st *control.Status) string {
	var parts []string
	if !st.Next.Hotpatch.IsZero() {
		parts = append(parts, s.day(st.Next.Hotpatch, st.Generated)+" hotpatch")
	}
	if !st.Next.Baseline.IsZero() {
		parts = append(parts, s.day(st.Next.Baseline, st.Generated)+" baseline with one restart")
	}
	return strings.Join(parts, "; ")
}
