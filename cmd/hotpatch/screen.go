package main

import (
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"hotpatchd/agent/control"
)

// width is how many columns a screen has.
const width = 100

// screen turns documents into text. It is pure: the same document gives the
// same text. Times are shown in zone, ages are counted from the document's own time.
type screen struct {
	colour bool
	zone   *time.Location
	wide   bool // nobody looks: values that people may want whole are not shortened
}

func newScreen(colour bool, zone *time.Location) *screen {
	return &screen{colour: colour, zone: zone}
}

// Colours repeat what the word beside them says.
const (
	good  = "\x1b[32m"
	fair  = "\x1b[33m"
	bad   = "\x1b[31m"
	plain = "\x1b[0m"
)

func (s *screen) paint(colour, text string) string {
	if !s.colour || colour == "" {
		return text
	}
	return colour + text + plain
}

// page collects lines.
type page struct{ strings.Builder }

// clean takes out of a text from outside what would steer a terminal or turn
// the reading direction: names and reasons come from programs and repositories.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n':
			return ' '
		case unicode.IsControl(r), unicode.Is(unicode.Cf, r), r == utf8.RuneError:
			return '?'
		}
		return r
	}, s)
}

// oneLine is clean for errors.
func oneLine(s string) string { return clean(strings.TrimSpace(s)) }

func (p *page) line(format string, args ...any) {
	p.WriteString(strings.TrimRight(fmt.Sprintf(format, args...), " "))
	p.WriteByte('\n')
}

func (p *page) blank() { p.WriteByte('\n') }

// field prints a label and a text that wraps under itself.
func (p *page) field(label string, column int, text string) {
	for i, l := range wrap(clean(text), width-column) {
		if i > 0 {
			label = ""
		}
		p.line("%s%s", pad(label, column), l)
	}
}

// verdict prints the first line: a word and a sentence.
func (p *page) verdict(s *screen, colour, word, text string) {
	indent := max(13, utf8.RuneCountInString(word)+3)
	for i, l := range wrap(clean(text), width-indent) {
		head := pad(word, indent)
		if i == 0 {
			head = s.paint(colour, word) + head[len(word):]
		} else {
			head = pad("", indent)
		}
		p.line("%s%s", head, l)
	}
}

// pad fills s with blanks up to n columns.
func pad(s string, n int) string {
	if k := utf8.RuneCountInString(s); k < n {
		return s + strings.Repeat(" ", n-k)
	}
	return s
}

