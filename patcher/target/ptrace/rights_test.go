//go:build linux && amd64

package ptrace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// ordinaryEnv makes the test binary, run as an ordinary user, try what it may
// do to the process of root that it names.
const ordinaryEnv = "HOTPATCHD_TEST_ORDINARY"

// nobody is the uid the test runs as: of no person on any Linux.
const nobody = 65534

func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		hosttest.Need(t, "root, to be an ordinary user beside it")
	}
	// Where the go command builds test binaries nobody else may go.
	dir, err := os.MkdirTemp("", "hotpatchd-ordinary-")
	must(t, "folder", err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, "chmod", os.Chmod(dir, 0o755))
	self, err := os.ReadFile("/proc/self/exe")
	must(t, "read", err)
	program := filepath.Join(dir, "ptrace.test")
	must(t, "write", os.WriteFile(program, self, 0o755))

	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	c := exec.Command(program)
	c.Dir = dir
	c.Env = append(os.Environ(), ordinaryEnv+"="+strconv.Itoa(h.PID))
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := c.CombinedOutput()
	if err != nil || string(out) != "well\n" {
		t.Errorf("%v: %s", err, out)
	}
	h.Healthy()
}

func ordinaryUser(pid string) {
	root, _ := strconv.Atoi(pid)
	ctx := context.Background()
	check := func(ok bool, format string, args ...any) {
		if !ok {
			fmt.Printf(format+"\n", args...)
			os.Exit(1)
		}
	}
	b, err := New()
	check(err == nil, "New: %v", err)
	sentence, err := b.(target.Prober).Probe(ctx)
	_, may := readRights().limits()
	check((err == nil) == may && strings.Contains(sentence, "CAP_SYS_PTRACE"), "Probe: %q, %v", sentence, err)
	own := exec.Command("sleep", "100")
	check(own.Start() == nil, "cannot start sleep")
	defer own.Process.Kill()
	for end := time.Now().Add(hosttest.Patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		// Start returns in the middle of its exec: who it is, is told at the end of that.
		if auxv, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", own.Process.Pid)); err == nil && len(auxv) > 16 {
			break
		}
	}
	list, err := b.List(ctx)
	check(err == nil, "List: %v", err)
	seen := 0
	for _, i := range list {
		switch i.PID {
		case root:
			seen++
			check(guarded(i, target.GuardProtected, "CAP_SYS_PTRACE") && i.UID == 0 && i.User != "", "%+v", i)
			_, err := b.Open(ctx, i.ID)
			check(errors.Is(err, target.ErrDenied), "Open of a process of root: %v", err)
		case own.Process.Pid:
			seen++
			check(i.UID == nobody, "%+v", i)
			if !may {
				continue
			}
			p, err := b.Open(ctx, i.ID)
			check(err == nil, "Open of an own process: %v", err)
			at := free()
			for end := time.Now().Add(hosttest.Patience); ; time.Sleep(time.Millisecond) {
				// So young, it may not have mapped its libc yet.
				if err = p.Alloc(at, page, target.Read); err == nil || time.Now().After(end) {
					break
				}
			}
			check(err == nil, "Alloc in an own process: %v", err)
			z, err := p.Freeze(ctx)
			check(err == nil, "Freeze of an own process: %v", err)
			check(z.Thaw() == nil, "Thaw of an own process")
		}
	}
	check(seen == 2, "List tells of %d of 2 processes", seen)
	own.Process.Kill()
	own.Wait()
	fmt.Println("well")
	os.Exit(0)
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		r    rights
		ok   bool
		says string
	}{
		{rights{uid: 0, capable: true}, true, "root, all processes"},
		{rights{uid: 0, capable: true, yama: 2}, true, "root"},
		{rights{uid: 5, capable: true, yama: 1}, true, "CAP_SYS_PTRACE, all"},
		{rights{uid: 1000}, true, "only processes of uid 1000: CAP_SYS_PTRACE is missing"},
		{rights{uid: 1000, yama: 1}, false, "ptrace_scope = 1"},
		{rights{uid: 1000, yama: 2}, false, "ptrace_scope = 2"},
		{rights{uid: 0, capable: true, yama: 3}, false, "ptrace_scope = 3 forbids tracing until the next boot"},
	} {
		s, ok := c.r.limits()
		if ok != c.ok || !strings.Contains(s, c.says) {
			t.Errorf("%+v: %q, %v", c.r, s, ok)
		}
	}
}
