package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/release"
)

// head is what every document begins with.
type head struct {
	Format, Version string
	Generated       time.Time
	Error           struct{ Code, Text, Hint string }
}

func documentOf(t *testing.T, text string) head {
	t.Helper()
	var h head
	if err := json.Unmarshal([]byte(text), &h); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if h.Format == "" || h.Version == "" || time.Since(h.Generated) > time.Hour || h.Generated.Location() != time.UTC {
		t.Errorf("no head: %s", text)
	}
	return h
}

// TestDocuments: every command answers in one document with --json, and fails in one.
func TestDocuments(t *testing.T) {
	dir := author(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	app, fix := fixtures+"mingw/app.dll", fixtures+"mingw/fix-import-1.dll"
	for _, c := range []struct {
		format string
		args   []string
	}{
		{"hotpatch-implib/1", []string{"implib", "--base", app, "-o", in("libapp.a")}},
		{"hotpatch-image-made/1", []string{"image", "--base", app, "--fix", fix, "--sequence", "1", "-o", in("app-1.dll")}},
		{"hotpatch-image/1", []string{"inspect", in("app-1.dll")}},
		{"hotpatch-built/1", []string{"release", "--manifest", in("release.toml"), "-o", in("DEMO-1.hotpatch")}},
		{"hotpatch-contents/1", []string{"inspect", in("DEMO-1.hotpatch")}},
		{"hotpatch-test/1", []string{"test", in("DEMO-1.hotpatch"), "--base", fixtures + "demo/demo.dll"}},
		{"hotpatch-keys/1", []string{"keys", "--dir", in("keys")}},
		{"hotpatch-publish/1", []string{"publish", "--repo", in("repo"), "--keys", in("keys"), in("DEMO-1.hotpatch")}},
		{"hotpatch-refresh/1", []string{"refresh", "--repo", in("repo"), "--keys", in("keys")}},
		{"hotpatch-repository/1", []string{"repo", "verify", "--repo", in("repo")}},
	} {
		if h := documentOf(t, must(t, append(c.args, "--json")...)); h.Format != c.format {
			t.Errorf("%v: format %q, want %q", c.args, h.Format, c.format)
		}
	}
	for _, c := range []struct {
		code int
		word string
		args []string
	}{
		{1, "writable-data", []string{"image", "--base", app, "--fix", fixtures + "bad/writable.dll", "--sequence", "1", "-o", in("x.dll")}},
		{2, "usage", []string{"image", "--base", app, "--sequence", "many"}},
		{1, "failed", []string{"implib", "--base", in("none.dll"), "-o", in("x.a")}},
		{1, "failed", []string{"inspect", in("release.toml")}},
		{1, "failed", []string{"release", "--manifest", in("none.toml")}},
		{1, "failed", []string{"test", in("release.toml")}},
		{1, "failed", []string{"keys", "--dir", in("keys")}},
		{1, "failed", []string{"publish", "--repo", in("repo"), "--keys", in("none"), in("DEMO-1.hotpatch")}},
		{2, "usage", []string{"refresh", "--repo", in("repo")}},
		{1, "failed", []string{"repo", "verify", "--repo", in("none")}},
	} {
		code, out, errs := command(append(c.args, "--json")...)
		if h := documentOf(t, errs); code != c.code || out != "" || h.Format != "hotpatch-error/1" || h.Error.Code != c.word || h.Error.Text == "" {
			t.Errorf("%v: exit %d, %q, %s", c.args, code, out, errs)
		}
	}
}

// TestAdvice: refusals that the author can do something about say what.
func TestAdvice(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.dll")
	pdb := filepath.Join(t.TempDir(), "app.pdb")
	if err := os.WriteFile(pdb, []byte("Microsoft C/C++ MSF 7.00\r\n\x1aDS\x00\x00\x00 and so on"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		base, fix string
		more      []string
		says      []string
	}{
		{"mingw/app.dll", "bad/tls.dll", nil, []string{"tls: ", "hint: ", "-nostdlib"}},
		{"mingw/app.dll", "bad/export.dll", nil, []string{"changed-exports: brand_new", "hint: ", "__declspec(dllexport)", "--function NAME=NEWNAME"}},
		{"entries/entries.dll", "entries/fix-short.dll", nil, []string{"too-short: entry_d_short", "hint: replace its callers"}},
		{"mingw/app.dll", "mingw/fix-ref-1.dll", []string{"--symbols", pdb}, []string{"symbols-mismatch", "app.pdb is a program database (PDB)", "/debug:symtab"}},
		{"mingw/app.dll", "mingw/fix-ref-1.dll", []string{"--sequence", "one"}, []string{"wanted a number from 1 to 4294967295", "hint: hotpatch-build image --help"}},
		{"callers/callers.dll", "callers/fix.dll", []string{"--function", "leaf"}, []string{"caller-relies-on-registers: leaf", "-fno-ipa-ra", "no_caller_saved_registers"}},
	} {
		code, _, errs := command(append([]string{"image", "--base", fixtures + c.base, "--fix", fixtures + c.fix, "--sequence", "1", "-o", out}, c.more...)...)
		for _, want := range c.says {
			if code == 0 || !strings.Contains(errs, want) || strings.Contains(errs, "strconv") {
				t.Errorf("%s: exit %d, %q, want %q", c.fix, code, errs, want)
			}
		}
	}
}

// TestReleaseChecks: what devices would refuse, or people not understand, is refused when made.
func TestReleaseChecks(t *testing.T) {
	dir := author(t)
	file := filepath.Join(dir, "release.toml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		old, now string
		code     int
		says     []string
	}{
		{"sequence = 1", "sequence = 3", 1, []string{"release.toml: release DEMO-1", "the release has sequence 3, but the hotpatch image, images/demo-1.dll in it, was made with sequence 1", "--sequence 3"}},
		{"sequence = 1", "", 1, []string{"sequence is 0"}},
		{"sequence = 1", "sequence = \"1\"", 1, []string{"sequence cannot be of type string, wanted a number"}},
		{"sequence = 1", "sequence = 1\nseverity = \"urgent\"", 1, []string{`severity is "urgent", not one of critical`}},
		{"sequence = 1", "sequence = 1\ncves = [\"2026-1\"]", 1, []string{`cves[0] is "2026-1", not CVE-YYYY-NNNN`}},
		{"sequence = 1", "sequence = 1\nconsistency = \"quiescent\"", 0, []string{"warning: consistency \"quiescent\": no device"}},
		{"sequence = 1", "sequence = 1\nseverity = \"important\"\ncves = [\"CVE-2026-0001\"]", 0, nil},
	} {
		if err := os.WriteFile(file, []byte(strings.Replace(string(text), c.old, c.now, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "x.hotpatch")
		code, _, errs := command("release", "--manifest", file, "-o", out)
		if code != c.code || c.says == nil && errs != "" {
			t.Errorf("%q: exit %d, %q", c.now, code, errs)
		}
		for _, want := range c.says {
			if !strings.Contains(errs, want) {
				t.Errorf("%q: %q, want %q", c.now, errs, want)
			}
		}
		if _, err := os.Stat(out); (err == nil) != (c.code == 0) {
			t.Errorf("%q: written: %v", c.now, err)
		}
	}
}

// TestPublishChecks: a release that was made by other means is looked at again.
func TestPublishChecks(t *testing.T) {
	dir := author(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	text, err := os.ReadFile(in("release.toml"))
	if err != nil {
		t.Fatal(err)
	}
	m, files, err := release.FromTOML(text, folder(dir))
	if err != nil {
		t.Fatal(err)
	}
	m.Sequence = 7
	b, err := release.Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in("x.hotpatch"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, "keys", "--dir", in("keys"))
	code, _, errs := command("publish", "--repo", in("repo"), "--keys", in("keys"), in("x.hotpatch"))
	if code != 1 || !strings.Contains(errs, "the release has sequence 7, but the hotpatch image, images/demo-1.dll in it, was made with sequence 1") {
		t.Errorf("exit %d, %q", code, errs)
	}
	if _, err := os.Stat(in("repo")); err == nil {
		t.Error("made a repository all the same")
	}
}

// TestKeysHint: keys that are wrong are no reason to make others.
func TestKeysHint(t *testing.T) {
	dir := t.TempDir()
	if _, _, errs := command("publish", "--repo", "r", "--keys", filepath.Join(dir, "none"), "x"); !strings.Contains(errs, "hint: for a new repository: hotpatch-build keys --dir ") {
		t.Error(errs)
	}
	if err := os.WriteFile(filepath.Join(dir, "root.pem"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, errs := command("publish", "--repo", "r", "--keys", dir, "x"); !strings.Contains(errs, "root.pem is not a private key") || strings.Contains(errs, "keys --dir") {
		t.Error(errs)
	}
}
