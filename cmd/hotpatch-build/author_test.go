package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hotpatchd/agent/release"
	"hotpatchd/patcher"
	"hotpatchd/pe"
)

const fixtures = "../../testdata/fixtures/"

// command runs hotpatch-build as main does and tells exit code and both streams.
func command(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(args, &out, &errs)
	return code, out.String(), errs.String()
}

// must runs a command that has to succeed.
func must(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := command(args...)
	if code != 0 {
		t.Fatalf("%v: exit %d\n%s%s", args, code, out, errs)
	}
	return out
}

// pack makes a release of one hotpatch image with the image command and the release command.
func pack(t *testing.T, base, fix string, sequence int, more ...string) string {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "image.dll")
	must(t, append([]string{"image", "--base", fixtures + base, "--fix", fixtures + fix, "--sequence", fmt.Sprint(sequence), "-o", image}, more...)...)
	manifest := fmt.Sprintf("id = \"TEST-%d\"\nsequence = %d\n[[images]]\nname = %q\nfile = \"image.dll\"\n", sequence, sequence, filepath.Base(base))
	toml, out := filepath.Join(dir, "release.toml"), filepath.Join(dir, "test.hotpatch")
	if err := os.WriteFile(toml, []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, "release", "--manifest", toml, "-o", out)
	return out
}

func TestImageWritesTheSideFile(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.dll")
	text := must(t, "image", "--base", fixtures+"mingw/app.dll", "--fix", fixtures+"mingw/fix-import-1.dll", "--sequence", "1", "-o", out)
	if !strings.Contains(text, "replaces  vuln at") || !strings.Contains(text, "replaces  slow at") {
		t.Errorf("does not say what it replaces:\n%s", text)
	}
	side, err := os.ReadFile(out + release.BaseSuffix)
	if err != nil {
		t.Fatal(err)
	}
	base, err := release.ReadBase(side)
	if err != nil {
		t.Fatal(err)
	}
	app, err := os.ReadFile(fixtures + "mingw/app.dll")
	if err != nil {
		t.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(app), int64(len(app)))
	if err != nil {
		t.Fatal(err)
	}
	if want, err := im.Identity(); err != nil || base.Identity != want || base.Unwind != release.UnwindNone {
		t.Errorf("side file %+v, want %+v (%v)", base, want, err)
	}
}

func TestImageFails(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.dll")
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"refused":       {[]string{"--base", fixtures + "mingw/app.dll", "--fix", fixtures + "bad/writable.dll", "--sequence", "1"}, exitFailed, "writable-data: answer_base"},
		"no such file":  {[]string{"--base", fixtures + "none.dll", "--fix", fixtures + "mingw/fix-ref-1.dll", "--sequence", "1"}, exitFailed, "none.dll"},
		"no sequence":   {[]string{"--base", fixtures + "mingw/app.dll", "--fix", fixtures + "mingw/fix-ref-1.dll"}, exitUsage, "sequence"},
		"empty name":    {[]string{"--base", fixtures + "mingw/app.dll", "--fix", fixtures + "mingw/fix-ref-1.dll", "--sequence", "1", "--function", "=x"}, exitFailed, "names no function"},
		"sequence zero": {[]string{"--base", fixtures + "mingw/app.dll", "--fix", fixtures + "mingw/fix-ref-1.dll", "--sequence", "0"}, exitFailed, "sequence: 0"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, errs := command(append([]string{"image", "-o", out}, c.args...)...)
			if code != c.code || !strings.Contains(errs, c.says) {
				t.Errorf("exit %d, %q; want %d and %q", code, errs, c.code, c.says)
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("wrote an image all the same")
			}
		})
	}
}

