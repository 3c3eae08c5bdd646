package release

import (
	"testing"

	"hotpatchd/pe"
)

// sample is a sound manifest with the contents it names.
func sample() (*Manifest, map[string][]byte) {
	image := []byte("MZ a hotpatch image, as far as a container cares")
	m := &Manifest{
		Format: Format, ID: "ACME-2026-11", Product: "acme-server", Kind: KindHotpatch, Month: "2026-11", Sequence: 2,
		Title: "heap overflow in the frame parser", Severity: "critical", CVEs: []string{"CVE-2026-0001"},
		SupportURL: "https://support.example.com/ACME-2026-11",
		Requires:   Requires{OS: []string{"windows", "linux"}, Arch: []string{"amd64"}},
		Info:       map[string]any{"ticket": "1234"},
		Images: []Image{{Name: "app.dll", Arch: "amd64", File: "images/app-1.dll",
			Base: pe.Identity{Machine: 34404, SizeOfImage: 65536, TimeDateStamp: 1,
				TextSHA256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}},
	}
	if err := fill(image, &m.Images[0].Size, &m.Images[0].SHA256); err != nil {
		panic(err)
	}
	return m, map[string][]byte{"images/app-1.dll": image}
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
}
