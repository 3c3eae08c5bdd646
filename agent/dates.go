package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/calendar"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
)

// A calendar shows the quarter before this one to the end of the next.
const (
	monthsBefore = 3
	monthsShown  = 9
)

// Calendar tells what is planned, what was released, and what comes next. It
// is worked out when it is asked for: what comes next changes with the hour,
// also while nothing happens.
func (a *Agent) Calendar(context.Context, control.Caller) (*control.Calendar, error) {
	s := a.shown.Load()
	doc := dates(s.announced, s.offers, s.status, a.o.Now())
	return &doc, nil
}

// next are the next dates of this device. A release that is announced, and
// waits for its publisher's hour, comes before what is only planned.
func next(announced []repository.Offer, shown control.Offers, now time.Time) control.Next {
	var n control.Next
	for kind, to := range map[calendar.Kind]*control.Time{calendar.Hotpatch: &n.Hotpatch, calendar.Baseline: &n.Baseline} {
		*to = control.At(calendar.Next(kind, now))
		for _, o := range announced {
			if due, ok := comes(o, shown, kind, now); ok && due.Before(to.Time) {
				*to = control.At(due)
			}
		}
	}
	return n
}

// comes tells when an announced release of a kind becomes this device's.
func comes(o repository.Offer, shown control.Offers, kind calendar.Kind, now time.Time) (time.Time, bool) {
	if o.Kind != string(kind) || o.Rollout.NotBefore == nil || !o.Rollout.NotBefore.After(now) {
		return time.Time{}, false
	}
	// Everything but its hour lets it come here: it is not halted, not held, not for others.
	mine := slices.ContainsFunc(shown.Releases, func(x control.Offer) bool {
		return x.ID == o.ID && !x.InForce && (x.Fits || x.ReasonCode == "not-before")
	})
	return *o.Rollout.NotBefore, mine
}

// dates makes the calendar of a device at an instant. It is pure.
func dates(offers []repository.Offer, shown control.Offers, st control.Status, now time.Time) control.Calendar {
	this := calendar.MonthOf(now)
	doc := control.Calendar{Header: control.Header{Generated: control.At(now)},
		Month: this.String(), Kind: string(this.Planned()), Quarter: this.Quarter().String(), Next: next(offers, shown, now),
		Months: []control.CalendarMonth{}, Products: []control.CalendarProduct{}, System: system(st.Device, now)}
	first := this.Quarter().Add(-monthsBefore)
	for i := range monthsShown {
		m := first.Add(i)
		doc.Months = append(doc.Months, control.CalendarMonth{Month: m.String(), Kind: string(m.Planned()),
			Planned: control.At(m.Release()), Releases: []control.CalendarRelease{}})
	}
	lines := map[string][]repository.Offer{}
	sorted := slices.Clone(offers)
	slices.SortStableFunc(sorted, func(x, y repository.Offer) int {
		return cmp.Or(cmp.Compare(x.Product, y.Product), x.Published.Compare(y.Published), cmp.Compare(x.Sequence, y.Sequence))
	})
	for _, o := range sorted {
		lines[o.Product] = append(lines[o.Product], o)
	}
	var products []string
	for p := range lines {
		products = append(products, p)
	}
	slices.Sort(products)
	for _, p := range products {
		doc.Products = append(doc.Products, product(p, lines[p], shown, st, now))
		updates := updatesOf(lines[p])
		for i, o := range lines[p] {
			switch n := updates[i].Month.Compare(first); {
			case n < 0:
				doc.Earlier++
			case n >= monthsShown:
				doc.Later++
			default:
				doc.Months[n].Releases = append(doc.Months[n].Releases, released(o, updates[i], shown))
			}
		}
	}
	return doc
}

// updatesOf puts a product's releases, oldest first, in the calendar's words.
// A release without a month belongs to the one it was published in. Of several
// hotpatches of one month, those after the first are out of band.
func updatesOf(line []repository.Offer) []calendar.Update {
	out := make([]calendar.Update, len(line))
	seen := map[calendar.Month]bool{}
	for i, o := range line {
		u := calendar.Update{ID: o.ID, Kind: calendar.Kind(o.Kind), Date: o.Published, Baseline: o.Baseline}
		m, err := calendar.ParseMonth(o.Month)
		if err != nil {
			m = calendar.MonthOf(o.Published)
		}
		u.Month = m
		if o.Kind == release.KindHotpatch {
			u.Free = o.Baseline == ""
			u.OutOfBand = seen[m]
			seen[m] = true
		}
		if at := o.Rollout.NotBefore; at != nil && at.After(u.Date) {
			u.Date = *at
		}
		out[i] = u
	}
	return out
}

