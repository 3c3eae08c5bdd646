package main

import (
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// groupFrom is how many like rows become one with a count.
const groupFrom = 3

// processes shows the images by state, exceptions first.
func (s *screen) processes(d *control.Processes, q control.ProcessQuery, each bool) string {
	p := &page{}
	if d.Scanned.IsZero() && d.Coverage.Images == 0 {
		p.line("The first scan of this device's processes is under way.")
		return p.String()
	}
	if q.PID != 0 {
		return s.process(d, q.PID)
	}
	p.line("%s", s.paint(verdictColour(d.Coverage), processesVerdict(d)))
	bad, well := s.groups(d, each)
	if q.Vulnerable {
		well = nil
	}
	var rows [][]string
	rows = append(rows, bad...)
	if len(bad) > 0 && len(well) > 0 {
		rows = append(rows, nil)
	}
	rows = append(rows, well...)
	if len(rows) > 0 {
		p.blank()
		cols := []column{{"STATE", 12, 0}, {"IMAGE", 20, 9}, {"PROCESS", 28, 16}, {"PID", 10, 0}, {"USER", 14, 8}, {"WHERE", 20, 12}, {title: "WHY"}}
		rows, cols = dropEmpty(rows, cols, 5)
		p.table(s, cols, rows, stateColour)
	}
	shown := 0
	for _, x := range d.Processes {
		shown += len(x.Images)
	}
	if hidden := d.Coverage.Images - shown; hidden > 0 && !q.Vulnerable {
		p.blank()
		p.line("%s in processes of other users: root and the daemon's group may see which.", many(hidden, "image"))
	}
	if d.Others > 0 && !q.Vulnerable {
		p.blank()
		p.line("%s loaded nothing that a release fixes.", otherProcesses(d.Others))
	}
	return p.String()
}

func otherProcesses(n int) string {
	if n == 1 {
		return "1 other process has"
	}
	return fmt.Sprintf("%d other processes have", n)
}

func verdictColour(c control.Coverage) string {
	switch {
	case c.Open() > 0:
		return bad
	case c.OtherBuild > 0:
		return fair
	}
	return good
}

// dropEmpty leaves a column out that nobody has anything in.
func dropEmpty(rows [][]string, cols []column, i int) ([][]string, []column) {
	for _, r := range rows {
		if len(r) > i && r[i] != "" {
			return rows, cols
		}
	}
	var out [][]string
	for _, r := range rows {
		if len(r) > i {
			r = slices.Delete(slices.Clone(r), i, i+1)
		}
		out = append(out, r)
	}
	return out, slices.Delete(slices.Clone(cols), i, i+1)
}

func processesVerdict(d *control.Processes) string {
	release := ""
	if d.Release != "" {
		release = fmt.Sprintf(" (release %s)", releaseName(d.Release, d.Sequence))
	}
	c := d.Coverage
	switch open := c.Open(); {
	case c.Images == 0:
		return fmt.Sprintf("No running process has loaded an image that a release names%s.", release)
	case open > 0:
		return fmt.Sprintf("%d of %s still %s vulnerable code%s.", open, many(c.Images, "image"), verb(open, "runs", "run"), release)
	case c.OtherBuild > 0:
		return fmt.Sprintf("%d of %s %s fixed code, %d %s of a build that no release names%s.", c.Patched+c.Fixed, many(c.Images, "image"),
			verb(c.Patched+c.Fixed, "runs", "run"), c.OtherBuild, verb(c.OtherBuild, "is", "are"), release)
	}
	text := allOf(c.Images, "runs", "run")
	return fmt.Sprintf("%s fixed code%s.", strings.ToUpper(text[:1])+text[1:], release)
}

// allOf is "the one image is", "all 2 images are".
func allOf(n int, one, several string) string {
	if n == 1 {
		return "the one image " + one
	}
	return fmt.Sprintf("all %d images %s", n, several)
}

// groupKey is what rows must have in common to become one.
type groupKey struct {
	state        control.ImageState
	image, exe   string
	reason, unit string
}

// groups makes the rows: those that are not well, worst first, and the others,
// most first.
func (s *screen) groups(d *control.Processes, each bool) (bad, well [][]string) {
	members := map[groupKey][]exception{}
	var order []groupKey
	for _, p := range d.Processes {
		for _, i := range p.Images {
			k := groupKey{state: i.State, image: i.Name, exe: p.Exe}
			if deniedSince(i) {
				k.reason = i.Reason
			}
			if !isWell(i.State) {
				k.reason, k.unit = i.Reason, p.Unit
			}
			if members[k] == nil {
				order = append(order, k)
			}
			members[k] = append(members[k], exception{p, i})
		}
	}
	slices.SortStableFunc(order, func(a, b groupKey) int {
		if r := rank(a.state) - rank(b.state); r != 0 {
			return r
		}
		return len(members[b]) - len(members[a])
	})
	for _, k := range order {
		m := members[k]
		var rows [][]string
		if len(m) >= groupFrom && !each {
			rows = append(rows, []string{string(k.state), k.image, fmt.Sprintf("%s x%d", base(k.exe), len(m)), "", users(m), unit(m), s.together(m, d.Generated)})
		} else {
			for _, x := range m {
				name := base(x.process.Exe)
				if !isWell(k.state) {
					name = x.process.Exe
				}
				rows = append(rows, []string{string(k.state), k.image, name, fmt.Sprint(x.process.PID), x.process.User, x.process.Unit, s.single(x.image, d.Generated)})
			}
		}
		if isWell(k.state) {
			well = append(well, rows...)
		} else {
			bad = append(bad, rows...)
		}
	}
	return bad, well
}

func isWell(st control.ImageState) bool { return st == control.Patched || st == control.Fixed }

// deniedSince tells of a patch that came before the rule that forbids it: it
// stays, and nothing newer comes.
func deniedSince(i control.Image) bool { return i.State == control.Patched && i.ReasonCode == "denied" }

func (s *screen) sinceDenied(i control.Image) string {
	return i.Reason + "; what was applied before stays, nothing newer is applied"
}

func (s *screen) single(i control.Image, now control.Time) string {
	if deniedSince(i) {
		return s.sinceDenied(i)
	}
	if i.State == control.Patched && i.PauseUS > 0 {
		return "pause " + pause(i.PauseUS)
	}
	if isWell(i.State) {
		return i.Reason
	}
	return s.why(i, now)
}

// together is what can be said of many like rows.
func (s *screen) together(m []exception, now control.Time) string {
	if !isWell(m[0].image.State) {
		return s.why(m[0].image, now)
	}
	if deniedSince(m[0].image) {
		return s.sinceDenied(m[0].image)
	}
	var pauses []int64
	for _, x := range m {
		if x.image.PauseUS > 0 {
			pauses = append(pauses, x.image.PauseUS)
		}
	}
	if len(pauses) == 0 {
		return m[0].image.Reason
	}
	slices.Sort(pauses)
	return fmt.Sprintf("pause %s typical, %s longest", pause(pauses[len(pauses)/2]), pause(pauses[len(pauses)-1]))
}

func users(m []exception) string {
	names := map[string]bool{}
	for _, x := range m {
		names[x.process.User] = true
	}
	if len(names) == 1 {
		return m[0].process.User
	}
	return fmt.Sprintf("%d users", len(names))
}

func unit(m []exception) string {
	for _, x := range m {
		if x.process.Unit != m[0].process.Unit {
			return ""
		}
	}
	return m[0].process.Unit
}

// process shows one process with all that is known of it.
func (s *screen) process(d *control.Processes, pid int) string {
	p := &page{}
	if len(d.Processes) == 0 {
		p.line("Process %d has loaded nothing that a release names, or it is over, or it is another user's.", pid)
		return p.String()
	}
	for n, x := range d.Processes {
		if n > 0 {
			p.blank()
		}
		open := 0
		for _, i := range x.Images {
			if i.State.Open() {
				open++
			}
		}
		verdict := fmt.Sprintf("%s %d: %s.", program(x.Exe), x.PID, allOf(len(x.Images), "is", "are")+" well")
		colour := good
		if open > 0 {
			verdict, colour = fmt.Sprintf("%s %d: %d of %s open.", program(x.Exe), x.PID, open, many(len(x.Images), "image")), bad
		}
		p.line("%s", s.paint(colour, clean(verdict)))
		p.blank()
		for _, f := range [][2]string{{"program", x.Exe}, {"host", x.Host}, {"user", x.User}, {"where", x.Unit}} {
			if f[1] != "" {
				p.field(f[0], 10, f[1])
			}
		}
		for _, i := range x.Images {
			p.blank()
			s.image(p, i, d.Generated)
		}
	}
	return p.String()
}

func (s *screen) image(p *page, i control.Image, now control.Time) {
	head := i.Name
	if i.Base != 0 {
		head += " at " + i.Base.String()
	}
	p.line("%s  %s", s.paint(stateColour(string(i.State)), string(i.State)), clean(head))
	why := ""
	switch {
	case deniedSince(i):
		why = s.sinceDenied(i)
	case !isWell(i.State):
		why = s.why(i, now)
	}
	release := ""
	if i.Release != "" {
		release = releaseName(i.Release, i.Sequence)
	}
	stop := ""
	if i.PauseUS > 0 {
		stop = pause(i.PauseUS)
	}
	for _, f := range [][2]string{{"release", release}, {"why", why}, {"detail", i.Detail}, {"to do", ends(i)}, {"pause", stop}, {"file", i.Path}} {
		if f[1] != "" {
			p.field("  "+f[0], 12, f[1])
		}
	}
	if a := i.Annex; a != nil && a.Address != 0 {
		p.field("  annex", 12, fmt.Sprintf("%s to %s, %s", a.Address, a.Address+control.Addr(a.Size), size(a.Size)))
		for _, f := range a.Functions {
			text := fmt.Sprintf("%s  %s", f.Address, f.Name)
			if f.Size > 0 {
				text += ", " + many(int(f.Size), "byte")
			}
			p.field("", 12, text)
		}
	}
}

func size(n uint64) string {
	if n >= 10<<10 && n%1024 == 0 || n >= 1<<20 {
		return fmt.Sprintf("%d KiB", n/1024)
	}
	return fmt.Sprintf("%d bytes", n)
}

// protections sums the segments of an annex by protection.
func protections(a *control.Annex) string {
	sum := map[string]uint64{}
	var order []string
	for _, g := range a.Segments {
		if g.Prot == "" {
			continue
		}
		if sum[g.Prot] == 0 {
			order = append(order, g.Prot)
		}
		sum[g.Prot] += g.Size
	}
	var out []string
	for _, prot := range order {
		out = append(out, fmt.Sprintf("%s %s", size(sum[prot]), prot))
	}
	return strings.Join(out, ", ")
}
