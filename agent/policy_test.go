package agent

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
)

const policyHead = "format = \"hotpatchd-policy/1\"\n"

func TestPolicyEverySetting(t *testing.T) {
	p, err := ParsePolicy("p.toml", []byte(policyHead+`
enrolled = true
allow_hotpatch = false
mode = "approved"
approve = ["ACME-2026-10", "ACME-2026-09"]
defer = "72h"
pause = true
hold = ["ACME-2026-11"]
deny = ['C:\Vault\*', "exe:srv.exe", "user:svc-*", "image:codec.dll", "d:/x"]
waive = ["vbs", "chpe"]
ring = 7
hours = ["22:00-06:00", "sat-sun 00:00-24:00"]
hours_grace = "48h"
busy_budget = "30s"
guard = "observe"
guard_window = "5m"
canary = "0s"
`))
	if err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	every := [7]bool{true, true, true, true, true, true, true}
	want := &Policy{
		File: "p.toml", Enrolled: &yes, AllowHotpatch: &no, Mode: Approved, Pause: true, Hold: []string{"ACME-2026-11"},
		Approve: []string{"ACME-2026-10", "ACME-2026-09"}, Defer: 72 * time.Hour, HoursGrace: 48 * time.Hour,
		Guard: GuardObserve, GuardWindow: 5 * time.Minute, Canary: 0,
		Deny:  []Denial{{DenyExe, `C:\Vault\*`}, {DenyExe, "srv.exe"}, {DenyUser, "svc-*"}, {DenyImage, "codec.dll"}, {DenyExe, "d:/x"}},
		Waive: []string{"vbs", "chpe"}, Ring: 7, BusyBudget: 30 * time.Second,
		Hours: Hours{{every, 22 * 60, 6 * 60}, {[7]bool{time.Saturday: true, time.Sunday: true}, 0, 24 * 60}},
	}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got  %+v\nwant %+v", p, want)
	}
	if !p.Held("ACME-2026-11") || p.Held("ACME-2026-10") {
		t.Error("Held is wrong")
	}
	p, err = ParsePolicy("p.toml", []byte(policyHead))
	if want := (&Policy{File: "p.toml", Mode: Automatic, Ring: -1, BusyBudget: busyBudget, Guard: GuardEnforce, GuardWindow: 10 * time.Minute, Canary: time.Minute}); err != nil || !reflect.DeepEqual(p, want) {
		t.Errorf("empty: got  %+v, %v\nwant %+v", p, err, want)
	}
}

func TestPolicyMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"enroled = true":             "p.toml:2:1: enroled: no such key\n  2 | enroled = true\n    | ^",
		"enrolled = \"yes\"":         "p.toml:2:12: enrolled: must be true or false, not a string\n  2 | enrolled = \"yes\"\n    |            ^",
		"mode = \"auto\"":            "p.toml:2:8: mode: \"auto\" is none of \"automatic\", \"approved\", \"manual\"\n  2 | mode = \"auto\"\n    |        ^",
		"waive = [\"os\",\n\"tpm\"]": "p.toml:3:1: waive[1]: \"tpm\" is not a check; the checks are os edition version arch managed policy vbs chpe baseline rights\n  3 | \"tpm\"]\n    | ^",
		"hold = [\"../x\"]":          "p.toml:2:9: hold[0]: \"../x\" is not the id of a release\n  2 | hold = [\"../x\"]\n    |         ^",
		"deny = [\"usr:bob\"]":       "p.toml:2:9: deny[0]: \"usr:\" is none of exe:, user:, image:\n  2 | deny = [\"usr:bob\"]\n    |         ^",
		"deny = [\"exe:\"]":          "p.toml:2:9: deny[0]: the pattern is empty\n  2 | deny = [\"exe:\"]\n    |         ^",
		"ring = 100":                 "p.toml:2:8: ring: 100 is not between 0 (first) and 99 (last)\n  2 | ring = 100\n    |        ^",
		"ring = -1":                  "p.toml:2:8: ring: -1 is not between 0 (first) and 99 (last)\n  2 | ring = -1\n    |        ^",
		"hours = [\"22-06\"]":        "p.toml:2:10: hours[0]: \"22-06\" is not like \"22:00-06:00\" or \"mon-fri 20:00-23:00\"\n  2 | hours = [\"22-06\"]\n    |          ^",
		"busy_budget = \"48h\"":      "p.toml:2:15: busy_budget: 48h is not between 0s and 24h0m0s\n  2 | busy_budget = \"48h\"\n    |               ^",
		"guard = \"on\"":             "p.toml:2:9: guard: \"on\" is none of \"off\", \"observe\", \"enforce\"\n",
		"guard_window = \"0s\"":      "p.toml:2:16: guard_window: 0s is not between 1s and 24h0m0s\n",
		"canary = \"2h\"":            "p.toml:2:10: canary: 2h is not between 0s and 1h0m0s\n",
		"defer = \"3d\"":             "p.toml:2:9: defer: \"3d\" is not a duration such as",
		"defer = \"-1h\"":            "p.toml:2:9: defer: -1h is not between 0s and 2160h0m0s\n",
		"hours_grace = \"0s\"":       "p.toml:2:15: hours_grace: 0s is not between 1m0s and 2160h0m0s\n",
		"approve = [\"A\"]":          "p.toml:2:1: approve: needs mode = \"approved\": with \"automatic\" every release comes into force, listed or not\n",
		"mode = \"approved\"\napprove = [\"A\", \"a b\"]":         "p.toml:3:17: approve[1]: \"a b\" is not the id of a release\n",
		"deny = [" + strings.Repeat("\"a\",", maxDenials+1) + "]": "p.toml:2:1: deny: has 1001 entries, at most 1000 are read",
	} {
		_, err := ParsePolicy("p.toml", []byte(policyHead+text+"\n"))
		if err == nil || !errors.Is(err, ErrPolicyWrong) || !strings.HasPrefix(err.Error(), want) || len(err.Error()) > 400 {
			t.Errorf("%.40q: got\n%v\nwant\n%s", text, err, want)
		}
	}
}

