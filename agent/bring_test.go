package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/sim"
)

// islandRig is a device without any repository, and a publisher elsewhere.
func islandRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 5, Processes: []sim.Process{
		{PID: sweepPID, Exe: "/opt/acme/acme-server", Modules: []sim.Module{{File: "kernel32.dll"}, {File: "mingw/app.dll"}, {File: "demo/demo.dll"}}}}})
	r.cfg.Repository.URL = ""
	r.release(t, "R1", "app", 1, "mingw/app-ref-1.dll")
	must(t, r.start())
	t.Cleanup(func() {
		if r.life == nil {
			return
		}
		if err := errors.Join(r.judge(), r.stop()); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) release(t *testing.T, id, product string, sequence uint32, file string) {
	t.Helper()
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: id, Product: product, Sequence: sequence, CVEs: []string{"CVE-2026-0001"}, Severity: "critical"}, image{file}))
}

func (r *rig) export(t *testing.T, ids ...string) []byte {
	t.Helper()
	b, _, err := repository.Export(r.path("repo"), ids, r.now())
	must(t, err)
	return b
}

// bring installs a file, as an operator does who came with a stick.
func (r *rig) bring(b []byte) (*control.Change, error) {
	return r.life.client.Install(context.Background(), control.InstallRequest{File: b}, nil)
}

func (r *rig) patched(t *testing.T, images int, ids ...string) {
	t.Helper()
	must(t, r.until(func() string {
		st, err := r.life.client.Status(context.Background())
		if err != nil || st.Coverage.Patched != images || len(st.Releases) != len(ids) {
			return fmt.Sprintf("%+v %v", st, err)
		}
		for _, id := range ids {
			found := false
			for _, in := range st.Releases {
				found = found || in.ID == id
			}
			if !found {
				return fmt.Sprintf("%s is not in force: %+v", id, st.Releases)
			}
		}
		return ""
	}))
}

func refusedBring(t *testing.T, r *rig, b []byte, words string) {
	t.Helper()
	_, err := r.bring(b)
	var e *control.Error
	if !errors.As(err, &e) || e.Code != control.CodeConflict || !strings.Contains(e.Text, "the file is refused: ") ||
		!strings.Contains(e.Text+"; "+e.Hint, words) || e.Hint == "" {
		t.Errorf("%+v, wanted %q", err, words)
	}
}

// An island: all that a device ever learns comes as files, and what it learnt
// once it does not forget.
func TestInstallExport(t *testing.T) {
	r := islandRig(t)
	first := r.export(t)
	ch, err := r.bring(first)
	if err != nil || !ch.Changed || ch.Release != "R1" || ch.Coverage.Patched != 1 {
		t.Fatalf("%+v %v", ch, err)
	}
	if ch, err = r.bring(first); err != nil || ch.Changed {
		t.Errorf("again: %+v %v", ch, err)
	}
	r.release(t, "R2", "app", 2, "mingw/app-ref-2.dll")
	r.release(t, "D1", "demo", 1, "demo/demo-1.dll")
	second := r.export(t)
	if ch, err = r.bring(second); err != nil || !ch.Changed || ch.Coverage.Patched != 2 {
		t.Fatalf("%+v %v", ch, err)
	}
	r.patched(t, 2, "R2", "D1")
	// Another life, without cache: the floors are the store's.
	must(t, r.stop())
	must(t, os.RemoveAll(r.path("state/repository")))
	must(t, r.start())
	refusedBring(t, r, first, "but this device has trusted version")
	forged := append([]byte{}, second...)
	forged[len(forged)/2] ^= 1
	refusedBring(t, r, forged, "checksum")
	h, err := r.life.client.History(context.Background(), 100)
	must(t, err)
	if imports := strings.Count(fmt.Sprintf("%+v", h), "metadata and releases came as a file"); imports != 3 {
		t.Errorf("%d imports in the history", imports)
	}

	r.patched(t, 2, "R2", "D1")
	if _, err := r.bring(second); err != nil {
		t.Error(err)
	}

	// What has ended is taken no more, and what is applied stays.
	r.clock.Store(int64(40 * 24 * time.Hour))
	refusedBring(t, r, second, "bring a newer export")
	r.patched(t, 2, "R2", "D1")
	if st, err := r.life.client.Status(context.Background()); err != nil || st.Repository.Error != nil {
		t.Errorf("a device without a repository misses none: %+v %v", st, err)
	}
}

// An export of several releases lifts no hold; an order for one release does.
func TestExportRespectsHolds(t *testing.T) {
	r := islandRig(t)
	r.release(t, "R2", "app", 2, "mingw/app-ref-2.dll")
	if _, err := r.life.client.Hold(context.Background(), "R2", "no"); err != nil {
		t.Fatal(err)
	}
	ch, err := r.bring(r.export(t))
	if err != nil || ch.Release != "R1" || ch.Lifted {
		t.Fatalf("%+v %v", ch, err)
	}
	if ch, err = r.bring(r.export(t, "R2")); err != nil || ch.Release != "R2" || !ch.Lifted {
		t.Errorf("%+v %v", ch, err)
	}
}

