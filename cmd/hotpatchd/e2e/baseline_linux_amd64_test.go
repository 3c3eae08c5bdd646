package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

const bootID = "/proc/sys/kernel/random/boot_id" // random(4)

// reboots has the next daemon of this namespace read another boot id, as after a
// restart of the device. Everything that ran must be over.
func reboots(t *testing.T, dir string, n int) {
	t.Helper()
	if !private() {
		need(t, "the right to make namespaces and mount")
	}
	file := filepath.Join(dir, fmt.Sprint("boot-", n))
	if err := os.WriteFile(file, fmt.Appendf(nil, "%08d-0000-4000-8000-000000000000\n", n), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(file, bootID, "", unix.MS_BIND, ""); err != nil {
		need(t, "a bind mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(bootID, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// wholeFiles publishes a release that brings fixtures to their places on this device.
func (d *device) wholeFiles(manifest string, files ...[3]string) {
	d.t.Helper()
	text := manifest + "[requires]\nos = [\"linux\"]\n"
	for _, f := range files {
		text += fmt.Sprintf("[[files]]\ndestination = %q\nfile = %q\nreplaces = [%q]\n", f[0], f[1], f[2])
	}
	m, contents, err := release.FromTOML([]byte(text), os.DirFS(filepath.Join(hosttest.Root(d.t), "testdata", "fixtures")))
	if err != nil {
		d.t.Fatal(err)
	}
	b, err := release.Write(m, contents)
	if err != nil {
		d.t.Fatal(err)
	}
	keys, err := repository.LoadKeys(d.path("keys"))
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := repository.Publish(d.path("repo"), keys, [][]byte{b}, repository.PublishOptions{Now: time.Now()}); err != nil {
		d.t.Fatal(err)
	}
}

// A baseline with the real daemon and real processes: staged, in force after a
// restart, and the device is back on the track by itself.
func TestBaseline(t *testing.T) {
	if !private() {
		need(t, "the right to make namespaces and mount")
	}
	d := newDevice(t, fix{"ACME-1", "acme", 1, []string{"mingw/app-ref-1.dll"}, ""})
	dll := d.path("opt/acme/app.dll")
	copyTo(t, hosttest.Fixture(t, "mingw/app.dll"), dll)
	start := func() *hosttest.Host {
		return hosttest.Start(t, hosttest.Options{DLL: dll, Call: "vuln", Spin: 1, Sleep: 1, Allow: []int{42, 43}})
	}
	old := start()
	d.start()
	d.becomes(old.PID, control.Patched)

	d.wholeFiles("id = \"ACME-B1\"\nproduct = \"acme\"\nkind = \"baseline\"\nmonth = \"2026-11\"\n",
		[3]string{dll, "plain/app.dll", "mingw/app.dll"})
	d.hotpatch(0, "check")
	d.until("a restart is required", func() bool { st := d.status(); return st.State == control.RestartRequired && st.RestartRequired })
	says(t, "status", d.hotpatch(0, "status").out, "RESTART-REQUIRED", "ACME-B1", "next restart")
	says(t, "list", d.hotpatch(0, "list").out, "ACME-B1", "staged")
	same := func(fixture string) {
		t.Helper()
		if string(read(t, dll)) != string(read(t, hosttest.Fixture(t, fixture))) {
			t.Fatalf("the file is not %s", fixture)
		}
	}
	same("mingw/app.dll")
	if im := d.image(old.PID); im == nil || im.State != control.Patched {
		t.Errorf("%+v", im)
	}

	d.kill() // a crash of the daemon is no restart of the device
	d.start()
	same("mingw/app.dll")
	d.stop()
	old.Healthy()
	old.Exit()

	reboots(t, d.dir, 1)
	early := start() // with the older file: it is there before the daemon
	d.start()
	same("plain/app.dll")
	d.becomes(early.PID, control.Patched)
	if st := d.status(); st.RestartRequired || st.Baseline.ID != "ACME-B1" || !st.Baseline.Current {
		t.Errorf("%+v, restart required %t", st.Baseline, st.RestartRequired)
	}
	next := start()
	if im := d.becomes(next.PID, control.Fixed); !strings.Contains(im.Reason, "ACME-B1") {
		t.Errorf("%+v", im)
	}

	hotpatch := "id = \"ACME-2\"\nproduct = \"acme\"\nbaseline = \"ACME-B1\"\nsequence = 1\ntitle = \"t\"\nunwind = \"none\"\n"
	d.wholeFiles(hotpatch+"[[images]]\nname = \"app.dll\"\nfile = \"plain/app-1.dll\"\n", [][3]string{}...)
	d.hotpatch(0, "check")
	if im := d.becomes(next.PID, control.Patched); im.Release != "ACME-2" {
		t.Errorf("%+v", im)
	}
	if v := next.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	// The release for the new file does not take the fix out of the older one.
	if im := d.image(early.PID); im == nil || im.State != control.Patched || im.Release != "ACME-1" || early.Value() != 43 {
		t.Errorf("%+v", im)
	}
	early.Healthy()
	early.Exit()

	a := d.hotpatch(0, "rollback", "ACME-B1")
	says(t, "rollback", a.out, "next restart")
	same("plain/app.dll")
	d.stop()
	next.Healthy()
	next.Exit()
	reboots(t, d.dir, 2)
	d.start()
	same("mingw/app.dll")
	last := start()
	d.becomes(last.PID, control.Patched)
	last.Healthy()
	left, err := filepath.Glob(d.path("opt/acme/.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