// shownOffer is what the list says of a release, zero if it does not list it.
func shownOffer(shown control.Offers, id string) control.Offer {
	for _, x := range shown.Releases {
		if x.ID == id {
			return x
		}
	}
	return control.Offer{}
}

func released(o repository.Offer, u calendar.Update, shown control.Offers) control.CalendarRelease {
	x := shownOffer(shown, o.ID)
	r := control.CalendarRelease{ID: o.ID, Product: o.Product, Kind: o.Kind, Sequence: int64(o.Sequence), Title: o.Title, Severity: o.Severity,
		Published: control.At(o.Published), OutOfBand: u.OutOfBand, InForce: x.InForce, Held: x.Held, Halted: o.Rollout.Halt,
		Unplanned: u.Kind == calendar.Baseline && u.Month.Planned() != calendar.Baseline}
	if at := o.Rollout.NotBefore; at != nil {
		r.NotBefore = control.At(*at)
	}
	return r
}

// product is what the rules of the calendar bring this device of one product,
// and what of that does not come into force now.
func product(name string, line []repository.Offer, shown control.Offers, st control.Status, now time.Time) control.CalendarProduct {
	p := control.CalendarProduct{Product: name}
	d := calendar.Device{Enrolled: st.Eligible}
	var mine []repository.Offer // those for this device's system and processor, and not halted
	for _, o := range line {
		x := shownOffer(shown, o.ID)
		if x.ReasonCode == "os" || x.ReasonCode == "arch" || o.Rollout.Halt && !x.InForce {
			continue
		}
		mine = append(mine, o)
		if x.InForce {
			d.ID = o.ID // the newest: a hotpatch is in force besides the baseline it builds on
			if o.Kind == release.KindBaseline {
				p.Baseline = o.ID
			} else {
				p.InForce = o.ID
			}
		}
	}
	track := calendar.NewTrack(name, updatesOf(mine))
	got := calendar.Offered(track, d, now)
	p.OnTrack, p.Kind, p.Offered, p.Restart = got.OnTrack, string(got.Kind), got.Update.ID, got.Restart
	p.Code, p.Text, p.Until = string(got.Code), got.Text, control.At(got.Until)
	if x := shownOffer(shown, p.Offered); p.Offered != "" {
		p.ReasonCode, p.Reason = x.ReasonCode, x.Reason
	}
	p.Next = control.Next{Hotpatch: control.At(track.Next(calendar.Hotpatch, now)), Baseline: control.At(track.Next(calendar.Baseline, now))}
	return p
}

// system is the calendar of the operating system's own updates, by rule.
func system(d control.Device, now time.Time) *control.CalendarSystem {
	if !strings.HasPrefix(d.OS, "Windows") {
		return nil
	}
	s := &control.CalendarSystem{Name: d.OS, Build: d.Build}
	const notOurs = "hotpatchd does not deliver Microsoft's updates; Windows Update does, if this device is enrolled there"
	switch d.OS {
	case eligibility.Windows11, eligibility.Server2022, eligibility.Server2025:
	default:
		s.Text = fmt.Sprintf("Microsoft has no hotpatches for %s: it gets a cumulative update with a restart each month. %s", d.OS, notOurs)
		return s
	}
	this := calendar.MonthOf(now)
	what := "a hotpatch, for devices on the baseline of " + this.Quarter().String()
	if this.Planned() == calendar.Baseline {
		what = "a baseline, with a restart"
	}
	s.Hotpatches = true
	s.Next = control.Next{Hotpatch: control.At(calendar.Next(calendar.Hotpatch, now)), Baseline: control.At(calendar.Next(calendar.Baseline, now))}
	s.Text = fmt.Sprintf("Microsoft's own updates: %s brings %s. These are planned dates; unplanned baselines and out-of-band updates are not known here. %s", this, what, notOurs)
	return s
}
