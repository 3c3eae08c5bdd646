package e2e

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// A device without any repository, an author elsewhere, and a file that is
// carried between them: the three programs as people use them.
func TestOfflineExport(t *testing.T) {
	d := newDevice(t, firstFix)
	set := d.set
	set.url = ""
	d.configure(set)
	d.launch()
	d.until("the daemon answers", func() bool { return d.run(nil, "hotpatch", "--socket", d.set.socket, "status").code != 5 })
	export := func(name string, ids ...string) string {
		t.Helper()
		file := d.path(name)
		if a := d.run(nil, "hotpatch-build", append([]string{"export", "--repo", d.path("repo"), "-o", file}, ids...)...); a.code != 0 {
			t.Fatal(a.err)
		}
		return file
	}
	first := export("first.export")
	var hosts []*hosttest.Host
	for _, mapped := range []string{"file", "anon"} {
		hosts = append(hosts, hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, "demo/demo.dll"), Map: mapped, Call: "answer", Spin: 1, Sleep: 1, Allow: []int{42, 43, 44}}))
	}
	answer := func(want int) {
		t.Helper()
		for _, h := range hosts {
			d.becomes(h.PID, control.Patched)
			if v := h.Value(); v != want {
				t.Errorf("process %d answers %d, not %d", h.PID, v, want)
			}
			h.Healthy()
		}
	}
	says(t, "install", d.hotpatch(0, "install", first).out, "INSTALLED", "ACME-1")
	answer(43)

	d.publish(nextFix)
	second := export("second.export", "ACME-2")
	says(t, "install", d.hotpatch(0, "install", second).out, "INSTALLED", "ACME-2")
	answer(44)
	says(t, "install of an older export", d.hotpatch(1, "install", first).err, "the file is refused", "trusted version", "hint: bring the newest export")

	// Killed and started again: no network, no file, and it goes on.
	d.kill()
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	d.launch()
	hosts = append(hosts, hosttest.Start(t, hosttest.Options{DLL: hosttest.Fixture(t, "demo/demo.dll"), Call: "answer", Spin: 1, Sleep: 1, Allow: []int{42, 44}}))
	answer(44)
	says(t, "status", d.hotpatch(0, "status").out, "none configured", "good until")

	d.refresh(time.Now().Add(-40 * 24 * time.Hour))
	a := d.run(nil, "hotpatch-build", "export", "--repo", d.path("repo"), "-o", d.path("late.export"))
	if a.code != 1 {
		t.Errorf("an export of what has ended: exit code %d", a.code)
	}
	says(t, "export of what has ended", a.err, "ended", "hint: hotpatch-build refresh")
	if _, err := os.Stat(d.path("late.export")); err == nil {
		t.Error("it was written all the same")
	}
	answer(44)
}

// Unpacked by anybody's zip program, an export is a repository on a stick.
func TestOfflineStick(t *testing.T) {
	unzip, err := exec.LookPath("unzip")
	if err != nil {
		need(t, "unzip (apt-get install unzip)")
	}
	d := newDevice(t, firstFix)
	set := d.set
	set.url = "file://" + d.path("stick")
	d.configure(set)
	if a := d.run(nil, "hotpatch-build", "export", "--repo", d.path("repo"), "-o", d.path("x.export")); a.code != 0 {
		t.Fatal(a.err)
	}
	if out, err := exec.Command(unzip, "-q", d.path("x.export"), "-d", d.path("stick")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.start()
	d.demos().answer(d, control.Patched, 43)
	if err := os.Rename(d.path("stick"), d.path("pocket")); err != nil {
		t.Fatal(err)
	}
	says(t, "check", d.hotpatch(1, "check").err, "there is no folder", "stick")
	if e := d.status().Repository.Error; e == nil || e.Code != "offline" {
		t.Errorf("%+v", e)
	}
	if st := d.status(); len(st.Attention) != 0 {
		t.Errorf("a stick that is out raises an alarm: %+v", st.Attention)
	}
	d.hotpatch(0, "status", "--check")
}
