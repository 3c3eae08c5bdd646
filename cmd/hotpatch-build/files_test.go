package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A baseline goes from release.toml to a repository; what devices would refuse
// is refused here.
func TestBaselineRelease(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, f := range []struct{ from, to string }{{"mingw/app.dll", "old.dll"}, {"plain/app.dll", "new.dll"}, {"plain/app-1.dll", "fix.dll"}, {"plain/app-1.dll.base.json", "fix.dll.base.json"}} {
		b, err := os.ReadFile(fixtures + f.from)
		if err != nil {
			t.Fatal(err)
		}
		put(f.to, string(b))
	}
	good := `id = "ACME-B1"
product = "acme"
kind = "baseline"
month = "2026-11"
[requires]
os = ["linux"]
[[files]]
destination = "/opt/acme/app.dll"
file = "new.dll"
replaces = ["old.dll"]
[[files]]
destination = "/opt/acme/extra.dll"
file = "new.dll"
`
	out := filepath.Join(dir, "b.hotpatch")
	code, text, errs := command("release", "--manifest", put("release.toml", good), "-o", out)
	if code != 0 || !strings.Contains(text, "ACME-B1, month 2026-11, 2 files, ") || !strings.Contains(errs, "/opt/acme/extra.dll replaces nothing") {
		t.Fatalf("exit %d\n%s%s", code, text, errs)
	}
	text = must(t, "inspect", out)
	for _, want := range []string{"baseline of product acme", "/opt/acme/app.dll", "replaces ", "processes that have mapped it are fixed", "new: nothing may be there"} {
		if !strings.Contains(text, want) {
			t.Errorf("inspect does not say %q:\n%s", want, text)
		}
	}
	must(t, "keys", "--dir", filepath.Join(dir, "keys"))
	must(t, "publish", "--repo", filepath.Join(dir, "repo"), "--keys", filepath.Join(dir, "keys"), out)
	must(t, "repo", "verify", "--repo", filepath.Join(dir, "repo"))

	for _, c := range []struct{ name, old, now, want string }{
		{"no order", `month = "2026-11"`, ``, "needs month or sequence"},
		{"no system", `os = ["linux"]`, ``, "names 0 systems"},
		{"path of another system", `"/opt/acme/app.dll"`, `'C:\acme\app.dll'`, "is not an absolute path"},
		{"no older file", `["old.dll"]`, `["older.dll"]`, "replaces[0]"},
		{"a device's name", `os = ["linux"]`, `os = ["windows"]`, "is not an absolute path like"},
		{"the vulnerable build", `kind = "baseline"`, "sequence = 1\n", "has to be the fixed one"},
	} {
		text := strings.Replace(good, c.old, c.now, 1)
		if c.name == "the vulnerable build" {
			text += "[[images]]\nname = \"app.dll\"\nfile = \"fix.dll\"\n"
		}
		code, _, errs := command("release", "--manifest", put("bad.toml", text), "-o", filepath.Join(dir, "bad.hotpatch"))
		if code == 0 || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d, %s", c.name, code, errs)
		}
	}
}
