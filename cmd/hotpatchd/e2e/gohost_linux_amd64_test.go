package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// A program that keeps its threads' stacks in its own heap, as Go does: what
// lies below a stack pointer there is somebody else's, and a remote system call
// that takes it for free room destroys it.
func TestRemoteCallsInProgramWithItsOwnStacks(t *testing.T) {
	cmd := exec.Command(program(t, "hotpatchd"), "pe-host", "--image", hosttest.Fixture(t, "demo/demo.dll"), "--threads", "2", "--sleepers", "6", "--allow", "42")
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
	b, err := ptrace.New()
	if err != nil {
		hosttest.Need(t, "ptrace: %v", err)
	}
	list, err := b.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var p target.Process
	for _, info := range list {
		if info.PID == cmd.Process.Pid {
			if p, err = b.Open(context.Background(), info.ID); err != nil {
				t.Fatal(err)
			}
			defer p.Close()
		}
	}
	const at, size = target.Addr(0x10000000000), 0x4000
	done, busy := 0, 0
	for range 400 {
		err := p.Alloc(at, size, target.Read|target.Exec)
		if errors.Is(err, target.ErrBusy) {
			busy++
			continue
		}
		if err != nil {
			t.Fatalf("after %d calls: %v", done, err)
		}
		done++
		for try := 0; ; try++ {
			if err = p.Free(at, size); err == nil {
				break
			}
			if !errors.Is(err, target.ErrBusy) || try == 20 {
				t.Fatalf("free after %d calls: %v", done, err)
			}
		}
	}
	if done < 200 {
		t.Errorf("only %d of 400 calls could be made", done)
	}
	fmt.Fprintln(in, "stats")
	if !lines.Scan() {
		t.Fatal("the host is dead")
	}
	var calls, wrong uint64
	if _, err := fmt.Sscanf(lines.Text(), "stats %d %d", &calls, &wrong); err != nil || wrong != 0 || calls == 0 {
		t.Errorf("%q: %v", lines.Text(), err)
	}
	fmt.Fprintln(in, "quit")
	io.Copy(io.Discard, out)
	t.Logf("%d remote calls, %d times busy, %s", 2*done, busy, lines.Text())
}
