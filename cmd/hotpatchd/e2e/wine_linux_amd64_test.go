package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// winapp is a running Windows program under Wine (testdata/winapp): a process
// with a real PE loader, whose threads call the function all the time.
type winapp struct {
	t      testing.TB
	pid    int // Linux's
	winPID int
	stdin  io.Writer
	lines  chan string
}

// startWinapp runs it in the prefix that scripts/wine gives.
func startWinapp(t testing.TB, dll string, spin, sleep, block int) *winapp {
	t.Helper()
	return startWinappIn(t, os.Environ(), dll, spin, sleep, block)
}

func startWinappIn(t testing.TB, env []string, dll string, spin, sleep, block int) *winapp {
	t.Helper()
	exe := windowsProgram(t, "x86_64-w64-mingw32-gcc", "winapp.c")
	return startWindows(t, env, exe, hosttest.Fixture(t, dll), "vuln", strconv.Itoa(spin), strconv.Itoa(sleep), strconv.Itoa(block), "42", "43", "44")
}

// windowsProgram builds one of testdata/winapp.
func windowsProgram(t testing.TB, compiler, source string) string {
	t.Helper()
	if os.Getenv("HOTPATCH_WINE") == "" {
		need(t, "Wine (scripts/wine shell go test ...)")
	}
	if _, err := exec.LookPath(compiler); err != nil {
		need(t, "%s (apt-get install gcc-mingw-w64-x86-64 g++-mingw-w64-x86-64)", compiler)
	}
	exe := filepath.Join(t.TempDir(), strings.TrimSuffix(source, filepath.Ext(source))+".exe")
	from := filepath.Join(hosttest.Root(t), "testdata", "winapp", source)
	if out, err := exec.Command(compiler, "-O2", "-static", "-o", exe, from).CombinedOutput(); err != nil {
		t.Fatalf("cannot build %s: %v\n%s", from, err, out)
	}
	return exe
}

// startWindows starts a program that says "ready PID" and answers lines.
func startWindows(t testing.TB, env []string, exe string, args ...string) *winapp {
	t.Helper()
	c := exec.Command(os.Getenv("HOTPATCH_WINE"), append([]string{exe}, args...)...)
	c.Env = env
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w := &winapp{t: t, pid: c.Process.Pid, stdin: stdin, lines: make(chan string, 16)}
	over := make(chan struct{})
	go func() {
		defer close(over)
		defer close(w.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			w.lines <- s.Text()
		}
	}()
	t.Cleanup(func() { c.Process.Kill(); <-over; c.Wait() })
	if line := w.line(); !strings.HasPrefix(line, "ready ") {
		t.Fatalf("the program says %q", line)
	} else if _, err := fmt.Sscanf(line, "ready %d", &w.winPID); err != nil {
		t.Fatalf("the program says %q", line)
	}
	return w
}

func (w *winapp) line() string {
	w.t.Helper()
	select {
	case s, ok := <-w.lines:
		if !ok {
			w.t.Fatal("the program ended")
		}
		return strings.TrimSpace(s)
	case <-time.After(patience):
		w.t.Fatal("the program does not answer")
	}
	return ""
}

// winState is what the program says of itself.
type winState struct{ value, calls, wrong, faults, sleeps, waits int64 }

func (w *winapp) state() (s winState) {
	w.t.Helper()
	fmt.Fprintln(w.stdin, "state")
	line := w.line()
	if _, err := fmt.Sscanf(line, "%d calls %d wrong %d faults %d sleeps %d waits %d", &s.value, &s.calls, &s.wrong, &s.faults, &s.sleeps, &s.waits); err != nil {
		w.t.Fatalf("the program says %q", line)
	}
	return s
}

// runs waits until every kind of its threads has done more work.
func (w *winapp) runs(d *device) {
	w.t.Helper()
	from := w.state()
	d.until("the Windows program runs on", func() bool {
		s := w.state()
		return s.calls > from.calls && s.sleeps > from.sleeps && s.waits > from.waits
	})
	if s := w.state(); s.wrong != 0 || s.faults != 0 {
		w.t.Errorf("the program counted %d wrong values, %d calls ended wrongly", s.wrong, s.faults)
	}
}

// A Windows program under Wine is patched from outside by the Linux daemon:
// real PE loader, many modules, imports bound by Wine.
func TestWineProcess(t *testing.T) {
	d := newDevice(t, appFix)
	w := startWinapp(t, "mingw/app.dll", 2, 5, 5)
	d.start()
	im := d.becomes(w.pid, control.Patched)
	t.Logf("patched in %d µs", im.PauseUS)
	if s := w.state(); s.value != 43 {
		t.Errorf("answers %d", s.value)
	}
	w.runs(d)
	late := startWinapp(t, "clang/app.dll", 1, 1, 1)
	d.becomes(late.pid, control.Patched)
	late.runs(d)
	if _, err := d.client.Rollback(context.Background(), control.RollbackRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*winapp{w, late} {
		d.becomes(w.pid, control.Unpatched)
		if s := w.state(); s.value != 42 {
			t.Errorf("answers %d after rollback", s.value)
		}
		w.runs(d)
	}
}

// From outside nobody can tell the program's unwinder of new frames: a release
// that needs it is refused by name, and the program is left as it is.
func TestWineProcessNeedsUnwinding(t *testing.T) {
	d := newDevice(t, fix{"THROW-1", "throw", 1, []string{"throw/throw-1.dll"}, "required"})
	exe := windowsProgram(t, "x86_64-w64-mingw32-g++", "winthrow.cpp")
	w := startWindows(t, os.Environ(), exe, hosttest.Fixture(t, "throw/throw.dll"))
	d.start()
	im := d.becomes(w.pid, control.Blocked)
	if im.ReasonCode != "unwind" || !strings.Contains(im.Reason, "unwind") {
		t.Errorf("%+v", im)
	}
	fmt.Fprintln(w.stdin, "state")
	if line := w.line(); !strings.HasPrefix(line, "42 ") {
		t.Errorf("the program says %q", line)
	}
}
