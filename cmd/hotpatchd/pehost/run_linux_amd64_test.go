package pehost

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace"
	"hotpatchd/pe"
)

const (
	demo = "../../../testdata/fixtures/demo/demo.dll"
	// waiting bounds every wait of these tests: far more than a loaded machine takes.
	waiting = 30 * time.Second
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "pe-host" {
		os.Exit(Run(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// guest is a host process that a test has started.
type guest struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
	pid   int
	base  uint64
}

func start(t *testing.T, args ...string) *guest {
	t.Helper()
	return startWith(t, nil, args...)
}

func startWith(t *testing.T, files []*os.File, args ...string) *guest {
	t.Helper()
	g := &guest{t: t, cmd: exec.Command(os.Args[0], append([]string{"pe-host"}, args...)...), lines: make(chan string, 16)}
	g.cmd.ExtraFiles = files
	g.cmd.Stderr = os.Stderr
	var err error
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			g.lines <- s.Text()
		}
		close(g.lines)
	}()
	t.Cleanup(func() {
		if g.cmd.ProcessState == nil {
			g.cmd.Process.Kill()
			g.cmd.Wait()
		}
	})
	f := strings.Fields(g.line())
	if len(f) != 3 || f[0] != "ready" {
		t.Fatalf("first line %q", f)
	}
	g.pid, _ = strconv.Atoi(f[1])
	g.base, _ = strconv.ParseUint(f[2], 0, 64)
	if g.pid != g.cmd.Process.Pid || g.base == 0 {
		t.Fatalf("ready %v, process %d", f, g.cmd.Process.Pid)
	}
	return g
}

func (g *guest) line() string {
	g.t.Helper()
	select {
	case s, ok := <-g.lines:
		if !ok {
			g.t.Fatal("the host has closed its output")
		}
		return s
	case <-time.After(waiting):
		g.t.Fatal("the host does not answer")
	}
	return ""
}

func (g *guest) ask(what string) []string {
	g.t.Helper()
	if _, err := fmt.Fprintln(g.in, what); err != nil {
		g.t.Fatal(err)
	}
	f := strings.Fields(g.line())
	if len(f) == 0 || f[0] != what {
		g.t.Fatalf("%s: answer %q", what, f)
	}
	return f[1:]
}

// stats gives calls, wrong ones, and how often each value was seen.
func (g *guest) stats() (calls, wrong uint64, by map[int]uint64) {
	g.t.Helper()
	f := g.ask("stats")
	calls, _ = strconv.ParseUint(f[0], 10, 64)
	wrong, _ = strconv.ParseUint(f[1], 10, 64)
	by = map[int]uint64{}
	for _, s := range f[2:] {
		v, n, _ := strings.Cut(s, "=")
		k, err := strconv.Atoi(v)
		if err != nil {
			g.t.Fatalf("stats %q", f)
		}
		by[k], _ = strconv.ParseUint(n, 10, 64)
	}
	return calls, wrong, by
}

func (g *guest) until(what string, ok func() bool) {
	g.t.Helper()
	for end := time.Now().Add(waiting); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			g.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// end asks it to quit and gives its exit code.
func (g *guest) end() int {
	g.t.Helper()
	fmt.Fprintln(g.in, "quit")
	if s := g.line(); s != "bye" {
		g.t.Errorf("quit: answer %q", s)
	}
	g.cmd.Wait()
	return g.cmd.ProcessState.ExitCode()
}

func TestAnswers(t *testing.T) {
	for _, header := range []string{"file", "anonymous"} {
		t.Run(header, func(t *testing.T) {
			g := start(t, "--image", demo, "--header", header, "--threads", "3", "--sleepers", "2", "--allow", "42")
			if v := g.ask("value"); v[0] != "42" {
				t.Errorf("value %v", v)
			}
			before, _, _ := g.stats()
			g.until("calls go on", func() bool { n, _, _ := g.stats(); return n > before+1000 })
			if calls, wrong, by := g.stats(); wrong != 0 || len(by) != 1 || by[42] != calls {
				t.Errorf("%d calls, %d wrong, values %v", calls, wrong, by)
			}
			maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", g.pid))
			if err != nil {
				t.Fatal(err)
			}
			path, _ := filepath.Abs(demo)
			if named := strings.Contains(string(maps), path); named != (header == "file") {
				t.Errorf("the mappings name the file: %v", named)
			}
			for _, l := range strings.Split(string(maps), "\n") {
				if f := strings.Fields(l); len(f) > 1 && strings.Contains(f[1], "wx") {
					t.Errorf("writable and executable: %s", l)
				}
			}
			if code := g.end(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

func TestRandomBase(t *testing.T) {
	seen := map[uint64]bool{}
	for range 3 {
		g := start(t, "--image", demo)
		if g.base%grain != 0 || g.base < areaStart || g.base >= areaEnd || seen[g.base] {
			t.Errorf("base %#x", g.base)
		}
		seen[g.base] = true
		g.end()
	}
}

func TestHandedDown(t *testing.T) {
	f, err := os.Open(demo)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g := startWith(t, []*os.File{f}, "--image", "fd:3")
	if v := g.ask("value"); v[0] != "42" {
		t.Errorf("value %v", v)
	}
	if code := g.end(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestEndsWithItsParent(t *testing.T) {
	g := start(t, "--image", demo, "--threads", "2", "--sleepers", "1")
	g.in.Close()
	done := make(chan error, 1)
	go func() { done <- g.cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(waiting):
		t.Fatal("it lives on with its input closed")
	}
}

// TestEndsWhateverItRuns: callers that never return do not keep it alive.
func TestEndsWhateverItRuns(t *testing.T) {
	g := start(t, "--image", demo, "--threads", "6", "--sleepers", "1")
	entry, err := strconv.ParseInt(g.ask("entry")[0], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", g.pid), os.O_RDWR, 0)
	if err != nil {
		absent(t, "to write to a process of the same user: %v", err)
	}
	defer mem.Close()
	if _, err := mem.WriteAt([]byte{0xeb, 0xfe}, entry); err != nil { // jmp to itself, in one aligned word
		t.Fatal(err)
	}
	g.until("nobody calls any more", func() bool {
		a, _, _ := g.stats()
		time.Sleep(20 * time.Millisecond)
		b, _, _ := g.stats()
		return a == b
	})
	if v := g.ask("value"); v[0] != "42" {
		t.Errorf("value %v", v)
	}
	g.in.Close()
	done := make(chan struct{})
	go func() { g.cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(waiting):
		t.Fatal("it lives on")
	}
	if code := g.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}

func TestTellsWrongValues(t *testing.T) {
	g := start(t, "--image", demo, "--allow", "7")
	if _, wrong, _ := g.stats(); wrong == 0 {
		t.Error("42 is not counted as wrong where 7 alone is right")
	}
	if code := g.end(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}

func TestRefuses(t *testing.T) {
	imports := "../../../testdata/fixtures/mingw/app.dll"
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "--image is missing"},
		{[]string{"--image", demo, "extra"}, 2, "unexpected"},
		{[]string{"--image", demo, "--header", "none"}, 2, "unknown --header"},
		{[]string{"--image", demo, "--threads", "0"}, 2, "0 threads"},
		{[]string{"--image", demo, "--threads", "100000"}, 2, "1 to 256"},
		{[]string{"--image", demo, "--allow", "x"}, 2, "no 32-bit number"},
		{[]string{"--image", demo, "--export", "nothing"}, 1, "does not export"},
		{[]string{"--image", "/nonexistent"}, 1, "no such file"},
		{[]string{"--image", "/dev/zero"}, 1, "is no file"},
		{[]string{"--image", "fd:0"}, 1, "handed down"},
		{[]string{"--image", "doc.go"}, 1, "no MZ signature"},
		{[]string{"--image", imports}, 1, "binds no imports"},
		{[]string{"--image", "../../../testdata/fixtures/demo-arm64/demo.dll"}, 1, "x86-64"},
	} {
		var out, errOut bytes.Buffer
		if code := run(c.args, strings.NewReader(""), &out, &errOut); code != c.code || !strings.Contains(errOut.String(), c.says) {
			t.Errorf("%v: code %d, %q; want %d, %q", c.args, code, errOut.String(), c.code, c.says)
		}
		if out.Len() != 0 {
			t.Errorf("%v: output %q", c.args, out.String())
		}
	}
}

// TestPatchable replaces the export by five bytes written under a freeze, many
// times, with more running threads than processors: no call may go wrong.
func TestPatchable(t *testing.T) {
	g := start(t, "--image", demo, "--threads", "6", "--sleepers", "2", "--allow", "42,1234")
	entry, err := strconv.ParseUint(g.ask("entry")[0], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	p := attach(t, backend(t), g.pid)
	// The new function goes right behind the image.
	f, err := os.Open(demo)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, _ := f.Stat()
	im, err := pe.Parse(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	annex := target.Addr(g.base) + target.Addr((im.SizeOfImage+0xffff)&^0xffff)
	if err := p.Alloc(annex, target.PageSize, target.Read|target.Exec); err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt([]byte{0xb8, 0xd2, 0x04, 0, 0, 0xc3}, annex); err != nil { // mov eax, 1234; ret
		t.Fatal(err)
	}
	if err := p.Flush(annex, 6); err != nil {
		t.Fatal(err)
	}
	old, jump := make([]byte, 5), []byte{0xe9, 0, 0, 0, 0}
	if _, err := p.ReadAt(old, target.Addr(entry)); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(jump[1:], uint32(uint64(annex)-entry-5))
	write := func(code []byte) {
		t.Helper()
		var fr target.Frozen
		g.until("it is frozen", func() bool {
			var err error
			if fr, err = p.Freeze(t.Context()); err != nil && !errors.Is(err, target.ErrBusy) {
				t.Fatal(err)
			}
			return err == nil // else busy, as on a loaded machine: try again
		})
		defer fr.Thaw()
		// The first five bytes are inside one instruction: no thread stands strictly in them.
		if _, err := p.WriteAt(code, target.Addr(entry)); err != nil {
			t.Fatal(err)
		}
		if err := p.Flush(target.Addr(entry), len(code)); err != nil {
			t.Fatal(err)
		}
	}
	for range 30 {
		write(jump)
		g.until("the new function runs", func() bool { return g.ask("value")[0] == "1234" })
		write(old)
		g.until("the old function runs", func() bool { return g.ask("value")[0] == "42" })
	}
	calls, wrong, by := g.stats()
	if wrong != 0 || len(by) != 2 || by[42] == 0 || by[1234] == 0 || by[42]+by[1234] != calls {
		t.Errorf("%d calls, %d wrong, values %v", calls, wrong, by)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if code := g.end(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestAllocatesHarmlessly maps memory in the host again and again, each time by
// a call made in one of its threads: goroutines have small stacks, and what
// lies below them is another's.
func TestAllocatesHarmlessly(t *testing.T) {
	g := start(t, "--image", demo, "--threads", "2", "--sleepers", "8", "--allow", "42")
	p := attach(t, backend(t), g.pid)
	at := target.Addr(g.base) + 0x100000
	for range 200 {
		for _, do := range []func() error{
			func() error { return p.Alloc(at, target.PageSize, target.Read) },
			func() error { return p.Protect(at, target.PageSize, target.Read|target.Write) },
			func() error { return p.Free(at, target.PageSize) },
		} {
			g.until("a thread is free to make a call", func() bool {
				err := do()
				if err != nil && !errors.Is(err, target.ErrBusy) {
					t.Fatal(err)
				}
				return err == nil
			})
		}
	}
	before, _, _ := g.stats()
	g.until("calls go on", func() bool { n, _, _ := g.stats(); return n > before+1000 })
	if calls, wrong, by := g.stats(); wrong != 0 || by[42] != calls {
		t.Errorf("%d calls, %d wrong, values %v", calls, wrong, by)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if code := g.end(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// absent leaves a test out for what the machine lacks, or fails it where
// everything must run.
func absent(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatalf("needs "+format, args...)
	}
	t.Skipf("needs "+format, args...)
}

// backend is the one of this system; the test is left out where it can do nothing.
func backend(t *testing.T) target.Backend {
	t.Helper()
	b, err := ptrace.New()
	if err != nil {
		t.Fatal(err)
	}
	if pr, ok := b.(target.Prober); ok {
		if s, err := pr.Probe(t.Context()); err != nil {
			absent(t, "ptrace: %s: %v", s, err)
		}
	}
	return b
}

func attach(t *testing.T, b target.Backend, pid int) target.Process {
	t.Helper()
	list, err := b.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		if i.PID != pid {
			continue
		}
		p, err := b.Open(t.Context(), i.ID)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	t.Fatalf("process %d is not listed", pid)
	return nil
}
