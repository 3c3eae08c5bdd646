package main

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"hotpatchd/agent/control"
)

var update = flag.Bool("update", false, "write the golden screens anew; read the difference before you keep it")

// screens are the documents and what they must look like, in testdata/screens.
func screens() map[string]string {
	s := newScreen(false, time.UTC)
	all := map[string]string{}

	all["status-well"] = s.status(wellStatus(), nil)
	all["status-open"] = s.status(openStatus(), openProcesses())
	hidden := openProcesses()
	hidden.Processes = hidden.Processes[:1]
	all["status-open-stranger"] = s.status(openStatus(), hidden)
	none := openProcesses()
	none.Processes = nil
	all["status-open-nothing-visible"] = s.status(openStatus(), none)

	first := &control.Status{Header: header(control.FormatStatus), State: control.Unknown, Device: wellStatus().Device,
		Repository: control.Repository{URL: "https://patches.example.com", Error: &control.RepositoryError{Code: "captive-portal",
			Text: "a web page came back instead of timestamp.json (captive portal or proxy login); applied fixes stay", Since: ago(40 * time.Second)}},
		Attention: []control.Attention{{Code: "clock", Severity: control.SeverityWarning, Text: "this clock is 2 h 10 min behind the server", Remedy: "set the clock; applied fixes stay"}}}
	all["status-unknown"] = s.status(first, nil)
	nowhere := &control.Status{Header: header(control.FormatStatus), State: control.Unknown, Device: wellStatus().Device, Fails: []string{"enrolled"},
		Attention: []control.Attention{{Code: "no-repository", Severity: control.SeverityWarning, Text: "no repository is configured",
			Remedy: "set [repository] url and root in /etc/hotpatchd/config.toml, then restart the daemon; or hotpatch install FILE"}}}
	all["status-no-repository"] = s.status(nowhere, nil)
	rootless := &control.Status{Header: header(control.FormatStatus), State: control.Unknown, Device: wellStatus().Device, Fails: []string{"enrolled"},
		Repository: control.Repository{URL: "https://patches.example.com", Error: &control.RepositoryError{Code: "config",
			Text: "cannot read the root of trust: open /etc/hotpatchd/root.json: no such file or directory; put the repository's root.json there, then restart the daemon", Since: ago(40 * time.Second)}}}
	all["status-no-root"] = s.status(rootless, nil)
	scan := wellStatus()
	scan.State, scan.Scanned, scan.Coverage = control.Unknown, control.Time{}, control.Coverage{}
	all["status-first-scan"] = s.status(scan, nil)

	ineligible := wellStatus()
	ineligible.State, ineligible.Eligible, ineligible.Fails, ineligible.Waived = control.Ineligible, false, []string{"vbs", "chpe"}, nil
	all["status-ineligible"] = s.status(ineligible, nil)
	held := wellStatus()
	held.State, held.Releases, held.Release = control.Held, nil, nil
	held.Coverage = coverage(map[control.ImageState]int{control.Unpatched: 41}, 38)
	held.Holds = []control.Hold{
		{ID: "ACME-2026-10", By: "alice", Since: ago(2 * time.Hour), Reason: "rolled back"}, // older: not what the state tells of
		{ID: "ACME-2026-11", By: "alice", Since: ago(time.Hour), Reason: "it eats memory", CVEs: []string{"CVE-2026-10142"}, Decisive: true},
		{ID: "OTHER-1", By: "policy", CVEs: []string{"CVE-2026-10142", "CVE-2026-7"}, Decisive: true}}
	held.Attention = []control.Attention{
		{Code: "held", Severity: control.SeverityWarning, Text: "ACME-2026-11 is held on this device", Remedy: "hotpatch install ACME-2026-11 lifts the hold"},
		{Code: "held", Severity: control.SeverityWarning, Text: "OTHER-1 is held on this device", Remedy: "the owner of the policy decides: take it out of hold in /etc/hotpatchd/policy.toml"},
		{Code: "unpatched", Severity: control.SeverityWarning, Text: "41 images in 38 processes are unpatched", Remedy: "policy"}}
	held.Paused = true
	all["status-held"] = s.status(held, nil)
	manual, waits := wellStatus(), openProcesses()
	manual.Paused, manual.PausedBy = true, "policy"
	manual.State, manual.Mode, manual.Releases, manual.Release = control.Incomplete, "manual", nil, nil
	manual.Coverage = coverage(map[control.ImageState]int{control.Unpatched: 2}, 2)
	for i := range waits.Processes {
		im := &waits.Processes[i].Images[0]
		im.State, im.ReasonCode, im.Reason, im.Remedy, im.Attempts = control.Unpatched, "manual", `the policy says mode = "manual"`, control.RemedyPolicy, 0
		im.ToDo, im.Since = "hotpatch install ACME-2026-11", ago(2*time.Second)
	}
	all["status-manual"] = s.status(manual, waits)
	tornP := openProcesses()
	tornP.Processes[0].Images[0].State, tornP.Processes[0].Images[0].Remedy = control.Torn, control.RemedyRestartProcess
	tornS := openStatus()
	tornS.Coverage.Busy, tornS.Coverage.Torn = 0, 1
	tornS.Attention = []control.Attention{{Code: "torn", Severity: "error", Text: "said above"}}
	all["status-torn"] = s.status(tornS, tornP)
	other := wellStatus()
	other.Coverage = coverage(map[control.ImageState]int{control.Patched: 39, control.OtherBuild: 2}, 38)
	all["status-other-build"] = s.status(other, nil)
	blind := wellStatus()
	blind.State, blind.Unseen = control.Incomplete, 3
	blind.Attention = []control.Attention{{Code: "not-looked-into", Severity: control.SeverityWarning, Text: "processes that could not be looked into, because the system refuses access: 3",
		Remedy: "the backend may reach: only processes of uid 1000: CAP_SYS_PTRACE is missing"}}
	all["status-unseen"] = s.status(blind, nil)
	for name, l := range map[string]control.Latency{
		"status-starts": {Watch: control.WatchEvents, ScanEveryMS: 2000, Quantiles: control.Quantiles{P50MS: 33.6, P99MS: 78.2, Count: 412},
			Late: control.Quantiles{P50MS: 1041, P99MS: 2061, Count: 3}},
		"status-starts-none": {Watch: control.WatchEvents, ScanEveryMS: 2000},
		"status-starts-deaf": {Watch: control.WatchScan, ScanEveryMS: 2000, Why: "cannot watch process starts (CAP_NET_ADMIN?): permission denied"},
	} {
		starting := wellStatus()
		starting.Latency = l
		all[name] = s.status(starting, nil)
	}
	up := wellStatus()
	up.State, up.Coverage, up.Releases, up.Release = control.UpToDate, control.Coverage{}, nil, nil
	all["status-up-to-date"] = s.status(up, nil)
	expired := wellStatus()
	expired.State, expired.Repository.Expires, expired.RestartRequired = control.RestartRequired, ago(3*days), true
	all["status-restart"] = s.status(expired, nil)
	staged := wellStatus()
	staged.State, staged.RestartRequired = control.RestartRequired, true
	staged.Baseline = control.Baseline{ID: "ACME-2026-10", Month: "2026-10"}
	staged.Staged = []control.StagedFiles{
		{Product: "acme-server", ID: "ACME-2027-01", Kind: "baseline", Phase: "staged", Files: 3, Text: "3 files of ACME-2027-01 take effect at the next restart"},
		{Product: "other", ID: "OTHER-10", Kind: "baseline", Phase: "active", Files: 1, Text: "OTHER-10 in force; the old files are kept until it has proved itself, about 2026-12-12T18:00:00Z"}}
	staged.Attention = []control.Attention{{Code: "restart-required", Severity: control.SeverityWarning, Since: ago(2 * days), Remedy: "restart-device",
		Text: "the baseline ACME-2027-01 is staged, 3 files: it takes effect at the next restart of the device"}}
	all["status-staged"] = s.status(staged, nil)
	maps.Copy(all, storyScreens(s))
	all["check"] = s.checked(wellStatus())

	all["eligibility-no"] = s.eligibility(eligibilityDoc(), false)
	all["eligibility-yes"] = s.eligibility(eligibleDoc(), true)
	all["list"] = s.offers(offersDoc())
	notHere := offersDoc()
	notHere.Eligible = false
	all["list-ineligible"] = s.offers(notHere)
	byHand := offersDoc()
	byHand.Releases = byHand.Releases[:1]
	byHand.Releases[0].Fits, byHand.Releases[0].ReasonCode, byHand.Releases[0].Reason = false, "manual", `the policy says mode = "manual"`
	all["list-manual"] = s.offers(byHand)
	later := offersDoc() // each for another reason, and all of them for this device
	for i, r := range [][2]string{{"deferred", "the policy defers it until 2026-12-12T18:00:00Z, 72h after its publication; it is critical"},
		{"not-approved", "the policy's approve does not list it"}, {"ring", "its rollout has reached 10 % of devices, this one is at 57"},
		{"not-before", "its publisher releases it on 2026-12-12T18:00:00Z"}} {
		later.Releases[i].Fits, later.Releases[i].InForce, later.Releases[i].Held = false, false, false
		later.Releases[i].ReasonCode, later.Releases[i].Reason = r[0], r[1]
	}
	all["list-waiting"] = s.offers(later)
	onlyHeld := offersDoc()
	onlyHeld.Releases = onlyHeld.Releases[3:]
	all["list-held"] = s.offers(onlyHeld)
	halted := &control.Offers{Eligible: true, Releases: []control.Offer{
		{ID: "ACME-2026-11", Product: "acme-server", Kind: "hotpatch", Sequence: 2, Month: "2026-11", Severity: "critical", Title: "heap overflow", Fits: true, InForce: true,
			Halted: true, ReasonCode: "halted", Reason: "its publisher halted it: crashes in Kyoto"},
		{ID: "ACME-B1", Product: "acme-server", Kind: "baseline", Month: "2026-10", Fits: true, ReasonCode: "staged", Reason: "it takes effect at the next restart"}}}
	all["list-halted"] = s.offers(halted)
	all["list-empty"] = s.offers(&control.Offers{})

	all["processes"] = s.processes(manyProcesses(), control.ProcessQuery{}, false)
	all["processes-each"] = s.processes(manyProcesses(), control.ProcessQuery{}, true)
	all["processes-vulnerable"] = s.processes(openProcesses(), control.ProcessQuery{Vulnerable: true}, false)
	since := openProcesses()
	since.Coverage, since.Processes = coverage(map[control.ImageState]int{control.Patched: 2}, 2), since.Processes[1:]
	since.Processes[0].Images[0].State, since.Processes[0].Images[0].Remedy = control.Patched, ""
	all["processes-denied-since"] = s.processes(since, control.ProcessQuery{}, false)
	one := openProcesses()
	one.Coverage, one.Processes = coverage(map[control.ImageState]int{control.Patched: 1}, 1), one.Processes[:1]
	one.Processes[0].Images[0].State = control.Patched
	all["processes-one"] = s.processes(one, control.ProcessQuery{}, false)
	all["processes-pid-one"] = s.processes(one, control.ProcessQuery{PID: 2216}, false)
	all["processes-none"] = s.processes(&control.Processes{Scanned: ago(0), Others: 212}, control.ProcessQuery{}, false)
	all["processes-first-scan"] = s.processes(&control.Processes{}, control.ProcessQuery{}, false)
	all["processes-pid"] = s.processes(oneProcess(), control.ProcessQuery{PID: 2216}, false)
	all["processes-pid-nothing"] = s.processes(&control.Processes{Scanned: ago(0)}, control.ProcessQuery{PID: 7}, false)

	all["plan"] = s.plan(planDoc(), 0)
	all["plan-pid"] = s.plan(planOf(0), 2216)
	all["plan-pid-blocked"] = s.plan(planOf(1), 880)
	all["plan-pid-other-build"] = s.plan(planOf(2), 30112)
	all["plan-pid-refused"] = s.plan(refusedPlan(), 2216)
	done := planDoc()
	for i := range done.Processes {
		im := &done.Processes[i].Images[0]
		im.State, im.ReasonCode, im.Reason, im.Functions = control.Patched, "in-force", "ACME-2026-11 is in force already", nil
	}
	done.Coverage = coverage(map[control.ImageState]int{control.Patched: 3}, 3)
	all["plan-done"] = s.plan(done, 0)
	stuck := planOf(1)
	stuck.Processes[0].Images[0].Functions = nil
	stuck.Coverage = coverage(map[control.ImageState]int{control.Blocked: 1}, 1)
	all["plan-blocked"] = s.plan(stuck, 0)
	wontDo := planDoc()
	wontDo.Refused = &control.Refusal{Code: "not-eligible", Text: "the device is not eligible: vbs", Hint: "hotpatch eligibility says what to do"}
	all["plan-ineligible"] = s.plan(wontDo, 0)
	notYet := planDoc()
	notYet.Waits = &control.Refusal{Code: "deferred", Text: "the policy defers it until 2026-12-12T18:00:00Z, 72h after its publication"}
	all["plan-waiting"] = s.plan(notYet, 0)
	all["plan-nothing"] = s.plan(&control.Plan{Release: "ACME-2026-11", Sequence: 2}, 0)
	all["plan-pid-nothing"] = s.plan(&control.Plan{Release: "ACME-2026-11", Sequence: 2}, 7)

	all["install"] = s.change(change("install", true, control.Patched, control.Patched))
	all["install-incomplete"] = s.change(change("install", true, control.Patched, control.Busy))
	all["install-already"] = s.change(change("install", false, control.Patched))
	never := change("install", true, control.Patched, control.Blocked, control.Blocked)
	for i := range never.Results {
		if im := &never.Results[i].Images[0]; im.State == control.Blocked {
			im.ReasonCode, im.Reason, im.Remedy, im.Attempts = "denied", "denied by policy: exe:vault", control.RemedyPolicy, 0
			im.ToDo = "change deny in /etc/hotpatchd/policy.toml, or leave it so"
		}
	}
	all["install-denied"] = s.change(never)
	lifted := change("install", true)
	lifted.Lifted, lifted.Verified = true, "signed by 2 of 3 targets keys, fresh until 29 Nov"
	all["install-nothing-runs"] = s.change(lifted)
	all["rollback"] = s.change(rolledBack())
	gone := change("rollback", true, control.Unpatched)
	all["rollback-to-nothing"] = s.change(gone)
	all["rollback-incomplete"] = s.change(change("rollback", true, control.Busy, control.Unpatched))
	all["rollback-already"] = s.change(change("rollback", false))
	notIn := change("rollback", true, control.Patched)
	notIn.Release, notIn.Sequence, notIn.Previous = "ACME-2026-10", 1, "ACME-2026-11"
	notIn.Text = "ACME-2026-10 is not in force here, so that nothing is taken out; it is held from now on. In force stays ACME-2026-11"
	all["rollback-not-in-force"] = s.change(notIn)
	out := change("hold", true, control.Unpatched)
	out.Text, out.Reopened = "ACME-2026-11 was in force and is taken out, no release of this product is in force now. It is held until: hotpatch release-hold ACME-2026-11", []string{"CVE-2026-10142"}
	all["hold-in-force"] = s.change(out)
	paused := change("pause", true)
	paused.Text = "paused: nothing new is applied, what is applied stays"
	all["pause"] = s.change(paused)
	all["hold-already"] = s.change(change("hold", false))

	all["verify-good"] = s.verify(&control.Verify{OK: true, Processes: 38, Images: 41, Sites: 82})
	all["verify-one"] = s.verify(&control.Verify{OK: true, Processes: 1, Images: 1, Sites: 1})
	all["verify-nothing"] = s.verify(&control.Verify{OK: true})
	all["verify-bad"] = s.verify(verifyBad())
	all["policy"] = s.policy(settingsDoc())
	refused := settingsDoc()
	refused.Problem = `HKLM\SOFTWARE\Policies\hotpatchd, mode: must be REG_SZ, not REG_DWORD`
	all["policy-refused"] = s.policy(refused)
	wrong := settingsDoc()
	wrong.Problem = "/etc/hotpatchd/policy.toml:4:1: this key is not known\n  4 | enroled = true\x1b[2J\n    | ^"
	all["policy-wrong"] = s.policy(wrong)
	all["calendar"] = s.calendar(calendarDoc())
	all["calendar-empty"] = s.calendar(emptyCalendar())
	all["calendar-east"] = newScreen(false, time.FixedZone("", 9*60*60)).calendar(emptyCalendar())
	all["history"] = s.history(historyDoc())
	all["history-empty"] = s.history(&control.History{})
	broken := historyDoc()
	broken.Broken = "history entry 2 was changed: its hash does not match"
	all["history-broken"] = s.history(broken)
	all["explain"] = s.explain(explainDoc())
	return all
}

