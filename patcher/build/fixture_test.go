package build

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"hotpatchd/pe"
)

const fixtures = "../../testdata/fixtures"

// fixture reads a committed image.
func fixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(fixtures, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, b []byte) *pe.Image {
	t.Helper()
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// need finds a tool, or skips; a full run has no skips.
func need(t *testing.T, tool string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err == nil {
		return path
	}
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatalf("needs %s", tool)
	}
	t.Skipf("needs %s", tool)
	return ""
}

// make builds an image of two fixtures and fails the test if it is refused.
func buildImage(t testing.TB, base, fix string, sequence uint32, functions ...Replacement) *Result {
	t.Helper()
	r, err := Image(Options{Base: fixture(t, base), Fix: fixture(t, fix), Sequence: sequence, Functions: functions})
	if err != nil {
		t.Fatalf("%s + %s: %v", base, fix, err)
	}
	return r
}

// wantRefusal checks code, symbol and image of a refusal and returns it.
func wantRefusal(t testing.TB, err error, code Code, image, symbol string) *Refusal {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) {
		t.Fatalf("got %v, want a refusal %s", err, code)
	}
	if r.Code != code || r.Symbol != symbol || (image != "" && r.Image != image) {
		t.Fatalf("got %s of %q in %q (%v), want %s of %q in %q", r.Code, r.Symbol, r.Image, r, code, symbol, image)
	}
	return r
}

// edit is a copy of an image whose header and tables a test damages.
type edit struct {
	t testing.TB
	b []byte
}

func editOf(t testing.TB, b []byte) edit { return edit{t, bytes.Clone(b)} }

func (e edit) coff() int     { return int(binary.LittleEndian.Uint32(e.b[0x3c:])) + 4 }
func (e edit) optional() int { return e.coff() + 20 }

// directory sets a data directory (Microsoft PE specification, "Optional Header Data Directories").
func (e edit) directory(i int, rva, size uint32) edit {
	at := e.optional() + 112 + 8*i
	binary.LittleEndian.PutUint32(e.b[at:], rva)
	binary.LittleEndian.PutUint32(e.b[at+4:], size)
	return e
}

func (e edit) word16(at int, v uint16) edit {
	binary.LittleEndian.PutUint16(e.b[at:], v)
	return e
}

func (e edit) word32(at int, v uint32) edit {
	binary.LittleEndian.PutUint32(e.b[at:], v)
	return e
}

// stripped drops the COFF symbol table, as strip does for debuggers' sake.
func (e edit) stripped() edit {
	return e.word32(e.coff()+8, 0).word32(e.coff()+12, 0)
}

// at is the file offset of an RVA.
func (e edit) at(rva uint32) int {
	e.t.Helper()
	im := parse(e.t, e.b)
	s := im.SectionAt(rva)
	if s == nil {
		e.t.Fatalf("no section holds %x", rva)
	}
	return int(s.RawOffset + rva - s.RVA)
}

// pdata is the file offset of the RUNTIME_FUNCTION of an entry.
func (e edit) pdata(entry uint32) int {
	e.t.Helper()
	d := parse(e.t, e.b).Directories[3] // IMAGE_DIRECTORY_ENTRY_EXCEPTION
	for at := d.RVA; at < d.RVA+d.Size; at += 12 {
		if o := e.at(at); binary.LittleEndian.Uint32(e.b[o:]) == entry {
			return o
		}
	}
	e.t.Fatalf("no unwind record begins at %x", entry)
	return 0
}

// symbolRecord is the file offset of a COFF symbol's record.
func (e edit) symbolRecord(name string) int {
	e.t.Helper()
	table, count := int(binary.LittleEndian.Uint32(e.b[e.coff()+8:])), int(binary.LittleEndian.Uint32(e.b[e.coff()+12:]))
	strings := table + 18*count
	for i := 0; i < count; i++ {
		at := table + 18*i
		raw := e.b[at : at+8]
		if binary.LittleEndian.Uint32(raw) == 0 {
			raw = e.b[strings+int(binary.LittleEndian.Uint32(raw[4:])):]
		}
		if string(raw[:min(len(raw), len(name))]) == name && (len(raw) == len(name) || raw[len(name)] == 0) {
			return at
		}
		i += int(e.b[at+17])
	}
	e.t.Fatalf("no symbol %s", name)
	return 0
}

// grow makes a section n bytes longer within its raw data and returns the RVA
// of the new bytes.
func (e edit) grow(section string, n uint32) uint32 {
	e.t.Helper()
	im := parse(e.t, e.b)
	table := e.optional() + int(binary.LittleEndian.Uint16(e.b[e.coff()+16:]))
	for i, s := range im.Sections {
		if s.Name == section && s.VirtualSize+n <= s.RawSize {
			at := (s.VirtualSize + 3) &^ 3
			e.word32(table+40*i+8, at+n)
			return s.RVA + at
		}
	}
	e.t.Fatalf("no room in section %s", section)
	return 0
}

// symbol is the RVA of a name in an image.
func symbol(t testing.TB, b []byte, name string) uint32 {
	t.Helper()
	list, err := parse(t, b).Symbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.Name == name {
			return s.RVA
		}
	}
	t.Fatalf("no symbol %s", name)
	return 0
}

// TestFixtures holds the committed images to what testdata/fixtures/README.md says of them.
func TestFixtures(t *testing.T) {
	total := int64(0)
	err := filepath.WalkDir(fixtures, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".dll" {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if total += info.Size(); info.Size() > 40<<10 {
			t.Errorf("%s has %d bytes, too many to commit", path, info.Size())
		}
		return nil
	})
	if err != nil || total > 600<<10 {
		t.Errorf("%d bytes of images (%v)", total, err)
	}
	for name, bare := range map[string]bool{"mingw/app.dll": false, "clang/app.dll": false, "arm64/app.dll": false, "other/app.dll": false, "demo/demo.dll": false, "plain/app.dll": true} {
		id, err := parse(t, fixture(t, name)).Identity()
		if err != nil {
			t.Fatal(err)
		}
		if (id.TimeDateStamp == 0) != bare || (id.RSDS == "") != bare {
			t.Errorf("%s: stamp %x, rsds %q", name, id.TimeDateStamp, id.RSDS)
		}
	}
	for _, name := range []string{"demo/demo.dll", "demo-clang/demo.dll", "demo-arm64/demo.dll"} {
		im := parse(t, fixture(t, name))
		imports, err := im.Imports()
		if err != nil {
			t.Fatal(err)
		}
		if lc, err := im.LoadConfig(); err != nil || lc != nil || len(imports) != 0 || im.EntryPoint != 0 {
			t.Errorf("%s: load configuration %v, imports %v, entry point %x (%v)", name, lc, imports, im.EntryPoint, err)
		}
		if relocs, err := im.Relocs(); err != nil || len(relocs) == 0 {
			t.Errorf("%s: nothing to relocate (%v)", name, err)
		}
	}
	for _, name := range []string{"clang/app.dll", "arm64/app.dll"} {
		if lc, err := parse(t, fixture(t, name)).LoadConfig(); err != nil || lc == nil || len(lc.GuardFunctions) == 0 {
			t.Errorf("%s: no CFG table (%v)", name, err)
		}
	}
}
