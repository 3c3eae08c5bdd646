package calendar

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// invented draws a track of up to three years: planned months, unplanned
// baselines, out-of-band updates of every kind, cumulative updates.
func invented(t *rapid.T) *Track {
	var out []Update
	ubr := rapid.IntRange(1, 1000).Draw(t, "first")
	add := func(k Kind, m Month, date time.Time, oob bool) {
		ubr += rapid.IntRange(2, 50).Draw(t, "step")
		out = append(out, Update{ID: fmt.Sprintf("U%d", len(out)), Kind: k, Month: m, Date: date, UBR: ubr, OutOfBand: oob})
	}
	first := Month{2026, time.January}.Add(rapid.IntRange(0, 11).Draw(t, "month"))
	for i := range rapid.IntRange(1, 36).Draw(t, "months") {
		m := first.Add(i)
		kind := m.Planned()
		if kind == Hotpatch && rapid.IntRange(0, 9).Draw(t, "unplanned") == 0 {
			kind = Baseline
		}
		date := m.Release()
		if kind != m.Planned() {
			date = date.Add(-time.Duration(rapid.IntRange(0, 5).Draw(t, "early")) * day)
		}
		add(kind, m, date, false)
		if kind == Hotpatch && rapid.Bool().Draw(t, "cumulative") {
			add(Standard, m, m.Release(), false)
		}
		for n := range rapid.IntRange(0, 2).Draw(t, "besides") {
			k := rapid.SampledFrom([]Kind{Hotpatch, Hotpatch, Standard, Baseline}).Draw(t, "kind")
			add(k, m, m.Release().Add(time.Duration(n+1)*3*day), true)
		}
	}
	return NewTrack("invented", out)
}

func instant(t *rapid.T, track *Track, name string) time.Time {
	all := track.updates
	first, last := all[0].Date.Add(-30*day), all[len(all)-1].Date.Add(60*day)
	return first.Add(time.Duration(rapid.Int64Range(0, int64(last.Sub(first)/time.Hour)).Draw(t, name)) * time.Hour)
}

// place is where an update stands in its track.
func place(track *Track, id string) int {
	for i, u := range track.updates {
		if u.ID == id {
			return i
		}
	}
	return -1
}

// The baseline comes when the rule says, whatever was published: unplanned and
// out-of-band ones shift nothing. A hotpatch whose place is taken is skipped, no other.
func TestCadenceNeverShifts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		track := invented(t)
		at := instant(t, track, "at")
		if got := track.Next(Baseline, at); !got.Equal(Next(Baseline, at)) {
			t.Fatalf("baseline after %s: %s", at, got)
		}
		next := track.Next(Hotpatch, at)
		if m := MonthOf(next); m.Planned() != Hotpatch || !m.Release().Equal(next) || !next.After(at) {
			t.Fatalf("hotpatch after %s: %s", at, next)
		}
		for x := Next(Hotpatch, at); x.Before(next); x = Next(Hotpatch, x) {
			if track.Kind(MonthOf(x), at) != Baseline {
				t.Fatalf("hotpatch of %s is left out", x)
			}
		}
	})
}

