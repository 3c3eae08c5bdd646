package baseline

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"
)

// noSpace is what this system says of a full disk.
const noSpace = windows.ERROR_DISK_FULL

// pending is what the system will move at its next restart.
func pending(t *testing.T) string {
	t.Helper()
	k, err := registry.OpenKey(registry.LOCAL_MACHINE, `SYSTEM\CurrentControlSet\Control\Session Manager`, registry.QUERY_VALUE)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	list, _, err := k.GetStringsValue("PendingFileRenameOperations")
	if err == registry.ErrNotExist {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, "\n")
}

// A file with a second name, which would go on naming the old one, is refused.
func TestSecondName(t *testing.T) {
	d := newDisk(t)
	if err := os.Link(d.path("lib/app.dll"), d.path("lib/b.dll")); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"weigh": d.x.Weigh(d.set()), "stage": func() error { _, err := d.x.Stage(d.set(), "boot-1", noon); return err }()} {
		var r *Refusal
		if !errors.As(err, &r) || r.Code != CodeLink {
			t.Errorf("%s: %v, want code %s", what, err, CodeLink)
		}
	}
	d.is("old")
	d.tidy()
}

// The system itself moves the files: they are in its list, and where a restart
// can be had, under Wine by wineboot, it is found done after it.
func TestMovedAtRestart(t *testing.T) {
	d := newDisk(t)
	d.x.mover = systemMover()
	if _, err := d.x.Stage(d.set(), "boot-1", noon); err != nil {
		t.Fatal(err)
	}
	d.is("old")
	list := pending(t)
	for _, e := range d.x.Records()[0].Files {
		if !strings.Contains(list, e.staged()) || !strings.Contains(list, e.Destination) {
			t.Errorf("%s is not in the system's list:\n%s", e.Destination, list)
		}
	}
	boot, err := exec.LookPath("wineboot.exe")
	if err != nil || !underWine() {
		t.Skip("needs Wine, whose restart can be asked for")
	}
	if out, err := exec.Command(boot).CombinedOutput(); err != nil {
		t.Fatalf("wineboot: %v, %s", err, out)
	}
	r, err := d.x.Activate("acme", "boot-2", noon)
	if err != nil || r.Phase != Active {
		t.Fatalf("%+v, %v", r, err)
	}
	d.is("new")
	if _, err := d.x.Leave("acme", "boot-2", noon); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(boot).CombinedOutput(); err != nil {
		t.Fatalf("wineboot: %v, %s", err, out)
	}
	d.is("old")
	if _, err := d.x.Activate("acme", "boot-3", noon); err != nil {
		t.Fatal(err)
	}
	d.is("old")
	d.tidy()
}

// Taken back before the restart: nothing is moved, although the list names it.
func TestTakenBackBeforeRestart(t *testing.T) {
	d := newDisk(t)
	d.x.mover = systemMover()
	if _, err := d.x.Stage(d.set(), "boot-1", noon); err != nil {
		t.Fatal(err)
	}
	if err := d.x.Unstage("acme", noon); err != nil {
		t.Fatal(err)
	}
	boot, err := exec.LookPath("wineboot.exe")
	if err != nil || !underWine() {
		t.Skip("needs Wine, whose restart can be asked for")
	}
	if out, err := exec.Command(boot).CombinedOutput(); err != nil {
		t.Fatalf("wineboot: %v, %s", err, out)
	}
	d.is("old")
	d.tidy()
}

// underWine: its ntdll exports a function that Windows does not have.
func underWine() bool {
	return windows.NewLazySystemDLL("ntdll.dll").NewProc("wine_get_version").Find() == nil
}
