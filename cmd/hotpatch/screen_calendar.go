package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
)

// calendarColumn is where the text beside the labels of calendar begins.
const calendarColumn = 13

// calendar shows past, present and next.
func (s *screen) calendar(d *control.Calendar) string {
	p := &page{}
	p.verdict(s, "", strings.ToUpper(s.month(d.Month)), s.today(d))
	p.blank()
	p.field("Next", calendarColumn, s.comesNext(d.Next, d.Generated))
	for _, x := range d.Products {
		s.product(p, x, d.Generated)
	}
	p.blank()
	var rows [][]string
	now := ""
	for _, m := range d.Months {
		mark := ""
		if m.Month == d.Month {
			mark, now = "now", m.Month
		}
		rows = append(rows, []string{m.Month, m.Kind, s.day(m.Planned, d.Generated), mark, s.released(m, d.Generated)})
	}
	p.table(s, []column{{"MONTH", 7, 0}, {"PLANNED", 8, 0}, {"DAY", 11, 0}, {"", 3, 0}, {title: "RELEASED"}}, rows, func(month string) string {
		if month == now {
			return good
		}
		return ""
	})
	if d.Earlier > 0 || d.Later > 0 {
		p.blank()
		p.field("", 0, s.others(d)+": hotpatch list shows all.")
	}
	if x := d.System; x != nil {
		p.blank()
		text := strings.Trim(x.Name+" "+x.Build, " ") + ". " + x.Text + "."
		if n := s.comesNext(x.Next, d.Generated); n != "" {
			text += " Next by that rule: " + n + "."
		}
		p.field("Windows", calendarColumn, text)
	}
	return p.String()
}

// month is "2026-11" for people.
func (s *screen) month(m string) string {
	t, err := time.Parse("2006-01", m)
	if err != nil {
		return m
	}
	return t.Format("January 2006")
}

// today is the verdict: what this month is, and how far it has come.
func (s *screen) today(d *control.Calendar) string {
	i := slices.IndexFunc(d.Months, func(m control.CalendarMonth) bool { return m.Month == d.Month })
	if i < 0 {
		return "A month that this command cannot show."
	}
	m := d.Months[i]
	text := "A hotpatch month, on the baseline of " + s.month(d.Quarter) + ": no restart is planned."
	if d.Kind == "baseline" {
		text = "A baseline month: one restart is planned."
	}
	if slices.ContainsFunc(m.Releases, func(r control.CalendarRelease) bool { return r.Unplanned && !r.Halted }) {
		text += " An unplanned baseline was released, which takes one restart; the months after it stay as planned."
	}
	switch n := len(m.Releases); {
	case n > 0:
		text += fmt.Sprintf(" %s for it %s out.", many(n, "release"), verb(n, "is", "are"))
	case m.Planned.After(d.Generated.Time):
		text += fmt.Sprintf(" Its day is %s, %s.", s.day(m.Planned, d.Generated), s.ahead(m.Planned, d.Generated))
	default:
		text += " Nothing was released for it."
	}
	var due []string
	for _, x := range d.Products {
		if x.Restart && (x.Reason == "" || x.ReasonCode == "staged") {
			due = append(due, x.Offered)
		}
	}
	if len(due) > 0 {
		text += fmt.Sprintf(" This device has a restart before it: %s.", strings.Join(due, ", "))
	}
	return text
}

// comesNext are the next dates, the sooner first.
func (s *screen) comesNext(n control.Next, now control.Time) string {
	type due struct {
		at   control.Time
		what string
	}
	var all []due
	for _, x := range []due{{n.Hotpatch, "hotpatch"}, {n.Baseline, "baseline with one restart"}} {
		if !x.at.IsZero() {
			all = append(all, x)
		}
	}
	slices.SortStableFunc(all, func(a, b due) int { return a.at.Compare(b.at.Time) })
	var parts []string
	for _, x := range all {
		parts = append(parts, fmt.Sprintf("%s %s, %s", s.day(x.at, now), x.what, s.ahead(x.at, now)))
	}
	return strings.Join(parts, "; ")
}

// ahead counts days by the reader's own calendar: what comes after midnight is tomorrow.
func (s *screen) ahead(t, now control.Time) string {
	switch n := s.dayNumber(t) - s.dayNumber(now); {
	case n < 0:
		return many(-n, "day") + " ago"
	case n == 0:
		return "today"
	case n == 1:
		return "tomorrow"
	default:
		return "in " + many(n, "day")
	}
}

func (s *screen) dayNumber(t control.Time) int {
	y, m, d := t.In(s.zone).Date()
	return int(time.Date(y, m, d, 0, 0, 0, 0, time.UTC).Unix() / (24 * 60 * 60))
}

// product is what the calendar brings this device of one product.
func (s *screen) product(p *page, x control.CalendarProduct, now control.Time) {
	text := x.Product + ": nothing is in force. "
	if at := strings.Join(slices.DeleteFunc([]string{x.InForce, x.Baseline}, func(s string) bool { return s == "" }), " on the baseline "); at != "" {
		text = fmt.Sprintf("%s: %s is in force. ", x.Product, at)
	}
	switch {
	case x.Code == "current":
		text += "Nothing newer is out for this device."
	case x.Offered == "" && x.Kind == "nothing":
		text += "Nothing is offered: " + x.Text + "."
	default:
		text += "Offered: " + x.Text + "."
	}
	if x.Reason != "" {
		text += " It does not come into force now: " + x.Reason + "."
	}
	if !x.Until.IsZero() {
		text += fmt.Sprintf(" The next baseline is planned for %s, %s.", s.day(x.Until, now), s.ahead(x.Until, now))
	}
	p.field("Product", calendarColumn, text)
}

// released lists a month's releases, or says when they are due.
func (s *screen) released(m control.CalendarMonth, now control.Time) string {
	var parts []string
	for _, r := range m.Releases {
		word := r.ID + s.kindOf(r, m)
		for _, x := range []struct {
			is   bool
			what string
		}{{r.InForce, "in force"}, {r.Held, "held"}, {r.Halted, "halted"}} {
			if x.is {
				word += ", " + x.what
			}
		}
		if r.NotBefore.After(now.Time) {
			word += ", not before " + s.date(r.NotBefore, now)
		}
		parts = append(parts, word)
	}
	switch {
	case len(parts) > 0:
		return strings.Join(parts, "; ")
	case m.Planned.After(now.Time):
		return s.ahead(m.Planned, now)
	}
	return "nothing"
}

// kindOf says what is not as planned.
func (s *screen) kindOf(r control.CalendarRelease, m control.CalendarMonth) string {
	switch {
	case r.Unplanned:
		return " (unplanned baseline)"
	case r.OutOfBand:
		return " (out-of-band " + r.Kind + ")"
	case r.Kind != m.Kind:
		return " (" + r.Kind + ")"
	}
	return ""
}

// others counts the releases of months that are not shown.
func (s *screen) others(d *control.Calendar) string {
	var parts []string
	if d.Earlier > 0 {
		parts = append(parts, many(d.Earlier, "earlier release"))
	}
	if d.Later > 0 {
		parts = append(parts, many(d.Later, "later release"))
	}
	return strings.Join(parts, " and ")
}
