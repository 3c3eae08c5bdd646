package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
)

// quietPlot is a device on which nothing is to be told but that the repository is asked again.
func quietPlot() plot {
	return plot{Now: noon, Looks: noon.Add(40 * time.Minute), Scanned: true,
		Repository: repositoryPlot{Configured: true, Polled: true, Verified: true, Checked: noon.Add(-time.Minute), Asks: noon.Add(4 * time.Minute)}}
}

// Every situation that an administrator meets: what is so and since when, what
// comes next, and when, or what it waits for.
func TestStory(t *testing.T) {
	before, later := noon.Add(-19*24*time.Hour), noon.Add(3*time.Hour)
	check := func(id eligibility.ID, result eligibility.Result, found string, since time.Time) openCheck {
		return openCheck{Check: eligibility.Check{ID: id, Result: result, Found: found}, Since: since}
	}
	waits := func(code, text string, opens time.Time) func(*plot) {
		return func(p *plot) {
			p.Waits = []wait{{Product: "app", ID: "R2", Severity: "critical", Kind: release.KindHotpatch, Why: reason{code, text}, Since: before, Opens: opens}}
		}
	}
	hold := func(change func(*heldBack)) func(*plot) {
		return func(p *plot) {
			h := heldBack{Hold: control.Hold{ID: "R2", Product: "app", Since: control.At(before), CVEs: []string{"CVE-2026-0001"}}}
			change(&h)
			p.Holds = []heldBack{h}
		}
	}
	behindOf := func(b behind) func(*plot) {
		return func(p *plot) {
			b.product, b.release, b.baseline, b.text = "app", "Z1", "B1", "Z1 needs the baseline B1, which …"
			p.Behind = []behindSince{{b, before}}
		}
	}
	images := func(state control.ImageState, remedy control.Remedy, again time.Time) func(*plot) {
		return func(p *plot) {
			p.Images = []openImages{{State: state, Remedy: remedy, Images: 2, Processes: 1, Since: before, Again: again}}
		}
	}
	trouble := func(code string, passing bool, alarm time.Time) func(*plot) {
		return func(p *plot) {
			p.Repository.Trouble = &control.RepositoryError{Code: code, Text: "it is away", Since: control.At(before)}
			p.Repository.Passing, p.Repository.Alarm = passing, alarm
		}
	}
	both := func(list ...func(*plot)) func(*plot) {
		return func(p *plot) {
			for _, f := range list {
				f(p)
			}
		}
	}
	// code | what | since | next | at | waits_for; since and at as the names below.
	for name, c := range map[string]struct {
		change func(*plot)
		want   string
	}{
		"nothing to do": {func(*plot) {}, "poll|the repository is in order||it is asked again|4m|time"},
		"being asked":   {func(p *plot) { p.Repository.Asks = time.Time{} }, "poll|the repository is in order||it is asked again||time"},
		"not eligible": {func(p *plot) {
			p.Checks = []openCheck{check("vbs", eligibility.Fail, "configured, not running", before)}
		},
			"ineligible|vbs fails: found configured, not running|before|no new fixes until it passes; it is looked at again|40m|requirement"},
		"several fail, one is unknown": {func(p *plot) {
			p.Checks = []openCheck{check("vbs", eligibility.Fail, "off", before), check("chpe", eligibility.Unknown, "could not be read: denied", noon)}
		}, "ineligible|vbs fails: found off|before|no new fixes until it passes; it is looked at again|40m|requirement\n" +
			"ineligible|chpe could not be read: denied|now|no new fixes until it passes; it is looked at again|40m|requirement"},
		"not enrolled": {func(p *plot) {
			c := check("managed", eligibility.Fail, "no policy file", before)
			c.ByPolicy = true
			p.Checks = []openCheck{c}
		}, "ineligible|managed fails: found no policy file|before|no new fixes until the policy says otherwise, which counts at once||policy"},
		"behind, not offered": {behindOf(behind{}),
			"baseline-required|Z1 needs the baseline B1, which …|before|no hotpatches until the repository has it; the next baseline is planned|12 Jan 2027|publisher"},
		"behind, being staged": {behindOf(behind{offered: true}), "baseline-required|Z1 needs the baseline B1, which …|before|it is staged by itself, for the restart after||time"},
		"behind, deferred": {behindOf(behind{offered: true, why: reason{"deferred", "…"}, opens: later}),
			"baseline-required|Z1 needs the baseline B1, which …|before|it is staged by itself, for the restart after|3h|time"},
		"behind, not approved": {behindOf(behind{offered: true, why: reason{"not-approved", "…"}}),
			"baseline-required|Z1 needs the baseline B1, which …|before|it comes when the policy approves it, or with hotpatch install B1||approval"},
		"behind, and the wait told once": {both(behindOf(behind{offered: true, why: reason{"manual", "…"}}), func(p *plot) {
			p.Waits = []wait{{Product: "app", ID: "B1", Kind: release.KindBaseline, Why: reason{"manual", "…"}}}
		}), "baseline-required|Z1 needs the baseline B1, which …|before|it comes with hotpatch install B1||approval"},
		"behind, and paused": {both(behindOf(behind{offered: true}), func(p *plot) { p.Paused, p.PausedAt = pausedByPolicy, before }),
			"paused|paused by the policy|before|nothing new is applied until it says pause = false||policy\n" +
				"baseline-required|Z1 needs the baseline B1, which …|before|no hotpatches until the policy says pause = false; then the baseline is staged||policy"},
		"a restart is required": {func(p *plot) {
			p.Restarts = []restart{{"app", "the baseline B1 is staged, 3 files", before, "it takes effect at the next restart of the device", false}}
		}, "restart-required|the baseline B1 is staged, 3 files|before|it takes effect at the next restart of the device||restart"},
		"a restart would not be enough": {func(p *plot) {
			p.Restarts = []restart{{"app", "the baseline B1 is staged, 3 files", before, "it takes effect at the next restart of the device", false}}
			p.Checks = []openCheck{check("vbs", eligibility.Fail, "off", before)}
		}, "ineligible|vbs fails: found off|before|no new fixes until it passes; it is looked at again|40m|requirement\n" +
			"restart-required|the baseline B1 is staged, 3 files|before|it takes effect at the next restart of the device after the eligibility checks pass||requirement"},
		"old files come back all the same": {func(p *plot) {
			p.Restarts = []restart{{"app", "the files of B1 are to go out", before, "the files before B1 take effect again at the next restart of the device", true}}
			p.Checks = []openCheck{check("vbs", eligibility.Fail, "off", before)}
		}, "ineligible|vbs fails: found off|before|no new fixes until it passes; it is looked at again|40m|requirement\n" +
			"restart-required|the files of B1 are to go out|before|the files before B1 take effect again at the next restart of the device||restart"},
		"a baseline proves itself": {func(p *plot) { p.Proofs = []proof{{"app", "B1", before, later}} },
			"baseline-proof|the old files are kept until B1 has proved itself|before|they are removed|3h|time"},
		"a canary": {func(p *plot) { p.Trials = []onTrial{{"R2", before, later, 40}} },
			"canary|R2 is tried in one process first, 40 images wait|before|the others get it, if that goes well,|3h|time"},
		"no canary yet": {func(p *plot) { p.Trials = []onTrial{{ID: "R2", Images: 1}} },
			"canary|R2 is tried in one process first, 1 image waits||the others get it, if that goes well,||process"},
		"the guard watches": {func(p *plot) { p.Watched = []watchedOver{{"app", "R2", before, later, 3, true}} },
			"guard-window|the health guard watches 3 processes with R2|before|it is taken out if they crash with it, else the watch ends|3h|time"},
		"the guard observes": {func(p *plot) { p.Watched = []watchedOver{{"app", "R2", before, later, 1, false}} },
			"guard-window|the health guard watches 1 process with R2|before|it is told if they crash with it, and the watch ends|3h|time"},
		"held": {hold(func(*heldBack) {}),
			"held|R2 is held on this device; open because of it: CVE-2026-0001|before|it stays out until hotpatch release-hold; a newer one comes by itself||operator"},
		"held by the policy": {hold(func(h *heldBack) { h.Policy = true }),
			"held|R2 is held on this device; open because of it: CVE-2026-0001|before|it stays out until the policy lets it in; a newer one comes by itself||policy"},
		"held by the guard": {hold(func(h *heldBack) { h.Guard = true }),
			"guard|the health guard took R2 out: R2 is held on this device; open because of it: CVE-2026-0001|before|it stays out until hotpatch release-hold; a newer one comes by itself||operator"},
		"paused": {func(p *plot) { p.Paused, p.PausedAt = pausedByOperator, before },
			"paused|paused by the operator|before|nothing new is applied until hotpatch resume||operator"},
		"holds may be lost": {func(p *plot) { p.Lost = before },
			"state-damaged|holds may be lost with a damaged state|before|nothing new is applied until hotpatch resume||operator"},
		"deferred": {waits("deferred", "the policy defers it until …", later),
			"waiting|R2 (critical) is not taken yet: the policy defers it|before|it comes by itself|3h|time"},
		"deferred, and paused": {both(waits("deferred", "…", later), func(p *plot) { p.Paused, p.PausedAt = pausedByOperator, before }),
			"paused|paused by the operator|before|nothing new is applied until hotpatch resume||operator\n" +
				"waiting|R2 (critical) is not taken yet: the policy defers it|before|it comes after hotpatch resume, at the soonest|3h|operator"},
		"not before": {waits("not-before", "its publisher releases it on …", later),
			"waiting|R2 (critical) is not taken yet: its publisher has set its day|before|it comes by itself|3h|time"},
		"returns": {waits("returns", "…", later),
			"waiting|R2 (critical) is not taken yet: its publisher has halted and released it again and again|before|it comes by itself|3h|time"},
		"approval": {waits("not-approved", "the policy's approve does not list it", time.Time{}),
			"waiting|R2 (critical) is not taken yet: the policy's approve does not list it|before|it comes when the policy approves it, or with hotpatch install R2||approval"},
		"manual": {waits("manual", "by hand", time.Time{}), "waiting|R2 (critical) is not taken yet: by hand|before|it comes with hotpatch install R2||approval"},
		"ring":   {waits("ring", "10 %", time.Time{}), "waiting|R2 (critical) is not taken yet: 10 %|before|it comes when its publisher rolls it out further||publisher"},
		"halted": {waits("halted", "slow", time.Time{}),
			"waiting|R2 (critical) is not taken yet: slow|before|it comes when its publisher releases it again, or a newer one does||publisher"},
		"fetch":    {waits("fetch", "no such file", later), "waiting|R2 (critical) is not taken yet: no such file|before|it is fetched again|3h|time"},
		"feature":  {waits("feature", "x", time.Time{}), "waiting|R2 (critical) is not taken yet: x|before|another release, or a newer hotpatchd, is needed||publisher"},
		"rollback": {waits("rollback", "x", time.Time{}), "waiting|R2 (critical) is not taken yet: x|before|it stays out: a newer one was in force; hotpatch install R2 takes it all the same||operator"},
		"a baseline that waits": {func(p *plot) {
			p.Waits = []wait{{Product: "app", ID: "B1", Kind: release.KindBaseline, Why: reason{"manual", "by hand"}, Since: before}}
		}, "waiting|the baseline B1 is not taken yet: by hand|before|it comes with hotpatch install B1||approval"},
		"outside hours": {func(p *plot) { p.Hours = hoursWait{2, before, later} }, "hours|2 images wait for the policy's hours|before|work begins|3h|time"},
		"loading":       {func(p *plot) { p.Loading = []string{"R2"} }, "loading|R2 is being fetched and verified||it is applied as soon as it is||time"},
		"busy":          {images(control.Busy, control.RemedyWait, later), "busy|2 images in 1 process are busy|before|tried again|3h|process"},
		"denied":        {images(control.Blocked, control.RemedyPolicy, time.Time{}), "blocked|2 images in 1 process are blocked|before|nothing by itself: stays so until somebody lets the daemon in||policy"},
		"denied by the policy": {both(images(control.Blocked, control.RemedyPolicy, time.Time{}), func(p *plot) { p.Images[0].Kept = keptByDeny }),
			"blocked|2 images in 1 process are blocked|before|nothing by itself: stays so until deny is changed||policy"},
		"kept by the guard": {both(images(control.Unpatched, control.RemedyPolicy, time.Time{}), func(p *plot) { p.Images[0].Kept = keptByGuard }),
			"unpatched|2 images in 1 process are unpatched|before|nothing by itself: stays so until hotpatch release-hold of the release, or a newer one||operator"},
		"out of scope": {both(images(control.Blocked, control.RemedyPolicy, time.Time{}), func(p *plot) { p.Images[0].Kept = keptByScope }),
			"blocked|2 images in 1 process are blocked|before|nothing by itself: stays so until [repository] images says otherwise||configuration"},
		"halted, and in force": {func(p *plot) { p.Halted = []haltedHere{{"app", "R2", "its publisher halted it: slow", before}} },
			"halted|R2 is in force, and its publisher halted it: slow|before|it stays where it is; a newer one replaces it||publisher"},
		"older file":  {images(control.Blocked, control.RemedyRestartProcess, time.Time{}), "blocked|2 images in 1 process are blocked|before|nothing by itself: a restart of the process ends it||end"},
		"failed":      {images(control.Failed, control.RemedyRestartDevice, time.Time{}), "failed|2 images in 1 process are failed|before|nothing by itself: a restart of the device ends it||restart"},
		"drifted":     {images(control.Drifted, control.RemedyAuthor, time.Time{}), "drifted|2 images in 1 process are drifted|before|nothing by itself: a release that fits ends it||publisher"},
		"needs files": {images(control.Blocked, control.RemedyBaseline, time.Time{}), "blocked|2 images in 1 process are blocked|before|nothing by itself: the baseline ends it||restart"},
		"offline": {trouble(repository.CodeOffline, true, later),
			"repository|it is away|before|from 2026-11-22T15:00:00Z on this is called wrong; it is asked again|4m|network"},
		"offline for too long": {trouble(repository.CodeOffline, true, before), "repository|it is away|before|it is asked again|4m|network"},
		"tampering":            {trouble(repository.CodeSignature, false, time.Time{}), "repository|it is away|before|it is asked again|4m|publisher"},
		"clock":                {trouble(repository.CodeClock, false, time.Time{}), "repository|it is away|before|it is asked again|4m|configuration"},
		"no root": {both(trouble(repository.CodeConfig, false, time.Time{}), func(p *plot) { p.Repository.Polled = false }),
			"repository|it is away|before|nothing new comes until the configuration is mended and the daemon restarted||configuration"},
		"no repository": {func(p *plot) { p.Repository = repositoryPlot{} },
			"no-repository|no repository is configured||nothing comes until one is, or with hotpatch install FILE||configuration"},
		"expired": {func(p *plot) { p.Repository.Ended = before },
			"expired|the repository's metadata has ended|before|nothing new is applied until its publisher signs anew; it is asked again|4m|publisher"},
		"expired while away": {both(trouble(repository.CodeOffline, true, before), func(p *plot) { p.Repository.Ended = before }),
			"expired|the repository's metadata has ended|before|nothing new is applied until its publisher signs anew; it is asked again|4m|network\n" +
				"repository|it is away|before|it is asked again|4m|network"},
		"wrong policy": {func(p *plot) { p.Refused, p.Good = before, noon.Add(-40*24*time.Hour) },
			"policy|the policy is refused|before|the last good one, in force since 2026-10-13T12:00:00Z, stays; the file is read again when it changes||policy"},
		"wrong policy from the start": {func(p *plot) { p.Refused = before },
			"policy|the policy is refused|before|there was none before, so that the device is not enrolled; the file is read again when it changes||policy"},
		"first look": {func(p *plot) { p.Scanned = false }, "scan|the processes have not all been looked at yet||they are looked at now||time"},
	} {
		p := quietPlot()
		c.change(&p)
		names := map[time.Time]string{{}: "", before: "before", noon: "now", later: "3h", p.Looks: "40m", noon.Add(4 * time.Minute): "4m"}
		var got []string
		for _, x := range story(p) {
			if x.Code == "poll" && name != "nothing to do" && name != "being asked" {
				continue
			}
			at := func(t control.Time) string {
				if s, ok := names[t.Time]; ok {
					return s
				}
				return t.Format("2 Jan 2006")
			}
			got = append(got, strings.Join([]string{x.Code, x.What, at(x.Since), x.Next, at(x.At), x.WaitsFor}, "|"))
			if !x.Scope.Public || x.What == "" || x.Next == "" || x.At.IsZero() && x.WaitsFor == "" {
				t.Errorf("%s: half a story: %+v", name, x)
			}
		}
		if text := strings.Join(got, "\n"); text != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, text, c.want)
		}
	}
}

