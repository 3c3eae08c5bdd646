package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

var appFix = fix{"ACME-1", "acme", 1, []string{"mingw/app-ref-1.dll", "clang/app-ref-1.dll", "plain/app-1.dll"}, ""}

// The main job with the real daemon: several builds of one image in a release,
// running processes, a later one, a restart, rollback and install again.
func TestEndToEnd(t *testing.T) {
	d := newDevice(t, appFix)
	gcc := app(t, hosttest.Options{Spin: 2, Sleep: 4, Block: 2})
	clang := app(t, hosttest.Options{DLL: "clang/app.dll", Map: "anon", Spin: 1, Sleep: 2})
	other := app(t, hosttest.Options{DLL: "other/app.dll", Spin: 1, Allow: []int{}})
	d.start()
	for _, h := range []*hosttest.Host{gcc, clang} {
		im := d.becomes(h.PID, control.Patched)
		if im.Release != "ACME-1" || im.PauseUS <= 0 {
			t.Errorf("process %d: %+v", h.PID, im)
		}
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
	}
	if im := d.becomes(other.PID, control.OtherBuild); im.Remedy != control.RemedyAuthor {
		t.Errorf("other build: %+v", im)
	}
	later := app(t, hosttest.Options{DLL: "plain/app.dll", Spin: 1})
	d.becomes(later.PID, control.Patched)
	if v := later.Value(); v != 43 {
		t.Errorf("later process answers %d", v)
	}
	if st := d.status(); st.State != control.Hotpatched || st.Release == nil || st.Release.ID != "ACME-1" {
		t.Errorf("state %s, release %+v", st.State, st.Release)
	}

	d.kill()
	for _, h := range []*hosttest.Host{gcc, clang, later} {
		h.Runs()
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d without the daemon", h.PID, v)
		}
	}
	d.start()
	v, err := d.client.Verify(context.Background())
	if err != nil || !v.OK || v.Images != 3 {
		t.Fatalf("verify after a crash: %+v, %v", v, err)
	}
	ch, err := d.client.Rollback(context.Background(), control.RollbackRequest{}, nil)
	if err != nil || !ch.Changed {
		t.Fatalf("rollback: %+v, %v", ch, err)
	}
	for _, h := range []*hosttest.Host{gcc, clang, later} {
		d.becomes(h.PID, control.Unpatched)
		if v := h.Value(); v != 42 {
			t.Errorf("process %d answers %d after rollback", h.PID, v)
		}
	}
	if st := d.status(); st.State != control.Held || len(st.Holds) != 1 {
		t.Errorf("state %s, holds %v after rollback", st.State, st.Holds)
	}
	if ch, err = d.client.Install(context.Background(), control.InstallRequest{ID: "ACME-1"}, nil); err != nil || !ch.Lifted {
		t.Fatalf("install: %+v, %v", ch, err)
	}
	for _, h := range []*hosttest.Host{gcc, clang, later} {
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d after install", h.PID, v)
		}
		h.Healthy()
	}
}

// The store is deleted while processes are patched, and one forks: everything
// is adopted from memory, and rollback reaches all.
func TestStoreLost(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{Spin: 2, Sleep: 2})
	d.start()
	d.becomes(h.PID, control.Patched)
	d.kill()
	child := h.Fork()
	if err := os.Remove(d.path("state/state.db")); err != nil {
		t.Fatal(err)
	}
	d.start()
	for _, x := range []*hosttest.Host{h, child} {
		d.becomes(x.PID, control.Patched)
	}
	late := h.Fork() // while the daemon runs
	d.becomes(late.PID, control.Patched)
	if _, err := d.client.Rollback(context.Background(), control.RollbackRequest{ID: "ACME-1"}, nil); err != nil {
		t.Fatal(err)
	}
	for _, x := range []*hosttest.Host{h, child, late} {
		d.becomes(x.PID, control.Unpatched)
		if v := x.Value(); v != 42 {
			t.Errorf("process %d answers %d after rollback", x.PID, v)
		}
	}
	h.Healthy()
}

// The daemon is killed at random moments while it patches and takes out:
// targets run on, no value is ever wrong, and after a restart every site is
// old or new as the record says.
func TestDaemonKilledAtAnyMoment(t *testing.T) {
	kills := 300
	if testing.Short() {
		kills = 30
	}
	d := newDevice(t, appFix)
	hosts := []*hosttest.Host{
		app(t, hosttest.Options{Spin: 1, FP: 1, Sleep: 3, Block: 2}),
		app(t, hosttest.Options{DLL: "clang/app.dll", Map: "anon", Spin: 1, Sleep: 2, Block: 1}),
	}
	patched := false
	for i := range kills {
		// Each life has something to do at once: what was out goes in, what was in goes out.
		if patched {
			d.policy("hold = [\"ACME-1\"]\n")
		} else {
			d.policy("")
		}
		patched = !patched
		d.launch()
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		d.kill()
		for _, h := range hosts {
			if !h.Alive() {
				t.Fatalf("kill %d: process %d is dead", i, h.PID)
			}
			if v := h.Value(); v != 42 && v != 43 {
				t.Fatalf("kill %d: process %d answers %d", i, h.PID, v)
			}
		}
	}
	for _, h := range hosts {
		h.Runs()
	}
	d.policy("")
	d.start()
	for _, h := range hosts {
		d.becomes(h.PID, control.Patched)
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
	}
	if v, err := d.client.Verify(context.Background()); err != nil || !v.OK || v.Images != len(hosts) {
		t.Errorf("verify: %+v, %v", v, err)
	}
	d.policy("hold = [\"ACME-1\"]\n")
	for _, h := range hosts {
		d.becomes(h.PID, control.Unpatched)
		if v := h.Value(); v != 42 {
			t.Errorf("process %d answers %d after the hold", h.PID, v)
		}
		h.Healthy()
	}
}
