//go:build windows

package winhosttest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/windows"
)

// Need skips the test for want of something, or fails it where everything must run.
func Need(t testing.TB, format string, args ...any) {
	t.Helper()
	why := "needs " + fmt.Sprintf(format, args...)
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatalf("%s, and HOTPATCH_TEST_ALL=1 allows no skip", why)
	}
	t.Skip(why)
}

// Root is the top of the module, found from the working directory of the test.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
}

// Wine tells whether this is Wine: for skips and for finding a compiler, never
// for what the product does.
func Wine() bool {
	return windows.NewLazySystemDLL("ntdll.dll").NewProc("wine_get_version").Find() == nil
}

const compiler = "x86_64-w64-mingw32-gcc"

var built struct {
	sync.Mutex
	path string
}

// Build compiles the program, once for all test binaries that see the same
// sources, and returns its path. Without a compiler the test is skipped.
func Build(t testing.TB) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	if built.path != "" {
		return built.path
	}
	dir := filepath.Join(Root(t), "testdata", "winhost")
	h := sha256.New()
	var files []string
	for _, pattern := range []string{"build", "*.h", "*.c"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("no sources %s in %s (%v)", pattern, dir, err)
		}
		for _, s := range found {
			b, err := os.ReadFile(s)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintln(h, filepath.Base(s), len(b))
			h.Write(b)
		}
		if pattern == "*.c" {
			files = found
		}
	}
	cache := filepath.Join(Root(t), ".cache", "winhost")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "winhost-"+hex.EncodeToString(h.Sum(nil)[:8])+".exe")
	if _, err := os.Stat(path); err != nil {
		if Wine() {
			buildOutside(t, dir, path)
		} else {
			buildHere(t, files, path)
		}
	}
	built.path = path
	return path
}

// buildHere compiles with a compiler for Windows.
func buildHere(t testing.TB, files []string, path string) {
	t.Helper()
	gcc, err := exec.LookPath(compiler)
	if err != nil {
		if gcc, err = exec.LookPath("gcc"); err != nil {
			Need(t, "%s or gcc of mingw-w64 in the PATH", compiler)
		}
	}
	out, err := exec.Command(gcc, append([]string{"-O2", "-o", path}, files...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("cannot build the victim: %v\n%s", err, out)
	}
}

// buildOutside has the system around Wine compile, which nobody can wait for
// but by looking for the file.
func buildOutside(t testing.TB, dir, path string) {
	t.Helper()
	if _, err := os.Stat(`Z:\usr\bin\` + compiler); err != nil {
		Need(t, "%s (apt-get install gcc-mingw-w64-x86-64)", compiler)
	}
	unix := func(p string) string { return filepath.ToSlash(strings.TrimPrefix(p, filepath.VolumeName(p))) }
	if out, err := exec.Command("cmd", "/c", "start", "/unix", unix(filepath.Join(dir, "build")), unix(path)).CombinedOutput(); err != nil {
		t.Fatalf("cannot build the victim: %v\n%s", err, out)
	}
	for end := time.Now().Add(2 * Patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		said, _ := os.ReadFile(path + ".log")
		if strings.Contains(string(said), "cannot be built") || time.Now().After(end) {
			t.Fatalf("the victim is not built: %s", said)
		}
	}
}
