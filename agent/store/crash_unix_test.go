//go:build !windows

package store

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// envLimit is the largest file, in bytes, that the test binary may write as a daemon.
const envLimit = "STORE_TEST_LIMIT"

func init() {
	v := os.Getenv(envLimit)
	if v == "" {
		return
	}
	n, _ := strconv.ParseUint(v, 10, 64)
	signal.Ignore(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
		panic(err)
	}
}

// TestDiskFull lets the disk end: the daemon gets an error, what was there
// stays, and it can go on when there is space again.
func TestDiskFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	for _, limit := range []int{200 << 10, 300<<10 + 1234, 600 << 10} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envWriter+"="+path, envLimit+"="+strconv.Itoa(limit))
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("limit %d: %v\n%s", limit, err, tail(out))
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		last := lines[len(lines)-1]
		if !strings.HasPrefix(last, "error cannot write state:") {
			t.Fatalf("limit %d: ended with %q", limit, last)
		}
		t.Logf("limit %d: %d commits, then %q", limit, len(lines)-1, last)
		s := mustOpen(t, path)
		acked, _ := strconv.Atoi(lines[max(0, len(lines)-2)])
		if err := whole(s, acked); err != nil {
			t.Fatalf("limit %d: %v", limit, err)
		}
		s.Close()
	}
}

// TestDiskReallyFull is the same on a small file system, where the file may
// grow but its pages cannot be written.
func TestDiskReallyFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command("mount", "-t", "tmpfs", "-o", "size=260k,mode=0700", "none", dir).Run(); err != nil {
		skip(t, "needs the right to mount a tmpfs")
	}
	t.Cleanup(func() { exec.Command("umount", "-l", dir).Run() })
	path := filepath.Join(dir, "state.db")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envWriter+"="+path)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(out))
	}
	if !strings.Contains(string(out), syscall.ENOSPC.Error()) {
		t.Fatalf("it did not end for want of space: %s", tail(out))
	}
	s := mustOpen(t, path)
	if err := whole(s, strings.Count(string(out), "\n")-1); err != nil {
		t.Fatal(err)
	}
}

// skip skips, unless nothing may be skipped.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

func tail(b []byte) []byte { return b[max(0, len(b)-2000):] }

func TestOnlyOursMayRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	path := filepath.Join(dir, "state.db")
	mustOpen(t, path).Close()
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", info.Mode(), err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	mustOpen(t, path).Close()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file: %v, %v", info.Mode(), err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(path); err == nil || !strings.Contains(err.Error(), "others may write to it") {
		t.Errorf("a folder open to all was taken: %v", err)
	}
	if os.Geteuid() != 0 {
		skip(t, "needs root to give a file to somebody else")
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, 12345, 12345)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(path); err == nil || !strings.Contains(err.Error(), "belongs to uid 12345") {
		t.Errorf("somebody else's folder was taken: %v", err)
	}
	if err := errors.Join(os.Chown(dir, 0, 0), os.Chown(path, 12345, 0)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(path); err == nil || !strings.Contains(err.Error(), "belongs to uid 12345") {
		t.Errorf("somebody else's file was taken: %v", err)
	}
}
