package main

import (
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// eligibility shows every check, the failing ones with all their parts.
func (s *screen) eligibility(d *control.Eligibility, all bool) string {
	p := &page{}
	var fails, unknowns, waived, passes, other []control.Check
	for _, c := range d.Checks {
		switch {
		case c.Result == control.Pass:
			passes = append(passes, c)
		case c.Result == control.NotApplicable:
			other = append(other, c)
		case c.Waived:
			waived = append(waived, c)
		case c.Result == control.Fail:
			fails = append(fails, c)
		default:
			unknowns = append(unknowns, c)
		}
	}
	n := len(d.Checks) - len(other)
	if d.Eligible {
		text := fmt.Sprintf("%d of %d checks pass.", len(passes), n)
		if len(waived) > 0 {
			text += fmt.Sprintf(" %d waived by policy (%s).", len(waived), ids(waived))
		}
		p.verdict(s, good, "ELIGIBLE", text+" This device gets its fixes while everything runs.")
	} else {
		var parts []string
		if len(fails) > 0 {
			parts = append(parts, fmt.Sprintf("%d of %d checks %s.", len(fails), n, verb(len(fails), "fails", "fail")))
		}
		if len(unknowns) > 0 {
			parts = append(parts, fmt.Sprintf("%d could not be read.", len(unknowns)))
		}
		p.verdict(s, bad, "NOT ELIGIBLE", strings.Join(append(parts, "This device gets no new fixes in memory; what is applied stays."), " "))
	}
	p.blank()
	idWidth := 0
	for _, c := range d.Checks {
		idWidth = max(idWidth, len(c.ID))
	}
	for _, c := range slices.Concat(fails, unknowns) {
		s.failing(p, c, idWidth, d.Generated)
	}
	rest := slices.Concat(waived, passes)
	if all {
		rest = slices.Concat(rest, other)
	}
	var rows [][]string
	for _, c := range rest {
		word, text := string(c.Result), strings.Trim(c.Found, " ")
		if text == "" {
			text = c.Title
		}
		if c.Waived && c.Result != control.Pass {
			word = "waived"
			text = fmt.Sprintf("found: %s, wanted: %s; waived by policy", c.Found, c.Wanted)
		}
		rows = append(rows, []string{word, c.ID, text})
	}
	if len(rows) > 0 {
		p.table(s, []column{{limit: 16}, {limit: 12}, {}}, rows, func(w string) string {
			if w == "pass" {
				return good
			}
			return fair
		})
	}
	if !d.Again.IsZero() && !d.Eligible {
		p.blank()
		p.line("Looked at again by itself %s (%s); a change of the policy counts at once.", s.date(d.Again, d.Generated), ahead(d.Again, d.Generated))
	}
	if !all && len(other) > 0 {
		p.line("%s not apply to this device (--all shows %s).", many(len(other), "check")+verb(len(other), " does", " do"), verb(len(other), "it", "them"))
	}
	return p.String()
}

// failing shows one check that stands in the way: wanted, found, where it was
// read, since when, what to do.
func (s *screen) failing(p *page, c control.Check, idWidth int, now control.Time) {
	word, colour := "FAIL", bad
	if c.Result != control.Fail {
		word, colour = "UNKNOWN", fair
	}
	p.line("%s  %s  %s", s.paint(colour, word), pad(c.ID, idWidth), clean(c.Title))
	indent := "      "
	since := ""
	if !c.Since.IsZero() {
		since = s.date(c.Since, now) + agoIn(c.Since, now)
	}
	for _, f := range [][2]string{{"wanted", c.Wanted}, {"found", c.Found}, {"source", c.Source}, {"since", since}, {"to do", c.Remedy}} {
		if f[1] == "" {
			continue
		}
		label := f[0]
		for part := range strings.SplitSeq(f[1], "\n") { // lines to copy stay lines
			for _, l := range wrap(clean(part), width-16) {
				p.line("%s%s%s", indent, pad(label, 10), l)
				label = ""
			}
		}
	}
	p.blank()
}

func ids(checks []control.Check) string {
	var out []string
	for _, c := range checks {
		out = append(out, c.ID)
	}
	return strings.Join(out, ", ")
}
