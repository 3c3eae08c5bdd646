package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent/control"
)

// class is what became of one device. Each device is in exactly one.
type class string

// The classes, the ones to look at first.
const (
	notReporting class = "not-reporting" // targeted, and nothing new enough is heard of it
	fellBack     class = "restart"       // fell back to a restart: no hotpatch ends what is open
	incomplete   class = "incomplete"    // eligible, and something stays open that does not end by itself at once
	pending      class = "pending"       // eligible, work is under way
	notEligible  class = "not-eligible"
	hotpatched   class = "hotpatched" // all images run fixed code
	upToDate     class = "up-to-date" // eligible, and nothing applies to it
)

var classes = []class{notReporting, fellBack, incomplete, pending, notEligible, hotpatched, upToDate}

// eligible tells whether devices of this class count as eligible.
func (c class) eligible() bool { return c != notReporting && c != notEligible }

// ahead is how far a device's clock may be ahead of ours before its word on
// when it reported is not believed.
const ahead = 24 * time.Hour

// heard is what was collected of one device: its newest report.
type heard struct {
	id          string
	at          time.Time
	status      control.Status
	eligibility *control.Eligibility // nil: a status alone was collected
	dropped     uint64
}

// question is what a report over a fleet is asked.
type question struct {
	now     time.Time
	silent  time.Duration // without a report for so long: not reporting
	release string        // hotpatched means: by this release; "" = by any
	// targeted are the devices meant, id → name; nil: those that report.
	targeted map[string]string
}

// deviceRow is one device of the answer.
type deviceRow struct {
	ID       string       `json:"id"`
	Name     string       `json:"name"`
	Class    class        `json:"class"`
	State    string       `json:"state"` // as the device reports it
	Releases []string     `json:"releases"`
	Reported control.Time `json:"reported"` // null: never
	Why      string       `json:"why"`
}

// counted is a name and how many devices it goes for.
type counted struct {
	Product string `json:"product,omitempty"`
	ID      string `json:"id"`
	Devices int    `json:"devices"`
}

// fleetReport is the answer. Targeted = NotReporting + NotEligible + Eligible, and
// Eligible = Hotpatched + UpToDate + Pending + Incomplete + Restart.
type fleetReport struct {
	document
	Release      string `json:"release"` // that was asked for
	Targeted     int    `json:"targeted"`
	Inventory    bool   `json:"inventory"` // false: targeted are those that report, and who does not is not known
	NotReporting int    `json:"not_reporting"`
	NotEligible  int    `json:"not_eligible"`
	Eligible     int    `json:"eligible"`
	Hotpatched   int    `json:"hotpatched"`
	UpToDate     int    `json:"up_to_date"`
	Pending      int    `json:"pending"`
	Incomplete   int    `json:"incomplete"`
	Restart      int    `json:"restart"`
	RestartDue   int    `json:"restart_due"` // of the hotpatched and up to date: files are staged for a restart
	// Beside the targeted: devices that report and are not in the inventory.
	NotTargeted []string    `json:"not_targeted"`
	Releases    []counted   `json:"releases"`       // in force, by how many devices
	Checks      []counted   `json:"checks"`         // that stand in the way, of devices that are not eligible
	Dropped     uint64      `json:"dropped"`        // reports that devices could not deliver
	Damaged     []string    `json:"damaged"`        // what was collected and cannot be read
	Devices     []deviceRow `json:"devices"`        // worst first
	Images      int         `json:"images"`         // that a release names, on devices that report
	Patched     int         `json:"patched_images"` // of them: patched in memory, or fixed on disk
}