func TestLoadPolicyTellsAbsentUnreadableWrongApart(t *testing.T) {
	folder := t.TempDir()
	file := filepath.Join(folder, "policy.toml")
	p, err := LoadPolicy(file)
	if err != nil || !p.Absent || p.Enrolled != nil {
		t.Errorf("absent: %+v, %v", p, err)
	}
	_, err = LoadPolicy(folder)
	if !errors.Is(err, ErrPolicyUnreadable) || errors.Is(err, ErrPolicyWrong) {
		t.Errorf("a folder: %v", err)
	}
	if err := os.WriteFile(file, []byte("enrolled = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = LoadPolicy(file)
	if !errors.Is(err, ErrPolicyWrong) || errors.Is(err, ErrPolicyUnreadable) {
		t.Errorf("no format: %v", err)
	}
	if err := os.WriteFile(file, []byte(policyHead+"enrolled = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err = LoadPolicy(file); err != nil || p.Absent || p.Enrolled == nil || !*p.Enrolled || p.File != file {
		t.Errorf("good: %+v, %v", p, err)
	}
}

// What eligibility is told: an unreadable policy is unknown, not "not enrolled".
func TestJudged(t *testing.T) {
	find := func(pol eligibility.Policy) eligibility.Check {
		for _, c := range eligibility.Judge(eligibility.LinuxDevice, eligibility.Facts{}, pol).Checks {
			if c.ID == eligibility.Managed {
				return c
			}
		}
		return eligibility.Check{}
	}
	yes := true
	none, wrong := (*Policy)(nil), errors.New("p:1:1: bad\n  1 | x")
	if c := find(none.Judged("p", wrong)); c.Result != eligibility.Unknown || strings.Contains(c.Found, "\n") || !strings.Contains(c.Found, "bad") {
		t.Errorf("wrong: %+v", c)
	}
	if c := find(none.Judged("p", nil)); c.Result != eligibility.Unknown {
		t.Errorf("not read yet: %+v", c)
	}
	if c := find((&Policy{Absent: true}).Judged("p", nil)); c.Result != eligibility.Fail || !strings.Contains(c.Found, "no policy file") {
		t.Errorf("absent: %+v", c)
	}
	if c := find((&Policy{Enrolled: &yes}).Judged("p", wrong)); c.Result != eligibility.Pass {
		t.Errorf("the last good one: %+v", c)
	}
}

func TestDenialMatch(t *testing.T) {
	for _, c := range []struct {
		rule, exe, user, image string
		want                   bool
	}{
		{`C:\Vault\*`, `c:\VAULT\deep\srv.exe`, "", "", true},
		{`C:\Vault\*`, `C:/Vault/srv.exe`, "", "", true},
		{`C:\Vault\*`, `\\?\C:\Vault\srv.exe`, "", "", true},
		{`C:\Vault\*`, `\??\C:\Vault\srv.exe`, "", "", true},
		{`C:\Vault\*`, `C:\Vaults\srv.exe`, "", "", false},
		{`C:\Vault\*`, `C:\Vault`, "", "", false},
		{"srv.exe", `D:\x\SRV.EXE`, "", "", true},
		{"srv.exe", "/opt/x/srv.exe", "", "", true},
		{"srv.exe", "srv.exe", "", "", true},
		{"srv.exe", `D:\x\mysrv.exe`, "", "", false},
		{"srv.exe", `D:\srv.exe\x.exe`, "", "", false},
		{"exe:s?v.*", "/opt/süv.exe", "", "", true},
		{"exe:*vault*", `C:\Vault\a.exe`, "", "", true},
		{"exe:srv.exe", "x.exe", "srv.exe", "srv.exe", false},
		{"user:alice", "x", "alice", "", true},
		{"user:alice", "x", `CORP\Alice`, "", true},
		{`user:CORP\*`, "x", `corp\bob`, "", true},
		{"user:alice", "alice", "bob", "alice", false},
		{"image:app.dll", "", "", `C:\x\APP.dll`, true},
		{"image:*", "x", "y", "", false},
		{"image:app.dll", "app.dll", "", "other.dll", false},
		{"*", "", "", "", true},
	} {
		d, err := parseDenial(c.rule)
		if err != nil {
			t.Fatal(err)
		}
		if got := d.Match(c.exe, c.user, c.image); got != c.want {
			t.Errorf("%s on %q %q %q: %t", d, c.exe, c.user, c.image, got)
		}
	}
	p := &Policy{Deny: []Denial{{DenyExe, "a"}, {DenyUser, "b"}, {DenyUser, "*"}}}
	if d, ok := p.Denied("x", "b", "y"); !ok || d.String() != "user:b" {
		t.Errorf("first rule: %s, %t", d, ok)
	}
	if _, ok := (&Policy{}).Denied("x", "b", "y"); ok {
		t.Error("denied by no rule")
	}
}

// wild agrees with the definition: * is any run, ? one character.
func TestWildAgreesWithItsDefinition(t *testing.T) {
	var slow func(p, s []rune) bool
	slow = func(p, s []rune) bool {
		switch {
		case len(p) == 0:
			return len(s) == 0
		case p[0] == '*':
			return slow(p[1:], s) || len(s) > 0 && slow(p, s[1:])
		case len(s) == 0:
			return false
		}
		return (p[0] == '?' || p[0] == s[0]) && slow(p[1:], s[1:])
	}
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.StringOfN(rapid.RuneFrom([]rune("ab*?ü")), 0, 8, -1).Draw(t, "pattern")
		s := rapid.StringOfN(rapid.RuneFrom([]rune("abü")), 0, 10, -1).Draw(t, "name")
		if got, want := wild(p, s), slow([]rune(p), []rune(s)); got != want {
			t.Fatalf("%q on %q: %t, want %t", p, s, got, want)
		}
	})
	// Not a matter of minutes: the pattern that kills backtracking matchers.
	if wild(strings.Repeat("a*", 200)+"b", strings.Repeat("a", 5000)) {
		t.Error("matched")
	}
}

func TestHours(t *testing.T) {
	at := func(day, hour, minute int) time.Time {
		return time.Date(2026, 11, 15+day, hour, minute, 30, 0, time.UTC)
	} // the 15th is a Sunday
	for _, c := range []struct {
		hours string
		t     time.Time
		open  bool
		next  time.Time
	}{
		{"", at(0, 12, 0), true, at(0, 12, 0)},
		{"08:00-10:00", at(1, 8, 0), true, at(1, 8, 0)},
		{"08:00-10:00", at(1, 9, 59), true, at(1, 9, 59)},
		{"08:00-10:00", at(1, 10, 0), false, at(2, 8, 0).Truncate(time.Minute)},
		{"22:00-06:00", at(1, 23, 0), true, at(1, 23, 0)},
		{"22:00-06:00", at(1, 5, 59), true, at(1, 5, 59)},
		{"22:00-06:00", at(1, 6, 0), false, at(1, 22, 0).Truncate(time.Minute)},
		{"sat 22:00-06:00", at(0, 5, 0), true, at(0, 5, 0)},
		{"sat 22:00-06:00", at(1, 5, 0), false, at(6, 22, 0).Truncate(time.Minute)},
		{"sat 22:00-06:00", at(6, 5, 0), false, at(6, 22, 0).Truncate(time.Minute)},
		{"fri-mon 00:00-24:00", at(0, 23, 59), true, at(0, 23, 59)},
		{"fri-mon 00:00-24:00", at(2, 0, 0), false, at(5, 0, 0).Truncate(time.Minute)},
	} {
		var h Hours
		if c.hours != "" {
			w, err := parseWindow(c.hours)
			if err != nil {
				t.Fatal(err)
			}
			h = Hours{w}
		}
		if h.Open(c.t) != c.open || !h.Next(c.t).Equal(c.next) {
			t.Errorf("%q at %s: open %t, next %s, want %t, %s", c.hours, c.t, h.Open(c.t), h.Next(c.t), c.open, c.next)
		}
	}
	for _, bad := range []string{"", "x", "10:00", "10:00-10:00", "24:00-06:00", "10:00-25:00", "10:00-9:00", "mo 10:00-11:00", "mon- 10:00-11:00", "mon tue 10:00-11:00"} {
		if w, err := parseWindow(bad); err == nil {
			t.Errorf("%q: %+v", bad, w)
		}
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add(policyHead + "deny = ['C:\\*']\nhours = [\"mon-fri 20:00-23:00\"]\nring = 3\nbusy_budget = \"1s\"\nmode = \"approved\"\napprove = [\"A\"]\ndefer = \"72h\"\nhours_grace = \"\"\ncanary = \"0s\"\n")
	f.Add(policyHead + "waive = [[]]\n")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePolicy("p", []byte(text))
		if (p == nil) == (err == nil) || err != nil && !errors.Is(err, ErrPolicyWrong) {
			t.Fatalf("%+v, %v", p, err)
		}
		if p == nil {
			return
		}
		p.Denied("a", "b", "c")
		if p.Ring < -1 || p.Ring > 99 || p.BusyBudget < 0 || p.Mode != Automatic && p.Mode != Manual && p.Mode != Approved ||
			p.Defer < 0 || p.HoursGrace < 0 || p.GuardWindow <= 0 || p.Canary < 0 || p.Mode == Automatic && len(p.Approve) > 0 {
			t.Errorf("%+v", p)
		}
	})
}

