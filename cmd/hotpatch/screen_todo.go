package main

import (
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// remedies are what ends an open image, as a person would do it.
var remedies = map[control.Remedy]string{
	control.RemedyWait:           "nothing: tried again by itself; a restart of the process ends it too",
	control.RemedyRestartProcess: "restart the process",
	control.RemedyRestartDevice:  "restart the device",
	control.RemedyBaseline:       "install the baseline, with one restart",
	control.RemedyPolicy:         "change the policy, or accept it as it is",
	control.RemedyAuthor:         "ask the author of the release for one that fits",
}

// ends is what ends an open image: the daemon's own words where it has any.
func ends(i control.Image) string {
	if i.ToDo != "" {
		return i.ToDo
	}
	return remedies[i.Remedy]
}

// toDo are the last lines: what ends what is open, and the next command.
func (s *screen) toDo(p *page, st *control.Status, rows []exception) {
	cells := endings(rows)
	for _, a := range st.Attention {
		switch {
		case a.Code == "torn", a.Code == "repository", slices.Contains(control.ImageStates, control.ImageState(a.Code)):
			continue // said above already
		case a.Code == "held":
			if !slices.ContainsFunc(cells, func(c []string) bool { return c[1] == a.Remedy }) {
				cells = append(cells, []string{"", a.Remedy})
			}
			continue
		}
		todo := a.Remedy
		if r, ok := remedies[control.Remedy(todo)]; ok {
			todo = r
		} else if todo == "none" {
			todo = ""
		}
		if told(st, a) { // under Next: here is what somebody can do about it
			if todo != "" && !slices.ContainsFunc(cells, func(c []string) bool { return c[1] == todo }) {
				cells = append(cells, []string{"", todo})
			}
			continue
		}
		cells = append(cells, []string{a.Severity, s.localAt(strings.TrimSuffix(a.Text+"; "+todo, "; "), st.Generated)})
	}
	for _, cmd := range nextCommands(st) {
		if !slices.ContainsFunc(cells, func(c []string) bool { return strings.HasPrefix(c[1], cmd) }) {
			cells = append(cells, []string{"", cmd})
		}
	}
	if len(cells) == 0 {
		return
	}
	p.blank()
	for i, c := range cells {
		label := ""
		if i == 0 {
			label = "To do"
		}
		head := pad(label, statusColumn)
		if c[0] == "" {
			p.field(strings.TrimRight(head, " "), statusColumn, c[1])
			continue
		}
		name := pad(shorten(clean(c[0]), 24), 17) + " "
		for n, l := range wrap(clean(c[1]), width-statusColumn-len([]rune(name))) {
			if n > 0 {
				head, name = pad("", statusColumn), pad("", len([]rune(name)))
			}
			p.line("%s%s%s", head, name, l)
		}
	}
}

// endings are what ends each open image, one line for all that it ends.
func endings(rows []exception) (cells [][]string) {
	count := map[string]int{}
	for _, r := range rows {
		text := ends(r.image)
		if count[text]++; text != "" && count[text] == 1 {
			cells = append(cells, []string{fmt.Sprintf("%s %d", program(r.process.Exe), r.process.PID), text})
		}
	}
	for _, c := range cells {
		if n := count[c[1]]; n > 1 {
			c[0] = many(n, "image")
		}
	}
	return cells
}

// nextCommands are the commands to copy.
func nextCommands(st *control.Status) (out []string) {
	if !st.Eligible {
		out = append(out, "hotpatch eligibility")
	}
	switch {
	case st.State == control.Unknown && st.Repository.LastCheck.IsZero() && !askable(st):
	case st.State == control.Unknown && st.Repository.LastCheck.IsZero():
		out = append(out, "hotpatch check")
	case st.State == control.Unknown:
		out = append(out, "hotpatch wait --for settled")
	case st.State == control.BaselineRequired:
		out = append(out, "hotpatch list")
	case st.Coverage.Open() > 0:
		out = append(out, "hotpatch processes --vulnerable")
	case st.Coverage.OtherBuild > 0:
		out = append(out, "hotpatch processes")
	}
	return out
}

// askable tells whether there is a repository that a check could reach: what
// is missing else is said beside it.
func askable(st *control.Status) bool {
	r := st.Repository
	return r.URL != "" && (r.Error == nil || r.Error.Code != "config")
}

// checked shows what a refresh of the repository came to.
func (s *screen) checked(st *control.Status) string {
	p := &page{}
	if e := st.Repository.Error; e != nil {
		p.verdict(s, bad, "FAILED", e.Text)
	} else {
		p.verdict(s, good, "CHECKED", fmt.Sprintf("%s answers; its metadata is good until %s.", st.Repository.URL, s.date(st.Repository.Expires, st.Generated)))
	}
	colour, text := s.sentence(st)
	p.verdict(s, colour, strings.ToUpper(string(st.State)), text)
	p.blank()
	p.line("hotpatch list shows what it offers.")
	return p.String()
}
