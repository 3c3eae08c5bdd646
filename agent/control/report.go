package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math"
	"slices"
	"time"
)

// FormatReport is the format name of a Report.
const FormatReport = "hotpatch-report/1"

// Report is what a device tells a fleet: the status and the eligibility checks
// as every local user may read them. It has no memory addresses, no bytes, and
// no names of users or processes.
type Report struct {
	Header
	Status      Status      `json:"status"`
	Eligibility Eligibility `json:"eligibility"`
	// Dropped counts reports of this device that were never delivered.
	Dropped uint64 `json:"dropped,omitempty"`
}

// stranger may read what everybody may, and owns no process.
var stranger = Caller{UID: math.MinInt, GID: -1}

// NewReport makes a report. Whatever is not for everybody stays behind.
func NewReport(s *Status, e *Eligibility) *Report {
	return &Report{Status: *strangersStatus(stranger, s), Eligibility: *strangersEligibility(e)}
}

// Encode makes the bytes of a report: one line.
func (r *Report) Encode(version string, now time.Time) ([]byte, error) {
	out := *r
	for header, format := range map[*Header]string{&out.Status.Header: FormatStatus, &out.Eligibility.Header: FormatEligibility} {
		*header = Header{Format: format, Generated: At(now), Version: version}
	}
	out.Header = Header{Generated: At(now), Version: version}
	return encode(&out, version, now)
}

// Key is the same for reports that tell a person the same: it leaves out times,
// and how many images and processes there are of a kind.
func (r *Report) Key() string {
	s := &r.Status
	type word struct{ A, B, C string }
	var words []word
	add := func(a, b, c string) { words = append(words, word{a, b, c}) }
	add("state", string(s.State), "")
	for _, x := range s.Releases {
		add("release", x.Product, x.ID)
	}
	for _, x := range s.Holds {
		add("hold", x.Product, x.ID)
	}
	for _, x := range s.Attention {
		add("attention", x.Code, x.Product)
	}
	for _, c := range r.Eligibility.Checks {
		if c.Waived {
			add("waived", c.ID, string(c.Result))
		} else {
			add("check", c.ID, string(c.Result))
		}
	}
	for _, x := range ImageStates {
		if s.Coverage.Count(x) > 0 {
			add("some", string(x), "")
		}
	}
	if e := s.Repository.Error; e != nil {
		add("repository", e.Code, "")
	}
	add("baseline", s.Baseline.ID, "")
	add("mode", s.Mode, s.PausedBy)
	for name, is := range map[string]bool{"eligible": s.Eligible, "restart": s.RestartRequired, "paused": s.Paused, "unseen": s.Unseen > 0, "scanned": !s.Scanned.IsZero()} {
		if is {
			add(name, "", "")
		}
	}
	slices.SortFunc(words, func(x, y word) int { return slices.Compare([]string{x.A, x.B, x.C}, []string{y.A, y.B, y.C}) })
	b, err := json.Marshal(slices.Compact(words))
	if err != nil {
		return "" // texts only: cannot fail
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (c *call) fleetReport() (any, error) {
	s, err := c.cfg.Service.Status(c.ctx, c.caller)
	if err != nil {
		return nil, err
	}
	e, err := c.cfg.Service.Eligibility(c.ctx, c.caller)
	if err != nil {
		return nil, err
	}
	r := NewReport(s, e)
	r.Status.Format, r.Eligibility.Format = FormatStatus, FormatEligibility
	return r, nil
}

// Report asks for what the device tells a fleet.
func (c *Client) Report(ctx context.Context) (*Report, error) {
	return ask[Report](ctx, c, "/v1/report", nil, askWait)
}