// Who takes what is offered comes to an end, never goes back, and ends with the
// newest that is for it.
func TestTakingWhatIsOfferedReachesCurrent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		track := invented(t)
		at := instant(t, track, "at")
		d := Device{Enrolled: rapid.Bool().Draw(t, "enrolled"), UBR: rapid.IntRange(1, 4000).Draw(t, "revision")}
		if rapid.Bool().Draw(t, "listed") {
			d.UBR = rapid.SampledFrom(track.updates).Draw(t, "has").UBR + rapid.IntRange(0, 1).Draw(t, "more") // one more is listed nowhere
		}
		if rapid.IntRange(0, 3).Draw(t, "upgrade") == 0 {
			d.Upgraded = instant(t, track, "upgraded")
		}
		l := track.line(0, at)
		was := d.UBR
		var got Decision
		for steps := 0; ; steps++ {
			got = Offered(track, d, at)
			if got.Kind == Nothing {
				break
			}
			if steps > 2 {
				t.Fatalf("still offered %+v", got)
			}
			if got.Update.UBR <= d.UBR {
				t.Fatalf("offered %+v to revision %d", got, d.UBR)
			}
			if got.Update.Date.After(at) {
				t.Fatalf("offered %+v on %s", got, at)
			}
			if got.Restart != (got.Update.Kind != Hotpatch) || got.Kind != got.Update.Kind {
				t.Fatalf("%+v", got)
			}
			if got.Kind == Hotpatch && (!d.Enrolled || !got.OnTrack) {
				t.Fatalf("%+v for %+v", got, d)
			}
			d.UBR = got.Update.UBR
		}
		if got.Code == CodeAhead || got.Code == CodeNoUpdates || got.Code == CodeLevel {
			if d.UBR != was {
				t.Fatalf("from revision %d to %d, and then %s", was, d.UBR, got.Code)
			}
			return
		}
		has := place(track, fmt.Sprint(idOf(track, d.UBR)))
		if has < 0 { // a revision between two: newer than all with a restart, which is where it stays
			return
		}
		if has < l.base {
			t.Fatalf("ended at %+v, behind the baseline %+v", track.updates[has], track.updates[l.base])
		}
		for i, u := range l.updates[has+1:] {
			mine := u.Kind == Hotpatch && got.OnTrack
			if other := u.restarts() && !got.OnTrack; mine || other {
				t.Fatalf("ended at %+v with %s, but update %d is newer: %+v", track.updates[has], got.Code, has+1+i, u)
			}
		}
	})
}

func idOf(track *Track, ubr int) string {
	for _, u := range track.updates {
		if u.UBR == ubr {
			return u.ID
		}
	}
	return ""
}

// The device that keeps up with everything from a baseline on restarts at
// baselines only, is never off the track, and has each hotpatch on its day.
func TestWhoKeepsUpRestartsAtBaselinesOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		track := invented(t)
		var d Device
		restarts, baselines := 0, 0
		for _, u := range track.updates {
			if u.starts() && d.UBR == 0 {
				d = Device{Enrolled: true, UBR: u.UBR}
				continue
			}
			if d.UBR == 0 {
				continue
			}
			if u.starts() {
				baselines++
			}
			got := Offered(track, d, u.Date)
			if got.Restart {
				restarts++
			}
			if got.Kind == Standard || got.Update.OutOfBand && got.Kind == Baseline {
				t.Fatalf("thrown off the track on %s by %+v", u.Date, got)
			}
			if got.Kind != Nothing {
				d.UBR = got.Update.UBR
			}
			if u.Kind == Hotpatch && d.UBR != u.UBR {
				t.Fatalf("at revision %d after %s: %+v", d.UBR, u.name(), got)
			}
			if got = Offered(track, d, u.Date); got.Code != CodeCurrent || !got.OnTrack {
				t.Fatalf("after %s: %+v", u.name(), got)
			}
		}
		if restarts != baselines {
			t.Fatalf("%d restarts, %d baselines", restarts, baselines)
		}
	})
}

// What is not out yet decides nothing, and to a device that stands still newer
// things are offered as time goes, never older ones.
func TestDecisionsAreMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		track := invented(t)
		has := rapid.SampledFrom(track.updates).Draw(t, "has")
		d := Device{Enrolled: rapid.Bool().Draw(t, "enrolled"), UBR: has.UBR}
		from := instant(t, track, "from")
		if from.Before(has.Date) {
			from = has.Date
		}
		to := instant(t, track, "to")
		if to.Before(from) {
			from, to = to, from
		}
		if from.Before(has.Date) {
			return
		}
		early, late := Offered(track, d, from), Offered(track, d, to)
		if early.Kind != Nothing && (late.Kind == Nothing || late.Update.UBR < early.Update.UBR) {
			t.Fatalf("on %s %+v\non %s %+v", from, early, to, late)
		}
		out := NewTrack("", track.line(0, from).updates)
		if only := Offered(out, d, from); only.Kind != early.Kind || only.Update.ID != early.Update.ID || only.Code != early.Code {
			t.Fatalf("with the future %+v\nwithout %+v", early, only)
		}
	})
}

