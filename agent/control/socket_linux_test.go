package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envSocket makes the test binary a client that asks two things and says how it was answered.
const envSocket = "CONTROL_TEST_SOCKET"

func TestMain(m *testing.M) {
	if socket := os.Getenv(envSocket); socket != "" {
		c := Dial(socket)
		_, open := c.Status(context.Background())
		_, closed := c.Plan(context.Background(), PlanQuery{})
		fmt.Printf("status %v; plan %v\n", open, closed)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// skip skips, unless nothing may be skipped.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// TestPeerCredentials lets processes of other users ask for real.
func TestPeerCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root to start processes of other users")
	}
	r := start(t, func(s *Server) {
		s.peer, s.identify = peer, identify
		s.cfg.Group = "daemon"
	})
	bin := filepath.Join(filepath.Dir(r.socket), "client")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cred syscall.Credential
		want string
		uid  int
	}{
		"root":                    {syscall.Credential{}, "status <nil>; plan <nil>", 0},
		"primary group":           {syscall.Credential{Uid: 1, Gid: 1}, "status <nil>; plan <nil>", 1},
		"primary group, no name":  {syscall.Credential{Uid: 54321, Gid: 1}, "status <nil>; plan <nil>", 54321},
		"group by the user list":  {syscall.Credential{Uid: 1, Gid: 54321}, "status <nil>; plan <nil>", 1},
		"stranger":                {syscall.Credential{Uid: 65534, Gid: 65534}, "status <nil>; plan plan needs root or membership in the group daemon; you are nobody", 65534},
		"stranger without a name": {syscall.Credential{Uid: 54321, Gid: 54321}, "status <nil>; plan plan needs root or membership in the group daemon; you are 54321", 54321},
	} {
		t.Run(name, func(t *testing.T) {
			r.fake.forget()
			ctx, cancel := context.WithTimeout(context.Background(), deadline)
			defer cancel()
			cmd := exec.CommandContext(ctx, bin)
			cmd.Env = []string{envSocket + "=" + r.socket}
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &tc.cred}
			out, err := cmd.CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != tc.want {
				t.Fatalf("%s %v\nwant %s", out, err, tc.want)
			}
			c := r.fake.firstCaller()
			if c.UID != tc.uid || c.GID != int(tc.cred.Gid) || c.PID != cmd.Process.Pid || c.User == "" {
				t.Errorf("the service saw %+v of pid %d", c, cmd.Process.Pid)
			}
		})
	}
}

func TestIdentify(t *testing.T) {
	for name, tc := range map[string]struct {
		c     Caller
		group string
		admin bool
	}{
		"root":                    {Caller{UID: 0}, "", true},
		"no group configured":     {Caller{UID: 1, GID: 1}, "", false},
		"group does not exist":    {Caller{UID: 1, GID: 1}, "no-such-group-here", false},
		"claims to be admin":      {Caller{UID: 54321, GID: 54321, Admin: true}, "daemon", false},
		"claims, no group at all": {Caller{UID: 54321, GID: 54321, Admin: true}, "", false},
	} {
		if got := identify(tc.c, tc.group); got.Admin != tc.admin {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestListen(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "sub", "c.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("socket %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("folder %v, %v", info.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("a second daemon: %v", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the second daemon broke the first: %v", err)
	} else {
		c.Close()
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after a kill
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal("no stale socket to try: ", err)
	}
	l, err = Listen(path)
	if err != nil {
		t.Fatal("stale socket: ", err)
	}
	l.Close()
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket stays after Close")
	}
}

func TestListenRefuses(t *testing.T) {
	file := filepath.Join(shortDir(t), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(shortDir(t), "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	wide := shortDir(t)
	if err := os.Chmod(wide, 0o777); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ path, want string }{
		"file":      {file, "not a socket"},
		"link":      {link, "not a socket"},
		"open dir":  {filepath.Join(wide, "c.sock"), "others may write to it"},
		"long":      {"/" + strings.Repeat("x", 200), "at most 107 bytes"},
		"relative":  {"c.sock", "not an absolute path"},
		"abstract":  {"@hotpatchd", "not an absolute path"},
		"empty":     {"", "not an absolute path"},
		"no folder": {file + "/c.sock", "cannot make the socket's folder"},
	} {
		l, err := Listen(tc.path)
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is gone: %s, %v", b, err)
	}
	if os.Geteuid() != 0 {
		skip(t, "needs root to give a folder to somebody else")
	}
	if err := os.Chown(wide, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(wide, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(filepath.Join(wide, "c.sock")); err == nil || !strings.Contains(err.Error(), "belongs to uid 12345") {
		t.Errorf("somebody else's folder: %v", err)
	}
}

// TestManyDaemonsStartAtOnce: exactly one gets the socket, and its socket is the one that is there.
func TestManyDaemonsStartAtOnce(t *testing.T) {
	for range 20 {
		path := filepath.Join(shortDir(t), "c.sock")
		l, err := Listen(path) // leave a stale one for them to fight over
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		got := make(chan net.Listener, 8)
		for range cap(got) {
			go func() {
				l, err := Listen(path)
				if err != nil && !errors.Is(err, ErrInUse) {
					t.Error(err)
				}
				got <- l
			}()
		}
		var winners []net.Listener
		for range cap(got) {
			if l := <-got; l != nil {
				winners = append(winners, l)
			}
		}
		if len(winners) != 1 {
			t.Fatalf("%d daemons listen", len(winners))
		}
		go func() {
			for {
				c, err := winners[0].Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "winner")
				c.Close()
			}
		}()
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(deadline))
		if b, _ := io.ReadAll(c); string(b) != "winner" {
			t.Errorf("got %q", b)
		}
		c.Close()
		winners[0].Close()
	}
}

// address is where a test may listen.
func address(t *testing.T) string { return filepath.Join(shortDir(t), "c.sock") }

// shortDir is a folder whose sockets have short enough paths, and that other users may enter.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "hpc")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