// wrap breaks a text at blanks into lines of at most n columns. A word that is longer stays whole.
func wrap(s string, n int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Split(s, " ") {
		switch {
		case line == "" && len(lines) == 0 && word == "":
			line += " "
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= n:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}

// shorten cuts a long name in the middle, so that both its ends can be read.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	tail := (n - 1) * 2 / 3
	return string(r[:n-1-tail]) + "…" + string(r[len(r)-tail:])
}

// column is one of a table: its title, how wide it may grow, and how far it
// gives way when the screen is too narrow (0: never).
type column struct {
	title string
	limit int
	least int
}

// lastColumn is how many columns the last one of a table keeps, if the others can give way.
const lastColumn = 30

// table prints rows in columns; the last one wraps in what is left. An empty
// row is a blank line. colour paints the first cell.
func (p *page) table(s *screen, cols []column, rows [][]string, colour func(string) string) {
	widths, indent := columnWidths(cols, rows)
	head := ""
	for i, c := range cols {
		head += pad(c.title, widths[i]+2)
	}
	if strings.TrimSpace(head) != "" {
		p.line("%s", head)
	}
	for _, row := range rows {
		if len(row) == 0 {
			p.blank()
			continue
		}
		for n, text := range wrap(clean(row[len(row)-1]), width-indent) {
			if n > 0 {
				p.line("%s%s", pad("", indent), text)
				continue
			}
			line := ""
			for i, cell := range row[:len(row)-1] {
				cell = shorten(clean(cell), widths[i])
				padded := pad(cell, widths[i]+2)
				if i == 0 && colour != nil {
					padded = s.paint(colour(cell), cell) + padded[len(cell):]
				}
				line += padded
			}
			p.line("%s%s", line, text)
		}
	}
}

// columnWidths fits the columns to their cells and the screen: the widest give
// way first, titles never. indent is where the last column begins.
func columnWidths(cols []column, rows [][]string) (widths []int, indent int) {
	widths = make([]int, len(cols))
	for i, c := range cols {
		widths[i] = utf8.RuneCountInString(c.title)
		for _, row := range rows {
			if i < len(row)-1 {
				widths[i] = max(widths[i], min(utf8.RuneCountInString(clean(row[i])), c.limit))
			}
		}
	}
	for {
		indent = 0
		widest := -1
		for i, w := range widths[:len(cols)-1] {
			indent += w + 2
			gives := cols[i].least > 0 && w > max(cols[i].least, utf8.RuneCountInString(cols[i].title))
			if gives && (widest < 0 || w > widths[widest]) {
				widest = i
			}
		}
		if indent <= width-lastColumn || widest < 0 {
			return widths, indent
		}
		widths[widest]--
	}
}

// date is a local date and time; the year only if it is not the present one.
func (s *screen) date(t control.Time, now control.Time) string {
	if t.IsZero() {
		return "not known"
	}
	l := t.In(s.zone)
	if l.Year() == now.In(s.zone).Year() {
		return l.Format("2 Jan 15:04")
	}
	return l.Format("2 Jan 2006 15:04")
}

// stamps are times as the daemon writes them into its sentences.
var stamps = regexp.MustCompile(`\b[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z`)

// local puts the times in a text into the reader's own zone, written as on every screen.
func (s *screen) local(text string) string {
	return stamps.ReplaceAllStringFunc(text, func(m string) string {
		t, err := time.Parse(time.RFC3339, m)
		if err != nil {
			return m
		}
		return t.In(s.zone).Format("2 Jan 2006 15:04")
	})
}

// localAt is the same for a text of a document made at now: the year only if it
// is another one, and how long it is until what is to come.
func (s *screen) localAt(text string, now control.Time) string {
	if now.IsZero() {
		return s.local(text)
	}
	return stamps.ReplaceAllStringFunc(text, func(m string) string {
		t, err := time.Parse(time.RFC3339, m)
		if err != nil {
			return m
		}
		at := control.At(t)
		if !t.After(now.Time) {
			return s.date(at, now)
		}
		return s.date(at, now) + " (" + ahead(at, now) + ")"
	})
}

// day is a local date.
func (s *screen) day(t control.Time, now control.Time) string {
	l := t.In(s.zone)
	if l.Year() == now.In(s.zone).Year() {
		return l.Format("2 Jan")
	}
	return l.Format("2 Jan 2006")
}

// age is how long ago t was, in up to two units.
func age(t, now control.Time) string { return control.Span(now.Sub(t.Time)) }

// pause is a stop of all threads.
func pause(us int64) string {
	if us >= 10000 {
		return fmt.Sprintf("%.1f ms", float64(us)/1000)
	}
	return fmt.Sprintf("%d us", us)
}

// many is "1 image", "2 images".
func many(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	if strings.HasSuffix(one, "s") {
		return fmt.Sprintf("%d %ses", n, one)
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// base is the last element of a path of either system.
func base(path string) string {
	if i := strings.LastIndexAny(path, `/\`); i >= 0 && i < len(path)-1 {
		return path[i+1:]
	}
	return path
}

// program is a process's name for a sentence.
func program(exe string) string {
	if exe == "" {
		return "process"
	}
	return base(exe)
}

func releaseName(id string, sequence int64) string {
	return fmt.Sprintf("%s, sequence %d", id, sequence)
}

// stateColour is the colour of an image state.
func stateColour(state string) string {
	switch control.ImageState(state) {
	case control.Patched, control.Fixed:
		return good
	case control.PendingImage, control.Unpatched, control.OtherBuild:
		return fair
	case control.Busy, control.Blocked, control.Drifted, control.Failed, control.Torn:
		return bad
	}
	return ""
}

// counts lists the states of a coverage that occur, worst first.
func counts(c control.Coverage) string {
	var out []string
	for i := len(control.ImageStates) - 1; i >= 0; i-- {
		st := control.ImageStates[i]
		if n := c.Count(st); n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, st))
		}
	}
	return strings.Join(out, ", ")
}