func TestImplib(t *testing.T) {
	out := filepath.Join(t.TempDir(), "libapp.a")
	if text := must(t, "implib", "--base", fixtures+"mingw/app.dll", "-o", out); !strings.Contains(text, "names of app.dll") {
		t.Errorf("says %q", text)
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.HasPrefix(b, []byte("!<arch>\n")) {
		t.Errorf("no archive (%v)", err)
	}
}

func TestDiffSaysItIsNotThere(t *testing.T) {
	code, _, errs := command("diff", "a", "b")
	if code != exitFailed || !strings.Contains(errs, "not available yet") {
		t.Errorf("exit %d, %q", code, errs)
	}
}

func TestInspectImage(t *testing.T) {
	text := must(t, "inspect", fixtures+"mingw/app-copy-2.dll")
	for _, want := range []string{
		"hotpatch image for amd64",
		"sequence 2",
		"leads to", "vuln; was 40 bytes",
		":= address of base", "__ref_answer_base", "__ref_calls",
		":= what base", "kernel32.dll!Sleep",
		"helper leads back to base",
		"and base",                  // the cold part
		"at   a000,      956 bytes", // sizes are decimal, places are not
	} {
		if !strings.Contains(text, want) {
			t.Errorf("does not say %q:\n%s", want, text)
		}
	}
	if text := must(t, "inspect", fixtures+"clang/app.dll"); !strings.Contains(text, "guard flags 10500") || !strings.Contains(text, "Hot patch    none") {
		t.Errorf("load configuration is not shown:\n%s", text)
	}
	if code, _, _ := command("inspect", fixtures+"src/app.c"); code != exitFailed {
		t.Errorf("a C file: exit %d", code)
	}
}

func TestInspectJSON(t *testing.T) {
	var doc struct {
		Format   string
		Identity pe.Identity
		HotPatch struct {
			Sequence int
			Bases    []struct {
				Records []struct {
					Type    string
					Inverse bool
					Name    string
					Length  int
				}
			}
		} `json:"hot_patch"`
	}
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", fixtures+"mingw/app-ref-1.dll")), &doc); err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for _, r := range doc.HotPatch.Bases[0].Records {
		counts[fmt.Sprintf("%s %v", r.Type, r.Inverse)]++
	}
	if doc.Format != "hotpatch-image/1" || doc.Identity.TextSHA256 == "" || doc.HotPatch.Sequence != 1 ||
		counts["function false"] != 2 || counts["absolute true"] != 3 || counts["indirect true"] != 1 || len(counts) != 3 {
		t.Errorf("document %+v, records %v", doc, counts)
	}
}

func TestInspectRelease(t *testing.T) {
	file := pack(t, "demo/demo.dll", "demo/demo-fix.dll", 1)
	if text := must(t, "inspect", file); !strings.Contains(text, "TEST-1") || !strings.Contains(text, "answer; was 14 bytes") {
		t.Errorf("says\n%s", text)
	}
	var doc struct {
		Manifest release.Manifest
		Images   []imageView
	}
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", file)), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Manifest.ID != "TEST-1" || len(doc.Images) != 1 || doc.Images[0].HotPatch == nil {
		t.Errorf("document %+v", doc)
	}
}

// checksOf runs the test command and returns its checks by name.
func checksOf(t *testing.T, wantCode int, args ...string) map[string]check {
	t.Helper()
	code, out, errs := command(append([]string{"test", "--json"}, args...)...)
	var doc struct {
		Passed bool
		Checks []check
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, errs)
	}
	checks := map[string]check{}
	for _, c := range doc.Checks {
		checks[strings.TrimSpace(c.Check+" "+c.Where)] = c
	}
	if code != wantCode || doc.Passed != (wantCode == 0) {
		t.Fatalf("exit %d, passed %v, want %d: %+v", code, doc.Passed, wantCode, checks)
	}
	return checks
}

