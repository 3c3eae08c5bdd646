package release

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"hotpatchd/pe"
)

const someHash = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// sample is a sound manifest with the contents it names.
func sample() (*Manifest, map[string][]byte) {
	m := &Manifest{
		Format: Format, ID: "ACME-2026-11", Product: "acme-server", Kind: KindHotpatch, Month: "2026-11", Sequence: 2,
		Title: "heap overflow in the frame parser", Severity: "critical", CVEs: []string{"CVE-2026-0001"},
		SupportURL: "https://support.example.com/ACME-2026-11",
		Requires:   Requires{OS: []string{"windows", "linux"}, Arch: []string{"amd64"}},
		Info:       map[string]any{"ticket": "1234"},
	}
	files := map[string][]byte{}
	addImage(m, files, "app.dll", "images/app-1.dll", []byte("MZ a hotpatch image, as far as a container cares"))
	return m, files
}

func addImage(m *Manifest, files map[string][]byte, name, file string, content []byte) {
	i := Image{Name: name, Arch: "amd64", File: file,
		Base: pe.Identity{Machine: 34404, SizeOfImage: 65536, TimeDateStamp: uint32(len(m.Images) + 1), TextSHA256: someHash}}
	if err := fill(content, &i.Size, &i.SHA256); err != nil {
		panic(err)
	}
	m.Images = append(m.Images, i)
	files[file] = content
}

func mustWrite(t testing.TB) []byte {
	t.Helper()
	m, files := sample()
	addImage(m, files, "codec.dll", "images/codec-2.dll", []byte("MZ another"))
	b, err := Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWriteOpen(t *testing.T) {
	m, files := sample()
	b, err := Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(b)
	if err != nil {
		t.Fatal(err)
	}
	if string(r.ImageBytes(0)) != string(files["images/app-1.dll"]) || r.Product != "acme-server" {
		t.Errorf("read back %+v", r.Manifest)
	}
	again, err := Write(&r.Manifest, files)
	if err != nil || string(again) != string(b) {
		t.Errorf("written again the bytes differ (%v)", err)
	}
	// A second opinion: the zip reader of the Go library sees the same files.
	z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	if err != nil || len(z.File) != 2 || z.File[0].Name != "release.json" || z.File[1].Name != "images/app-1.dll" {
		t.Errorf("archive/zip reads %v, %v", z, err)
	}
}

// word draws what ids, products and baselines may be.
var word = rapid.StringMatching(`[A-Za-z0-9][A-Za-z0-9._-]{0,20}`)

func drawRelease(t *rapid.T) (*Manifest, map[string][]byte) {
	m := &Manifest{
		Format: Format, ID: word.Draw(t, "id"), Product: word.Draw(t, "product"), Kind: KindHotpatch,
		Month: rapid.SampledFrom([]string{"", "2026-11", "2031-01"}).Draw(t, "month"), Sequence: rapid.Uint32Min(1).Draw(t, "sequence"),
		Title:       rapid.StringOfN(rapid.RuneFrom(nil, rangeOfLetters), 0, 30, 120).Draw(t, "title"),
		Consistency: rapid.SampledFrom([]string{ConsistencyEntry, ConsistencyQuiescent}).Draw(t, "consistency"),
		Unwind:      rapid.SampledFrom([]string{UnwindNone, UnwindRequired}).Draw(t, "unwind"),
		CVEs:        rapid.SliceOfNDistinct(word, 0, 4, rapid.ID).Draw(t, "cves"),
	}
	files := map[string][]byte{}
	n := rapid.IntRange(1, 5).Draw(t, "images")
	if rapid.Bool().Draw(t, "baseline") {
		m.Kind = KindBaseline
		for i := range n {
			f := File{Destination: fmt.Sprintf(`C:\Program Files\ACME\%d.dll`, i), File: fmt.Sprintf("files/%d.dll", i)}
			files[f.File] = rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "content")
			if err := fill(files[f.File], &f.Size, &f.SHA256); err != nil {
				t.Fatal(err)
			}
			m.Files = append(m.Files, f)
		}
		return m, files
	}
	for i := range n {
		addImage(m, files, "app.dll", fmt.Sprintf("images/app-%d.dll", i), rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "content"))
	}
	return m, files
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, files := drawRelease(t)
		b, err := Write(m, files)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Open(b)
		if err != nil {
			t.Fatal(err)
		}
		m.fill()
		if !reflect.DeepEqual(&r.Manifest, m) {
			t.Fatalf("wrote %+v, read %+v", m, r.Manifest)
		}
		for i := range r.Images {
			if !bytes.Equal(r.ImageBytes(i), files[m.Images[i].File]) {
				t.Fatalf("image %d differs", i)
			}
		}
		for i := range r.Files {
			if !bytes.Equal(r.FileBytes(i), files[m.Files[i].File]) {
				t.Fatalf("file %d differs", i)
			}
		}
		again, err := Write(&r.Manifest, files)
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("not deterministic (%v)", err)
		}
	})
}

