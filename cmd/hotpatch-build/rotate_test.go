package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRotateCommand: after it the folder of keys still publishes and refreshes, and the old keys alone do not.
func TestRotateCommand(t *testing.T) {
	dir := author(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	must(t, "release", "--manifest", in("release.toml"), "-o", in("DEMO-1.hotpatch"))
	must(t, "keys", "--dir", in("keys"))
	must(t, "publish", "--repo", in("repo"), "--keys", in("keys"), in("DEMO-1.hotpatch"))
	for _, role := range []string{"timestamp", "targets", "root"} {
		if out := must(t, "rotate", role, "--repo", in("repo"), "--keys", in("keys")); !strings.Contains(out, role+"-2.pem: it signs for "+role) {
			t.Error(out)
		}
		if err := os.Remove(in("keys/" + role + ".pem")); err != nil { // as it says
			t.Fatal(err)
		}
	}
	if h := documentOf(t, must(t, "rotate", "root", "--repo", in("repo"), "--keys", in("keys"), "--json")); h.Format != "hotpatch-rotate/1" {
		t.Errorf("%+v", h)
	}
	must(t, "refresh", "--repo", in("repo"), "--keys", in("keys"))
	if out := must(t, "repo", "verify", "--repo", in("repo")); !strings.HasPrefix(out, "SOUND   1 of 1 release verifies; root 9,") {
		t.Error(out)
	}
	good, err := os.ReadFile(in("repo/metadata/timestamp.json"))
	if err != nil || os.WriteFile(in("repo/metadata/timestamp.json"), good[:len(good)/2], 0o600) != nil {
		t.Fatal(err)
	}
	// The author is no device.
	if code, _, errs := command("repo", "verify", "--repo", in("repo")); code != 1 || !strings.Contains(errs, "hint: restore the file from a copy") || strings.Contains(errs, "applied fixes") {
		t.Errorf("exit %d, %s", code, errs)
	}
	if err := os.WriteFile(in("repo/metadata/timestamp.json"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := command("rotate", "mirror", "--repo", in("repo"), "--keys", in("keys")); code != 2 || !strings.Contains(errs, `"mirror" is not a role`) {
		t.Errorf("exit %d, %s", code, errs)
	}
	before, _ := filepath.Glob(in("keys/*"))
	if code, _, _ := command("rotate", "root", "--repo", in("none"), "--keys", in("keys")); code != 1 {
		t.Errorf("exit %d for no repository", code)
	}
	if after, _ := filepath.Glob(in("keys/*")); len(after) != len(before) {
		t.Errorf("made a key for no repository: %q", after)
	}
}