// An export whose only news is a halt is taken over, and that is all there is to do.
func TestExportOfHalt(t *testing.T) {
	r := islandRig(t)
	r.release(t, "R2", "app", 2, "mingw/app-ref-2.dll")
	if ch, err := r.bring(r.export(t)); err != nil || ch.Release != "R2" {
		t.Fatalf("%+v %v", ch, err)
	}
	halt, why := true, "crashes in Kyoto"
	for _, undo := range []bool{false, true} {
		_, err := repository.SetRollout(r.path("repo"), r.keys, "R2", repository.RolloutChange{Halt: &halt, Undo: &undo, Reason: &why}, repository.PublishOptions{Now: r.now()})
		must(t, err)
		for _, export := range [][]byte{r.export(t), r.export(t, "R2")} {
			ch, err := r.bring(export)
			if err != nil || ch.Changed || !strings.Contains(ch.Text, "there is nothing to install: R2: its publisher halted it: crashes in Kyoto") {
				t.Fatalf("undo %v: %+v %v", undo, ch, err)
			}
			r.patched(t, 1, map[bool]string{false: "R2", true: "R1"}[undo])
		}
	}
}

// A stranger's export, and one that says of itself to be newer, are nobody's word.
func TestExportOfStranger(t *testing.T) {
	r := islandRig(t)
	_, err := repository.GenerateKeys(r.path("other-keys"))
	must(t, err)
	keys, err := repository.LoadKeys(r.path("other-keys"))
	must(t, err)
	b, err := r.container(&release.Manifest{ID: "R9", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"})
	must(t, err)
	_, err = repository.Publish(r.path("other"), keys, [][]byte{b}, repository.PublishOptions{Now: r.now()})
	must(t, err)
	export, _, err := repository.Export(r.path("other"), nil, r.now())
	must(t, err)
	refusedBring(t, r, export, "not signed by the keys that this device trusts")
	if st, err := r.life.client.Status(context.Background()); err != nil || st.State != control.Unknown {
		t.Errorf("%+v %v", st, err)
	}
}

// Being away alarms nobody for three days, counted over restarts; what hints at
// tampering alarms at once.
func TestAwayIsNoAlarm(t *testing.T) {
	r := patchedRig(t, 1)
	ctx := context.Background()
	must(t, os.Rename(r.path("repo"), r.path("away")))
	alarm := func() bool {
		t.Helper()
		must(t, r.pass())
		st, err := r.life.client.Status(ctx)
		must(t, err)
		for _, a := range st.Attention {
			if a.Code == "repository" || a.Code == "expires-soon" {
				return true
			}
		}
		return false
	}
	fails := func(code string) {
		t.Helper()
		r.life.client.Check(ctx)
		st, err := r.life.client.Status(ctx)
		must(t, err)
		if st.Repository.Error == nil || st.Repository.Error.Code != code || st.Repository.Error.Text == "" {
			t.Fatalf("%+v, wanted %s", st.Repository, code)
		}
	}
	for day, want := range []bool{false, false, false, true} {
		r.clock.Store(int64(time.Duration(day)*24*time.Hour + time.Minute))
		must(t, r.stop())
		must(t, r.start())
		fails(repository.CodeOffline)
		if got := alarm(); got != want {
			t.Errorf("day %d: alarm %v", day, got)
		}
	}
	must(t, os.Rename(r.path("away"), r.path("repo")))
	if _, err := r.life.client.Check(ctx); err != nil || alarm() {
		t.Errorf("back again: %v", err)
	}
	must(t, os.WriteFile(r.path("repo/metadata/timestamp.json"), []byte("{}"), 0o600))
	fails(repository.CodeDamaged)
	if !alarm() {
		t.Error("damage is kept quiet")
	}
}

// A device that comes home, or wakes in the morning, has what was published
// meanwhile at once and not at its next turn.
func TestHomeAgain(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 5, Processes: []sim.Process{
		{PID: sweepPID, Exe: "/opt/acme/acme-server", Modules: []sim.Module{{File: "demo/demo.dll"}}}}})
	r.release(t, "D1", "demo", 1, "demo/demo-1.dll")
	home := make(chan struct{})
	r.cfg.Repository.CheckEvery = 24 * time.Hour
	r.tune = func(a *Agent) {
		a.outside.spread = time.Millisecond
		a.o.HostEvents = func(ctx context.Context, tell func(string)) {
			select {
			case <-home:
				tell("the addresses of this machine have changed")
			case <-ctx.Done():
			}
		}
	}
	must(t, r.start())
	t.Cleanup(func() {
		if err := errors.Join(r.judge(), r.stop()); err != nil {
			t.Error(err)
		}
	})
	r.patched(t, 1, "D1")
	r.release(t, "D2", "demo", 2, "demo/demo-2.dll")
	must(t, r.pass())
	r.patched(t, 1, "D1")
	close(home)
	r.patched(t, 1, "D2")
}

// What wakes the machine brings the next check forward, but not at any rate.
func TestWokenAsksSoon(t *testing.T) {
	const least = 20 * time.Millisecond
	a := &Agent{outside: outside{soon: make(chan struct{}, 1), spread: 10 * time.Millisecond, least: least}}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a.outside.soon <- struct{}{}
	if !a.untilCheck(ctx, time.Hour) {
		t.Fatal("what woke the machine did not bring a check")
	}
	first := a.outside.woken
	a.outside.soon <- struct{}{}
	if !a.untilCheck(ctx, time.Hour) {
		t.Fatal("the second time it did not")
	}
	if gap := a.outside.woken.Sub(first); gap < least {
		t.Errorf("two checks within %s", gap)
	}
	over, end := context.WithCancel(context.Background())
	end()
	if a.untilCheck(over, time.Hour) {
		t.Error("the end was not noticed")
	}
}
