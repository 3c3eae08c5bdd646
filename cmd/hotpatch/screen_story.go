package main

import (
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
)

// maxChapters is how many of them status tells; the first are the gravest.
const maxChapters = 8

// toldElsewhere are the chapters whose times stand in other lines of status:
// under Repository, Held, or in the first lines.
var toldElsewhere = []string{"poll", "repository", "no-repository", "paused", "scan", "held", "guard"}

// story tells what comes next and when, and then the dates of the calendar.
func (s *screen) story(p *page, st *control.Status) {
	var lines []string
	all, more := shown(st)
	for i, c := range all {
		text := c.What
		// What may hold the same time already, as of who held it.
		if !c.Since.IsZero() && !strings.Contains(s.localAt(text, st.Generated), "since "+s.date(c.Since, st.Generated)) {
			text += ", since " + s.date(c.Since, st.Generated) + agoIn(c.Since, st.Generated)
		}
		// Several that end alike say so once.
		same := i+1 < len(all) && all[i+1].Code == c.Code && all[i+1].Next == c.Next && all[i+1].At.Equal(c.At.Time)
		if !same {
			text += ". " + capital(s.comes(c, st.Generated)) + "."
		}
		lines = append(lines, s.localAt(text, st.Generated))
	}
	if more > 0 {
		lines = append(lines, "and "+many(more, "more thing")+": hotpatch status --json")
	}
	if n := s.next(st); n != "" {
		lines = append(lines, n)
	}
	label := "Next"
	for _, l := range lines {
		p.field(label, statusColumn, l)
		label = ""
	}
}

// shown are the chapters under Next, and how many more there are.
func shown(st *control.Status) (first []control.Chapter, more int) {
	all := slices.DeleteFunc(slices.Clone(st.Story), func(c control.Chapter) bool { return slices.Contains(toldElsewhere, c.Code) })
	n := min(len(all), maxChapters)
	return all[:n], len(all) - n
}

// capital begins a sentence.
func capital(text string) string {
	return strings.ToUpper(text[:min(1, len(text))]) + text[min(1, len(text)):]
}

// comes is what comes next, with when it does.
func (s *screen) comes(c control.Chapter, now control.Time) string {
	if c.At.IsZero() {
		return c.Next
	}
	return c.Next + " " + s.date(c.At, now) + " (" + ahead(c.At, now) + ")"
}

// chapter is the first of a code, nil if none tells of that.
func chapter(st *control.Status, code string) *control.Chapter {
	i := slices.IndexFunc(st.Story, func(c control.Chapter) bool { return c.Code == code })
	if i < 0 {
		return nil
	}
	return &st.Story[i]
}

// told says whether a chapter on the screen tells what an attention is about.
func told(st *control.Status, a control.Attention) bool {
	list, _ := shown(st)
	return slices.ContainsFunc(list, func(c control.Chapter) bool { return c.Code == a.Code && (a.Product == "" || c.Product == a.Product) })
}

// filesTold says whether a chapter on the screen tells of staged or kept files.
func filesTold(st *control.Status, f control.StagedFiles) bool {
	code := "restart-required"
	if f.Phase == "active" {
		code = "baseline-proof"
	}
	list, _ := shown(st)
	return slices.ContainsFunc(list, func(c control.Chapter) bool {
		return c.Code == code && c.Product == f.Product && strings.Contains(c.What, f.ID)
	})
}

// ahead is how long it is until a time.
func ahead(t, now control.Time) string {
	d := t.Sub(now.Time)
	if d >= 48*time.Hour { // told in days: the nearest
		d = d.Round(24 * time.Hour)
	}
	if d >= time.Second {
		return "in " + control.Span(d)
	}
	return "now"
}
