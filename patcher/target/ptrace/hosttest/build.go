//go:build linux && amd64

package hosttest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
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

// Fixture is the path of a committed image, as "demo/demo.dll".
func Fixture(t testing.TB, name string) string {
	t.Helper()
	return filepath.Join(Root(t), "testdata", "fixtures", filepath.FromSlash(name))
}

// Unnamed is a copy of a fixture that no release names: another build by its
// time stamp. Tests whose hosts must stay as they are use it, since tests of
// other packages may run a whole daemon on this machine at the same time.
func Unnamed(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(Fixture(t, name))
	if err != nil {
		t.Fatal(err)
	}
	header := binary.LittleEndian.Uint32(b[0x3c:])
	binary.LittleEndian.PutUint32(b[header+8:], 0x7e57_7e57) // TimeDateStamp
	path := filepath.Join(t.TempDir(), filepath.Base(name))
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Build compiles the host, once for all test binaries that see the same
// sources, and returns its path. Without a compiler the test is skipped.
func Build(t testing.TB, static bool) string {
	t.Helper()
	dir := filepath.Join(Root(t), "testdata", "host")
	sources, err := filepath.Glob(filepath.Join(dir, "*.[ch]"))
	if err != nil || len(sources) == 0 {
		t.Fatalf("no sources of the host in %s (%v)", dir, err)
	}
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		Need(t, "gcc (apt-get install gcc libc6-dev)")
	}
	args := []string{"-O2", "-pthread"}
	if static {
		args = append(args, "-static")
	}
	h := sha256.New()
	fmt.Fprintln(h, args)
	var files []string
	for _, s := range sources {
		b, err := os.ReadFile(s)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(h, filepath.Base(s), len(b))
		h.Write(b)
		if filepath.Ext(s) == ".c" {
			files = append(files, s)
		}
	}
	cache := filepath.Join(os.TempDir(), "hotpatchd-host-"+strconv.Itoa(os.Getuid()))
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "host-"+hex.EncodeToString(h.Sum(nil)[:8]))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	// Packages are tested side by side: each builds its own and the last rename wins.
	f, err := os.CreateTemp(cache, "build-")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	defer os.Remove(f.Name())
	out, err := exec.Command(gcc, append(append(args, "-o", f.Name()), files...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("cannot build the host: %v\n%s", err, out)
	}
	if err := os.Chmod(f.Name(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		t.Fatal(err)
	}
	return path
}
