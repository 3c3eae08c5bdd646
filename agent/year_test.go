package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// year is a device through a year, in the time of a synctest bubble: its
// publisher, its people and its programs.
type year struct {
	*script
	ctx  context.Context
	rng  *rand.Rand
	disk string // the build that programs load when they start
	pids []int
	last int
	away bool      // there is no network, and the publisher is not at work
	sign time.Time // when the publisher signs anew
}

// population is how many programs run at any time.
const population = 50

// A year of a device: planned and unplanned baselines, one that is missed, a hotpatch out of
// band, one with which programs crash, one that is halted, weeks without a network, four
// restarts, and programs that come and go all the time. At the end everything
// runs what it should, and the history tells each step once.
func TestYear(t *testing.T) {
	if testing.Short() {
		t.Skip("needs some twenty seconds of a processor")
	}
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2027, 1, 1, 9, 0, 0, 0, time.UTC)))
		y := newYear(t)
		const (
			clang, mingw, plain = "clang/app.dll", "mingw/app.dll", "plain/app.dll"
			c1, c2, m1, m2, p1  = "clang/app-import-1.dll", "clang/app-import-2.dll", "mingw/app-import-1.dll", "mingw/app-import-2.dll", "plain/app-1.dll"
		)
		y.install(plain)
		y.baseline("B-01", "2027-01", clang, plain)
		y.begin()
		y.until(1, 14)
		y.holds(control.RestartRequired, "", "")
		y.restart(clang)

		y.until(2, 9)
		y.holds(control.UpToDate, "", "B-01")
		y.hotpatch("H-02", "2027-02", "B-01", 1, c1)
		y.until(2, 25)
		y.holds(control.Hotpatched, "H-02", "B-01")
		y.hotpatch("H-02-oob", "2027-02", "B-01", 2, c2) // out of band
		y.until(3, 9)
		y.holds(control.Hotpatched, "H-02-oob", "B-01")
		y.hotpatch("H-03", "2027-03", "B-01", 3, c1)
		if n := y.crashes("H-03"); n != 1 {
			t.Errorf("%d programs crashed before the guard acted, want the canary alone", n)
		}
		y.until(3, 10)
		y.holds(control.Held, "H-02-oob", "B-01")
		y.rollout("H-03", true, "it crashes")
		y.until(3, 16)
		y.hotpatch("H-03-oob", "2027-03", "B-01", 4, c2)
		y.until(4, 13)
		y.holds(control.Hotpatched, "H-03-oob", "B-01")

		// A baseline that this device misses: nobody restarts it.
		y.baseline("B-04", "2027-04", mingw, clang)
		y.until(5, 11)
		y.holds(control.RestartRequired, "H-03-oob", "B-01")
		y.hotpatch("H-05", "2027-05", "B-04", 1, m1)
		y.until(6, 8)
		y.holds(control.RestartRequired, "H-03-oob", "B-01")
		y.tells("restart-required", 4, 13, control.WaitsForRestart)
		// An unplanned one takes its place, and that of a hotpatch.
		y.baseline("B-06", "2027-06", plain, clang, mingw)
		y.until(6, 20)
		y.restart(plain)
		y.until(7, 13)
		y.holds(control.UpToDate, "", "B-06")
		y.baseline("B-07", "2027-07", clang, plain)
		y.until(7, 15)
		y.restart(clang)

		// A hotpatch that its publisher takes back; and weeks without a network.
		y.until(8, 10)
		y.hotpatch("H-08", "2027-08", "B-07", 1, c1)
		y.until(8, 12)
		y.holds(control.Hotpatched, "H-08", "B-07")
		y.rollout("H-08", true, "slow")
		y.until(8, 17)
		if st := y.status(); st.Release != nil || st.Coverage.Patched != 0 {
			t.Errorf("%v is in force, %d images patched, though it was halted", st.Release, st.Coverage.Patched)
		}
		y.hotpatch("H-08-oob", "2027-08", "B-07", 2, c2)
		y.until(8, 20)
		y.away = true
		y.must(y.doRepo([]string{"down"}))
		y.until(9, 10)
		y.holds(control.Hotpatched, "H-08-oob", "B-07")
		y.tells("repository", 8, 20, control.WaitsForNetwork)
		y.must(y.doRepo([]string{"up"}))
		y.away = false
		y.until(9, 14)
		y.hotpatch("H-09", "2027-09", "B-07", 3, c1)
		for range 10 { // offered again and again
			y.refresh()
			y.pause(24 * time.Hour)
		}

		y.until(10, 12)
		y.holds(control.Hotpatched, "H-09", "B-07")
		y.baseline("B-10", "2027-10", mingw, clang)
		y.until(10, 14)
		y.holds(control.RestartRequired, "H-09", "B-07")
		y.restart(mingw)
		y.until(11, 9)
		y.holds(control.UpToDate, "", "B-10")
		y.hotpatch("H-11", "2027-11", "B-10", 1, m1)
		y.until(12, 14)
		y.holds(control.Hotpatched, "H-11", "B-10")
		y.hotpatch("H-12", "2027-12", "B-10", 2, m2)
		y.until(12, 31)
		y.holds(control.Hotpatched, "H-12", "B-10")
		time.Sleep(time.Minute) // for what started just now
		st := y.status()
		if st.Coverage.Images != population || st.Coverage.Patched != population {
			t.Errorf("coverage at the end: %+v", st.Coverage)
		}
		y.told(`
baseline-staged B-01
baseline-activated B-01
baseline-proved B-01
in-force H-02
in-force H-02-oob
in-force H-03
guard H-03
in-force H-02-oob
in-force H-03-oob
baseline-staged B-04
baseline-unstaged B-04
baseline-staged B-06
baseline-activated B-06
out-of-force H-03-oob
baseline-proved B-06
baseline-staged B-07
baseline-activated B-07
baseline-proved B-07
in-force H-08
out-of-force H-08
in-force H-08-oob
check-failed
check-again
in-force H-09
baseline-staged B-10
baseline-activated B-10
out-of-force H-09
baseline-proved B-10
in-force H-11
in-force H-12
`)
		y.must(y.stop())
	})
}

