//go:build windows

package win32

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// freezerEnv makes the test binary freeze and thaw a process, and end itself at
// one of its calls: PID:CALL:before or PID:CALL:after.
const freezerEnv = "HOTPATCHD_TEST_FREEZER"

// survived is the exit code of one that made fewer calls.
const survived = 5

func TestMain(m *testing.M) {
	Guardian()
	if s := os.Getenv(freezerEnv); s != "" {
		if err := freezeAndDie(s); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(survived)
	}
	os.Exit(m.Run())
}

func freezeAndDie(job string) error {
	part := strings.Split(job, ":")
	pid, _ := strconv.Atoi(part[0])
	call, _ := strconv.Atoi(part[1])
	k := &mortal{kernel: system{}, at: int64(call), after: part[2] == "after"}
	b := newBackend(k)
	if err := b.guard.ready(k); err != nil {
		return err
	}
	list, err := b.List(context.Background())
	if err != nil {
		return err
	}
	for _, i := range list {
		if i.PID != pid {
			continue
		}
		p, err := b.Open(context.Background(), i.ID)
		if err != nil {
			return err
		}
		k.counting.Store(true)
		for range 200 { // busy is the machine's answer, not what is tested
			f, err := p.Freeze(context.Background())
			if err != nil {
				continue
			}
			if _, err := f.Threads(); err != nil {
				return err
			}
			return f.Thaw()
		}
		return fmt.Errorf("never stopped")
	}
	return fmt.Errorf("no process %d", pid)
}

// mortal ends us at a call: before all of them, after those that change anything.
type mortal struct {
	kernel
	at       int64
	after    bool
	counting atomic.Bool
	calls    atomic.Int64
}

func (m *mortal) step(changes bool) (done func()) {
	if !m.counting.Load() {
		return func() {}
	}
	if m.after && !changes {
		return func() {}
	}
	here := m.calls.Add(1) == m.at
	end := func() {
		windows.TerminateProcess(windows.CurrentProcess(), 9)
		select {}
	}
	if here && !m.after {
		end()
	}
	return func() {
		if here && m.after {
			end()
		}
	}
}

func (m *mortal) threads(id target.ID) ([]int, error) {
	defer m.step(false)()
	return m.kernel.threads(id)
}
func (m *mortal) open(tid int) (windows.Handle, error) {
	defer m.step(false)()
	return m.kernel.open(tid)
}
func (m *mortal) next(process, after windows.Handle) (windows.Handle, error) {
	defer m.step(false)()
	return m.kernel.next(process, after)
}
func (m *mortal) count(thread windows.Handle) (int, error) {
	defer m.step(false)()
	return m.kernel.count(thread)
}
func (m *mortal) suspend(thread windows.Handle) (int, error) {
	defer m.step(true)()
	return m.kernel.suspend(thread)
}
func (m *mortal) resume(thread windows.Handle) (int, error) {
	defer m.step(true)()
	return m.kernel.resume(thread)
}
func (m *mortal) registers(thread windows.Handle, r *registers) error {
	defer m.step(false)()
	return m.kernel.registers(thread, r)
}
func (m *mortal) share(thread, with windows.Handle) (windows.Handle, error) {
	defer m.step(true)()
	return m.kernel.share(thread, with)
}
func (m *mortal) unshare(with, thread windows.Handle) {
	defer m.step(true)()
	m.kernel.unshare(with, thread)
}

// TestKilledAnywhere ends a process that freezes another one at each of its
// calls. The other one's threads must run on, but for the one that it holds itself.
func TestKilledAnywhere(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1, Block: 1})
	own, err := strconv.Atoi(h.Do("suspended"))
	if err != nil {
		t.Fatal(err)
	}
	stride := 3
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		stride = 1
	}
	kills, slowest := 0, time.Duration(0)
	for _, when := range []string{"before", "after"} {
		for call := 1; ; call += stride {
			code := runFreezer(t, fmt.Sprintf("%d:%d:%s", h.PID, call, when))
			if code == survived {
				break
			}
			if code != 9 {
				t.Fatalf("call %d: the freezer ended with %d", call, code)
			}
			kills++
			from := time.Now()
			unheld(t, h, own, fmt.Sprintf("killed %s call %d", when, call))
			slowest = max(slowest, time.Since(from))
			h.Runs()
		}
	}
	if kills < 20 {
		t.Errorf("only %d kills", kills)
	}
	h.Healthy()
	t.Logf("%d kills, the slowest release after %v", kills, slowest)
}