// watchPatience is how long a test waits for what must come; machines may be slow.
const watchPatience = 20 * time.Second

// watchedPolicy starts a watch whose calls arrive on the channel. Polling is off
// unless poll is set, so that a call proves a notification.
func watchedPolicy(t *testing.T, path string, poll time.Duration) <-chan struct{} {
	t.Helper()
	if poll == 0 {
		poll = time.Hour
	}
	calls := make(chan struct{}, 100)
	ready := make(chan struct{})
	done := make(chan struct{})
	w := policyWatch{path: path, folder: filepath.Dir(path), debounce: 10 * time.Millisecond, rewatch: 20 * time.Millisecond, poll: poll}
	w.started = func() { close(ready) }
	go func() {
		defer close(done)
		w.run(t.Context(), func() { calls <- struct{}{} })
	}()
	t.Cleanup(func() { <-done }) // t.Context ends before
	<-ready
	return calls
}

func awaitCall(t *testing.T, calls <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-calls:
	case <-time.After(watchPatience):
		t.Fatalf("no call after %s", what)
	}
}

// drainCalls waits until no call has come for a while, so that the next one is new.
func drainCalls(calls <-chan struct{}) {
	for {
		select {
		case <-calls:
		case <-time.After(200 * time.Millisecond):
			return
		}
	}
}