func newYear(t *testing.T) *year {
	s := &script{sections: map[string]string{}, labels: map[string]int{}, traces: map[string]*trace{}}
	s.rig = newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1})
	s.cfg.Backend.ScanEvery = time.Hour // starts are told; more often makes the year longer, not fuller
	s.cfg.Repository.CheckEvery = 12 * time.Hour
	s.unheard = true
	s.write("policy.toml", strings.Replace(goodPolicy, `canary = "0s"`, `canary = "10m"`, 1))
	return &year{script: s, ctx: context.Background(), rng: rand.New(rand.NewPCG(7, 7))}
}

func (y *year) must(err error) {
	y.t.Helper()
	if err != nil {
		y.t.Fatalf("%s: %v", time.Now().Format(time.DateOnly), err)
	}
}

// install puts a build on the disk, as it was delivered.
func (y *year) install(build string) {
	y.must(y.doPlace([]string{"app.dll", build}))
	y.disk = build
}

// begin starts the daemon and the programs.
func (y *year) begin() {
	y.must(y.script.start())
	for len(y.pids) < population {
		y.run()
	}
}

func (y *year) run() {
	y.last++ // no number comes twice
	id, err := y.m.Start(sim.Process{PID: y.last, Exe: fmt.Sprintf("/opt/acme/acme-%d", y.rng.IntN(5)), Modules: []sim.Module{{File: "kernel32.dll"}, {File: y.disk}}})
	y.must(err)
	y.pids = append(y.pids, id.PID)
}

// restart restarts the device: everything ends, and begins with what is on the disk then.
func (y *year) restart(build string) {
	y.must(y.script.stop())
	for _, pid := range y.pids {
		y.must(y.m.Exit(pid))
	}
	y.pids = nil
	y.must(y.doReboot(nil))
	y.must(y.script.start())
	if err := y.wantFile([]string{"app.dll", build}); err != nil {
		y.must(err)
	}
	y.disk = build
	for len(y.pids) < population {
		y.run()
	}
}

// until lives on to the morning of a day.
func (y *year) until(month time.Month, day int) {
	y.pause(time.Until(time.Date(2027, month, day, 9, 0, 0, 0, time.UTC)))
}

// pause is life going on: five programs a day end and others start, and the
// publisher's job signs once a week.
func (y *year) pause(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Until(end), 4*time.Hour))
		if y.rng.IntN(6) < 5 {
			y.replace(y.pids[y.rng.IntN(len(y.pids))], 0)
		}
		if !y.away && time.Now().After(y.sign) {
			y.refresh()
			y.sign = time.Now().Add(7 * 24 * time.Hour)
		}
	}
	synctest.Wait()
}

// replace ends a program, with a signal if it crashes, and starts another.
func (y *year) replace(pid, signal int) {
	y.must(y.m.ExitWith(pid, 0, signal))
	y.pids = slices.DeleteFunc(y.pids, func(p int) bool { return p == pid })
	y.run()
}

// crashes is a day on which programs crash half a minute after a release came
// into them. It tells how many did.
func (y *year) crashes(id string) (n int) {
	for range 24 * 120 {
		time.Sleep(30 * time.Second)
		synctest.Wait()
		list, err := y.life.agent.Processes(y.ctx, healthGuard, control.ProcessQuery{})
		y.must(err)
		for _, p := range list.Processes {
			if slices.ContainsFunc(p.Images, func(im control.Image) bool { return im.Release == id && im.State == control.Patched }) {
				y.replace(p.PID, 11)
				n++
			}
		}
	}
	return n
}