func TestTrial(t *testing.T) {
	for _, c := range []struct {
		base, fix string
		sequence  int
		more      []string
		plan      string
	}{
		{"demo/demo.dll", "demo/demo-fix.dll", 1, nil, "1 entry ("},
		{"mingw/app.dll", "mingw/fix-ref-1.dll", 1, nil, "2 entries"},
		{"mingw/app.dll", "mingw/fix-import-2.dll", 2, nil, "3 entries"},
		{"mingw/app.dll", "mingw/fix-copy-2.dll", 2, nil, "3 entries"},
		{"plain/app.dll", "mingw/fix-ref-1.dll", 1, nil, "2 entries"},
		{"clang/app.dll", "clang/fix-import-2.dll", 2, nil, "two-byte jump"},
		{"clang/app.dll", "clang/fix-marked-1.dll", 1, []string{"--function", "vuln"}, "1 entry ("},
		{"entries/entries.dll", "entries/fix-entries.dll", 1, nil, "4 entries (1 by two-byte jump into owned filler, 3 by five-byte jump)"},
		{"many/many.dll", "many/many-fix.dll", 1, nil, "100 entries"},
	} {
		t.Run(c.fix, func(t *testing.T) {
			checks := checksOf(t, 0, pack(t, c.base, c.fix, c.sequence, c.more...), "--base", fixtures+c.base)
			for _, name := range []string{"base", "table", "plan", "busy", "apply", "again", "rollback", "invariants", "plan relocated", "rollback relocated", "invariants relocated"} {
				if checks[name].Result != passed {
					t.Errorf("%s: %+v", name, checks[name])
				}
			}
			if !strings.Contains(checks["plan"].Text, c.plan) {
				t.Errorf("plan says %q, want %q", checks["plan"].Text, c.plan)
			}
		})
	}
}

func TestTrialUnwindIsLeftToTheDevice(t *testing.T) {
	checks := checksOf(t, 0, pack(t, "mingw/app.dll", "mingw/fix-throw-1.dll", 1), "--base", fixtures+"mingw/app.dll")
	if checks["unwind"].Result != device {
		t.Errorf("unwind: %+v", checks["unwind"])
	}
}

func TestTrialFails(t *testing.T) {
	file := pack(t, "mingw/app.dll", "mingw/fix-ref-1.dll", 1)
	for name, args := range map[string][]string{"other build": {"--base", fixtures + "other/app.dll"}, "no base": nil} {
		checks := checksOf(t, exitFailed, append([]string{file}, args...)...)
		if checks["base"].Result != failed || len(checks) != 1 {
			t.Errorf("%s: %+v", name, checks)
		}
	}
	if code, _, errs := command("test", fixtures+"mingw/app.dll"); code != exitFailed || errs == "" {
		t.Errorf("a DLL is no release: exit %d %q", code, errs)
	}
}

// TestTrialJudges shows the judge what a wrong patcher would leave behind: an
// entry that leads elsewhere, other bytes than planned, code not restored.
func TestTrialJudges(t *testing.T) {
	b, err := os.ReadFile(pack(t, "mingw/app.dll", "mingw/fix-ref-1.dll", 1))
	if err != nil {
		t.Fatal(err)
	}
	r, err := release.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	bases, err := readBases([]string{fixtures + "mingw/app.dll"})
	if err != nil {
		t.Fatal(err)
	}
	patch, err := patcher.NewPatch(patcher.Origin{Release: r.ID, Sequence: 1, Image: "app.dll", Base: r.Images[0].Base}, r.ImageBytes(0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := (&trial{release: r, bases: bases}).start(t.Context(), bases[0], patch, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.p.Close()
	plan, err := s.prepare()
	if err != nil {
		t.Fatal(err)
	}
	before, err := s.code(plan)
	if err != nil {
		t.Fatal(err)
	}
	record, err := s.x.Apply(t.Context(), s.p, plan)
	if err != nil || s.applied(record) != nil {
		t.Fatalf("applied and not believed: %v, %v", err, s.applied(record))
	}
	if s.unchanged(plan, before) == nil {
		t.Error("patched code passes for unchanged")
	}
	record.Sites[0].Target++
	if s.applied(record) == nil {
		t.Error("an entry that leads elsewhere is believed")
	}
	record.Sites[0].Target--
	record.Sites[0].New[1]++
	if s.applied(record) == nil {
		t.Error("other bytes than planned are believed")
	}
	record.Sites[0].New[1]--
	record.State = patcher.Staged
	if s.applied(record) == nil {
		t.Error("a record that is not applied is believed")
	}
}

// TestStub: what stands in for system DLLs is an image that exports what was asked for, once each.
func TestStub(t *testing.T) {
	b := stubDLL("kernel32.dll", 0x8664, []string{"Sleep", "GetTickCount64", "Sleep"})
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	exports, err := im.Exports()
	if err != nil || len(exports) != 2 || exports[0].Name != "GetTickCount64" || exports[1].Name != "Sleep" {
		t.Errorf("exports %+v (%v)", exports, err)
	}
}