func TestScreens(t *testing.T) {
	all := screens()
	for name, got := range all {
		file := filepath.Join("testdata", "screens", name+".txt")
		if *update {
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		if got != string(want) {
			t.Errorf("%s:\n--- got\n%s--- want\n%s", name, got, want)
		}
		for _, line := range strings.Split(got, "\n") {
			if n := utf8.RuneCountInString(line); n > width {
				t.Errorf("%s: a line of %d columns: %s", name, n, line)
			}
			if strings.TrimRight(line, " ") != line {
				t.Errorf("%s: blanks at the end of %q", name, line)
			}
		}
		for _, r := range got {
			if r != '\n' && (r < ' ' || r == 0x7f || r == 0x202e) {
				t.Errorf("%s: the character %q reaches the terminal", name, r)
			}
		}
	}
	files, _ := filepath.Glob("testdata/screens/*.txt")
	for _, f := range files {
		if _, ok := all[strings.TrimSuffix(filepath.Base(f), ".txt")]; !ok {
			t.Errorf("%s belongs to no screen", f)
		}
	}
}

// TestColourOnlyRepeats: without its colours a coloured screen is the plain one.
func TestColourOnlyRepeats(t *testing.T) {
	strip := strings.NewReplacer(good, "", fair, "", bad, "", plain, "")
	in, out := newScreen(true, time.UTC), newScreen(false, time.UTC)
	for name, two := range map[string][2]string{
		"status":      {in.status(openStatus(), openProcesses()), out.status(openStatus(), openProcesses())},
		"eligibility": {in.eligibility(eligibilityDoc(), true), out.eligibility(eligibilityDoc(), true)},
		"processes":   {in.processes(manyProcesses(), control.ProcessQuery{}, false), out.processes(manyProcesses(), control.ProcessQuery{}, false)},
		"plan":        {in.plan(refusedPlan(), 2216), out.plan(refusedPlan(), 2216)},
		"change":      {in.change(rolledBack()), out.change(rolledBack())},
	} {
		if two[0] == two[1] || strip.Replace(two[0]) != two[1] {
			t.Errorf("%s:\n%q\n%q", name, two[0], two[1])
		}
	}
}

func TestDurations(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 0: "0 s", 40 * time.Second: "40 s", 250 * time.Second: "4 min 10 s", 3 * time.Minute: "3 min",
		2*time.Hour + 10*time.Minute: "2 h 10 min", 24 * time.Hour: "1 day", 26 * time.Hour: "1 day 2 h", 11*days + 5*time.Hour: "11 days",
	} {
		if got := control.Span(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}

func TestShortenAndWrap(t *testing.T) {
	if got := shorten(`C:\srv\a folder with a very long name\feed.exe`, 28); got != `C:\srv\a …long name\feed.exe` || utf8.RuneCountInString(got) > 28 {
		t.Errorf("%q", got)
	}
	for _, in := range []string{"", "one", "one two  three", strings.Repeat("word ", 60), strings.Repeat("x", 300) + " y"} {
		lines := wrap(in, 40)
		if strings.Join(strings.Fields(strings.Join(lines, " ")), " ") != strings.Join(strings.Fields(in), " ") {
			t.Errorf("wrap(%q) = %q", in, lines)
		}
		for _, l := range lines {
			if len(l) > 40 && strings.Contains(strings.TrimSpace(l), " ") {
				t.Errorf("%q is too long", l)
			}
		}
	}
}

// A time in a sentence of the daemon is written as every other one on the screen.
func TestTimesInSentences(t *testing.T) {
	s := newScreen(false, time.FixedZone("", 2*60*60))
	for in, want := range map[string]string{
		"metadata ended 2026-11-22T23:30:00Z: nothing": "metadata ended 23 Nov 2026 01:30: nothing",
		"held since 2026-99-22T23:30:00Z":              "held since 2026-99-22T23:30:00Z",
		"CVE-2026-1234":                                "CVE-2026-1234",
	} {
		if got := s.local(in); got != want {
			t.Errorf("%q, wanted %q", got, want)
		}
	}
}

func TestCheckCode(t *testing.T) {
	with := func(state control.State, severity string) *control.Status {
		st := wellStatus()
		st.State, st.Attention = state, []control.Attention{{Code: "x", Severity: severity}}
		return st
	}
	out := wellStatus()
	out.Eligible, out.State = false, control.Ineligible
	fresh := wellStatus() // installed a moment ago: no repository, not enrolled
	fresh.Eligible, fresh.State, fresh.Fails = false, control.Unknown, []string{"enrolled"}
	unjudged := wellStatus()
	unjudged.Eligible, unjudged.State, unjudged.Fails = false, control.Unknown, nil
	for _, c := range []struct {
		st   *control.Status
		want int
	}{{wellStatus(), exitDone}, {with(control.UpToDate, control.SeverityWarning), exitDone}, {with(control.Hotpatched, control.SeverityError), exitIncomplete},
		{with(control.Held, control.SeverityWarning), exitIncomplete}, {with(control.Incomplete, ""), exitIncomplete}, {out, exitNotEligible},
		{fresh, exitNotEligible}, {unjudged, exitIncomplete}} {
		if got := checkCode(c.st); got != c.want {
			t.Errorf("%s %+v: %d, wanted %d", c.st.State, c.st.Attention, got, c.want)
		}
	}
}

// The hint names what is on this machine.
func TestHowToAskTheService(t *testing.T) {
	for _, c := range []struct {
		goos    string
		systemd bool
		want    string
	}{{"windows", false, "sc query hotpatchd"}, {"linux", true, "systemctl status hotpatchd"}, {"linux", false, "hotpatchd run"}} {
		if got := howToAsk(c.goos, c.systemd); !strings.Contains(got, c.want) || c.want != "systemctl status hotpatchd" && strings.Contains(got, "systemctl") {
			t.Errorf("%s, systemd %v: %s", c.goos, c.systemd, got)
		}
	}
	if listener("windows") != "pipe" || listener("linux") != "socket" {
		t.Error("what the daemon listens on")
	}
}

// Piped, a value is whole, however long.
func TestPipedPolicyIsWhole(t *testing.T) {
	d, long := settingsDoc(), strings.Repeat("long/", 40)
	d.Configuration = append(d.Configuration, control.Setting{Key: "state_dir", Value: long, Source: "here"})
	s := newScreen(false, time.UTC)
	if strings.Contains(s.policy(d), long) {
		t.Error("a person's screen has a column of 200 characters")
	}
	s.wide = true
	if got := s.policy(d); !strings.Contains(got, long+"  here\n") || strings.Contains(got, "…") {
		t.Errorf("shortened:\n%s", got)
	}
}
