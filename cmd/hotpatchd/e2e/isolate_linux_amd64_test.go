package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// insideEnv marks the test binary that runs in namespaces of its own.
const insideEnv = "HOTPATCH_E2E_INSIDE"

// A daemon patches every process it can see, and so would patch those of other
// tests that run on this machine at the same time. So the tests run again in a
// process and a mount namespace of their own, where they see themselves only,
// may mount what they like, and leave nothing behind: the kernel ends every
// process of a namespace with its first one. Without the right to make
// namespaces they run where they are. Benchmarks do too: process events
// (cn_proc) come in the first namespace only, and belong to what they measure.
func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(insideEnv) != "" {
		settle()
	} else if os.Geteuid() == 0 && flag.Lookup("test.bench").Value.String() == "" {
		if code, ran := isolated(); ran {
			os.Exit(code)
		}
	}
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// isolated runs this test binary again in namespaces; ran is false if it cannot.
func isolated() (code int, ran bool) {
	program, err := os.Executable()
	if err != nil {
		return 0, false
	}
	cmd := exec.Command(program, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: no namespaces of our own:", err)
		return 0, false
	}
	if err := cmd.Wait(); err != nil {
		return max(1, cmd.ProcessState.ExitCode()), true
	}
	return 0, true
}

// settle makes /proc that of the namespace, for nobody else to see.
func settle() {
	os.Unsetenv(insideEnv)
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: cannot set up the namespaces:", err)
		os.Exit(1)
	}
}

// private tells whether this process sees its own children only.
func private() bool { return os.Getpid() == 1 }

// small mounts a file system of at most size bytes, for the test alone.
func small(t *testing.T, dir string, size int) {
	t.Helper()
	if !private() {
		need(t, "the right to make namespaces and mount")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,mode=700", size)); err != nil {
		need(t, "a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill takes all that is free in a folder's file system; what it returns frees it.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 64<<10); ; {
		if _, err = f.Write(b); err != nil && len(b) == 1 {
			break
		} else if err != nil {
			b = b[:len(b)/2]
		}
	}
	return func() { os.Remove(path) }
}
