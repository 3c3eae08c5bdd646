package control

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

func reportStatus() *Status {
	return &Status{State: Incomplete, Eligible: true, Coverage: Coverage{Processes: 3, Images: 4, Patched: 3, Busy: 1},
		Releases: []ActiveRelease{{Product: "p", ID: "R-1"}}, Scanned: At(testNow),
		Holds: []Hold{{ID: "R-2", By: "bob", Reason: "bob's word", Product: "p"}},
		Attention: []Attention{{Code: "torn", Text: "secret.exe 12", Scope: Scope{OfUser: true, UID: 0}},
			{Code: "nobody", Text: "secret", Scope: Scope{OfUser: true, UID: -1}},
			{Code: "policy", Text: "at 7ffb2a3c149b", Scope: Scope{Public: true}}},
		Repository: Repository{URL: "https://bob:secret@patches.example.com/a"}, Device: Device{ID: "d1"}}
}

// A report leaves the device: what only some may read must not be in it,
// whoever asks for it.
func TestReportTellsNoSecrets(t *testing.T) {
	e := &Eligibility{Eligible: true, Checks: []Check{{ID: "os", Result: Pass, Found: "cc cc cc cc"}}}
	r := NewReport(reportStatus(), e)
	r.Dropped = 7
	b, err := r.Encode("1.2", testNow)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"bob", "secret", "7ffb2a3c149b", "cc cc"} {
		if strings.Contains(string(b), secret) {
			t.Errorf("%q in %s", secret, b)
		}
	}
	var got Report
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if got.Format != FormatReport || got.Status.Format != FormatStatus || got.Eligibility.Format != FormatEligibility || !got.Generated.Equal(testNow) ||
		got.Status.Version != "1.2" || got.Status.Device.ID != "d1" || got.Dropped != 7 || len(got.Eligibility.Checks) != 1 || len(got.Status.Attention) != 1 {
		t.Errorf("%s", b)
	}
	if strings.Count(string(b), "\n") != 1 {
		t.Errorf("not one line: %q", b)
	}
}

// The key changes with what a person would act on, and not with counts and times.
func TestReportKey(t *testing.T) {
	key := func(change func(*Status, *Eligibility)) string {
		s, e := reportStatus(), &Eligibility{Eligible: true, Checks: []Check{{ID: "os", Result: Pass}}}
		if change != nil {
			change(s, e)
		}
		return NewReport(s, e).Key()
	}
	same := key(nil)
	for name, change := range map[string]func(*Status, *Eligibility){
		"one more patched": func(s *Status, _ *Eligibility) { s.Coverage.Patched++; s.Coverage.Images++ },
		"later": func(s *Status, _ *Eligibility) {
			s.Scanned = At(testNow.Add(time.Hour))
			s.Repository.LastCheck = s.Scanned
		},
		"words": func(s *Status, _ *Eligibility) { s.Attention[2].Text = "other" },
	} {
		if key(change) != same {
			t.Errorf("%s changes the key", name)
		}
	}
	for name, change := range map[string]func(*Status, *Eligibility){
		"state":      func(s *Status, _ *Eligibility) { s.State = Hotpatched },
		"none busy":  func(s *Status, _ *Eligibility) { s.Coverage.Busy = 0 },
		"release":    func(s *Status, _ *Eligibility) { s.Releases[0].ID = "R-2" },
		"hold":       func(s *Status, _ *Eligibility) { s.Holds = nil },
		"attention":  func(s *Status, _ *Eligibility) { s.Attention[2].Code = "scan" },
		"repository": func(s *Status, _ *Eligibility) { s.Repository.Error = &RepositoryError{Code: "tls"} },
		"check":      func(_ *Status, e *Eligibility) { e.Checks[0].Result = Fail },
		"waived":     func(_ *Status, e *Eligibility) { e.Checks[0].Waived = true },
		"paused":     func(s *Status, _ *Eligibility) { s.Paused = true },
		"restart":    func(s *Status, _ *Eligibility) { s.RestartRequired = true },
		"baseline":   func(s *Status, _ *Eligibility) { s.Baseline.ID = "B" },
	} {
		if key(change) == same {
			t.Errorf("%s does not change the key", name)
		}
	}
}
