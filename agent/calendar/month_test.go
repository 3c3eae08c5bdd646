package calendar

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// patchTuesdays are the days of the month, January first.
var patchTuesdays = map[int][12]int{
	2024: {9, 13, 12, 9, 14, 11, 9, 13, 10, 8, 12, 10},
	2025: {14, 11, 11, 8, 13, 10, 8, 12, 9, 14, 11, 9},
	2026: {13, 10, 10, 14, 12, 9, 14, 11, 8, 13, 10, 8},
	2027: {12, 9, 9, 13, 11, 8, 13, 10, 14, 12, 9, 14},
}

func TestPatchTuesdays(t *testing.T) {
	for year, days := range patchTuesdays {
		for i, day := range days {
			m := Month{year, time.Month(i + 1)}
			r := m.Release()
			if r.Day() != day || MonthOf(r) != m || r.Weekday() != time.Tuesday {
				t.Errorf("%s: %s, wanted day %d", m, r, day)
			}
		}
	}
}

// Summer time, against instants written down by hand.
func TestReleaseHour(t *testing.T) {
	for month, want := range map[string]string{
		"2026-01": "2026-01-13T18:00:00Z",
		"2026-03": "2026-03-10T17:00:00Z", // summer time began on the 8th
		"2027-03": "2027-03-09T18:00:00Z", // it begins on the 14th
		"2022-03": "2022-03-08T18:00:00Z", // it begins on the 13th
		"2026-04": "2026-04-14T17:00:00Z",
		"2026-10": "2026-10-13T17:00:00Z",
		"2026-11": "2026-11-10T18:00:00Z", // it ended on the 1st
		"2025-11": "2025-11-11T18:00:00Z",
	} {
		m, err := ParseMonth(month)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.Release().Format(time.RFC3339); got != want {
			t.Errorf("%s: %s, wanted %s", month, got, want)
		}
	}
	for day, hour := range map[int]int{7: 18, 8: 17} { // March 2026
		if got := ReleaseOn(2026, time.March, day); got.Hour() != hour {
			t.Errorf("%s, wanted %d h", got, hour)
		}
	}
	for day, hour := range map[int]int{1: 17, 2: 17, 3: 18} { // November 2024: it ended on the 3rd
		if got := ReleaseOn(2024, time.November, day); got.Hour() != hour {
			t.Errorf("%s, wanted %d h", got, hour)
		}
	}
}

// Where there is a time zone database, it says the same for every month of 2007 to 2100.
func TestReleaseHourByDatabase(t *testing.T) {
	pacific, err := time.LoadLocation("America/Los_Angeles")
	if err != nil {
		t.Skip("needs a time zone database")
	}
	for m := (Month{2007, time.January}); m.Year < 2100; m = m.Add(1) {
		if r := m.Release().In(pacific); r.Hour() != releaseHour || r.Weekday() != time.Tuesday || r.Day() < 8 || r.Day() > 14 {
			t.Errorf("%s: %s", m, r)
		}
	}
}

func TestMonths(t *testing.T) {
	for _, c := range []struct {
		month   string
		planned Kind
		quarter string
	}{
		{"2026-01", Baseline, "2026-01"}, {"2026-02", Hotpatch, "2026-01"}, {"2026-03", Hotpatch, "2026-01"},
		{"2026-04", Baseline, "2026-04"}, {"2026-05", Hotpatch, "2026-04"}, {"2026-06", Hotpatch, "2026-04"},
		{"2026-07", Baseline, "2026-07"}, {"2026-08", Hotpatch, "2026-07"}, {"2026-09", Hotpatch, "2026-07"},
		{"2026-10", Baseline, "2026-10"}, {"2026-11", Hotpatch, "2026-10"}, {"2026-12", Hotpatch, "2026-10"},
	} {
		m, err := ParseMonth(c.month)
		if err != nil || m.String() != c.month || m.Planned() != c.planned || m.Quarter().String() != c.quarter {
			t.Errorf("%s: %s, %s, quarter %s, %v", c.month, m, m.Planned(), m.Quarter(), err)
		}
	}
	for _, bad := range []string{"", "2026", "2026-13", "2026-00", "2026-1", "26-01", "2026-01-01", "0000-01", "2026-01 "} {
		if m, err := ParseMonth(bad); err == nil {
			t.Errorf("%q is %s", bad, m)
		}
	}
	if s := (Month{}).String(); s != "" {
		t.Errorf("no month is %q", s)
	}
	if m := MonthOf(time.Date(2026, time.October, 1, 1, 0, 0, 0, time.FixedZone("", 14*60*60))); m != (Month{2026, time.September}) {
		t.Errorf("the first hour of October far in the east is %s", m)
	}
	if m := (Month{2026, time.January}).Add(-1); m != (Month{2025, time.December}) {
		t.Errorf("before 2026-01: %s", m)
	}
}

func TestNext(t *testing.T) {
	for _, c := range []struct {
		kind        Kind
		after, want string
	}{
		{Hotpatch, "2026-11-22T12:00:00Z", "2026-12-08T18:00:00Z"},
		{Baseline, "2026-11-22T12:00:00Z", "2027-01-12T18:00:00Z"},
		{Hotpatch, "2026-11-10T17:59:59Z", "2026-11-10T18:00:00Z"},
		{Hotpatch, "2026-11-10T18:00:00Z", "2026-12-08T18:00:00Z"},
		{Hotpatch, "2026-12-08T18:00:00Z", "2027-02-09T18:00:00Z"},
		{Baseline, "2026-10-13T16:59:59Z", "2026-10-13T17:00:00Z"},
		{Baseline, "2026-10-13T17:00:00Z", "2027-01-12T18:00:00Z"},
		{Baseline, "2026-10-13T20:00:00+09:00", "2026-10-13T17:00:00Z"}, // Tokyo is ahead
		{Baseline, "2026-10-01T01:00:00+14:00", "2026-10-13T17:00:00Z"}, // still September in UTC
	} {
		after, err := time.Parse(time.RFC3339, c.after)
		if err != nil {
			t.Fatal(err)
		}
		if got := Next(c.kind, after).Format(time.RFC3339); got != c.want {
			t.Errorf("%s after %s: %s, wanted %s", c.kind, c.after, got, c.want)
		}
	}
	if got := Next(Standard, (Month{2026, 11}).Release()); !got.IsZero() {
		t.Errorf("a standard update is planned for %s", got)
	}
}

// Whatever the instant: the next release is later, planned, of its month, and none is missed between.
func TestCadence(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		after := time.Unix(rapid.Int64Range(1136073600, 4102444800).Draw(t, "after"), 0) // 2006 to 2100
		for _, kind := range []Kind{Baseline, Hotpatch} {
			next := Next(kind, after)
			m := MonthOf(next)
			if !next.After(after) || m.Planned() != kind || !m.Release().Equal(next) {
				t.Fatalf("%s after %s: %s", kind, after, next)
			}
			if before := Next(kind, next.Add(-time.Second)); !before.Equal(next) {
				t.Fatalf("%s after %s: %s, a second before it: %s", kind, after, next, before)
			}
			months := map[Kind]int{Baseline: 3, Hotpatch: 2}[kind]
			if gap := m.index() - MonthOf(after).index(); gap < 0 || gap > months {
				t.Fatalf("%s after %s: %s, %d months later", kind, after, next, gap)
			}
			for x := MonthOf(after); x.Compare(m) < 0; x = x.Add(1) {
				if x.Planned() == kind && x.Release().After(after) {
					t.Fatalf("%s after %s: %s, but %s comes first", kind, after, next, x.Release())
				}
			}
		}
	})
}