// Releases of a vendor have ids, not revisions, and may name their baseline or need none.
func TestVendorsTrack(t *testing.T) {
	on := func(month string, days int) time.Time {
		m, err := ParseMonth(month)
		if err != nil {
			t.Fatal(err)
		}
		return m.Release().Add(time.Duration(days) * day)
	}
	u := func(id string, kind Kind, month string, days int, baseline string, free bool) Update {
		m, _ := ParseMonth(month)
		return Update{ID: id, Kind: kind, Month: m, Date: on(month, days), Baseline: baseline, Free: free}
	}
	acme := NewTrack("acme", []Update{
		u("A-10", Baseline, "2026-10", 0, "", false),
		u("A-11", Hotpatch, "2026-11", 0, "A-10", false),
		u("A-12", Hotpatch, "2026-12", 0, "A-10", false),
		u("A-01", Baseline, "2027-01", 0, "", false),
		u("A-10-late", Hotpatch, "2027-01", 5, "A-10", false), // one more for those who are late
		u("A-02", Hotpatch, "2027-02", 0, "A-01", false),
	})
	free := NewTrack("free", []Update{
		u("F-1", Hotpatch, "2026-11", 0, "", true),
		u("F-2", Hotpatch, "2026-12", 3, "", true),
	})
	elsewhere := NewTrack("elsewhere", []Update{u("E-1", Hotpatch, "2026-11", 0, "E-0", false)})
	for _, c := range []struct {
		track *Track
		has   string
		at    time.Time
		kind  Kind
		id    string
		code  Code
	}{
		{acme, "", on("2026-10", 1), Baseline, "A-10", CodeBaseline},
		{acme, "A-10", on("2026-10", 1), Nothing, "", CodeCurrent},
		{acme, "A-10", on("2026-12", 1), Hotpatch, "A-12", CodeHotpatch},
		{acme, "", on("2026-12", 1), Baseline, "A-10", CodeBaseline},
		{acme, "A-12", on("2027-01", 0), Baseline, "A-01", CodeBaseline},
		{acme, "A-12", on("2027-01", 6), Baseline, "A-01", CodeBaseline},
		{acme, "A-01", on("2027-01", 6), Nothing, "", CodeCurrent},
		{acme, "A-10-late", on("2027-02", 0), Baseline, "A-01", CodeBaseline},
		{acme, "A-01", on("2027-02", 0), Hotpatch, "A-02", CodeHotpatch},
		{free, "", on("2026-11", -1), Nothing, "", CodeNoUpdates},
		{free, "", on("2026-11", 0), Hotpatch, "F-1", CodeHotpatch},
		{free, "F-1", on("2026-12", 0), Nothing, "", CodeCurrent},
		{free, "F-1", on("2026-12", 3), Hotpatch, "F-2", CodeHotpatch},
		{free, "F-2", on("2027-12", 3), Nothing, "", CodeCurrent},
		{elsewhere, "", on("2026-12", 0), Nothing, "", CodeBaseline},
	} {
		got := Offered(c.track, Device{ID: c.has, Enrolled: true}, c.at)
		if got.Kind != c.kind || got.Update.ID != c.id || got.Code != c.code {
			t.Errorf("%s, with %q on %s: %+v, wanted %s %q %s", c.track.Name, c.has, c.at.Format(time.DateOnly), got, c.kind, c.id, c.code)
		}
	}
}
