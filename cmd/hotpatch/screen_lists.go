package main

import (
	"fmt"
	"strings"

	"hotpatchd/agent/control"
)

// offers shows what the repository offers.
func (s *screen) offers(d *control.Offers) string {
	p := &page{}
	if len(d.Releases) == 0 {
		p.line("The repository offers no release, or none could be verified yet.")
		p.line("Ask it now: hotpatch check. Without a repository: hotpatch install FILE")
		return p.String()
	}
	fit, next, held := 0, "", ""
	var rows [][]string
	for _, o := range d.Releases {
		word, why := "no", o.Reason
		switch {
		case o.InForce:
			word = "in force"
		case o.Held:
			word = "held"
		case o.Halted:
			word = "halted"
		case o.ReasonCode == "staged":
			word = "staged"
		case o.Fits:
			word = "fits"
		case waitWords[o.ReasonCode] != "":
			word = waitWords[o.ReasonCode]
		}
		if o.Fits || waitWords[o.ReasonCode] != "" {
			fit++
		}
		if o.Fits && !o.InForce && !o.Held && o.ReasonCode != "staged" && next == "" {
			next = o.ID
		}
		if (o.ReasonCode == "manual" || o.ReasonCode == "not-approved") && next == "" {
			next = o.ID // the operator's word is all that it waits for
		}
		if o.Held && !o.Halted && held == "" { // install refuses what is halted
			held = o.ID
		}
		if why == "" {
			why = o.ReasonCode
		}
		if o.InForce && !o.Halted || why == "" {
			why = o.Title
		}
		rows = append(rows, []string{word, o.ID, o.Product, fmt.Sprint(o.Sequence), o.Month, o.Severity, s.localAt(why, d.Generated)})
	}
	p.line("%d of %s %s this device.", fit, many(len(d.Releases), "release"), verb(fit, "fits", "fit"))
	p.blank()
	p.table(s, []column{{"", 10, 0}, {"RELEASE", 24, 14}, {"PRODUCT", 16, 8}, {"SEQ", 6, 0}, {"MONTH", 8, 0}, {"SEVERITY", 10, 0}, {title: "WHY OR WHAT"}}, rows, func(w string) string {
		switch w {
		case "in force", "fits":
			return good
		}
		return fair
	})
	switch {
	case !d.Eligible:
		p.blank()
		p.line("Nothing of it is installed here: this device is not eligible. hotpatch eligibility says why.")
	case next != "":
		p.blank()
		p.line("hotpatch plan %s shows what it would do; hotpatch install %s does it.", clean(next), clean(next))
	case held != "":
		p.blank()
		p.line("hotpatch install %s lifts the hold on it and applies it, unless the policy holds it.", clean(held))
	}
	return p.String()
}

// waitWords are for releases that fit this device and wait for somebody's word
// or for their time.
var waitWords = map[string]string{"manual": "manual", "not-approved": "unapproved", "deferred": "deferred", "not-before": "dated", "ring": "rollout", "returns": "dated"}

// verify shows whether memory is as recorded.
func (s *screen) verify(d *control.Verify) string {
	p := &page{}
	read := fmt.Sprintf("%s of %s in %s", many(d.Sites, "site"), many(d.Images, "image"), processes(d.Processes))
	if d.OK {
		if d.Sites == 0 {
			p.verdict(s, good, "VERIFIED", "Nothing is patched; the history's chain of hashes holds.")
			return p.String()
		}
		p.verdict(s, good, "VERIFIED", read+verb(d.Sites, " is", " are")+" as recorded; the history's chain of hashes holds.")
		return p.String()
	}
	var parts []string
	if n := len(d.Mismatches); n > 0 {
		parts = append(parts, fmt.Sprintf("%s not as recorded", many(n, "site")+verb(n, " is", " are")))
	}
	if n := len(d.Unread); n > 0 {
		parts = append(parts, many(n, "image")+" could not be read")
	}
	if d.History != "" {
		parts = append(parts, "the history's chain of hashes is broken")
	}
	p.verdict(s, bad, "MISMATCH", strings.Join(parts, "; ")+". Looked at: "+read+".")
	p.blank()
	for _, m := range d.Mismatches {
		p.line("%s %d, %s of %s at %s", clean(program(m.Exe)), m.PID, clean(m.Function), clean(m.Image), m.Address)
		p.field("  recorded", 12, spaced(m.Expected))
		p.field("  found", 12, spaced(m.Found))
		if m.Text != "" {
			p.field("", 12, m.Text)
		}
	}
	for _, m := range d.Unread {
		p.line("%s %d, %s: could not be read: %s", clean(program(m.Exe)), m.PID, clean(m.Image), clean(m.Text))
	}
	if d.History != "" {
		p.line("history: %s", clean(d.History))
	}
	if len(d.Mismatches) > 0 {
		p.blank()
		p.line("Somebody else has written there. hotpatch explain PID ADDRESS; a restart of the process mends it.")
	}
	return p.String()
}

func spaced(hex string) string {
	var out []string
	for i := 0; i+1 < len(hex); i += 2 {
		out = append(out, hex[i:i+2])
	}
	return strings.Join(out, " ")
}

// history shows what was done, newest first.
func (s *screen) history(d *control.History) string {
	p := &page{}
	switch {
	case d.Broken != "":
		p.line("%s", s.paint(bad, clean("The history's chain of hashes is broken: "+d.Broken)))
	case len(d.Entries) == 0:
		p.line("Nothing was done yet.")
		return p.String()
	default:
		p.line("The newest %s; the chain of hashes holds.", strings.TrimPrefix(entries(len(d.Entries)), "1 "))
	}
	p.blank()
	var rows [][]string
	for _, e := range d.Entries {
		what := e.Text
		if e.PID != 0 {
			what = strings.TrimPrefix(fmt.Sprintf("%s; %s %d", what, program(e.Exe), e.PID), "; ")
		}
		if e.Image != "" {
			what += ", " + e.Image
		}
		rows = append(rows, []string{s.date(e.Time, d.Generated), e.Caller.User, e.Action, e.Release, what})
	}
	p.table(s, []column{{"WHEN", 18, 0}, {"WHO", 14, 8}, {"ACTION", 20, 8}, {"RELEASE", 24, 14}, {title: "WHAT"}}, rows, nil)
	return p.String()
}

func entries(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

// explain says what lies at an address.
func (s *screen) explain(d *control.Explain) string {
	p := &page{}
	text := d.Text
	if text == "" {
		text = fmt.Sprintf("%s of %s", d.Kind, d.Image)
	}
	p.line("%s in %s %d: %s", d.Address, clean(program(d.Exe)), d.PID, clean(text))
	function := d.Function
	if function != "" && d.Offset > 0 {
		function += fmt.Sprintf("+0x%x", d.Offset)
	}
	for _, f := range [][2]string{{"kind", d.Kind}, {"image", d.Image}, {"function", function}, {"release", d.Release}} {
		if f[1] != "" {
			p.field(f[0], 10, f[1])
		}
	}
	return p.String()
}

// event is one line of watch.
func (s *screen) event(e control.Event) string {
	text := clean(e.Text)
	if text == "" {
		text = strings.TrimSpace(clean(e.Release + " " + e.State))
	}
	if e.Reason != "" && !strings.Contains(text, clean(e.Reason)) {
		text += ": " + clean(e.Reason)
	}
	when := "               "
	if !e.Time.IsZero() {
		when = e.Time.In(s.zone).Format("2 Jan 15:04:05")
	}
	return fmt.Sprintf("%s  %s  %s", pad(when, 15), pad(clean(e.Type), 10), text)
}