// runFreezer runs one to its end and waits for that of its guardian.
func runFreezer(t *testing.T, job string) int {
	t.Helper()
	var c *exec.Cmd
	for try := 1; ; try++ { // on a loaded machine Wine may fail to start a process ("Internal error")
		c = exec.Command(os.Args[0])
		c.Env = append(os.Environ(), freezerEnv+"="+job)
		c.Stderr = os.Stderr
		err := c.Start()
		if err == nil {
			break
		}
		if try == 5 {
			t.Fatal(err)
		}
	}
	timer := time.AfterFunc(winhosttest.Patience, func() { c.Process.Kill() })
	defer timer.Stop()
	// Open until its guardian is over: its pid is given to no other process meanwhile.
	h, err := windows.OpenProcess(windows.PROCESS_QUERY_LIMITED_INFORMATION, false, uint32(c.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer windows.CloseHandle(h)
	c.Wait()
	for end := time.Now().Add(winhosttest.Patience); childOf(t, h) != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: guardian %d outlives its process", job, childOf(t, h))
		}
	}
	return c.ProcessState.ExitCode()
}

// childOf is a process that another one started, 0 if none of them lives. A
// process keeps the pid of its parent when that has ended and the pid is given to
// another: who is older than h is not its child.
func childOf(t *testing.T, h windows.Handle) int {
	t.Helper()
	parent, err := windows.GetProcessId(h)
	if err != nil {
		t.Fatal(err)
	}
	since, err := started(h)
	if err != nil {
		t.Fatal(err)
	}
	s, err := windows.CreateToolhelp32Snapshot(windows.TH32CS_SNAPPROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer windows.CloseHandle(s)
	e := windows.ProcessEntry32{Size: uint32(unsafe.Sizeof(windows.ProcessEntry32{}))}
	for err = windows.Process32First(s, &e); err == nil; err = windows.Process32Next(s, &e) {
		if e.ParentProcessID == parent && livesSince(t, e.ProcessID, since) {
			return int(e.ProcessID)
		}
	}
	return 0
}

// livesSince tells whether a process lives and was not there before a time.
func livesSince(t *testing.T, pid uint32, since uint64) bool {
	t.Helper()
	h, err := windows.OpenProcess(windows.PROCESS_QUERY_LIMITED_INFORMATION|windows.SYNCHRONIZE, false, pid)
	if errors.Is(err, windows.ERROR_INVALID_PARAMETER) || errors.Is(err, windows.ERROR_ACCESS_DENIED) {
		return false // it has ended, or is none of ours
	}
	if err != nil {
		t.Fatalf("process %d: %v", pid, err)
	}
	defer windows.CloseHandle(h)
	at, err := started(h)
	if err != nil {
		t.Fatal(err)
	}
	return at >= since && !signalled(h)
}

// unheld waits until no thread is suspended but own, which is so once.
func unheld(t *testing.T, h *winhosttest.Host, own int, what string) {
	t.Helper()
	var text string
	for end := time.Now().Add(winhosttest.Patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		text = ""
		for _, tid := range h.ThreadIDs() {
			th, err := system{}.open(int(tid))
			if err != nil {
				continue
			}
			n, err := system{}.count(th)
			windows.CloseHandle(th)
			want := 0
			if int(tid) == own {
				want = 1
			}
			if err == nil && n != want {
				text += fmt.Sprintf(" thread %d is suspended %d times, want %d;", tid, n, want)
			}
		}
		if text == "" {
			return
		}
	}
	t.Fatalf("%s:%s", what, text)
}
