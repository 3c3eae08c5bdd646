package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// Names that steer a terminal, forge a line, or are no text at all: programs
// and images of other users may have them.
const (
	evilProgram = "evil\x1b[2J\x1b]0;x\a\nTORN  all is lost\u202e"
	evilImage   = "demo\r\nblocked \x9b31m\xff.dll"
)

// A process with hostile names is patched like any other, and nothing it is
// called reaches a terminal, a log line or a document but as text.
func TestHostileNames(t *testing.T) {
	d := newDevice(t, firstFix)
	evil := d.path(evilProgram)
	copyTo(t, program(t, "hotpatchd"), evil)
	if err := os.Chmod(evil, 0o755); err != nil {
		t.Fatal(err)
	}
	copyTo(t, hosttest.Fixture(t, "demo/demo.dll"), d.path(evilImage))
	d.start()
	cmd := exec.Command(evil, "pe-host", "--image", d.path(evilImage), "--threads", "1", "--allow", "42,43")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); cmd.Wait() }()
	lines := bufio.NewScanner(out)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "ready") {
		t.Fatalf("not ready: %q", lines.Text())
	}
	pid := cmd.Process.Pid
	d.becomes(pid, control.Patched)

	screen := func(what, text string) {
		t.Helper()
		for _, r := range text {
			if r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) || r == unicode.ReplacementChar {
				t.Errorf("%s prints %q:\n%q", what, r, text)
				break
			}
		}
		for l := range strings.Lines(text) {
			if strings.HasPrefix(l, "TORN") || strings.HasPrefix(l, "blocked") {
				t.Errorf("%s prints a forged line:\n%s", what, text)
			}
		}
	}
	number := strconv.Itoa(pid)
	for _, args := range []string{"status", "processes", "processes --each", "processes --pid " + number, "plan", "plan --pid " + number, "verify",
		"history", "wait --pid " + number, "explain " + number + " 1000", "rollback ACME-1", "processes --pid " + number, "install ACME-1", "history"} {
		a := d.run(nil, "hotpatch", append([]string{"--socket", d.set.socket}, strings.Fields(args)...)...)
		if a.code != 0 {
			t.Errorf("%s: exit code %d: %s%s", args, a.code, a.out, a.err)
		}
		screen(args, a.out+a.err)
		document(t, args, []byte(d.hotpatch(0, append([]string{"--json"}, strings.Fields(args)...)...).out), nil)
	}
	screen("metrics", string(first(d.asNobody("GET", "/metrics", ""))))
	for l := range strings.Lines(string(read(t, d.path("log")))) {
		var e map[string]any
		if err := json.Unmarshal([]byte(l), &e); err != nil || e["msg"] == nil {
			t.Errorf("a line of the log is none: %q", l)
		}
	}

	fmt.Fprintln(in, "quit")
	for lines.Scan() {
	}
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the process ends with %v", err)
	}
}

func first(_ int, b []byte) []byte { return b }
