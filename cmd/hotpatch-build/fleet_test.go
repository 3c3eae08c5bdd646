package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/control"
)

// told writes one device's report to a folder and returns it.
func told(t *testing.T, dir, id string, at time.Time, change func(*control.Status)) {
	t.Helper()
	s := &control.Status{Eligible: true, State: control.Hotpatched, Device: control.Device{ID: id, Name: "host-" + id, OS: "Linux"},
		Releases: []control.ActiveRelease{{Product: "demo", ID: "R2"}}, Coverage: control.Coverage{Processes: 1, Images: 2, Patched: 2}}
	e := &control.Eligibility{Eligible: true, Checks: []control.Check{{ID: "vbs", Result: control.Fail, Found: "off"}}}
	if change != nil {
		change(s)
	}
	b, err := control.NewReport(s, e).Encode("1.2", at)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s-%d.json", id, at.Unix())), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fleetOf is one device of each kind, and the inventory of it.
func fleetOf(t *testing.T) (dir, inventory string) {
	t.Helper()
	dir = t.TempDir()
	now := time.Now()
	public := control.Scope{Public: true}
	told(t, dir, "good", now, nil)
	told(t, dir, "idle", now, func(s *control.Status) { s.State, s.Releases, s.Coverage = control.UpToDate, nil, control.Coverage{} })
	told(t, dir, "older", now, func(s *control.Status) { s.Releases[0].ID = "R1" })
	told(t, dir, "working", now, func(s *control.Status) { s.State = control.Pending })
	told(t, dir, "busy", now, func(s *control.Status) {
		s.State, s.Coverage = control.Incomplete, control.Coverage{Processes: 1, Images: 2, Patched: 1, Busy: 1}
		s.Attention = []control.Attention{{Code: "report", Severity: control.SeverityInfo, Text: "no", Scope: public}, {Code: "busy", Severity: control.SeverityWarning, Text: "1 image in 1 process is busy", Scope: public}}
	})
	told(t, dir, "held", now, func(s *control.Status) { s.State = control.Held })
	told(t, dir, "lost", now, func(s *control.Status) { s.State = control.Unknown })
	told(t, dir, "restart", now, func(s *control.Status) { s.State = control.RestartRequired })
	told(t, dir, "staged", now, func(s *control.Status) { s.RestartRequired = true }) // a restart brings it to the disk, too
	told(t, dir, "due", now, func(s *control.Status) {                                // all images are fixed, and a baseline waits for the restart
		s.State, s.RestartRequired = control.RestartRequired, true
	})
	told(t, dir, "falls", now, func(s *control.Status) { // as before, and an image is open
		s.State, s.RestartRequired = control.RestartRequired, true
		s.Coverage = control.Coverage{Processes: 1, Images: 2, Patched: 1, Unpatched: 1}
	})
	told(t, dir, "behind", now, func(s *control.Status) { s.State = control.BaselineRequired })
	told(t, dir, "home", now, func(s *control.Status) {
		s.State, s.Eligible, s.Fails = control.Ineligible, false, []string{"vbs", "edition"}
	})
	told(t, dir, "silent", now.Add(-73*time.Hour), nil)
	told(t, dir, "future", now.Add(48*time.Hour), nil)
	told(t, dir, "stranger", now, nil)
	// What was before does not count, in whatever order it is read.
	told(t, dir, "good", now.Add(-time.Hour), func(s *control.Status) { s.State = control.Incomplete })
	told(t, dir, "held", now.Add(-time.Hour), nil)
	inventory = filepath.Join(t.TempDir(), "inventory.txt")
	text := "# the fleet\ngood the good one\nidle\nolder\nworking\nbusy\tin the office # often\nheld\n\nlost\nrestart\nstaged\ndue\nfalls\nbehind\nhome\nsilent\nfuture\nnever  a desk\n"
	if err := os.WriteFile(inventory, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, inventory
}

func fleetJSON(t *testing.T, args ...string) (r fleetReport, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(append([]string{"fleet", "--json"}, args...), &out, &errOut)
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v: %s %s", err, out.String(), errOut.String())
	}
	return r, code
}

// Every device is told apart by what an administrator has to do about it.
func TestFleetTellsDevicesApart(t *testing.T) {
	dir, inventory := fleetOf(t)
	r, code := fleetJSON(t, "--inventory", inventory, dir)
	if code != int(exitIncomplete) || r.Format != "hotpatch-fleet/1" {
		t.Errorf("exit %d, %s", code, r.Format)
	}
	want := map[string]class{"good": hotpatched, "older": hotpatched, "idle": upToDate, "working": pending, "busy": incomplete, "held": incomplete, "lost": incomplete,
		"restart": fellBack, "staged": hotpatched, "due": hotpatched, "falls": fellBack, "behind": fellBack, "home": notEligible, "silent": notReporting, "future": notReporting, "never": notReporting}
	got := map[string]deviceRow{}
	for _, d := range r.Devices {
		got[d.ID] = d
		if d.Class != want[d.ID] {
			t.Errorf("%s is %s, want %s", d.ID, d.Class, want[d.ID])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d devices", len(got))
	}
	if r.Targeted != 16 || r.NotReporting != 3 || r.NotEligible != 1 || r.Eligible != 12 || r.Hotpatched != 4 || r.UpToDate != 1 || r.Pending != 1 || r.Incomplete != 3 || r.Restart != 3 || r.RestartDue != 2 {
		t.Errorf("%+v", r)
	}
	if strings.Join(r.NotTargeted, ",") != "stranger" {
		t.Errorf("%v", r.NotTargeted)
	}
	for id, why := range map[string]string{"busy": "1 image in 1 process is busy", "home": "vbs: off; edition", "never": "never heard of", "future": "ahead of this clock", "silent": "last heard of", "held": "held"} {
		if !strings.Contains(got[id].Why, why) {
			t.Errorf("%s: %q", id, got[id].Why)
		}
	}
	if got["good"].Name != "the good one" || got["busy"].Name != "in the office" || got["idle"].Name != "host-idle" || got["never"].Name != "a desk" {
		t.Errorf("%+v", got)
	}
	if r.Devices[0].Class != notReporting || r.Devices[len(r.Devices)-1].Class != upToDate {
		t.Errorf("not the worst first: %+v", r.Devices)
	}
	// By one release: another one in force is not that.
	r, _ = fleetJSON(t, "--inventory", inventory, "--release", "R2", dir)
	if r.Hotpatched != 3 || r.Incomplete != 4 {
		t.Errorf("%+v", r)
	}
	// Without an inventory nobody is missed.
	r, _ = fleetJSON(t, dir)
	if r.Targeted != 16 || r.NotReporting != 2 || r.Inventory || len(r.NotTargeted) != 0 {
		t.Errorf("%+v", r)
	}
}

func TestFleetScreen(t *testing.T) {
	dir, inventory := fleetOf(t)
	var out, errOut bytes.Buffer
	if code := run([]string{"fleet", "--inventory", inventory, dir}, &out, &errOut); code != 4 || errOut.Len() != 0 {
		t.Errorf("%d, %s", code, errOut.String())
	}
	text := out.String()
	for _, want := range []string{"FLEET   5 of 16 targeted devices are well\n", "restart due", "not for 3 days", "vbs 1", "R2", "busy ", "1 image in 1 process is busy", "never heard of", "stranger"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for _, row := range strings.Split(text, "\n") {
		if f := strings.Fields(row); len(f) == 2 && f[0] == "hotpatched" && f[1] != "4" {
			t.Errorf("%q", row)
		}
	}
	if strings.Contains(text, "\ngood") {
		t.Errorf("a device that is well is listed without --all:\n%s", text)
	}
}

func TestFleetExitCodes(t *testing.T) {
	now := time.Now()
	for want, change := range map[int]func(*control.Status){0: nil, 3: func(s *control.Status) { s.State, s.Eligible = control.Ineligible, false },
		4: func(s *control.Status) { s.State = control.Incomplete }} {
		dir := t.TempDir()
		told(t, dir, "a", now, nil)
		told(t, dir, "b", now, change)
		if _, code := fleetJSON(t, dir); code != want {
			t.Errorf("exit %d, want %d", code, want)
		}
		if want == 0 { // all is well, but for what nobody has
			var out, errOut bytes.Buffer
			if code := run([]string{"fleet", "--release", "NOPE", dir}, &out, &errOut); code != 4 || !strings.Contains(out.String(), "NOPE is in force on no device that reports") {
				t.Errorf("exit %d\n%s%s", code, out.String(), errOut.String())
			}
		}
	}
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for want, args := range map[string][]string{
		"1 nothing could be read":           {write("junk.json", "junk")},
		"4 no report was found in":          {t.TempDir()},
		"1 no such file":                    {filepath.Join(dir, "none")},
		"1 twice.txt:2: a stands there":     {"--inventory", write("twice.txt", "a\na\n"), dir},
		"1 empty.txt names no device":       {"--inventory", write("empty.txt", "# nothing\n"), dir},
		"2 requires at least 1 arg":         {},
		"2 --silent must be more than":      {"--silent", "0s", dir},
		"1 hotpatch-list/1\", not hotpatch": {write("list.json", `{"format":"hotpatch-list/1"}`)},
	} {
		var out, errOut bytes.Buffer
		code := run(append([]string{"fleet"}, args...), &out, &errOut)
		number, text, _ := strings.Cut(want, " ")
		if fmt.Sprint(code) != number || !strings.Contains(errOut.String(), text) {
			t.Errorf("%v: %d, %s", args, code, errOut.String())
		}
	}
}

// Reports come from machines that may lie: what is wrong is said and passed
// over, and no terminal obeys it.
func TestFleetHostileReports(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	told(t, dir, "good", now, nil)
	evil := "\x1b[2J\x07evil\nrow"
	told(t, dir, "evil", now, func(s *control.Status) {
		s.State, s.Device.Name = control.State(evil), evil
		s.Attention = []control.Attention{{Severity: control.SeverityError, Text: evil + strings.Repeat("x", 5000), Scope: control.Scope{Public: true}}}
		s.Releases = []control.ActiveRelease{{Product: evil, ID: evil}}
	})
	var lines strings.Builder
	for i := range 300 {
		fmt.Fprintf(&lines, "{\"format\":\"hotpatch-report/1\",\"n\":%d}\n", i)
	}
	for name, text := range map[string]string{"no-device.json": lines.String(), "number.json": "7", "half.json": `{"format":"hotpatch-report/1","status":`,
		"long.json": `{"format":"hotpatch-status/1","generated":"2026-11-01T00:00:00Z","device":{"id":"` + strings.Repeat("x", 100) + `"}}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out, errOut bytes.Buffer
	run([]string{"fleet", "--all", dir}, &out, &errOut)
	if all := out.String() + errOut.String(); strings.ContainsAny(all, "\x1b\x07") || strings.Contains(all, "\nrow") || len(all) > 50000 {
		t.Errorf("%q", all)
	}
	if !strings.Contains(out.String(), "FLEET   1 of 2 devices") || strings.Count(errOut.String(), "warning:") != maxDamaged+1 {
		t.Errorf("%s\n%d warnings", out.String(), strings.Count(errOut.String(), "warning:"))
	}
}

// A status that somebody saved is as good as a report.
func TestFleetReadsStatuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "all")
	at := time.Now().UTC().Format(time.RFC3339)
	text := fmt.Sprintf(`{"format":"hotpatch-status/1","generated":%q,"eligible":true,"state":"hotpatched","device":{"id":"a"}}
{"format":"hotpatch-status/1","generated":%q,"eligible":true,"state":"up-to-date","device":{"id":"b"}}`, at, at)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, code := fleetJSON(t, file); code != 0 || r.Hotpatched != 1 || r.UpToDate != 1 {
		t.Errorf("%d, %+v", code, r)
	}
}

// Whatever devices report, each targeted one is counted once.
func TestFleetCountsAddUp(t *testing.T) {
	now := time.Date(2026, 11, 10, 12, 0, 0, 0, time.UTC)
	rapid.Check(t, func(t *rapid.T) {
		all := map[string]*heard{}
		for i := range rapid.IntRange(0, 30).Draw(t, "devices") {
			h := &heard{id: fmt.Sprint("d", i), at: now.Add(time.Duration(rapid.IntRange(-200, 60).Draw(t, "hours")) * time.Hour)}
			h.status.State = control.State(rapid.SampledFrom(append([]string{"", "other"}, states()...)).Draw(t, "state"))
			h.status.Eligible, h.status.RestartRequired = rapid.Bool().Draw(t, "eligible"), rapid.Bool().Draw(t, "restart")
			all[h.id] = h
		}
		q := question{now: now, silent: 72 * time.Hour}
		if rapid.Bool().Draw(t, "inventory") {
			q.targeted = map[string]string{}
			for i := range rapid.IntRange(0, 40).Draw(t, "targeted") {
				q.targeted[fmt.Sprint("d", i)] = ""
			}
		}
		r := weigh(q, all)
		if r.Targeted != len(r.Devices) || r.Targeted != r.NotReporting+r.NotEligible+r.Eligible || r.Eligible != r.Hotpatched+r.UpToDate+r.Pending+r.Incomplete+r.Restart {
			t.Fatalf("%+v", r)
		}
		if q.targeted != nil && r.Targeted != len(q.targeted) || q.targeted == nil && r.Targeted != len(all) {
			t.Fatalf("%d targeted", r.Targeted)
		}
		for _, d := range r.Devices {
			if h := all[d.ID]; d.Class == hotpatched && (h.status.State != control.Hotpatched && !h.status.RestartRequired || !h.status.Eligible) {
				t.Fatalf("%+v is called hotpatched", h.status)
			}
		}
	})
}

func states() (out []string) {
	for _, s := range control.States {
		out = append(out, string(s))
	}
	return out
}
