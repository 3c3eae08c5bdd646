package agent

import (
	"fmt"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
)

// Window is a span of local time: on the given days from one minute of the day
// to another. One that ends at or before its beginning runs past midnight and
// belongs to the day it begins on.
type Window struct {
	Days     [7]bool // by time.Weekday
	From, To int     // minutes after midnight; To may be 24:00
}

// Hours are windows; none at all means always.
type Hours []Window

// Open tells whether t lies in one of the windows, by t's own location.
func (h Hours) Open(t time.Time) bool {
	if len(h) == 0 {
		return true
	}
	today, minute := t.Weekday(), t.Hour()*60+t.Minute()
	yesterday := (today + 6) % 7
	for _, w := range h {
		switch {
		case w.From < w.To:
			if w.Days[today] && minute >= w.From && minute < w.To {
				return true
			}
		case w.Days[today] && minute >= w.From, w.Days[yesterday] && minute < w.To:
			return true
		}
	}
	return false
}

// Next is the first whole minute from t on at which Open holds, or t itself.
// Windows repeat weekly, but for an hour that a change of the clocks leaves out.
func (h Hours) Next(t time.Time) time.Time {
	if h.Open(t) {
		return t
	}
	at := t.Truncate(time.Minute)
	for range 15 * 24 * 60 {
		at = at.Add(time.Minute)
		if h.Open(at) {
			break
		}
	}
	return at
}

var weekdays = [7]string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// parseWindow reads "22:00-06:00", "sat 00:00-24:00" or "mon-fri 20:00-23:00".
func parseWindow(text string) (Window, error) {
	const form = `%q is not like "22:00-06:00" or "mon-fri 20:00-23:00"`
	fields := strings.Fields(strings.ToLower(text))
	var w Window
	switch len(fields) {
	case 1:
		w.Days = [7]bool{true, true, true, true, true, true, true}
	case 2:
		first, last, several := strings.Cut(fields[0], "-")
		if !several {
			last = first
		}
		from, to := weekday(first), weekday(last)
		if from < 0 || to < 0 {
			return w, fmt.Errorf(form, text)
		}
		for day := from; ; day = (day + 1) % 7 {
			w.Days[day] = true
			if day == to {
				break
			}
		}
	default:
		return w, fmt.Errorf(form, text)
	}
	from, to, ok := strings.Cut(fields[len(fields)-1], "-")
	var ok1, ok2 bool
	w.From, ok1 = minuteOfDay(from)
	w.To, ok2 = minuteOfDay(to)
	if !ok || !ok1 || !ok2 || w.From == 24*60 || w.From == w.To {
		return w, fmt.Errorf(form, text)
	}
	return w, nil
}

func weekday(s string) int {
	for i, name := range weekdays {
		if s == name {
			return i
		}
	}
	return -1
}

// minuteOfDay reads "06:30"; "24:00" is the end of the day.
func minuteOfDay(s string) (int, bool) {
	if s == "24:00" {
		return 24 * 60, true
	}
	t, err := time.Parse("15:04", s)
	return t.Hour()*60 + t.Minute(), err == nil && len(s) == 5
}

// grace is when a release stops keeping to the hours.
type grace struct {
	Release string
	Ends    time.Time
}

// hoursOpen is when the policy's hours open, now if they are.
func (a *Agent) hoursOpen(now time.Time) time.Time {
	if a.policy == nil {
		return now
	}
	return a.policy.Hours.Next(now)
}

// graceEnds counts from when a release came into force here: that is on disk,
// so that a restart of the daemon, or a process that starts every hour, does not
// begin the wait anew.
func (a *Agent) graceEnds() map[string]grace {
	if a.policy == nil || a.policy.HoursGrace <= 0 {
		return nil
	}
	out := map[string]grace{}
	a.store.View(func(tx *store.Tx) error {
		for product, f := range inForceIn(tx) {
			out[product] = grace{f.ID, f.Since.Add(a.policy.HoursGrace)}
		}
		return nil
	})
	return out
}

// graceOver tells whether the offer has waited for the hours long enough.
func (v View) graceOver(in Intent) bool {
	g, ok := v.Grace[in.Product]
	return ok && g.Release == in.Offer.ID && !v.Now.Before(g.Ends)
}

// outsideHours says when the wait ends: with the hours, or with the grace if
// that is sooner.
func (v View) outsideHours(in Intent) Intent {
	in.State, in.Remedy, in.Again = control.PendingImage, control.RemedyWait, v.Opens
	in.Reason = because("hours", "outside the policy's hours, which begin %s", stamp(v.Opens))
	if g, ok := v.Grace[in.Product]; ok && g.Release == in.Offer.ID && g.Ends.Before(v.Opens) {
		in.Again = g.Ends
		in.Reason = because("hours", "outside the policy's hours; its grace ends %s, before they begin", stamp(g.Ends))
	}
	return in
}
