package agent

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/calendar"
	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
)

var calendarNoon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// dated is a release of a month, published on that month's day.
func dated(id, kind, month, baseline string, sequence uint32) repository.Offer {
	m, err := calendar.ParseMonth(month)
	if err != nil {
		panic(err)
	}
	return repository.Offer{ID: id, Product: "acme", Kind: kind, Month: month, Baseline: baseline, Sequence: sequence, Published: m.Release(), Rollout: repository.Rollout{Percent: 100}}
}

// listing is what the list says of releases, edited by id.
func listing(offers []repository.Offer, edit map[string]func(*control.Offer)) control.Offers {
	var out control.Offers
	for _, o := range offers {
		x := control.Offer{ID: o.ID, Product: o.Product, Fits: true}
		if fn := edit[o.ID]; fn != nil {
			fn(&x)
		}
		out.Releases = append(out.Releases, x)
	}
	return out
}

func nowInForce(x *control.Offer) { x.InForce = true }

func TestDatesOfAProduct(t *testing.T) {
	base, nov, extra, jan := dated("A-10", "baseline", "2026-10", "", 1), dated("A-11", "hotpatch", "2026-11", "A-10", 2), dated("A-11b", "hotpatch", "2026-11", "A-10", 3), dated("A-01", "baseline", "2027-01", "", 1)
	extra.Published = extra.Published.Add(5 * 24 * time.Hour)
	all := []repository.Offer{extra, base, nov}
	halt := extra
	halt.Rollout.Halt = true
	later, hour := extra, calendarNoon.Add(time.Hour)
	later.Rollout.NotBefore = &hour
	eligible := control.Status{Eligible: true}
	atBase := map[string]func(*control.Offer){"A-10": nowInForce}
	for name, c := range map[string]struct {
		offers []repository.Offer
		edit   map[string]func(*control.Offer)
		st     control.Status
		now    time.Time
		want   string // kind, offered, code, reason code
	}{
		"nothing of it":      {all, nil, eligible, calendarNoon, "baseline A-10 baseline "},
		"at the baseline":    {all, atBase, eligible, calendarNoon, "hotpatch A-11b hotpatch "},
		"one behind":         {all, map[string]func(*control.Offer){"A-11": nowInForce}, eligible, calendarNoon, "hotpatch A-11b hotpatch "},
		"current":            {all, map[string]func(*control.Offer){"A-11b": nowInForce}, eligible, calendarNoon, "nothing  current "},
		"halted":             {[]repository.Offer{base, nov, halt}, map[string]func(*control.Offer){"A-11": nowInForce}, eligible, calendarNoon, "nothing  current "},
		"halted, in force":   {[]repository.Offer{base, nov, halt}, map[string]func(*control.Offer){"A-11b": nowInForce}, eligible, calendarNoon, "nothing  current "},
		"announced":          {[]repository.Offer{base, nov, later}, atBase, eligible, calendarNoon, "hotpatch A-11 hotpatch "},
		"its hour":           {[]repository.Offer{base, nov, later}, atBase, eligible, hour, "hotpatch A-11b hotpatch "},
		"held":               {all, map[string]func(*control.Offer){"A-10": nowInForce, "A-11": nowInForce, "A-11b": func(x *control.Offer) { x.Fits, x.Held, x.ReasonCode = false, true, "held" }}, eligible, calendarNoon, "hotpatch A-11b hotpatch held"},
		"other processor":    {all, map[string]func(*control.Offer){"A-10": nowInForce, "A-11b": func(x *control.Offer) { x.Fits, x.ReasonCode = false, "arch" }}, eligible, calendarNoon, "hotpatch A-11 hotpatch "},
		"not eligible":       {all, nil, control.Status{}, calendarNoon, "baseline A-10 not-enrolled "},
		"the next baseline":  {append(all, jan), map[string]func(*control.Offer){"A-11b": nowInForce}, eligible, jan.Published, "baseline A-01 baseline "},
		"a second before it": {append(all, jan), map[string]func(*control.Offer){"A-11b": nowInForce}, eligible, jan.Published.Add(-time.Second), "nothing  current "},
		"no baseline needed": {[]repository.Offer{dated("F-11", "hotpatch", "2026-11", "", 1)}, nil, eligible, calendarNoon, "hotpatch F-11 hotpatch "},
		"baseline elsewhere": {[]repository.Offer{nov}, nil, eligible, calendarNoon, "nothing  baseline "},
		"staged":             {all, map[string]func(*control.Offer){"A-10": func(x *control.Offer) { x.ReasonCode = "staged" }}, eligible, calendarNoon, "baseline A-10 baseline staged"},
	} {
		d := dates(c.offers, listing(c.offers, c.edit), c.st, c.now)
		if len(d.Products) != 1 {
			t.Fatalf("%s: %+v", name, d.Products)
		}
		p := d.Products[0]
		if got := fmt.Sprintf("%s %s %s %s", p.Kind, p.Offered, p.Code, p.ReasonCode); got != c.want || p.Text == "" {
			t.Errorf("%s: %q, wanted %q: %+v", name, got, c.want, p)
		}
		if p.Restart != (p.Kind == "baseline") {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func TestDatesOfMonths(t *testing.T) {
	june, second := dated("A-06", "baseline", "2026-06", "", 1), dated("A-09b", "hotpatch", "2026-09", "", 3)
	second.Published = second.Published.Add(time.Hour)
	bare := dated("B-1", "hotpatch", "2026-09", "", 1) // without a month: that of its publication
	bare.Product, bare.Month = "bare", ""
	all := []repository.Offer{dated("A-01", "baseline", "2026-01", "", 1), june, dated("A-08", "baseline", "2026-08", "", 1), second, dated("A-09", "hotpatch", "2026-09", "", 5), dated("A-10", "baseline", "2026-10", "", 1), bare, dated("A-12", "hotpatch", "2027-12", "", 9)}
	d := dates(all, listing(all, map[string]func(*control.Offer){"A-09": nowInForce}), control.Status{Eligible: true}, calendarNoon)
	if d.Month != "2026-11" || d.Kind != "hotpatch" || d.Quarter != "2026-10" || d.Earlier != 2 || d.Later != 1 {
		t.Errorf("%+v", d)
	}
	var got []string
	for _, m := range d.Months {
		line := m.Month + " " + m.Kind + " " + m.Planned.Format("2")
		for _, r := range m.Releases {
			line += " " + r.ID
			if r.Unplanned {
				line += "/unplanned"
			}
			if r.OutOfBand {
				line += "/out-of-band"
			}
			if r.InForce {
				line += "/in-force"
			}
		}
		got = append(got, line)
	}
	want := `2026-07 baseline 14
2026-08 hotpatch 11 A-08/unplanned
2026-09 hotpatch 8 A-09/in-force A-09b/out-of-band B-1
2026-10 baseline 13 A-10
2026-11 hotpatch 10
2026-12 hotpatch 8
2027-01 baseline 12
2027-02 hotpatch 9
2027-03 hotpatch 9`
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwanted\n%s", strings.Join(got, "\n"), want)
	}
}

// A hotpatch and the baseline it builds on are in force side by side.
func TestDatesNameTheBaseline(t *testing.T) {
	offers := []repository.Offer{dated("A-10", "baseline", "2026-10", "", 1), dated("A-11", "hotpatch", "2026-11", "A-10", 1)}
	for _, c := range []struct{ base, hot bool }{{false, false}, {true, false}, {true, true}, {false, true}} {
		want := control.CalendarProduct{}
		edit := map[string]func(*control.Offer){}
		if c.base {
			want.Baseline, edit["A-10"] = "A-10", nowInForce
		}
		if c.hot {
			want.InForce, edit["A-11"] = "A-11", nowInForce
		}
		got := dates(offers, listing(offers, edit), control.Status{Eligible: true}, calendarNoon).Products[0]
		if got.Baseline != want.Baseline || got.InForce != want.InForce || got.OnTrack != (c.base || c.hot) {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

// What is announced for this device comes before what is only planned.
func TestNextDates(t *testing.T) {
	planned := control.Next{Hotpatch: control.At(time.Date(2026, 12, 8, 18, 0, 0, 0, time.UTC)), Baseline: control.At(time.Date(2027, 1, 12, 18, 0, 0, 0, time.UTC))}
	soon := calendarNoon.Add(48 * time.Hour)
	for name, c := range map[string]struct {
		kind  string
		at    *time.Time
		halt  bool
		edit  func(*control.Offer)
		early bool
	}{
		"at once":          {"hotpatch", nil, false, nil, false},
		"announced":        {"hotpatch", &soon, false, func(x *control.Offer) { x.Fits, x.ReasonCode = false, "not-before" }, true},
		"baseline":         {"baseline", &soon, false, func(x *control.Offer) { x.Fits, x.ReasonCode = false, "not-before" }, true},
		"halted":           {"hotpatch", &soon, true, func(x *control.Offer) { x.Fits, x.ReasonCode = false, "halted" }, false},
		"for others":       {"hotpatch", &soon, false, func(x *control.Offer) { x.Fits, x.ReasonCode = false, "arch" }, false},
		"in force already": {"hotpatch", &soon, false, nowInForce, false},
		"over":             {"hotpatch", &calendarNoon, false, nil, false},
	} {
		o := dated("A-11", c.kind, "2026-11", "", 1)
		o.Rollout.NotBefore, o.Rollout.Halt = c.at, c.halt
		offers := []repository.Offer{o}
		want := planned
		if c.early && c.kind == "hotpatch" {
			want.Hotpatch = control.At(soon)
		} else if c.early {
			want.Baseline = control.At(soon)
		}
		if got := next(offers, listing(offers, map[string]func(*control.Offer){"A-11": c.edit}), calendarNoon); got != want {
			t.Errorf("%s: %+v, wanted %+v", name, got, want)
		}
	}
}

// For Windows its own calendar is told by rule, and whose updates those are.
func TestDatesOfTheSystem(t *testing.T) {
	for os, hotpatches := range map[string]bool{"Windows 11": true, "Windows Server 2022": true, "Windows Server 2025": true, "Windows 10": false, "Windows Server 2019": false} {
		s := system(control.Device{OS: os, Build: "26100.7092"}, calendarNoon)
		if s == nil || s.Hotpatches != hotpatches || s.Next.Hotpatch.IsZero() == hotpatches || s.Next.Baseline.IsZero() == hotpatches {
			t.Errorf("%s: %+v", os, s)
			continue
		}
		if !strings.Contains(s.Text, "hotpatchd does not deliver Microsoft's updates") || hotpatches && !strings.Contains(s.Text, "planned dates") {
			t.Errorf("%s: %s", os, s.Text)
		}
	}
	for _, os := range []string{"Linux", ""} {
		if s := system(control.Device{OS: os}, calendarNoon); s != nil {
			t.Errorf("%q: %+v", os, s)
		}
	}
}

// Whatever a repository says: nine months in order, every release is in one of
// them or counted, and the next dates are ahead.
func TestDatesAreWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(rapid.Int64Range(1600000000, 1900000000).Draw(t, "now"), 0)
		var offers []repository.Offer
		for i := range rapid.IntRange(0, 12).Draw(t, "releases") {
			o := repository.Offer{ID: fmt.Sprint("R", i), Product: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "product"),
				Kind:      rapid.SampledFrom([]string{"hotpatch", "baseline"}).Draw(t, "kind"),
				Month:     rapid.SampledFrom([]string{"", "2020-01", "2026-11", "9999-12", "no month"}).Draw(t, "month"),
				Baseline:  rapid.SampledFrom([]string{"", "R0", "elsewhere"}).Draw(t, "baseline"),
				Published: time.Unix(rapid.Int64Range(-1, 1900000000).Draw(t, "published"), 0)}
			if rapid.Bool().Draw(t, "announced") {
				at := time.Unix(rapid.Int64Range(1600000000, 1900000000).Draw(t, "not before"), 0)
				o.Rollout.NotBefore = &at
			}
			offers = append(offers, o)
		}
		d := dates(offers, listing(offers, nil), control.Status{Eligible: rapid.Bool().Draw(t, "eligible")}, now)
		n := d.Earlier + d.Later
		for i, m := range d.Months {
			n += len(m.Releases)
			if i > 0 && m.Month <= d.Months[i-1].Month {
				t.Fatalf("%s after %s", m.Month, d.Months[i-1].Month)
			}
		}
		if n != len(offers) || len(d.Months) != monthsShown {
			t.Fatalf("%d of %d releases in %d months", n, len(offers), len(d.Months))
		}
		if !d.Next.Hotpatch.After(now) || !d.Next.Baseline.After(now) {
			t.Fatalf("at %s, next %+v", now, d.Next)
		}
		for _, p := range d.Products {
			if p.Text == "" || p.Kind == "nothing" != (p.Offered == "") {
				t.Fatalf("%+v", p)
			}
		}
	})
}
