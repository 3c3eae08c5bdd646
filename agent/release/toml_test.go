package release

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

const demoTOML = `
id = "DEMO-1"
product = "demo"
month = "2026-11"
sequence = 1
title = "wrong answer"
[requires]
os = ["linux"]
[info]
ticket = 12
when = 2026-11-10
[[images]]
name = "demo.dll"
file = "out/demo-1.dll"
`

// demoFolder holds a hotpatch image as the builder leaves it.
func demoFolder(t *testing.T) fstest.MapFS {
	t.Helper()
	dir := fstest.MapFS{}
	for _, suffix := range []string{"", BaseSuffix} {
		b, err := os.ReadFile("../../testdata/fixtures/demo/demo-1.dll" + suffix)
		if err != nil {
			t.Fatal(err)
		}
		dir["out/demo-1.dll"+suffix] = &fstest.MapFile{Data: b}
	}
	return dir
}

func TestFromTOML(t *testing.T) {
	dir := demoFolder(t)
	m, files, err := FromTOML([]byte(demoTOML), dir)
	if err != nil {
		t.Fatal(err)
	}
	i := m.Images[0]
	if m.Kind != KindHotpatch || m.Format != Format || m.Unwind != UnwindNone || i.Arch != "amd64" || i.File != "images/demo-1.dll" ||
		i.Size != int64(len(dir["out/demo-1.dll"].Data)) || i.Base.RSDS == "" || i.Base.ImageBase == 0 {
		t.Errorf("%+v", m)
	}
	b, err := Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(b)
	if err != nil || r.Info["ticket"] != 12.0 || r.Info["when"] != "2026-11-10" {
		t.Errorf("%v %v", r, err)
	}
}

func TestFromTOMLUnwind(t *testing.T) {
	dir := demoFolder(t)
	side := "out/demo-1.dll" + BaseSuffix
	dir[side] = &fstest.MapFile{Data: []byte(strings.Replace(string(dir[side].Data), `"unwind": "none"`, `"unwind": "required"`, 1))}
	m, _, err := FromTOML([]byte(demoTOML), dir)
	if err != nil || m.Unwind != UnwindRequired {
		t.Errorf("the builder found unwinding: %v, %v", m, err)
	}
	// One image that needs it is enough, wherever it stands.
	dir["out/demo-2.dll"] = dir["out/demo-1.dll"]
	dir["out/demo-2.dll"+BaseSuffix] = demoFolder(t)["out/demo-1.dll"+BaseSuffix]
	two := demoTOML + "[[images]]\nname = \"other.dll\"\nfile = \"out/demo-2.dll\"\n"
	for _, text := range []string{two, strings.NewReplacer("demo-1.dll", "demo-2.dll", "demo-2.dll", "demo-1.dll").Replace(two)} {
		m, _, err = FromTOML([]byte(text), dir)
		if err != nil || m.Unwind != UnwindRequired {
			t.Errorf("one of two images unwinds: %v, %v", m, err)
		}
	}
	m, _, err = FromTOML([]byte("unwind = \"none\"\n"+demoTOML), dir)
	if err != nil || m.Unwind != UnwindNone {
		t.Errorf("the author's word counts: %v, %v", m, err)
	}
}

func TestFromTOMLBaseline(t *testing.T) {
	text := `id = "ACME-B"
kind = "baseline"
[[files]]
destination = 'C:\ACME\app.dll'
file = "out/demo-1.dll"
replaces = ["out/older.dll", "` + strings.Repeat("a", 64) + `"]
[[files]]
destination = 'C:\ACME\app.conf'
file = "out/app.conf"
`
	dir := demoFolder(t)
	dir["out/older.dll"], dir["out/app.conf"] = &fstest.MapFile{Data: []byte("older")}, &fstest.MapFile{Data: []byte("conf")}
	m, files, err := FromTOML([]byte(text), dir)
	if err != nil {
		t.Fatal(err)
	}
	if r := m.Files[0].Replaces; len(r) != 2 || r[0] != fmt.Sprintf("%x", sha256.Sum256([]byte("older"))) || r[1] != strings.Repeat("a", 64) {
		t.Errorf("replaces %v", r)
	}
	if id := m.Files[0].Identity; id == nil || id.Machine != 0x8664 || id.SizeOfImage == 0 || m.Files[1].Identity != nil {
		t.Errorf("identities %v, %v", id, m.Files[1].Identity)
	}
	if m.Files[0].File != "files/1-demo-1.dll" || len(files) != 2 || m.Product != DefaultProduct {
		t.Errorf("%+v", m)
	}
	if _, err := Write(m, files); err != nil {
		t.Error(err)
	}
}