func writePolicy(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func replacePolicy(t *testing.T, path, text string) {
	t.Helper()
	writePolicy(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestWatchPolicySeesEveryKindOfChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.toml")
	calls := watchedPolicy(t, path, 0)
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"appears", func() { writePolicy(t, path, "1") }},
		{"is written in place", func() { writePolicy(t, path, "2") }},
		{"is replaced", func() { replacePolicy(t, path, "3") }},
		{"is replaced again", func() { replacePolicy(t, path, "4") }},
		{"goes", func() { _ = os.Remove(path) }},
		{"comes back", func() { replacePolicy(t, path, "5") }},
	} {
		step.do()
		awaitCall(t, calls, step.name)
		drainCalls(calls)
	}
}

func TestWatchPolicyDebounces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.toml")
	calls := make(chan struct{}, 100)
	ready := make(chan struct{})
	done := make(chan struct{})
	w := policyWatch{path: path, folder: filepath.Dir(path), debounce: time.Second, rewatch: time.Hour, poll: time.Hour, started: func() { close(ready) }}
	go func() { defer close(done); w.run(t.Context(), func() { calls <- struct{}{} }) }()
	t.Cleanup(func() { <-done })
	<-ready
	for range 20 {
		writePolicy(t, path, "x")
	}
	awaitCall(t, calls, "twenty writes")
	if n := len(calls); n > 5 {
		t.Errorf("%d more calls for one burst", n)
	}
}

