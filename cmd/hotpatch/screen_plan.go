package main

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"hotpatchd/agent/control"
)

// plan shows a table of what would be done; with a pid, that process byte by byte.
func (s *screen) plan(d *control.Plan, pid int) string {
	if pid != 0 {
		return s.planProcess(d, pid)
	}
	p := &page{}
	name := releaseName(d.Release, d.Sequence)
	if len(d.Processes) == 0 {
		p.verdict(s, good, "PLAN", fmt.Sprintf("%s: no running process has loaded an image that it fixes. Nothing would be done.", name))
		return p.String()
	}
	c := d.Coverage
	if changes(d) == 0 {
		nothing := "nothing is to be done"
		if c.Patched+c.Fixed < c.Images {
			nothing = "nothing would be changed"
		}
		p.verdict(s, "", "PLAN", fmt.Sprintf("%s: %s. Of %s in %s: %s.", name, nothing, many(c.Images, "image"), processes(c.Processes), counts(c)))
	} else {
		p.verdict(s, "", "PLAN", fmt.Sprintf("%s: %d of %s in %s would run fixed code. Nothing is changed by looking.",
			name, c.Patched+c.Fixed, many(c.Images, "image"), processes(c.Processes)))
	}
	p.blank()
	var rows [][]string
	for _, x := range d.Processes {
		for _, i := range x.Images {
			rows = append(rows, []string{string(i.State), i.Name, base(x.Exe), fmt.Sprint(x.PID), functions(i), planWhy(i)})
		}
	}
	slices.SortStableFunc(rows, func(a, b []string) int {
		return rank(control.ImageState(a[0])) - rank(control.ImageState(b[0]))
	})
	p.table(s, []column{{"EXPECTED", 12, 0}, {"IMAGE", 20, 9}, {"PROCESS", 24, 12}, {"PID", 10, 0}, {"FUNCTIONS", 30, 10}, {title: "WHY"}}, rows, stateColour)
	p.blank()
	p.line("Totals: %s.", counts(c))
	p.line("One process byte by byte: hotpatch plan %s --pid PID", clean(d.Release))
	s.applyWith(p, d)
	return p.String()
}

// changes counts the images that the plan would change.
func changes(d *control.Plan) (n int) {
	for _, x := range d.Processes {
		for _, i := range x.Images {
			if isWell(i.State) && len(i.Functions) > 0 {
				n++
			}
		}
	}
	return n
}

// applyWith is the next command, if there is anything to do and it would not be refused.
func (s *screen) applyWith(p *page, d *control.Plan) {
	switch r := d.Refused; {
	case r != nil:
		p.field("", 0, "hotpatch install "+d.Release+" would be refused: "+r.Text)
		if r.Hint != "" {
			p.field("", 0, r.Hint)
		}
	case changes(d) > 0:
		if d.Waits != nil {
			p.field("", 0, "not by itself now: "+s.localAt(d.Waits.Text, d.Generated))
		}
		p.line("Apply with: hotpatch install %s", clean(d.Release))
	}
}

func functions(i control.PlannedImage) string {
	switch len(i.Functions) {
	case 0:
		return ""
	case 1:
		return i.Functions[0].Name
	case 2:
		return i.Functions[0].Name + ", " + i.Functions[1].Name
	}
	return fmt.Sprintf("%s and %d more", i.Functions[0].Name, len(i.Functions)-1)
}

func planWhy(i control.PlannedImage) string {
	text := i.Reason
	if i.Refused != nil && i.Refused.Text != "" {
		text = i.Refused.Text
	}
	if text == "" && i.Replaces != "" {
		text = "replaces " + i.Replaces
	}
	return text
}

func (s *screen) planProcess(d *control.Plan, pid int) string {
	p := &page{}
	if len(d.Processes) == 0 {
		p.verdict(s, good, "PLAN", fmt.Sprintf("%s: process %d has loaded nothing that it fixes. Nothing would be done.", releaseName(d.Release, d.Sequence), pid))
		return p.String()
	}
	refused := false
	for _, x := range d.Processes {
		for _, i := range x.Images {
			s.planHead(p, d, x, i)
			s.planFacts(p, x, i)
			if i.Refused != nil {
				refused = true
				p.blank()
				continue
			}
			p.blank()
			s.sites(p, i)
		}
	}
	s.applyWith(p, d)
	if refused && changes(d) == 0 {
		p.line("What can be done about it: hotpatch processes --pid %d", pid)
	}
	return p.String()
}

func (s *screen) planHead(p *page, d *control.Plan, x control.PlannedProcess, i control.PlannedImage) {
	where := fmt.Sprintf("%s, for %s %d: ", releaseName(d.Release, d.Sequence), program(x.Exe), x.PID)
	switch {
	case i.Refused != nil:
		p.verdict(s, bad, "REFUSED", where+i.Refused.Text)
	case len(i.Functions) == 0:
		p.verdict(s, fair, "PLAN", fmt.Sprintf("%s%s is %s: %s", where, i.Name, i.State, planWhy(i)))
	default:
		text := fmt.Sprintf("%s%s of %s. Nothing is changed by looking.", where, many(len(i.Functions), "function"), i.Name)
		if !isWell(i.State) {
			text = fmt.Sprintf("%s%s of %s, but it would be %s: %s", where, many(len(i.Functions), "function"), i.Name, i.State, planWhy(i))
		}
		p.verdict(s, "", "PLAN", text)
	}
	p.blank()
}

// planColumn is where the text beside the labels of a plan begins.
const planColumn = 11

