package e2e

import (
	"strings"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// Programs that crash with a release as soon as they run it: the daemon learns
// from the system how they ended, and takes the release out of the one that
// does not. What starts later does not get it.
func TestWindowsGuard(t *testing.T) {
	w := newWindows(t, appFix)
	w.eligible()
	w.configure("file:///Z:"+w.fleet.path("repo"), `"vbs", "baseline"`)
	w.fleet.policy("waive = [\"vbs\", \"baseline\"]\ncanary = \"0s\"\n")
	exe := windowsProgram(t, "x86_64-w64-mingw32-gcc", "winapp.c")
	start := func(deadly string) *winapp {
		return startWindows(t, append(w.environment(), "WINAPP_DEADLY="+deadly), exe, hosttest.Fixture(t, "mingw/app.dll"), "vuln", "1", "1", "1", "42", "43", "44")
	}
	healthy := start("-1")
	var victims []*winapp
	for range 3 {
		victims = append(victims, start("43"))
	}
	defer w.foreground()()
	for _, v := range victims {
		if line := v.line(); !strings.HasPrefix(line, "error exception c0000005") {
			t.Fatalf("the program says %q", line)
		}
	}
	w.becomes(control.Unpatched, healthy)
	if s := healthy.state(); s.value != 42 {
		t.Errorf("it answers %d", s.value)
	}
	healthy.runs(w.fleet)
	im := imageOf(w.processes(), healthy)
	if im == nil || im.ReasonCode != "guard" || !strings.Contains(im.Reason, "3 of") || !strings.Contains(im.Reason, "ended with status 0xc0000005") {
		t.Errorf("%+v", im)
	}
	history := w.hotpatch(0, "history")
	if !strings.Contains(history, "guard") {
		t.Errorf("history:\n%s", history)
	}
	t.Logf("\n%s\n%s", w.hotpatch(0, "status"), history)
	later := start("43")
	w.becomes(control.Unpatched, later)
	later.runs(w.fleet)
}
