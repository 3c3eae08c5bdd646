package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/release"
)

// author makes a folder with a release.toml for the demo's hotpatch image.
func author(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	image, err := filepath.Abs("../../testdata/fixtures/demo/demo-1.dll")
	if err != nil {
		t.Fatal(err)
	}
	text := "id = \"DEMO-1\"\nproduct = \"demo\"\nsequence = 1\n[[images]]\nname = \"demo.dll\"\nfile = '" + filepath.ToSlash(image) + "'\n"
	if err := os.WriteFile(filepath.Join(dir, "release.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// From a manifest to a repository that devices would take.
func TestReleaseToRepository(t *testing.T) {
	dir := author(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	out := must(t, "release", "--manifest", in("release.toml"), "-o", in("DEMO-1.hotpatch"))
	if !strings.Contains(out, "DEMO-1, sequence 1, 1 image,") {
		t.Error(out)
	}
	first, err := os.ReadFile(in("DEMO-1.hotpatch"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := release.Open(first); err != nil {
		t.Error(err)
	}
	must(t, "release", "--manifest", in("release.toml"), "-o", in("again.hotpatch"))
	if again, _ := os.ReadFile(in("again.hotpatch")); !bytes.Equal(first, again) {
		t.Error("the same input gives other bytes")
	}
	must(t, "keys", "--dir", in("keys"))
	if out := must(t, "publish", "--repo", in("repo"), "--keys", in("keys"), in("DEMO-1.hotpatch")); !strings.Contains(out, "published DEMO-1") || !strings.Contains(out, "root.json") {
		t.Error(out)
	}
	if out := must(t, "publish", "--repo", in("repo"), "--keys", in("keys"), in("DEMO-1.hotpatch")); !strings.Contains(out, "was published before, with the same content") {
		t.Error(out)
	}
	if out := must(t, "repo", "verify", "--repo", in("repo")); !strings.HasPrefix(out, "SOUND   1 of 1 release verifies") || strings.Contains(out, " \n") {
		t.Error(out)
	}
	var doc struct {
		Format, Generated, Version string
		Changed                    bool
		Expires                    string
	}
	if err := json.Unmarshal([]byte(must(t, "refresh", "--repo", in("repo"), "--keys", in("keys"), "--expires", "12h", "--json")), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Format != "hotpatch-refresh/1" || doc.Generated == "" || doc.Version == "" || !doc.Changed || doc.Expires == "" {
		t.Errorf("%+v", doc)
	}
	// The same id with other content.
	text, err := os.ReadFile(in("release.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in("release.toml"), append([]byte("title = \"x\"\n"), text...), 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, "release", "--manifest", in("release.toml"), "-o", in("DEMO-1.hotpatch"))
	code, _, stderr := command("publish", "--repo", in("repo"), "--keys", in("keys"), in("DEMO-1.hotpatch"))
	if code != 1 || stderr != "hotpatch-build: publish: DEMO-1 was published before with other content; raise the sequence and take a new id\n" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	// Damage is found, by the exit code, too.
	files, err := filepath.Glob(filepath.Join(dir, "repo/targets/releases/*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	if err := os.WriteFile(files[0], first[1:], 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := command("repo", "verify", "--repo", in("repo"))
	if code != 1 || !strings.HasPrefix(stdout, "NOT SOUND   1 of 1") || !strings.Contains(stderr, "refused by devices") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
}

func TestExitCodes(t *testing.T) {
	empty := t.TempDir()
	huge := filepath.Join(t.TempDir(), "huge")
	if err := errors.Join(os.WriteFile(huge, nil, 0o600), os.Truncate(huge, 1<<40)); err != nil {
		t.Skip("needs a file system with sparse files: ", err)
	}
	for _, c := range []struct {
		args string
		code int
		want string // in the lines on standard error
	}{
		{"--help", 0, ""},
		{"--version", 0, ""},
		{"nothing", 2, "hint: hotpatch-build --help"},
		{"", 2, "no command is given"},
		{"completion foo", 2, "completion needs a shell"},
		{"completion bash", 0, ""},
		{"publish", 2, "hint: hotpatch-build publish --help"},
		{"publish x.hotpatch", 2, `required flag(s) "keys", "repo" not set`},
		{"publish --repo r --keys k --expires never x", 2, "is not a time like 30d or 12h"},
		{"publish --repo r --keys k --expires 9999d x", 2, "at most 365d"},
		{"publish --repo r --keys " + empty + " x", 1, "hint: for a new repository: hotpatch-build keys"},
		{"keys", 2, `"dir" not set`},
		{"keys --dir " + empty + " more", 2, "hint: "},
		{"repo", 2, "repo needs a command"},
		{"repo verify --repo " + empty, 1, "is not a repository"},
		{"refresh --bogus", 2, "unknown flag"},
		{"release", 2, `"manifest" not set`},
		{"release --manifest none.toml", 1, "cannot read manifest"},
		{"inspect " + huge, 1, huge + " has 1099511627776 bytes, more than "},
		{"inspect " + empty, 1, empty + " is not a regular file"},
		{"release --manifest " + huge, 1, "cannot read manifest: " + huge + " has"},
		{"rollout ACME-1 --percent 5", 2, `required flag(s) "keys", "repo" not set`},
	} {
		code, stdout, stderr := command(strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, want %d: %s", c.args, code, c.code, stderr)
		}
		if code != 0 && (stdout != "" || !strings.HasPrefix(stderr, "hotpatch-build: ") || strings.Count(stderr, "\n") > 2) {
			t.Errorf("%s: not one line and a hint: %q %q", c.args, stdout, stderr)
		}
	}
}

// What is no file, or has no end, is refused at once.
func TestInputsWaitForNobody(t *testing.T) {
	dir := t.TempDir()
	odd := map[string]bool{}
	if err := exec.Command("mkfifo", filepath.Join(dir, "pipe")).Run(); err == nil {
		odd[filepath.Join(dir, "pipe")] = true
	}
	if info, err := os.Stat("/dev/zero"); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		odd["/dev/zero"] = true
	}
	if len(odd) < 2 {
		if os.Getenv("HOTPATCH_TEST_ALL") == "1" && runtime.GOOS != "windows" {
			t.Fatal("needs mkfifo and /dev/zero")
		}
		t.Skip("needs mkfifo and /dev/zero")
	}
	must(t, "keys", "--dir", filepath.Join(dir, "keys"))
	for file := range odd {
		toml := filepath.Join(dir, "release.toml")
		text := fmt.Sprintf("id = \"X-1\"\nsequence = 1\n[[images]]\nname = \"app.dll\"\nfile = %q\n", file)
		if err := os.WriteFile(toml, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{
			{"inspect", file}, {"diff", file, file}, {"test", file, "--base", file}, {"publish", "--repo", filepath.Join(dir, "repo"), "--keys", filepath.Join(dir, "keys"), file},
			{"image", "--base", file, "--fix", file, "--sequence", "1", "-o", filepath.Join(dir, "out")}, {"implib", "--base", file, "-o", filepath.Join(dir, "out")},
			{"release", "--manifest", file}, {"release", "--manifest", toml},
		} {
			type result struct {
				code   int
				stderr string
			}
			done := make(chan result, 1)
			go func() {
				code, _, stderr := command(args...)
				done <- result{code, stderr}
			}()
			select {
			case r := <-done:
				if want := file + " is not a regular file"; r.code != 1 || !strings.Contains(r.stderr, want) && args[0] != "diff" {
					t.Errorf("%s: exit code %d: %s", args, r.code, r.stderr)
				}
			case <-time.After(time.Minute):
				t.Fatalf("%s hangs", args)
			}
		}
	}
}