func (y *year) status() *control.Status {
	synctest.Wait()
	st, err := y.life.agent.Status(y.ctx, healthGuard)
	y.must(err)
	return st
}

// holds asks for the device's state, the release in force and the baseline.
func (y *year) holds(state control.State, id, baseline string) {
	y.t.Helper()
	st := y.status()
	got := ""
	if st.Release != nil {
		got = st.Release.ID
	}
	if st.State != state || got != id || st.Baseline.ID != baseline {
		y.t.Errorf("%s: %s with %q on %q, want %s with %q on %q; %+v\n%+v", time.Now().Format(time.DateOnly), st.State, got, st.Baseline.ID, state, id, baseline, st.Coverage, st.Attention)
	}
}

// tells asks the story for what stands since a day, and for what it waits.
func (y *year) tells(code string, month time.Month, day int, waits string) {
	y.t.Helper()
	st := y.status()
	i := slices.IndexFunc(st.Story, func(c control.Chapter) bool { return c.Code == code })
	if i < 0 || st.Story[i].WaitsFor != waits {
		y.t.Errorf("%s: no story of %s: %+v", time.Now().Format(time.DateOnly), code, st.Story)
		return
	}
	from := time.Date(2027, month, day, 9, 0, 0, 0, time.UTC)
	if since := st.Story[i].Since; since.Before(from) || since.After(from.Add(24*time.Hour)) {
		y.t.Errorf("%s: %s stands since %s, want %s", time.Now().Format(time.DateOnly), code, since, from)
	}
}

// hotpatch publishes one. Its image is one of the fixtures with another sequence number.
func (y *year) hotpatch(id, month, baseline string, sequence uint32, file string) {
	m := &release.Manifest{Format: release.Format, Kind: release.KindHotpatch, ID: id, Product: "app", Month: month, Baseline: baseline, Sequence: sequence}
	b, err := os.ReadFile(filepath.Join(fixtures, file))
	y.must(err)
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	y.must(err)
	h, err := im.HotPatch()
	y.must(err)
	s := im.SectionAt(h.RVA)
	binary.LittleEndian.PutUint32(b[s.RawOffset+h.RVA-s.RVA+8:], sequence)
	side, err := os.ReadFile(filepath.Join(fixtures, file+".base.json"))
	y.must(err)
	base, err := release.ReadBase(side)
	y.must(err)
	m.Images = []release.Image{{Name: "app.dll", Arch: release.ArchOf(base.Machine), File: "images/app.dll", Size: int64(len(b)), SHA256: sum(b), Base: base.Identity}}
	out, err := release.Write(m, map[string][]byte{"images/app.dll": b})
	y.must(err)
	y.must(y.publishBytes(out))
}

// baseline publishes one that replaces any of some builds.
func (y *year) baseline(id, month, build string, old ...string) {
	m := &release.Manifest{Format: release.Format, Kind: release.KindBaseline, ID: id, Product: "app", Month: month, Sequence: 1}
	contents := map[string][]byte{}
	y.must(y.wholeFiles(m, contents, []string{"app.dll=" + old[0] + ":" + build}))
	for _, o := range old[1:] {
		m.Files[0].Replaces = append(m.Files[0].Replaces, sum(contentOf(o)))
	}
	b, err := release.Write(m, contents)
	y.must(err)
	y.must(y.publishBytes(b))
}

func (y *year) rollout(id string, halt bool, why string) {
	_, err := repository.SetRollout(y.path("repo"), y.keys, id, repository.RolloutChange{Halt: &halt, Undo: &halt, Reason: &why}, repository.PublishOptions{Now: y.now()})
	y.must(err)
}

// refresh signs the same anew, as a publisher's job does.
func (y *year) refresh() {
	_, err := repository.Refresh(y.path("repo"), y.keys, repository.PublishOptions{Now: y.now()})
	y.must(err)
}

// told compares the history's steps with what they should be.
func (y *year) told(want string) {
	h, err := y.life.agent.History(y.ctx, healthGuard, 1<<20)
	y.must(err)
	var got []string
	times := map[string]int{}
	for _, e := range h.Entries {
		switch e.Action {
		case "patched", "undone", "over", "start", "stop":
			times[fmt.Sprint(e.Action, " ", e.Release, " in ", e.PID)]++
			continue
		}
		got = append(got, strings.TrimSpace(e.Action+" "+e.Release))
	}
	slices.Reverse(got)
	if strings.TrimSpace(want) != strings.Join(got, "\n") {
		y.t.Errorf("history:\n%s", strings.Join(got, "\n"))
	}
	for what, n := range times {
		if n > 1 && strings.HasPrefix(what, "patched ") && !strings.Contains(what, "H-02-oob") { // which came back once
			y.t.Errorf("%d times %s", n, what)
		}
	}
	if h.Broken != "" {
		y.t.Errorf("the history's chain is broken: %s", h.Broken)
	}
}
