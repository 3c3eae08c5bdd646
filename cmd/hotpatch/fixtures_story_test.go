package main

import (
	"fmt"
	"time"

	"hotpatchd/agent/control"
)

func in(d time.Duration) control.Time { return control.At(now.Add(d)) }

// polled is how a device goes on on which nothing else is to come.
func polled() control.Chapter {
	return control.Chapter{Code: "poll", What: "the repository is in order", Next: "it is asked again", At: in(2 * time.Minute), WaitsFor: control.WaitsForTime}
}

// storyScreens are devices on which something is to come, or should.
func storyScreens(s *screen) map[string]string {
	all := map[string]string{}
	add := func(name string, change func(*control.Status), story ...control.Chapter) {
		st := wellStatus()
		st.Story = story
		change(st)
		all["story-"+name] = s.status(st, nil)
	}
	add("nothing", func(*control.Status) {}, polled())
	const until = "no new fixes until it passes; it is looked at again"
	add("ineligible", func(st *control.Status) {
		st.State, st.Eligible, st.Fails, st.Waived = control.Ineligible, false, []string{"vbs", "chpe"}, nil
	}, control.Chapter{Code: "ineligible", What: "vbs fails: found configured, not running", Since: ago(19 * days), Next: until, At: in(40 * time.Minute), WaitsFor: control.WaitsForRequirement},
		control.Chapter{Code: "ineligible", What: "chpe could not be read: access denied", Since: ago(50 * time.Hour), Next: until, At: in(40 * time.Minute), WaitsFor: control.WaitsForRequirement}, polled())
	add("behind", func(st *control.Status) {
		st.State, st.Baseline = control.BaselineRequired, control.Baseline{ID: "ACME-2026-07", Month: "2026-07"}
		st.Attention = []control.Attention{{Code: "baseline-required", Severity: control.SeverityWarning, Since: ago(11 * days),
			Text: "ACME-2026-11 needs the baseline ACME-2026-10, which is not offered here", Remedy: "baseline"}}
	}, control.Chapter{Code: "baseline-required", Product: "acme-server", What: "ACME-2026-11 needs the baseline ACME-2026-10, which is not offered here", Since: ago(11 * days),
		Next: "no hotpatches until the repository has it; the next baseline is planned", At: in(51 * days), WaitsFor: control.WaitsForPublisher}, polled())
	add("restart", func(st *control.Status) {
		st.State, st.RestartRequired = control.RestartRequired, true
		st.Baseline = control.Baseline{ID: "ACME-2026-07", Month: "2026-07"}
		st.Staged = []control.StagedFiles{{Product: "acme-server", ID: "ACME-2026-10", Kind: "baseline", Phase: "staged", Files: 3, Text: "3 files of ACME-2026-10 take effect at the next restart"}}
		st.Attention = []control.Attention{{Code: "restart-required", Severity: control.SeverityWarning, Since: ago(40 * days), Remedy: "restart-device",
			Text: "the baseline ACME-2026-10 is staged, 3 files: it takes effect at the next restart of the device"}}
	}, control.Chapter{Code: "restart-required", Product: "acme-server", What: "the baseline ACME-2026-10 is staged, 3 files", Since: ago(40 * days),
		Next: "it takes effect at the next restart of the device", WaitsFor: control.WaitsForRestart}, polled())
	add("trial", func(st *control.Status) {
		st.State = control.Pending
		st.Coverage = coverage(map[control.ImageState]int{control.Patched: 1, control.PendingImage: 40}, 38)
	}, control.Chapter{Code: "canary", What: "ACME-2026-11 is tried in one process first, 40 images wait", Since: ago(20 * time.Second), Next: "the others get it, if that goes well,", At: in(40 * time.Second), WaitsFor: control.WaitsForTime},
		control.Chapter{Code: "guard-window", Product: "acme-server", What: "the health guard watches 1 process with ACME-2026-11", Since: ago(20 * time.Second),
			Next: "it is taken out if they crash with it, else the watch ends", At: in(580 * time.Second), WaitsFor: control.WaitsForTime}, polled())
	add("waiting", func(st *control.Status) {
		st.Attention = []control.Attention{
			{Code: "waiting", Severity: control.SeverityInfo, Product: "acme-server", Text: "ACME-2026-12 (critical) is not taken yet: the policy defers it until 2026-11-22T15:00:00Z, 72h after its publication; it is critical",
				Remedy: "it comes by itself; now: hotpatch install ACME-2026-12"},
			{Code: "waiting", Severity: control.SeverityInfo, Product: "other", Text: "OTHER-2 is not taken yet: the policy's approve does not list it", Remedy: "hotpatch install OTHER-2"}}
	}, control.Chapter{Code: "waiting", Product: "acme-server", What: "ACME-2026-12 (critical) is not taken yet: the policy defers it", Since: ago(69 * time.Hour), Next: "it comes by itself", At: in(3 * time.Hour), WaitsFor: control.WaitsForTime},
		control.Chapter{Code: "waiting", Product: "other", What: "OTHER-2 is not taken yet: the policy's approve does not list it", Since: ago(6 * days),
			Next: "it comes when the policy approves it, or with hotpatch install OTHER-2", WaitsFor: control.WaitsForApproval}, polled())
	add("paused", func(st *control.Status) { st.Paused, st.PausedBy = true, "operator" },
		control.Chapter{Code: "paused", What: "paused by the operator", Since: ago(50 * time.Hour), Next: "nothing new is applied until hotpatch resume", WaitsFor: control.WaitsForOperator}, polled())
	add("offline", func(st *control.Status) {
		st.Repository.LastCheck = ago(31 * time.Hour)
		st.Repository.Error = &control.RepositoryError{Code: "offline", Text: "there is no way to patches.example.com", Since: ago(30 * time.Hour)}
	}, control.Chapter{Code: "repository", What: "there is no way to patches.example.com", Since: ago(30 * time.Hour), Next: "from 2026-11-24T05:00:00Z on this is called wrong; it is asked again",
		At: in(4 * time.Minute), WaitsFor: control.WaitsForNetwork})
	add("policy", func(st *control.Status) {
		st.Attention = []control.Attention{{Code: "policy", Severity: control.SeverityError, Text: "the policy was refused, the last good one stays in force", Since: ago(2 * time.Hour),
			Remedy: "mend /etc/hotpatchd/policy.toml:5:1: x: no such key (hotpatch policy shows the place, or hotpatchd check-config)"}}
	}, control.Chapter{Code: "policy", What: "the policy is refused", Since: ago(2 * time.Hour), Next: "the last good one, in force since 2026-10-13T12:00:00Z, stays; the file is read again when it changes",
		WaitsFor: control.WaitsForPolicy}, polled())
	add("hours", func(st *control.Status) {
		st.State = control.Pending
		st.Coverage = coverage(map[control.ImageState]int{control.Patched: 39, control.PendingImage: 2}, 38)
	}, control.Chapter{Code: "hours", What: "2 images wait for the policy's hours", Since: ago(3 * time.Hour), Next: "work begins", At: in(21 * time.Hour), WaitsFor: control.WaitsForTime}, polled())
	add("halted", func(*control.Status) {}, control.Chapter{Code: "halted", Product: "acme-server", What: "ACME-2026-11 is in force, and its publisher halted it: crashes in Kyoto",
		Since: ago(2 * time.Hour), Next: "it stays where it is; a newer one replaces it", WaitsFor: control.WaitsForPublisher}, polled())
	var many []control.Chapter
	for i := range 11 {
		many = append(many, control.Chapter{Code: "waiting", Product: fmt.Sprint(i), What: fmt.Sprintf("R%d\x1b is not taken yet: by hand", i), Next: "it comes with hotpatch install R", WaitsFor: control.WaitsForApproval, Since: ago(time.Duration(i) * days)})
	}
	add("many", func(st *control.Status) { // the last is not told under Next
		for _, i := range []string{"0", "10"} {
			st.Attention = append(st.Attention, control.Attention{Code: "waiting", Severity: control.SeverityInfo, Product: i, Text: "R" + i + " is not taken yet: by hand", Remedy: "hotpatch install R" + i})
		}
	}, many...)
	return all
}
