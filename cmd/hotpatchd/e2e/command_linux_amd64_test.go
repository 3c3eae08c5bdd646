package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// nobody is an ordinary user with no rights at all.
var nobody = &syscall.Credential{Uid: 65534, Gid: 65534}

// answer is what a command came to.
type answer struct {
	code     int
	out, err string
}

// hotpatch runs the operator's command. It fails the test unless the exit code is want.
func (d *device) hotpatch(want int, args ...string) answer {
	d.t.Helper()
	return d.hotpatchAs(nil, want, args...)
}

func (d *device) hotpatchAs(who *syscall.Credential, want int, args ...string) answer {
	d.t.Helper()
	a := d.run(who, "hotpatch", append([]string{"--socket", d.set.socket}, args...)...)
	if a.code != want {
		d.t.Fatalf("hotpatch %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), a.code, want, a.out, a.err)
	}
	return a
}

// run runs one of our programs to its end.
func (d *device) run(who *syscall.Credential, name string, args ...string) answer {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(d.t, name), args...)
	var out, errOut bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		d.t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return answer{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// document runs a command with --json and reads the one document it prints.
func (d *device) document(into any, want int, args ...string) {
	d.t.Helper()
	a := d.hotpatch(want, append([]string{"--json"}, args...)...)
	document(d.t, strings.Join(args, " "), []byte(a.out), into)
}

// document checks what every document has.
func document(t testing.TB, what string, b []byte, into any) {
	t.Helper()
	var h struct{ Format, Generated, Version string }
	if err := json.Unmarshal(b, &h); err != nil {
		t.Fatalf("%s prints no JSON document: %v\n%s", what, err, b)
	}
	if when, err := time.Parse(time.RFC3339, h.Generated); err != nil || !strings.HasSuffix(h.Generated, "Z") || time.Since(when) > time.Hour {
		t.Errorf("%s: generated %q, want a time in UTC, now (%v)", what, h.Generated, err)
	}
	if !strings.HasPrefix(h.Format, "hotpatch-") || !strings.HasSuffix(h.Format, "/1") || h.Version == "" {
		t.Errorf("%s: format %q, version %q", what, h.Format, h.Version)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal(b, into); err != nil {
		t.Fatalf("%s: %v\n%s", what, err, b)
	}
}

// says fails the test unless the text has all the words, however its lines are broken.
func says(t testing.TB, what, text string, words ...string) {
	t.Helper()
	flat := strings.Join(strings.Fields(text), " ")
	for _, w := range words {
		if !strings.Contains(flat, w) {
			t.Errorf("%s does not say %q:\n%s", what, w, text)
		}
	}
}

// others are processes that nothing happens to: whatever befalls another one,
// they run the fix and are well.
type others []*hosttest.Host

// others starts two, of different builds, and waits until they are patched.
func (d *device) others() others {
	d.t.Helper()
	o := others{
		app(d.t, hosttest.Options{Spin: 1, Sleep: 1}),
		app(d.t, hosttest.Options{DLL: "clang/app.dll", Map: "anon", Spin: 1, Block: 1}),
	}
	o.well(d)
	return o
}

// well waits until all run the fix, and checks that none was harmed.
func (o others) well(d *device) {
	d.t.Helper()
	o.answer(d, control.Patched, 43)
}

func (o others) answer(d *device, state control.ImageState, value int) {
	d.t.Helper()
	for _, h := range o {
		d.becomes(h.PID, state)
		if v := h.Value(); v != value {
			d.t.Errorf("process %d, which is %s, answers %d, want %d", h.PID, state, v, value)
		}
		h.Runs()
		h.Healthy()
	}
}

// attention waits for an attention of that code.
func (d *device) attention(code string) control.Attention {
	d.t.Helper()
	var found control.Attention
	d.until("there is an attention "+code, func() bool {
		st, err := d.client.Status(context.Background())
		if err != nil {
			return false
		}
		for _, a := range st.Attention {
			if a.Code == code {
				found = a
				return true
			}
		}
		return false
	})
	return found
}

// dialAs connects to a Unix socket with the credentials of another user, on a
// thread that takes them for that moment (raw calls: those of Go change every thread).
func dialAs(who *syscall.Credential, socket string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its credentials
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(who.Gid), uintptr(who.Gid), ^uintptr(0)); e != 0 {
			done <- result{nil, e}
			return
		}
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(who.Uid), uintptr(who.Uid), ^uintptr(0)); e != 0 {
			done <- result{nil, e}
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
		}
		if err != nil {
			done <- result{nil, err}
			return
		}
		f := os.NewFile(uintptr(fd), socket)
		c, err := net.FileConn(f)
		f.Close()
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

// release is the path of a release's file in the repository.
func (d *device) release(id string) string {
	d.t.Helper()
	found, err := filepath.Glob(d.path("repo/targets/releases/*" + id + ".hotpatch"))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("%s in the repository: %v, %v", id, found, err)
	}
	return found[0]
}