// weigh makes the answer of what was heard.
func weigh(q question, all map[string]*heard) fleetReport {
	r := fleetReport{Release: q.release, Inventory: q.targeted != nil, NotTargeted: []string{}, Releases: []counted{}, Checks: []counted{}, Damaged: []string{}, Devices: []deviceRow{}}
	targeted := q.targeted
	if targeted == nil {
		targeted = map[string]string{}
		for id := range all {
			targeted[id] = ""
		}
	}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if _, ok := targeted[id]; !ok {
			r.NotTargeted = append(r.NotTargeted, id)
		}
	}
	counts, releases, checks := map[class]int{}, map[[2]string]int{}, map[string]int{}
	for _, id := range slices.Sorted(maps.Keys(targeted)) {
		h := all[id]
		row := deviceRow{ID: id, Name: targeted[id], Releases: []string{}}
		row.Class, row.Why = classOf(q, h)
		if h != nil {
			row.Name = cmp.Or(row.Name, h.status.Device.Name)
			row.State, row.Reported = string(h.status.State), control.At(h.at)
			r.Dropped += h.dropped
		}
		if h != nil && row.Class != notReporting {
			for _, x := range h.status.Releases {
				row.Releases = append(row.Releases, x.ID)
				releases[[2]string{x.Product, x.ID}]++
			}
			r.Images += h.status.Coverage.Images
			r.Patched += h.status.Coverage.Patched + h.status.Coverage.Fixed
		}
		if row.Class == notEligible {
			for _, check := range h.status.Fails {
				checks[check]++
			}
		}
		if (row.Class == hotpatched || row.Class == upToDate) && restartDue(&h.status) {
			row.Why = "a restart is due"
			r.RestartDue++
		}
		counts[row.Class]++
		r.Devices = append(r.Devices, row)
	}
	for c, n := range counts {
		r.Targeted += n
		if c.eligible() {
			r.Eligible += n
		}
	}
	r.NotReporting, r.NotEligible, r.Hotpatched, r.UpToDate = counts[notReporting], counts[notEligible], counts[hotpatched], counts[upToDate]
	r.Pending, r.Incomplete, r.Restart = counts[pending], counts[incomplete], counts[fellBack]
	for k, n := range releases {
		r.Releases = append(r.Releases, counted{k[0], k[1], n})
	}
	for k, n := range checks {
		r.Checks = append(r.Checks, counted{"", k, n})
	}
	most := func(x, y counted) int {
		return cmp.Or(cmp.Compare(y.Devices, x.Devices), cmp.Compare(x.Product, y.Product), cmp.Compare(x.ID, y.ID))
	}
	slices.SortFunc(r.Releases, most)
	slices.SortFunc(r.Checks, most)
	slices.SortStableFunc(r.Devices, func(x, y deviceRow) int {
		return cmp.Compare(slices.Index(classes, x.Class), slices.Index(classes, y.Class))
	})
	return r
}

// classOf tells one device's class, and why it is not well. h is nil for a
// device that was never heard of.
func classOf(q question, h *heard) (class, string) {
	switch {
	case h == nil:
		return notReporting, "never heard of"
	case h.at.After(q.now.Add(ahead)):
		return notReporting, "its report is from " + day(h.at) + ", ahead of this clock"
	case q.now.Sub(h.at) > q.silent:
		return notReporting, "last heard of " + day(h.at)
	}
	s := &h.status
	state := s.State
	if state == control.RestartRequired && restartDue(s) { // files wait for it, code does not
		state = control.UpToDate
		if s.Coverage.Images > 0 {
			state = control.Hotpatched
		}
	}
	switch {
	case state == control.RestartRequired || s.State == control.BaselineRequired:
		return fellBack, firstOf(h, string(s.State))
	case !s.Eligible || s.State == control.Ineligible:
		return notEligible, openCheck(h)
	case s.State == control.Pending:
		return pending, ""
	case state == control.UpToDate:
		return upToDate, ""
	case state != control.Hotpatched:
		return incomplete, firstOf(h, string(s.State))
	case q.release != "" && !slices.ContainsFunc(s.Releases, func(x control.ActiveRelease) bool { return x.ID == q.release }):
		return incomplete, "hotpatched, but not by " + q.release
	}
	return hotpatched, ""
}

// restartDue tells whether a restart is all that a device is left to do: no image is open on it.
func restartDue(s *control.Status) bool {
	return s.RestartRequired && s.Coverage.Open() == 0 && s.Unseen == 0
}

// firstOf is the first thing that the device wants a person to know.
func firstOf(h *heard, otherwise string) string {
	for _, a := range h.status.Attention {
		if a.Severity != control.SeverityInfo {
			return a.Text
		}
	}
	return otherwise
}

// openCheck names what stands in the way of eligibility.
func openCheck(h *heard) string {
	var out []string
	for _, id := range h.status.Fails {
		text := id
		if h.eligibility != nil {
			for _, c := range h.eligibility.Checks {
				if c.ID == id && c.Found != "" {
					text = fmt.Sprintf("%s: %s", id, c.Found)
				}
			}
		}
		out = append(out, text)
	}
	return strings.Join(out, "; ")
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04") }
