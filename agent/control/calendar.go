package control

// FormatCalendar is the format name of a Calendar.
const FormatCalendar = "hotpatch-calendar/1"

// Calendar is the servicing rhythm around now: what is planned, what was
// released, and what comes next to this device.
type Calendar struct {
	Header
	Month    string            `json:"month"`   // this one, "2026-11"; months are those of UTC
	Kind     string            `json:"kind"`    // what it brings by plan: hotpatch or baseline
	Quarter  string            `json:"quarter"` // the month of this quarter's planned baseline
	Next     Next              `json:"next"`    // as in status
	Months   []CalendarMonth   `json:"months"`  // oldest first, without gaps
	Earlier  int               `json:"earlier"` // releases of months before the first
	Later    int               `json:"later"`   // releases of months after the last
	Products []CalendarProduct `json:"products"`
	System   *CalendarSystem   `json:"system"` // the operating system's own updates; null where it has no such calendar
}

// CalendarMonth is one month, as planned, and what was released for it.
type CalendarMonth struct {
	Month    string            `json:"month"`
	Kind     string            `json:"kind"`    // planned: hotpatch or baseline
	Planned  Time              `json:"planned"` // second Tuesday, 10:00 Pacific
	Releases []CalendarRelease `json:"releases"`
}

// CalendarRelease is one release of the repository, in order of publication.
type CalendarRelease struct {
	ID        string `json:"id"`
	Product   string `json:"product"`
	Kind      string `json:"kind"`
	Sequence  int64  `json:"sequence"`
	Title     string `json:"title"`
	Severity  string `json:"severity"`
	Published Time   `json:"published"`
	NotBefore Time   `json:"not_before"` // when its publisher lets devices take it; null: at once
	Unplanned bool   `json:"unplanned"`  // a baseline in the place of a hotpatch
	OutOfBand bool   `json:"out_of_band"`
	InForce   bool   `json:"in_force"`
	Held      bool   `json:"held"`
	Halted    bool   `json:"halted"`
}

// CalendarProduct is what one product brings this device by the rules of the calendar.
type CalendarProduct struct {
	Product  string `json:"product"`
	InForce  string `json:"in_force"` // id of the hotpatch, "" if none is
	Baseline string `json:"baseline"` // id of the one that took effect on this device, "" if none did
	OnTrack  bool   `json:"on_track"` // its hotpatches are for this device
	Offered  string `json:"offered"`  // id, "" if nothing is
	Kind     string `json:"kind"`     // of what is offered: hotpatch, baseline or nothing
	Restart  bool   `json:"restart"`  // it takes one
	Code     string `json:"code"`
	Text     string `json:"text"`
	Until    Time   `json:"until"` // off the track: the planned baseline that ends it; null if not known
	// Why what is offered does not come into force now, "" if it does.
	ReasonCode string `json:"reason_code"`
	Reason     string `json:"reason"`
	Next       Next   `json:"next"`
}

// CalendarSystem is the operating system's own calendar. Its dates are planned
// ones: what was really published, and whether it is for this device, only the
// system's own update service knows.
type CalendarSystem struct {
	Name       string `json:"name"`
	Build      string `json:"build"`
	Hotpatches bool   `json:"hotpatches"` // its maker has hotpatches for it
	Text       string `json:"text"`
	Next       Next   `json:"next"` // by rule; null where it has none
}

// strangersCalendar: the calendar is for everyone, but for who holds what and why.
func strangersCalendar(d *Calendar) *Calendar {
	out := &Calendar{Header: d.Header, Month: d.Month, Kind: d.Kind, Quarter: d.Quarter, Next: copyNext(d.Next), Earlier: d.Earlier, Later: d.Later}
	for _, m := range d.Months {
		row := CalendarMonth{Month: m.Month, Kind: m.Kind, Planned: m.Planned}
		for _, r := range m.Releases {
			row.Releases = append(row.Releases, CalendarRelease{ID: r.ID, Product: r.Product, Kind: r.Kind, Sequence: r.Sequence,
				Title: r.Title, Severity: r.Severity, Published: r.Published, NotBefore: r.NotBefore, Unplanned: r.Unplanned,
				OutOfBand: r.OutOfBand, InForce: r.InForce, Held: r.Held, Halted: r.Halted})
		}
		out.Months = append(out.Months, row)
	}
	for _, p := range d.Products {
		out.Products = append(out.Products, CalendarProduct{Product: p.Product, InForce: p.InForce, Baseline: p.Baseline, OnTrack: p.OnTrack,
			Offered: p.Offered, Kind: p.Kind, Restart: p.Restart, Code: p.Code, Text: scrub(p.Text), Until: p.Until,
			ReasonCode: p.ReasonCode, Reason: strangersReason(p.ReasonCode, p.Reason), Next: copyNext(p.Next)})
	}
	if s := d.System; s != nil {
		out.System = &CalendarSystem{Name: s.Name, Build: s.Build, Hotpatches: s.Hotpatches, Text: scrub(s.Text), Next: copyNext(s.Next)}
	}
	return out
}

func copyNext(n Next) Next { return Next{Hotpatch: n.Hotpatch, Baseline: n.Baseline} }