// What a chapter tells of is not counted again among the images; the rest is
// grouped by what ends it, and stands since the first of it.
func TestOpenImages(t *testing.T) {
	im := func(state control.ImageState, code string, remedy control.Remedy, ago time.Duration) control.Image {
		return control.Image{State: state, ReasonCode: code, Reason: byDeny + ": x", Remedy: remedy, Since: control.At(noon.Add(-ago))}
	}
	d := control.Processes{Processes: []control.Process{
		{Images: []control.Image{im(control.Blocked, "denied", control.RemedyPolicy, time.Hour), im(control.Blocked, "denied", control.RemedyPolicy, 2*time.Hour),
			im(control.Patched, "", "", time.Hour), im(control.OtherBuild, "identity", control.RemedyAuthor, time.Hour)}},
		{Images: []control.Image{im(control.Blocked, "denied", control.RemedyPolicy, time.Minute), im(control.Busy, "stack", control.RemedyWait, time.Minute)}},
		{Images: []control.Image{im(control.Unpatched, "held", control.RemedyPolicy, time.Hour), im(control.PendingImage, "canary", control.RemedyWait, time.Hour),
			im(control.Blocked, "older-file", control.RemedyRestartProcess, time.Hour), im(control.Blocked, "out-of-scope", control.RemedyPolicy, time.Hour)}},
	}}
	soon, old := noon.Add(time.Second), noon.Add(-50*time.Hour)
	got := openOf(d, map[control.ImageState]time.Time{control.Busy: soon}, func(s control.ImageState) time.Time {
		if s == control.Blocked {
			return old // said before the daemon was started
		}
		return time.Time{}
	})
	want := []openImages{
		{control.Busy, control.RemedyWait, 1, 1, noon.Add(-time.Minute), soon, ""},
		{control.Blocked, control.RemedyPolicy, 3, 2, old, time.Time{}, keptByDeny},
		{control.Blocked, control.RemedyPolicy, 1, 1, old, time.Time{}, keptByScope},
		{control.Blocked, control.RemedyRestartProcess, 1, 1, old, time.Time{}, ""},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestSinces(t *testing.T) {
	at := func(h int) time.Time { return noon.Add(time.Duration(h) * time.Hour) }
	s := newSinces(map[string]time.Time{"policy": at(-5), "over": at(-9)})
	// Before the first look at everything nothing is taken to have ended.
	if got := s.of("policy", at(0), true); !got.Equal(at(-5)) {
		t.Errorf("a restart makes it begin at %s", got)
	}
	if keep, news := s.end(true); news || len(keep) != 2 {
		t.Errorf("an early round: %v, news %t", keep, news)
	}
	s.of("policy", at(1), true)
	s.of("busy", at(1), false)
	keep, news := s.end(false)
	if !news || len(keep) != 1 || !keep["policy"].Equal(at(-5)) {
		t.Errorf("kept: %v, news %t", keep, news)
	}
	s.stored = keep
	if got := s.of("busy", at(2), false); !got.Equal(at(1)) {
		t.Errorf("what goes on begins at %s", got)
	}
	s.of("policy", at(2), true)
	if keep, news := s.end(false); news {
		t.Errorf("written again without news: %v", keep)
	}
	s.end(false) // none of it
	if got := s.of("policy", at(3), true); !got.Equal(at(3)) {
		t.Errorf("what had ended began at %s", got)
	}
	if got := s.of("policy", at(1), true); !got.Equal(at(1)) {
		t.Errorf("what began under a clock that was ahead began at %s", got)
	}
	for i := range 2 * maxSinces {
		s.of(strings.Repeat("x", i), at(3), true)
	}
	if len(s.at) > maxSinces {
		t.Errorf("%d times are kept", len(s.at))
	}
}

// What comes and goes with processes is not written to the disk each time.
func TestSettles(t *testing.T) {
	a := &Agent{sinces: newSinces(nil)}
	begun := noon
	for _, c := range []struct {
		now    time.Time
		stored bool
	}{{noon, false}, {noon.Add(settles - time.Second), false}, {noon.Add(settles), true}} {
		x := control.Attention{Code: string(control.Blocked), Text: c.now.String(), Since: control.At(c.now), Scope: control.Scope{Public: true}}
		a.sinceWhen(&x, c.now)
		if !x.Since.Equal(begun) {
			t.Errorf("at %s it stands since %s", c.now, x.Since)
		}
		if keep, _ := a.sinces.end(false); len(keep) > 0 != c.stored {
			t.Errorf("at %s %v is stored", c.now, keep)
		}
	}
	own := control.Attention{Code: "held", Since: control.At(noon.Add(-time.Hour)), Scope: control.Scope{Public: true}}
	if a.sinceWhen(&own, noon); !own.Since.Equal(noon.Add(-time.Hour)) {
		t.Errorf("what knows its beginning stands since %s", own.Since)
	}
}

func TestStandings(t *testing.T) {
	v := func(result eligibility.Result, waived bool) eligibility.Verdict {
		return eligibility.Verdict{Checks: []eligibility.Check{{ID: "vbs", Result: result, Waived: waived, Found: "off"}}}
	}
	at := func(h int) time.Time { return noon.Add(time.Duration(h) * time.Hour) }
	stands := map[eligibility.ID]checkStands{}
	for i, c := range []struct {
		v             eligibility.Verdict
		since, open   time.Time
		opened, ended bool
	}{
		{v(eligibility.Pass, false), at(0), time.Time{}, false, false},
		{v(eligibility.Fail, false), at(1), at(1), true, false},
		{v(eligibility.Fail, false), at(1), at(1), false, false},
		{v(eligibility.Unknown, false), at(3), at(1), false, false}, // another result, the same failure
		{v(eligibility.Fail, true), at(4), time.Time{}, false, true},
		{v(eligibility.Fail, false), at(5), at(5), true, false},
		{v(eligibility.Pass, false), at(6), time.Time{}, false, true},
	} {
		next, opened, ended := standings(stands, c.v, at(i))
		if s := next["vbs"]; !s.Since.Equal(c.since) || !s.Open.Equal(c.open) || len(opened) > 0 != c.opened || len(ended) > 0 != c.ended {
			t.Errorf("%d: %+v, opened %v, ended %v", i, s, opened, ended)
		}
		stands = next
	}
	ahead := map[eligibility.ID]checkStands{"vbs": {Result: eligibility.Fail, Since: at(9), Open: at(8)}}
	next, opened, _ := standings(ahead, v(eligibility.Fail, false), at(1))
	if s := next["vbs"]; !s.Since.Equal(at(1)) || !s.Open.Equal(at(1)) || len(opened) > 0 {
		t.Errorf("what began under a clock that was ahead: %+v, opened %v", s, opened)
	}
}