// A changed byte is found, or it lies where nothing is read from.
func TestMutationIsRefusedOrHarmless(t *testing.T) {
	b := mustWrite(t)
	sound, err := Open(b)
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	for at := range b {
		for _, bit := range []byte{0x01, 0x80, 0xff} {
			changed := bytes.Clone(b)
			changed[at] ^= bit
			r, err := Open(changed)
			if err != nil {
				continue
			}
			accepted++
			if !reflect.DeepEqual(r.Manifest, sound.Manifest) || !reflect.DeepEqual(r.contents, sound.contents) {
				t.Fatalf("byte %d changed by %#x gives another release", at, bit)
			}
		}
	}
	// Time stamps, versions and attributes of three records: nothing else is free.
	if limit := 3 * 3 * 24; accepted > limit {
		t.Errorf("%d changes were accepted, more than %d", accepted, limit)
	}
	rapid.Check(t, func(t *rapid.T) {
		cut := rapid.IntRange(0, len(b)).Draw(t, "cut")
		end := rapid.IntRange(cut, len(b)).Draw(t, "end")
		noise := rapid.SliceOfN(rapid.Byte(), 0, 64).Draw(t, "noise")
		changed := append(append(bytes.Clone(b[:cut]), noise...), b[end:]...)
		if r, err := Open(changed); err == nil && !reflect.DeepEqual(r.contents, sound.contents) {
			t.Fatal("another release")
		}
	})
}

func TestWriteRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Manifest, map[string][]byte){
		"missing":   func(_ *Manifest, f map[string][]byte) { delete(f, "images/app-1.dll") },
		"too many":  func(_ *Manifest, f map[string][]byte) { f["images/more.dll"] = []byte("x") },
		"hash":      func(_ *Manifest, f map[string][]byte) { f["images/app-1.dll"][0] = 'N' },
		"size":      func(m *Manifest, _ map[string][]byte) { m.Images[0].Size++ },
		"id":        func(m *Manifest, _ map[string][]byte) { m.ID = "../evil" },
		"deep info": func(m *Manifest, _ map[string][]byte) { m.Info = nest(maxDepth + 1) },
	} {
		m, files := sample()
		spoil(m, files)
		if _, err := Write(m, files); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

func nest(n int) map[string]any {
	if n == 0 {
		return map[string]any{}
	}
	return map[string]any{"x": nest(n - 1)}
}

func TestReadManifestRefuses(t *testing.T) {
	m, _ := sample()
	m.fill()
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadManifest(text); err != nil {
		t.Fatal(err)
	}
	sub := func(old, now string) string {
		if strings.Count(string(text), old) != 1 {
			t.Fatalf("%q is not there once in %s", old, text)
		}
		return strings.Replace(string(text), old, now, 1)
	}
	for _, c := range []struct{ name, text, want string }{
		{"unknown field", sub(`"kind":`, `"x":1,"kind":`), `release ACME-2026-11 has the field "x": this daemon does not know it; newer daemons may`},
		{"unknown field below", sub(`"machine":`, `"y":1,"machine":`), `release ACME-2026-11 has the field "images[0].base.y"`},
		{"unknown format", sub(Format, "hotpatch-release/2"), `release ACME-2026-11 has the format "hotpatch-release/2": this daemon does not know it; newer daemons may`},
		{"no format", sub(`"format":"hotpatch-release/1",`, ``), `format is ""`},
		{"case of a field", sub(`"kind":`, `"Kind":`), `has the field "Kind"`},
		{"field twice", sub(`"kind":`, `"kind":"baseline","kind":`), `field "kind" occurs twice`},
		{"null", sub(`"cves":["CVE-2026-0001"]`, `"cves":null`), `field "cves" is null`},
		{"type", sub(`"sequence":2`, `"sequence":"2"`), `field "sequence" cannot be a string`},
		{"sequence range", sub(`"sequence":2`, `"sequence":4294967296`), `sequence`},
		{"sequence 0", sub(`"sequence":2`, `"sequence":0`), `sequence is 0`},
		{"fraction", sub(`"sequence":2`, `"sequence":2.5`), `sequence`},
		{"something after", string(text) + "{}", `something follows the document`},
		{"cut off", string(text[:len(text)-1]), `unexpected EOF`},
		{"not UTF-8", sub("frame parser", "frame \xff"), `not UTF-8`},
		{"control character", sub("frame parser", `frame \u001b[2J`), `title has the control character U+001B`},
		{"direction of writing", sub("frame parser", `\u202egnp.exe`), `title has the control character U+202E`},
		{"id", sub(`"id":"ACME-2026-11"`, `"id":"-x"`), `release id "-x"`},
		{"product", sub(`acme-server`, `acme server`), `product "acme server"`},
		{"kind", sub(`"kind":"hotpatch"`, `"kind":"coldpatch"`), `kind is "coldpatch"`},
		{"month", sub(`"month":"2026-11"`, `"month":"2026-13"`), `month is "2026-13"`},
		{"consistency", sub(`"consistency":"entry"`, `"consistency":"never"`), `consistency is "never"`},
		{"unwind", sub(`"unwind":"none"`, `"unwind":"maybe"`), `unwind is "maybe"`},
		{"address", sub(`https://support`, `javascript://support`), `support_url`},
		{"way out", sub(`images/app-1.dll`, `images/../app-1.dll`), `file "images/../app-1.dll"`},
		{"absolute", sub(`images/app-1.dll`, `/images/app-1.dll`), `file "/images/app-1.dll"`},
		{"other folder", sub(`images/app-1.dll`, `app-1.dll`), `file "app-1.dll"`},
		{"stream", sub(`images/app-1.dll`, `images/app:1`), `file "images/app:1"`},
		{"name with a path", sub(`"name":"app.dll"`, `"name":"..\\app.dll"`), `is not the name of a file`},
		{"hash", sub(`"sha256":"`, `"sha256":"A`), `lower-case hexadecimal`},
		{"size", sub(`"size":48`, `"size":-1`), `size is -1`},
		{"huge", sub(`"size":48`, `"size":99999999999`), `size is 99999999999`},
		{"arch", sub(`"arch":"amd64"`, `"arch":"arm64"`), `arch is "arm64"`},
		{"machine", sub(`34404`, `332`), `can be patched`},
		{"weak identity", sub(`"text_sha256":"`+someHash+`"`, `"text_sha256":""`), `text_sha256 is missing`},
		{"rsds", sub(`"rsds":""`, `"rsds":"x/1"`), `base.rsds`},
		{"no image", sub(`"images":[`, `"images":[],"info2":[`), `info2`},
		{"relative destination", sub(`"images":[`, `"files":[{"destination":"x","file":"files/x","size":1,"sha256":"`+someHash+`"}],"images":[`), `files[0] destination "x" is not an absolute path`},
		{"destination with a way out", sub(`"images":[`, `"files":[{"destination":"/opt/../etc/x","file":"files/x","size":1,"sha256":"`+someHash+`"}],"images":[`), `is not an absolute path`},
		{"destination on Windows with a way out", sub(`"images":[`, `"files":[{"destination":"C:\\\\a\\\\..\\\\x","file":"files/x","size":1,"sha256":"`+someHash+`"}],"images":[`), `is not an absolute path`},
		{"replaces", sub(`"images":[`, `"files":[{"destination":"/opt/x","file":"files/x","size":1,"sha256":"`+someHash+`","replaces":["x"]}],"images":[`), `replaces[0]`},
		{"identity", sub(`"images":[`, `"files":[{"destination":"/opt/x","file":"files/x","size":1,"sha256":"`+someHash+`","identity":{"machine":1}}],"images":[`), `identity has the machine 1`},
		{"destination twice", sub(`"images":[`, `"files":[{"destination":"/opt/x","file":"files/x","size":1,"sha256":"`+someHash+`"},{"destination":"/opt/X","file":"files/y","size":1,"sha256":"`+someHash+`"}],"images":[`), `files[1] destination "/opt/X" is there twice`},
		{"info", sub(`"1234"`, `"`+strings.Repeat("x", MaxInfo)+`"`), `info has`},
		{"word twice", sub(`["windows","linux"]`, `["linux","linux"]`), `requires.os[1]`},
		{"deep", sub(`"1234"`, strings.Repeat("[", 99)+strings.Repeat("]", 99)), `nested deeper`},
	} {
		_, err := ReadManifest([]byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

// Two images for one build would leave open which of them a device takes.
func TestSameBaseTwice(t *testing.T) {
	m, files := sample()
	addImage(m, files, "APP.DLL", "images/app-2.dll", []byte("MZ another"))
	m.fill()
	m.Images[1].Base = m.Images[0].Base
	if err := m.Check(); err == nil || !strings.Contains(err.Error(), "same build") {
		t.Errorf("error %v", err)
	}
	m.Images[1].Base.SizeOfImage++
	if err := m.Check(); err != nil {
		t.Errorf("two builds of one name: %v", err)
	}
	m.Images[1].File = "images/APP-1.dll"
	if err := m.Check(); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("names that differ in case only: %v", err)
	}
}

// An unknown feature is for the device to judge, not an error of the release.
func TestUnknownFeatureIsRead(t *testing.T) {
	m, files := sample()
	m.Requires.Features = []string{"time-travel"}
	b, err := Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Open(b); err != nil || r.Requires.Features[0] != "time-travel" {
		t.Errorf("%v", err)
	}
}

func FuzzManifest(f *testing.F) {
	m, _ := sample()
	m.fill()
	text, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"format":"hotpatch-release/2","id":"x"}`))
	f.Add([]byte(`{"format":"hotpatch-release/1","id":"x","info":{"a":[[[1e999]]]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ReadManifest(b)
		if err != nil {
			return
		}
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ReadManifest(text)
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("read %+v, then %+v (%v)", m, again, err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	f.Add(mustWrite(f))
	for _, c := range evilZips(f) {
		f.Add(c.bytes)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Open(b)
		if err != nil {
			return
		}
		var total int
		for i := range r.Images {
			total += len(r.ImageBytes(i))
		}
		if total > MaxRatio*len(b) {
			t.Fatalf("%d bytes expand to %d", len(b), total)
		}
	})
}
