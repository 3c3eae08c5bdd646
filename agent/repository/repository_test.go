package repository

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
	"hotpatchd/pe"
)

// start is the time at which every test begins.
var start = time.Date(2026, 11, 10, 12, 0, 0, 0, time.UTC)

// hotpatchImage is the smallest hotpatch image of the fixtures, its table
// changed to another sequence, and n more bytes behind it.
func hotpatchImage(t testing.TB, sequence uint32, n, seed int) (image []byte, stamp uint32) {
	t.Helper()
	image, err := os.ReadFile("../../testdata/fixtures/demo-clang/demo-1.dll")
	if err != nil {
		t.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		t.Fatal(err)
	}
	table, err := im.HotPatch()
	if err != nil {
		t.Fatal(err)
	}
	in := im.SectionAt(table.RVA)
	binary.LittleEndian.PutUint32(image[in.RawOffset+table.RVA-in.RVA+8:], sequence) // IMAGE_HOT_PATCH_INFO.SequenceNumber
	for i := range n {
		image = append(image, byte(i*7+seed))
	}
	return image, table.Bases[0].OriginalTimeDateStamp
}

// container makes a release with one image, which has n bytes that do not matter.
func container(t testing.TB, id string, sequence uint32, n int) []byte {
	t.Helper()
	image, stamp := hotpatchImage(t, sequence, n, len(id))
	return containerOf(t, id, sequence, image, stamp)
}

func containerOf(t testing.TB, id string, sequence uint32, image []byte, stamp uint32) []byte {
	t.Helper()
	return containerFor(t, "", id, sequence, image, stamp)
}

// containerFor is containerOf a release for a baseline.
func containerFor(t testing.TB, baseline, id string, sequence uint32, image []byte, stamp uint32) []byte {
	t.Helper()
	sum := sha256.Sum256(image)
	m := &release.Manifest{Format: release.Format, ID: id, Product: "acme", Kind: release.KindHotpatch, Month: "2026-11", Sequence: sequence, Baseline: baseline,
		Images: []release.Image{{Name: "app.dll", Arch: "amd64", File: "images/app-1.dll", Size: int64(len(image)), SHA256: hex.EncodeToString(sum[:]),
			Base: pe.Identity{Machine: 0x8664, SizeOfImage: 65536, TimeDateStamp: stamp, ImageBase: 0x7ffff80000000,
				TextSHA256: fmt.Sprintf("%064x", 1)}}}}
	b, err := release.Write(m, map[string][]byte{"images/app-1.dll": image})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fixture is a repository with one release and its keys.
type fixture struct {
	t    testing.TB
	dir  string
	keys Keys
	now  time.Time
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{t: t, dir: filepath.Join(t.TempDir(), "repo"), now: start}
	keyDir := filepath.Join(t.TempDir(), "keys")
	if _, err := GenerateKeys(keyDir); err != nil {
		t.Fatal(err)
	}
	keys, err := LoadKeys(keyDir)
	if err != nil {
		t.Fatal(err)
	}
	f.keys = keys
	f.publish("ACME-1", 1)
	return f
}

func (f *fixture) options() PublishOptions { return PublishOptions{Now: f.now} }

func (f *fixture) publish(id string, sequence uint32) Result {
	f.t.Helper()
	res, err := Publish(f.dir, f.keys, [][]byte{container(f.t, id, sequence, 5000)}, f.options())
	if err != nil {
		f.t.Fatal(err)
	}
	return res
}

func (f *fixture) root() []byte {
	f.t.Helper()
	b, err := os.ReadFile(filepath.Join(f.dir, "root.json"))
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// client makes a client of the folder, or of url, with a cache of its own.
func (f *fixture) client(url string) *Client {
	f.t.Helper()
	return f.clientIn(url, f.t.TempDir(), Floors{})
}

func (f *fixture) clientIn(url, dir string, floors Floors) *Client {
	f.t.Helper()
	if url == "" {
		url = folderURL(f.dir)
	}
	c, err := New(Config{URL: url, Dir: dir, InitialRoot: f.root(), Floors: floors, Now: func() time.Time { return f.now }})
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// serve starts a web server over the repository. meddle may answer a request
// itself and then returns true.
func (f *fixture) serve(meddle func(w http.ResponseWriter, r *http.Request) bool) *httptest.Server {
	f.t.Helper()
	files := http.FileServer(http.Dir(f.dir))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", f.now.UTC().Format(http.TimeFormat)) // tests about clocks set it otherwise
		if meddle == nil || !meddle(w, r) {
			files.ServeHTTP(w, r)
		}
	}))
	f.t.Cleanup(s.Close)
	return s
}

