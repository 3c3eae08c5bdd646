package main

import (
	"time"

	"hotpatchd/agent/control"
)

// calendarDoc is the calendar of a device in a hotpatch month, of one product
// that keeps up and one that is off the track.
func calendarDoc() *control.Calendar {
	on := func(y int, m time.Month, d int) control.Time {
		return control.At(time.Date(y, m, d, 18, 0, 0, 0, time.UTC))
	}
	month := func(m, kind string, planned control.Time, r ...control.CalendarRelease) control.CalendarMonth {
		return control.CalendarMonth{Month: m, Kind: kind, Planned: planned, Releases: r}
	}
	acme := func(id, kind string) control.CalendarRelease {
		return control.CalendarRelease{ID: id, Product: "acme-server", Kind: kind}
	}
	inForce, halted, extra := acme("ACME-2026-11b", "hotpatch"), acme("ACME-2026-09", "hotpatch"), acme("ACME-2026-08", "baseline")
	inForce.InForce, inForce.OutOfBand, halted.Halted, extra.Unplanned = true, true, true, true
	soon := acme("ACME-2026-12", "hotpatch")
	soon.NotBefore = on(2026, 12, 4)
	next := control.Next{Hotpatch: on(2026, 12, 4), Baseline: on(2027, 1, 12)}
	return &control.Calendar{Header: header(control.FormatCalendar), Month: "2026-11", Kind: "hotpatch", Quarter: "2026-10", Next: next, Earlier: 2,
		Months: []control.CalendarMonth{
			month("2026-07", "baseline", on(2026, 7, 14), acme("ACME-2026-07", "baseline")),
			month("2026-08", "hotpatch", on(2026, 8, 11), extra),
			month("2026-09", "hotpatch", on(2026, 9, 8), halted),
			month("2026-10", "baseline", on(2026, 10, 13), acme("ACME-2026-10", "baseline")),
			month("2026-11", "hotpatch", on(2026, 11, 10), acme("ACME-2026-11", "hotpatch"), inForce),
			month("2026-12", "hotpatch", on(2026, 12, 8), soon),
			month("2027-01", "baseline", on(2027, 1, 12)),
			month("2027-02", "hotpatch", on(2027, 2, 9)),
			month("2027-03", "hotpatch", on(2027, 3, 9)),
		},
		Products: []control.CalendarProduct{
			{Product: "acme-server", InForce: "ACME-2026-11b", Baseline: "ACME-2026-10", OnTrack: true, Kind: "nothing", Code: "current",
				Text: "this device has ACME-2026-11b, the out-of-band hotpatch of 2026-11, and nothing newer is out for it"},
			{Product: "late", InForce: "LATE-2026-11", Baseline: "LATE-2026-10", Kind: "nothing", Code: "off-track", Until: on(2027, 1, 12),
				Text: "this device has LATE-X, the out-of-band baseline of 2026-11, on which no hotpatch builds, and gets none before the next baseline; it has the newest"},
			{Product: "next", Kind: "baseline", Offered: "NEXT-2026-10", Restart: true, Code: "baseline", ReasonCode: "staged", Reason: "it is staged: it takes effect at the next restart of the device",
				Text: "NEXT-2026-10, the baseline of 2026-10, with a restart: this device gets no hotpatches without it"},
			{Product: "other", Kind: "baseline", Offered: "OTHER-10", Restart: true, Code: "baseline", ReasonCode: "held", Reason: "held by alice",
				Text: "OTHER-10, the baseline of 2026-10, with a restart: this device gets no hotpatches without it"},
		},
		System: &control.CalendarSystem{Name: "Windows 11", Build: "26100.7092", Hotpatches: true, Next: control.Next{Hotpatch: on(2026, 12, 8), Baseline: on(2027, 1, 12)},
			Text: "Microsoft's own updates: 2026-11 brings a hotpatch, for devices on the baseline of 2026-10. These are planned dates; unplanned baselines and out-of-band updates are not known here. hotpatchd does not deliver Microsoft's updates; Windows Update does, if this device is enrolled there"}}
}

// emptyCalendar is that of a baseline month before its day, with nothing from anybody.
func emptyCalendar() *control.Calendar {
	d := calendarDoc()
	d.Month, d.Kind, d.Quarter, d.Earlier, d.Products, d.System = "2027-01", "baseline", "2027-01", 0, nil, nil
	d.Generated = control.At(time.Date(2027, 1, 11, 23, 0, 0, 0, time.UTC))
	d.Next = control.Next{Hotpatch: control.At(time.Date(2027, 2, 9, 18, 0, 0, 0, time.UTC)), Baseline: d.Months[6].Planned}
	for i := range d.Months {
		d.Months[i].Releases = nil
	}
	return d
}
