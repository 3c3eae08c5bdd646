package calendar

import (
	"fmt"
	"time"
)

// Kind is a kind of update.
type Kind string

// The kinds.
const (
	Baseline Kind = "baseline" // whole files, takes effect by a restart; hotpatches build on it
	Hotpatch Kind = "hotpatch" // no restart
	Standard Kind = "standard" // cumulative update with a restart that no hotpatch builds on
	Nothing  Kind = "nothing"  // of a Decision only
)

// Month is a month of the Gregorian calendar. The zero value is no month.
type Month struct {
	Year  int
	Month time.Month
}

// ParseMonth reads "2026-11", the form of a release's month.
func ParseMonth(s string) (Month, error) {
	t, err := time.Parse("2006-01", s)
	if err != nil || t.Year() < 1 {
		return Month{}, fmt.Errorf("%.20q is no month such as \"2026-11\"", s)
	}
	return Month{t.Year(), t.Month()}, nil
}

// MonthOf is the month of t in UTC. A planned release falls on the same day in
// UTC as in Pacific time, so that it lies in its own month.
func MonthOf(t time.Time) Month {
	t = t.UTC()
	return Month{t.Year(), t.Month()}
}

// String is the form that ParseMonth reads; "" for the zero Month.
func (m Month) String() string {
	if m == (Month{}) {
		return ""
	}
	return fmt.Sprintf("%04d-%02d", m.Year, int(m.Month))
}

func (m Month) index() int { return m.Year*12 + int(m.Month) - 1 }

// Add is the month n months later; n may be negative.
func (m Month) Add(n int) Month {
	i := m.index() + n
	return Month{i / 12, time.Month(i%12) + 1}
}

// Compare is negative if m is before o, positive if after.
func (m Month) Compare(o Month) int { return m.index() - o.index() }

// Planned is what the rule plans for the month.
func (m Month) Planned() Kind {
	if m.Month%3 == 1 {
		return Baseline
	}
	return Hotpatch
}

// Quarter is the month of the baseline, planned by rule, that m belongs to.
func (m Month) Quarter() Month { return m.Add(-(int(m.Month) - 1) % 3) }

// releaseHour is the hour of day, Pacific time, at which updates are released.
const releaseHour = 10

// Release is the instant at which the month's planned update is released: its
// second Tuesday, 10:00 Pacific.
func (m Month) Release() time.Time { return ReleaseOn(m.Year, m.Month, nth(m, time.Tuesday, 2)) }

// ReleaseOn is 10:00 Pacific of a day, in UTC: 17:00 in summer, 18:00 in
// winter, so that the day is the same in UTC. Summer time is computed by the
// rule of the United States in force since 2007, second Sunday of March to
// first Sunday of November, because there is no time zone database on every
// device. Should that rule change, the hour is wrong by one, never the day.
func ReleaseOn(year int, month time.Month, day int) time.Time {
	m := Month{year, month}
	offset := 8
	switch {
	case month > time.March && month < time.November,
		month == time.March && day >= nth(m, time.Sunday, 2),
		month == time.November && day < nth(m, time.Sunday, 1):
		offset = 7
	}
	return time.Date(year, month, day, releaseHour+offset, 0, 0, 0, time.UTC)
}

// nth is the day of the month of its n-th weekday.
func nth(m Month, w time.Weekday, n int) int {
	first := time.Date(m.Year, m.Month, 1, 0, 0, 0, 0, time.UTC).Weekday()
	return 1 + int(w-first+7)%7 + 7*(n-1)
}

// Next is the first planned release of a kind, Baseline or Hotpatch, after an
// instant: one that is released at that very instant has come already. Another
// kind is never planned: the zero time.
func Next(kind Kind, after time.Time) time.Time {
	m := MonthOf(after)
	for range 4 { // a quarter, and the rest of this month
		if t := m.Release(); m.Planned() == kind && t.After(after) {
			return t
		}
		m = m.Add(1)
	}
	return time.Time{}
}