func (s *screen) planFacts(p *page, x control.PlannedProcess, i control.PlannedImage) {
	image := i.Name
	if i.Base != 0 {
		image += " at " + i.Base.String()
	}
	if id := i.Identity; id != nil {
		image += fmt.Sprintf(", %s, time %08x, checksum %08x", size(uint64(id.SizeOfImage)), id.TimeStamp, id.CheckSum)
		if id.RSDS != "" {
			image += ", RSDS " + id.RSDS
		}
	}
	p.field("image", planColumn, image)
	var names []string
	for _, f := range i.Functions {
		n := f.Name
		if f.Size > 0 {
			n += fmt.Sprintf(" %d bytes", f.Size)
		}
		names = append(names, n)
	}
	if len(names) > 0 {
		text := strings.Join(names, ", ")
		if i.Refused == nil {
			text += ": as expected in memory"
		}
		p.field("functions", planColumn, text)
	}
	if i.Replaces != "" {
		p.field("replaces", planColumn, i.Replaces)
	}
	if a := i.Annex; a != nil {
		text := fmt.Sprintf("%s at %s", size(a.Size), a.Address)
		if prot := protections(a); prot != "" {
			text += ": " + prot
		}
		p.field("annex", planColumn, text)
	}
	if len(i.Binds) > 0 {
		found := 0
		var names []string
		for _, b := range i.Binds {
			name := b.Name
			if b.Kind != "" {
				name += " (" + b.Kind + ")"
			}
			if b.Found {
				found++
			} else {
				name += " not found"
			}
			names = append(names, name)
		}
		p.field("binds", planColumn, fmt.Sprintf("%s: %d of %d found", strings.Join(names, ", "), found, len(i.Binds)))
	}
	switch i.Consistency {
	case "entry":
		p.field("needs", planColumn, "consistency entry: no thread inside the bytes below")
	case "quiescent":
		p.field("needs", planColumn, "consistency quiescent: no thread in any of these functions, nor on its way back into one")
	}
	if x.Threads > 0 {
		text := fmt.Sprintf("%d; at this moment none inside", x.Threads)
		if x.Inside > 0 {
			text = fmt.Sprintf("%d; at this moment one inside", x.Threads)
			if i.Reason != "" {
				text += ": " + i.Reason
			}
		}
		p.field("threads", planColumn, text)
	}
}

// sites shows the bytes, function by function, in order of address.
func (s *screen) sites(p *page, i control.PlannedImage) {
	if len(i.Sites) == 0 {
		return
	}
	var names []string
	by := map[string][]control.Site{}
	for _, w := range i.Sites {
		if by[w.Name] == nil {
			names = append(names, w.Name)
		}
		by[w.Name] = append(by[w.Name], w)
	}
	for _, name := range names {
		method := ""
		for _, f := range i.Functions {
			if f.Name == name {
				method = f.Method
			}
		}
		p.line("%s  %s", clean(name), clean(method))
		sites := slices.SortedFunc(slices.Values(by[name]), func(a, b control.Site) int {
			if a.Address < b.Address {
				return -1
			}
			return 1
		})
		for _, w := range sites {
			s.site(p, w, len(i.Sites))
		}
	}
	p.blank()
	p.field("order", planColumn, fmt.Sprintf("annex and binds; stop all threads; check them; %s, the one numbered %d last; read back; run", many(len(i.Sites), "write"), len(i.Sites)))
	p.field("undo", planColumn, "the same places back, kept with the record")
	p.blank()
}

// site shows one place: old bytes and what they mean, new bytes and what they mean.
func (s *screen) site(p *page, w control.Site, last int) {
	old, next := byteRows(w.OldBytes), byteRows(w.NewBytes)
	note := fmt.Sprintf("write %d", w.Order)
	if w.Order == last && last > 1 {
		note += ", last"
	}
	if w.Kind != "" {
		note = w.Kind + ", " + note
	}
	texts := slices.Clone(w.NewText)
	if len(texts) == 0 {
		texts = []string{""}
	}
	if len(texts) > 1 || utf8.RuneCountInString(texts[0])+2+len(note) > siteText {
		texts = append(texts, note)
	} else {
		texts[0] = strings.TrimSpace(texts[0] + "  " + note)
	}
	for n := range max(len(old), len(next), len(w.OldText), len(texts)) {
		place := ""
		if n == 0 {
			place = w.Address.String()
		}
		p.line("  %s  %s%s%s %s%s", pad(place, 12), pad(pick(old, n), 16), pad(shorten(clean(pick(w.OldText, n)), 18), 19), arrow(n),
			pad(pick(next, n), 16), shorten(clean(pick(texts, n)), siteText))
	}
}

// siteText is how many columns are left for what the new bytes mean.
const siteText = width - 2 - 12 - 2 - 16 - 19 - 3 - 16

func arrow(n int) string {
	if n == 0 {
		return "->"
	}
	return "  "
}

func pick(s []string, n int) string {
	if n < len(s) {
		return s[n]
	}
	return ""
}

// byteRows cuts hex digits into bytes, five a row.
func byteRows(hex string) []string {
	var rows []string
	row := ""
	for i := 0; i+1 < len(hex); i += 2 {
		if row != "" {
			row += " "
		}
		row += hex[i : i+2]
		if (i/2)%5 == 4 {
			rows = append(rows, clean(row))
			row = ""
		}
	}
	if row != "" {
		rows = append(rows, clean(row))
	}
	return rows
}