func TestWatchPolicyPassesOverOtherFiles(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "policy.toml")
	calls := watchedPolicy(t, path, 0)
	writePolicy(t, filepath.Join(folder, "config.toml"), "x")
	writePolicy(t, path, "1") // its call comes after whatever the other file would have caused
	awaitCall(t, calls, "the policy's own change")
	drainCalls(calls)
	writePolicy(t, filepath.Join(folder, "config.toml"), "y")
	select {
	case <-calls:
		t.Error("called for another file")
	case <-time.After(300 * time.Millisecond):
	}
}

func TestWatchPolicySurvivesItsFolder(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "etc")
	path := filepath.Join(folder, "policy.toml")
	calls := watchedPolicy(t, path, 0) // the folder is not there yet
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	writePolicy(t, path, "1")
	awaitCall(t, calls, "the folder appeared")
	drainCalls(calls)
	writePolicy(t, path, "2")
	awaitCall(t, calls, "a change in the new folder")
	drainCalls(calls)
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	awaitCall(t, calls, "the folder went")
	drainCalls(calls)
	err := os.Mkdir(folder, 0o700)
	if err != nil && runtime.GOOS == "windows" {
		t.Skip("needs a folder whose name is free again although we have it open, as on Windows, not on Wine: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	writePolicy(t, path, "3")
	awaitCall(t, calls, "the folder came back")
	drainCalls(calls)
	writePolicy(t, path, "4")
	awaitCall(t, calls, "a change in the folder that came back")
}

// A symbolic link that is turned elsewhere gives no notification for the name.
func TestWatchPolicyPolls(t *testing.T) {
	folder := t.TempDir()
	data := filepath.Join(folder, "data")
	path := filepath.Join(folder, "sub", "policy.toml")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	writePolicy(t, data, "1")
	if err := os.Symlink(data, path); err != nil {
		t.Skip("needs symbolic links: ", err)
	}
	if _, err := os.Readlink(path); err != nil {
		t.Skip("needs symbolic links: one was made, but is not there ", err) // Wine
	}
	calls := watchedPolicy(t, path, 20*time.Millisecond)
	replacePolicy(t, data, "22")
	awaitCall(t, calls, "the target was replaced")
}

func TestWatchPolicyEnds(t *testing.T) {
	calls := watchedPolicy(t, filepath.Join(t.TempDir(), "none", "policy.toml"), time.Millisecond)
	select {
	case <-calls:
		t.Error("called although nothing happened")
	case <-time.After(200 * time.Millisecond):
	} // the cleanup waits for the end
}

// TestGrace: a release leaves the hours behind when its own grace ends, not
// another one's, and what is told is the first moment at which work may begin.
func TestGrace(t *testing.T) {
	in := Intent{Product: "app", Offer: &repository.Offer{ID: "R1"}}
	open := noon.Add(10 * time.Hour)
	for name, c := range map[string]struct {
		grace map[string]grace
		over  bool
		again time.Time
		says  string
	}{
		"never":           {nil, false, open, "which begin 2026-11-22T22:00:00Z"},
		"over":            {map[string]grace{"app": {"R1", noon}}, true, noon, ""},
		"not yet":         {map[string]grace{"app": {"R1", noon.Add(time.Second)}}, false, noon.Add(time.Second), "its grace ends 2026-11-22T12:00:01Z"},
		"after the hours": {map[string]grace{"app": {"R1", open.Add(1)}}, false, open, "which begin"},
		"another release": {map[string]grace{"app": {"R0", noon}}, false, open, "which begin"},
		"another product": {map[string]grace{"demo": {"R1", noon}}, false, open, "which begin"},
	} {
		v := View{Now: noon, Closed: true, Opens: open, Grace: c.grace}
		if v.graceOver(in) != c.over {
			t.Errorf("%s: over %t", name, !c.over)
		}
		if out := v.outsideHours(in); !c.over && (!out.Again.Equal(c.again) || !strings.Contains(out.Reason.Text, c.says)) {
			t.Errorf("%s: again %v, %q", name, out.Again, out.Reason.Text)
		}
	}
}