// sources are the two ways to a repository; a test that changes files of the
// folder runs over both.
func (f *fixture) sources() map[string]string {
	return map[string]string{"file": "", "http": f.serve(nil).URL}
}

func (f *fixture) file(name string) string { return filepath.Join(f.dir, filepath.FromSlash(name)) }

func (f *fixture) read(name string) []byte {
	f.t.Helper()
	b, err := os.ReadFile(f.file(name))
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f *fixture) write(name string, b []byte) {
	f.t.Helper()
	if err := os.WriteFile(f.file(name), b, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// snapshot of the folder, to put it back later.
func (f *fixture) save() map[string][]byte {
	f.t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(f.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(f.dir, path)
		if err == nil {
			files[filepath.ToSlash(rel)], err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return files
}

// resign signs m for role by what the repository's root names, as a thief of
// keys would, and writes it as name.
func resign[T metadata.Roles](f *fixture, m *metadata.Metadata[T], role, name string, keys Keys) []byte {
	f.t.Helper()
	root, err := metadata.Root().FromBytes(f.root())
	if err != nil {
		f.t.Fatal(err)
	}
	m.ClearSignatures()
	for _, key := range keys[role] {
		root.Signed.Roles[role].Threshold = 1
		_, id, err := tufKey(key)
		if err != nil {
			f.t.Fatal(err)
		}
		root.Signed.Roles[role].KeyIDs = []string{id}
		one := &metadata.Metadata[T]{Signed: m.Signed}
		if err := sign(one, role, root, Keys{role: {key}}); err != nil {
			f.t.Fatal(err)
		}
		m.Signatures = append(m.Signatures, one.Signatures...)
	}
	b, err := m.ToBytes(true)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write("metadata/"+name, b)
	return b
}

func parse[T metadata.Roles](f *fixture, m *metadata.Metadata[T], name string) *metadata.Metadata[T] {
	f.t.Helper()
	m, err := m.FromBytes(f.read("metadata/" + name))
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func mustRefresh(t testing.TB, c *Client) *Catalog {
	t.Helper()
	catalog, err := c.Refresh(context.Background())
	if err != nil {
		t.Fatalf("%v: %v", err, errors.Unwrap(err))
	}
	return catalog
}

// refused refreshes and wants the code; what was known before must stay.
func refused(t testing.TB, c *Client, code string) *Error {
	t.Helper()
	before, beforeErr := c.Cached()
	_, err := c.Refresh(context.Background())
	if CodeOf(err) != code {
		t.Fatalf("refresh: %v (code %q, cause %v), want %q", err, CodeOf(err), errors.Unwrap(err), code)
	}
	after, afterErr := c.Cached()
	if beforeErr == nil && (afterErr != nil || len(after.Offers) != len(before.Offers)) {
		t.Fatalf("a failed refresh changed what was known: %v", afterErr)
	}
	var e *Error
	errors.As(err, &e)
	return e
}

func TestPublishRefreshFetch(t *testing.T) {
	f := newFixture(t)
	c := f.client("")
	catalog, err := c.Refresh(context.Background())
	if err != nil {
		t.Fatalf("%v (%v)", err, err.(*Error).Err)
	}
	if len(catalog.Offers) != 1 || catalog.Offers[0].ID != "ACME-1" || catalog.Offers[0].Bases[0].Name != "app.dll" {
		t.Fatalf("offers: %+v, skipped %+v", catalog.Offers, catalog.Skipped)
	}
	b, err := c.Fetch(context.Background(), catalog.Offers[0])
	if err != nil {
		t.Fatal(err)
	}
	r, err := release.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := catalog.Offers[0].Agrees(&r.Manifest); err != nil {
		t.Error(err)
	}
	report, err := Verify(f.dir, f.now)
	if err != nil || report.Problems() != 0 {
		t.Errorf("%+v %v", report, err)
	}
}

// writeKeys puts keys where LoadKeys finds them.
func writeKeys(t testing.TB, dir string, keys Keys) {
	t.Helper()
	for role, list := range keys {
		der, err := x509.MarshalPKCS8PrivateKey(list[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := writeNew(keyFile(dir, role), pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})); err != nil {
			t.Fatal(err)
		}
	}
}

// folderURL is a folder as a configuration names it: file:///C:/… on Windows.
func folderURL(dir string) string {
	return "file:///" + strings.TrimPrefix(filepath.ToSlash(dir), "/")
}
