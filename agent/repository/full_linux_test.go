package repository

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fullEnv makes this test program a client or publisher on a disk that takes
// no file longer than so many bytes (RLIMIT_FSIZE: the kernel refuses the
// write in the middle, as it does on a full disk).
const fullEnv = "HOTPATCH_TEST_FULL_DISK"

func TestMain(m *testing.M) {
	if os.Getenv(fullEnv) != "" {
		if err := onFullDisk(); err != nil {
			fmt.Printf("%s\n%v\n", CodeOf(err), err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func onFullDisk() error {
	args := strings.Split(os.Getenv(fullEnv), "|")
	limit, err := strconv.ParseUint(args[0], 10, 64)
	if err != nil {
		return err
	}
	what, repo, dir := args[1], args[2], args[3]
	root, err := os.ReadFile(filepath.Join(repo, "root.json"))
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGXFSZ)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: limit, Max: limit}); err != nil {
		return err
	}
	if what == "refresh" {
		keys, err := LoadKeys(dir)
		if err != nil {
			return err
		}
		_, err = Refresh(repo, keys, PublishOptions{Now: start})
		return err
	}
	c, err := New(Config{URL: "file://" + repo, Dir: dir, InitialRoot: root, Now: func() time.Time { return start }})
	if err != nil {
		return err
	}
	catalog, err := c.Refresh(context.Background())
	if err != nil {
		return err
	}
	_, err = c.Fetch(context.Background(), catalog.Offers[0])
	return err
}

// full runs this test program anew with a limit and returns what it printed.
func full(t *testing.T, limit int, what, repo, dir string) (code, text string, failed bool) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Skip("needs its own executable: " + err.Error())
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d|%s|%s|%s", fullEnv, limit, what, repo, dir))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) {
		t.Fatalf("%v: %s", err, out)
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Scan()
	code = lines.Text()
	lines.Scan()
	return code, lines.Text(), err != nil
}

// A disk that fills up at any point: an error that says so, nothing half
// written, and everything works again once there is space.
func TestFullDisk(t *testing.T) {
	f := newFixture(t)
	seen := map[bool]int{}
	for _, limit := range []int{0, 1, 300, 700, 900, 1100, 1500, 2500, 4000, 1 << 20} {
		dir := t.TempDir()
		code, text, failed := full(t, limit, "fetch", f.dir, dir)
		seen[failed]++
		if failed && code != CodeStorage {
			t.Errorf("limit %d: %s: %s", limit, code, text)
		}
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && (strings.HasPrefix(d.Name(), tempPrefix) || strings.HasSuffix(d.Name(), ".part")) {
				t.Errorf("limit %d: %s is left", limit, path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		c := f.clientIn("", dir, Floors{})
		o := mustRefresh(t, c).Offers[0]
		if _, err := c.Fetch(t.Context(), o); err != nil {
			t.Error(err)
		}
	}
	if seen[true] < 5 || seen[false] < 1 {
		t.Errorf("the limits tell nothing: %v", seen)
	}
}

func TestPublisherOnFullDisk(t *testing.T) {
	f := newFixture(t)
	keys := t.TempDir()
	writeKeys(t, keys, f.keys)
	before := f.save()
	c := f.client("")
	mustRefresh(t, c)
	for _, limit := range []int{0, 100, 500} {
		if _, text, failed := full(t, limit, "refresh", f.dir, keys); !failed || !strings.Contains(text, "cannot write") {
			t.Errorf("limit %d: %v %s", limit, failed, text)
		}
		after := f.save()
		for name, b := range after {
			if strings.HasPrefix(filepath.Base(name), ".") {
				t.Errorf("limit %d: %s is left", limit, name)
			}
			if old, ok := before[name]; ok && !bytes.Equal(old, b) {
				t.Errorf("limit %d: %s changed", limit, name)
			}
		}
		mustRefresh(t, c)
	}
	if _, err := Refresh(f.dir, f.keys, f.options()); err != nil {
		t.Error(err)
	}
	mustRefresh(t, c)
}