// TestFromTOMLFormat: format may be left out in TOML, the manifest has it; another is refused.
func TestFromTOMLFormat(t *testing.T) {
	m, files, err := FromTOML([]byte(demoTOML), demoFolder(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := Write(m, files)
	if err != nil || !strings.Contains(string(b), `"format": "hotpatch-release/1"`) {
		t.Errorf("no format in release.json (%v)", err)
	}
	if _, _, err := FromTOML([]byte("format = \"hotpatch-release/2\"\n"+demoTOML), demoFolder(t)); err == nil || !strings.Contains(err.Error(), "format is") {
		t.Errorf("another format: %v", err)
	}
}

func TestFromTOMLRefuses(t *testing.T) {
	with := func(old, now string) string { return strings.Replace(demoTOML, old, now, 1) }
	dir := demoFolder(t)
	dir["out/plain.dll"] = &fstest.MapFile{Data: []byte("MZ")}
	other, err := os.ReadFile("../../testdata/fixtures/demo/demo.dll")
	if err != nil {
		t.Fatal(err)
	}
	dir["out/demo.dll"] = &fstest.MapFile{Data: other}
	dir["out/alone.dll"] = dir["out/demo-1.dll"]
	dir["out/odd.dll"] = dir["out/demo-1.dll"]
	side := string(dir["out/demo-1.dll"+BaseSuffix].Data)
	dir["out/odd.dll"+BaseSuffix] = &fstest.MapFile{Data: []byte(strings.Replace(side, `"time_stamp": 17`, `"time_stamp": 18`, 1))}
	dir["out/new.dll"] = dir["out/demo-1.dll"]
	dir["out/new.dll"+BaseSuffix] = &fstest.MapFile{Data: []byte(strings.Replace(side, BaseFormat, "hotpatch-base/2", 1))}
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", with("title =", "titel ="), `line 6, column 1: there is no field "titel"`},
		{"syntax", with("sequence = 1", "sequence ="), "line 5"},
		{"type", with("sequence = 1", `sequence = "1"`), "line 5"},
		{"no such image", with("out/demo-1.dll", "out/none.dll"), "cannot read"},
		{"not an image", with("out/demo-1.dll", "out/plain.dll"), "out/plain.dll"},
		{"not a hotpatch image", with("out/demo-1.dll", "out/demo.dll"), "no hot patch table"},
		{"no side file", with("out/demo-1.dll", "out/alone.dll"), "side file"},
		{"side file of another build", with("out/demo-1.dll", "out/odd.dll"), "is for a base with 1700000000"},
		{"side file of a newer builder", with("out/demo-1.dll", "out/new.dll"), `format is "hotpatch-base/2"`},
		{"no name", with(`name = "demo.dll"`, ``), "name is missing"},
		{"wrong hash given", with(`name = "demo.dll"`, "name = \"demo.dll\"\nsha256 = \""+someHash+"\""), "but the file's is"},
		{"wrong arch given", with(`name = "demo.dll"`, "name = \"demo.dll\"\narch = \"arm64\""), `arch is "arm64"`},
		{"no images", demoTOML[:strings.Index(demoTOML, "[[images]]")], "kind hotpatch has images"},
	} {
		_, _, err := FromTOML([]byte(c.text), dir)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
	_, _, err = FromTOML([]byte(with("out/demo-1.dll", "out/none.dll")), dir)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cause is lost: %v", err)
	}
}

// TestCheckTables: a manifest that says other than the image's own table.
func TestCheckTables(t *testing.T) {
	for _, c := range []struct {
		sequence uint32
		want     string
	}{{1, ""}, {2, "release DEMO-1: image 1 for demo.dll: the release has sequence 2, but the hotpatch image, images/demo-1.dll in it, was made with sequence 1: set sequence = 1, or make the image anew by hotpatch-build image --sequence 2"}} {
		m, files, err := FromTOML([]byte(demoTOML), demoFolder(t))
		if err != nil {
			t.Fatal(err)
		}
		m.Sequence = c.sequence
		b, err := Write(m, files)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Open(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.CheckTables(); (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("sequence %d: %v", c.sequence, err)
		}
	}
}

func TestCheckLabels(t *testing.T) {
	for _, c := range []struct {
		severity, cve, want string
	}{
		{"", "", ""},
		{"critical", "CVE-2026-0001", ""},
		{"low", "CVE-1999-1234567", ""},
		{"urgent", "", `severity is "urgent", not one of critical, important, moderate, low`},
		{"Critical", "", `severity is "Critical"`},
		{"", "2026-0001", `cves[0] is "2026-0001", not CVE-YYYY-NNNN`},
		{"", "CVE-2026-001", `cves[0] is "CVE-2026-001"`},
		{"", "cve-2026-0001", `cves[0] is "cve-2026-0001"`},
	} {
		m := &Manifest{ID: "X", Severity: c.severity}
		if c.cve != "" {
			m.CVEs = []string{c.cve}
		}
		if err := m.CheckLabels(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %q: %v", c.severity, c.cve, err)
		}
	}
}
