package repository

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hotpatchd/agent/release"
	"hotpatchd/pe"
)

// start is the time at which every test begins.
var start = time.Date(2026, 11, 10, 12, 0, 0, 0, time.UTC)

// container makes a release with one image of n bytes.
func container(t testing.TB, id string, sequence uint32, n int) []byte {
	t.Helper()
	image := make([]byte, n)
	for i := range image {
		image[i] = byte(i*7 + len(id))
	}
	sum := sha256.Sum256(image)
	m := &release.Manifest{Format: release.Format, ID: id, Product: "acme", Kind: release.KindHotpatch, Month: "2026-11", Sequence: sequence,
		Images: []release.Image{{Name: "app.dll", Arch: "amd64", File: "images/app-1.dll", Size: int64(n), SHA256: hex.EncodeToString(sum[:]),
			Base: pe.Identity{Machine: 0x8664, SizeOfImage: 65536, TimeDateStamp: 7, ImageBase: 0x7ffff80000000,
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
		url = "file://" + filepath.ToSlash(f.dir)
	}
	c, err := New(Config{URL: url, Dir: dir, InitialRoot: f.root(), Floors: floors, Now: func() time.Time { return f.now }})
	if err != nil {
		f.t.Fatal(err)
	}
	return c
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
