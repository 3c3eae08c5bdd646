package main

import (
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// barWidth is the length of the progress bar.
const barWidth = 40

// progress is one event of a change, in one line without its end.
func (s *screen) progress(e control.Event) string {
	text := clean(e.Text)
	if e.Total <= 0 {
		if text == "" {
			return ""
		}
		return "  " + text
	}
	done := min(max(e.Done, 0), e.Total)
	word := "done"
	if e.State != "" {
		word = clean(e.State)
	}
	line := fmt.Sprintf("  %s  %d of %d", pad(word, 10), done, e.Total)
	if s.colour {
		n := barWidth * done / e.Total
		return fmt.Sprintf("%s  %s%s", line, strings.Repeat("#", n), strings.Repeat("-", barWidth-n))
	}
	if text != "" {
		line += "  " + text
	}
	return line
}

// change shows what a change came to: the verdict first, what it did not reach,
// and what to do next.
func (s *screen) change(c *control.Change) string {
	p := &page{}
	open := changeOpen(c)
	name := c.Release
	if c.Sequence > 0 {
		name = releaseName(c.Release, c.Sequence)
	}
	switch {
	case c.Action != "install" && c.Action != "rollback":
		p.verdict(s, "", strings.ToUpper(c.Action), orElse(c.Text, map[bool]string{true: "done", false: "it was so already; nothing to do"}[c.Changed]))
	case c.Action == "rollback" && c.Changed && open == 0 && c.Text != "": // nothing was taken out
		p.verdict(s, fair, "HELD", c.Text+".")
	case !c.Changed && open == 0:
		p.line("%s", clean(orElse(c.Text, alreadySo(c)+"; nothing to do.")))
	case c.Action == "install" && open == 0:
		p.verdict(s, good, "INSTALLED", fmt.Sprintf("%s: %s. No restart needed.", name, summary(c)))
	case c.Action == "install":
		p.verdict(s, bad, "INCOMPLETE", fmt.Sprintf("%s: %s. %s", name, summary(c), goesOn(c)))
	case open == 0:
		back := "no release of this product is in force now"
		if c.Previous != "" {
			back = "back to " + c.Previous
		}
		p.verdict(s, fair, "HELD", fmt.Sprintf("%s is out, %s: %s.", name, back, summary(c)))
	default:
		p.verdict(s, bad, "INCOMPLETE", fmt.Sprintf("%s still runs in %s. %s", name, many(open, "image"), goesOn(c)))
	}
	if c.Lifted {
		p.line("The hold on %s is lifted.", clean(c.Release))
	}
	if c.Verified != "" {
		p.field("Verified", statusColumn, c.Verified)
	}
	if c.Action == "install" && c.Changed && c.Text != "" {
		p.line("%s.", clean(strings.ToUpper(c.Text[:1])+c.Text[1:]))
	}
	s.unreached(p, c)
	if len(c.Reopened) > 0 {
		p.field("Open again", statusColumn, strings.Join(c.Reopened, " "))
	}
	if c.Action == "rollback" {
		p.line("The release is held on this device until: hotpatch install %s", clean(c.Release))
	}
	switch {
	case open > 0 && comes(c):
		p.line("hotpatch processes --vulnerable shows the rest; hotpatch wait waits for it.")
	case open > 0:
		for i, text := range endsOf(c) {
			p.field([]string{"To do", ""}[min(i, 1)], statusColumn, text)
		}
		p.line("hotpatch processes --vulnerable shows the rest.")
	}
	return p.String()
}

// comes tells whether any image that a change did not reach is tried again by itself.
func comes(c *control.Change) bool {
	for _, p := range c.Results {
		for _, i := range p.Images {
			if imageOpen(c, i) && (i.Remedy == control.RemedyWait || i.Remedy == "" || i.State == control.PendingImage || i.State == control.Busy) {
				return true
			}
		}
	}
	return false
}

func goesOn(c *control.Change) string {
	if comes(c) {
		return "The daemon goes on trying."
	}
	return "Nothing more of it comes by itself."
}

// endsOf is what ends what a change did not reach, each once.
func endsOf(c *control.Change) (out []string) {
	for _, p := range c.Results {
		for _, i := range p.Images {
			if text := ends(i); imageOpen(c, i) && text != "" && !slices.Contains(out, text) && len(out) < maxListed {
				out = append(out, text)
			}
		}
	}
	return out
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func alreadySo(c *control.Change) string {
	if c.Action == "rollback" {
		return c.Release + " is out already"
	}
	return c.Release + " is already in force"
}

// summary counts the images and the longest stop.
func summary(c *control.Change) string {
	var cov control.Coverage
	longest := int64(0)
	for _, p := range c.Results {
		for _, i := range p.Images {
			cov.Add(i.State)
			longest = max(longest, i.PauseUS)
		}
	}
	if cov.Images == 0 {
		return "no running process has loaded an image that it fixes"
	}
	text := counts(cov)
	if longest > 0 {
		text += "; longest pause " + pause(longest)
	}
	return text
}

// unreached lists the images for which the change is not complete.
func (s *screen) unreached(p *page, c *control.Change) {
	var rows [][]string
	n := 0
	for _, x := range c.Results {
		for _, i := range x.Images {
			if !imageOpen(c, i) {
				continue
			}
			if n++; n <= maxListed {
				rows = append(rows, []string{"", string(i.State), fmt.Sprintf("%s %d, %s", program(x.Exe), x.PID, i.Name), s.why(i, c.Generated)})
			}
		}
	}
	if len(rows) == 0 {
		return
	}
	p.table(s, []column{{}, {limit: 12}, {limit: 36, least: 20}, {}}, rows, nil)
	if n > maxListed {
		p.line("  and %d more", n-maxListed)
	}
}

// waited is the one line of wait about the whole device.
func (s *screen) waited(st *control.Status, w waiting, done bool) string {
	p := &page{}
	colour, text := s.sentence(st)
	if !done {
		colour = bad
		text = "Not reached in time. " + text
	}
	p.verdict(s, colour, strings.ToUpper(string(st.State)), text)
	if !done {
		p.line("hotpatch status says what is open and what ends it.")
	}
	return p.String()
}
