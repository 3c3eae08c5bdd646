package repository

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// A damaged cache is set aside and told of; updating goes on.
func TestDamagedCache(t *testing.T) {
	damages := map[string]func(b []byte) []byte{
		"empty":   func([]byte) []byte { return nil },
		"cut off": func(b []byte) []byte { return b[:len(b)/2] },
		"zeros":   func(b []byte) []byte { return make([]byte, len(b)) },
		"huge":    func(b []byte) []byte { return bytes.Repeat([]byte(" "), maxTargetsLength+1) },
		"changed": func(b []byte) []byte { return bytes.Replace(b, []byte(`"version": 2`), []byte(`"version": 3`), 1) },
	}
	for _, file := range []string{"root.json", "metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/2.targets.json"} {
		for name, damage := range damages {
			if file == "root.json" && name == "changed" {
				damage = func(b []byte) []byte { return bytes.Replace(b, []byte(`"version": 1`), []byte(`"version": 7`), 1) }
			}
			t.Run(file+" "+name, func(t *testing.T) {
				f := newFixture(t)
				f.publish("ACME-2", 2)
				dir := t.TempDir()
				floors := func() Floors {
					c := f.clientIn("", dir, Floors{})
					mustRefresh(t, c)
					return c.Floors()
				}()
				path := filepath.Join(dir, filepath.FromSlash(file))
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, damage(b), 0o600); err != nil {
					t.Fatal(err)
				}
				var notices []string
				c, err := New(Config{URL: folderURL(f.dir), Dir: dir, InitialRoot: f.root(), Floors: floors,
					Now: func() time.Time { return f.now }, Notice: func(s string) { notices = append(notices, s) }})
				if err != nil {
					t.Fatal(err)
				}
				if catalog, err := c.Cached(); file != "root.json" && err == nil {
					t.Errorf("a damaged cache was believed: %+v", catalog)
				}
				if len(notices) != 1 || !strings.Contains(notices[0], "set aside as "+filepath.Base(file)+".bad") {
					t.Errorf("told: %q", notices)
				}
				if len(mustRefresh(t, c).Offers) != 2 {
					t.Error("offers are missing")
				}
				again := f.clientIn("", dir, floors)
				if catalog, err := again.Cached(); err != nil || len(catalog.Offers) != 2 {
					t.Errorf("after the refresh: %v", err)
				}
			})
		}
	}
}

// What a crash leaves of a file never counts, and goes.
func TestLeftOvers(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	mustRefresh(t, f.clientIn("", dir, Floors{}))
	for _, d := range []string{"", "metadata", "targets"} {
		if err := os.WriteFile(filepath.Join(dir, d, tempPrefix+"123"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := f.clientIn("", dir, Floors{})
	if _, err := c.Cached(); err != nil {
		t.Error(err)
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if strings.HasPrefix(d.Name(), tempPrefix) {
			t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// A power cut between two files of a new set leaves the old one.
func TestCrashWhileKeeping(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	mustRefresh(t, f.clientIn("", dir, Floors{}))
	f.publish("ACME-2", 2)
	for _, name := range []string{"2.targets.json", "2.snapshot.json"} {
		if err := os.WriteFile(filepath.Join(dir, "metadata", name), f.read("metadata/"+name), 0o600); err != nil {
			t.Fatal(err)
		}
		if catalog, err := f.clientIn("", dir, Floors{}).Cached(); err != nil || len(catalog.Offers) != 1 {
			t.Errorf("after %s: %v", name, err)
		}
	}
	if len(mustRefresh(t, f.clientIn("", dir, Floors{})).Offers) != 2 {
		t.Error("the new set was not taken")
	}
	entries, err := os.ReadDir(filepath.Join(dir, "metadata"))
	if err != nil || len(entries) != 3 {
		t.Errorf("kept %v (%v)", entries, err)
	}
}

// Nothing fetched yet, and no network: that is said, not shown as empty.
func TestCachedOfNothing(t *testing.T) {
	f := newFixture(t)
	if _, err := f.client("").Cached(); CodeOf(err) != CodeNotFound || !strings.Contains(err.Error(), "nothing was fetched yet") {
		t.Errorf("%v", err)
	}
}

// Without the newest root the cache may be signed by revoked keys.
func TestCachedBelowRootFloor(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	mustRefresh(t, f.clientIn("", dir, Floors{}))
	if _, err := f.clientIn("", dir, Floors{Root: 2}).Cached(); CodeOf(err) != CodeRollback {
		t.Errorf("%v", err)
	}
}

// Another repository under the same state needs the operator's word.
func TestRootOfAnotherRepository(t *testing.T) {
	f, other := newFixture(t), newFixture(t)
	dir := t.TempDir()
	mustRefresh(t, f.clientIn("", dir, Floors{}))
	_, err := New(Config{URL: folderURL(other.dir), Dir: dir, InitialRoot: other.root()})
	if CodeOf(err) != CodeConfig || !strings.Contains(err.Error(), "not the one") {
		t.Errorf("%v", err)
	}
}

// An unchanged repository costs one small file, and the versioned ones that
// are kept are not asked for again.
func TestRefreshIsCheap(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	mustRefresh(t, f.clientIn("", dir, Floors{}))
	for _, name := range []string{"metadata/1.snapshot.json", "metadata/1.targets.json"} {
		if err := os.Remove(f.file(name)); err != nil {
			t.Fatal(err)
		}
	}
	mustRefresh(t, f.clientIn("", dir, Floors{}))
}

// A publisher may have to publish a version again; the kept one is then
// genuine, but not what the timestamp names.
func TestVersionPublishedAgain(t *testing.T) {
	f := newFixture(t)
	c := f.client("")
	mustRefresh(t, c)
	snap := parse(f, metadata.Snapshot(), "1.snapshot.json")
	snap.Signed.Expires = start.Add(9 * 24 * time.Hour)
	signSnapshot(f, snap)
	catalog := mustRefresh(t, c)
	if !catalog.Expires.Equal(snap.Signed.Expires) || catalog.ExpiresIn != "snapshot.json" {
		t.Errorf("ends %v in %s", catalog.Expires, catalog.ExpiresIn)
	}
}

// One target of a format from the future does not hide the others.
func TestUnknownTargetIsSkippedAlone(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	for name, c := range map[string]struct{ old, now, want string }{
		"format":     {`"hotpatch-target/1"`, `"hotpatch-target/2"`, `has the format "hotpatch-target/2": this daemon does not know it; newer daemons may`},
		"field":      {`"sequence":1`, `"sequence":1,"quorum":3`, `has the field "quorum": this daemon does not know it; newer daemons may`},
		"other name": {`"id":"ACME-1"`, `"id":"ACME-9"`, `name is not that of the release "ACME-9"`},
		"percent":    {`"percent":100`, `"percent":101`, `101 percent`},
	} {
		targets := parse(f, metadata.Targets(), "2.targets.json")
		target := targets.Signed.Targets["releases/ACME-1.hotpatch"]
		text := bytes.Replace(compact(t, *target.Custom), []byte(c.old), []byte(c.now), 1)
		raw := rawJSON(text)
		target.Custom = &raw
		offers, skipped, err := readOffers(targets.Signed.Targets)
		if err != nil || len(offers) != 1 || offers[0].ID != "ACME-2" || len(skipped) != 1 || !strings.Contains(skipped[0].Reason, c.want) {
			t.Errorf("%s: %v, skipped %+v", name, err, skipped)
		}
	}
	two := parse(f, metadata.Targets(), "2.targets.json")
	two.Signed.Targets["releases/ACME-1.hotpatch"].Hashes["sha512"] = make([]byte, 64)
	if offers, skipped, _ := readOffers(two.Signed.Targets); len(offers) != 1 || !strings.Contains(skipped[0].Reason, "exactly one hash") {
		t.Errorf("%+v", skipped)
	}
}

func TestVerifyFile(t *testing.T) {
	f := newFixture(t)
	known, unknown := container(t, "ACME-1", 1, 5000), container(t, "ACME-7", 7, 50)
	dir := t.TempDir()
	c := f.clientIn("", dir, Floors{})
	if _, err := c.VerifyFile(known); err == nil {
		t.Error("a file without any metadata was believed")
	}
	mustRefresh(t, c)
	if o, err := f.clientIn("", dir, Floors{}).VerifyFile(known); err != nil || o.ID != "ACME-1" {
		t.Errorf("%v", err)
	}
	if _, err := c.VerifyFile(unknown); CodeOf(err) != CodeUnknown {
		t.Errorf("%v", err)
	}
	f.now = start.Add(31 * 24 * time.Hour)
	if _, err := c.VerifyFile(known); CodeOf(err) != CodeExpired {
		t.Errorf("%v", err)
	}
}

func TestVerifyWithMetadata(t *testing.T) {
	f, other := newFixture(t), newFixture(t)
	stick := os.DirFS(f.file("metadata"))
	b := container(t, "ACME-1", 1, 5000)
	if o, err := VerifyWithMetadata(f.root(), stick, b, Floors{}, f.now); err != nil || o.ID != "ACME-1" {
		t.Errorf("%v", err)
	}
	for name, c := range map[string]struct {
		root   []byte
		dir    fs.FS
		b      []byte
		floors Floors
		now    time.Time
		code   string
	}{
		"other root":  {other.root(), stick, b, Floors{}, start, CodeSignature},
		"other file":  {f.root(), stick, b[1:], Floors{}, start, CodeUnknown},
		"ended":       {f.root(), stick, b, Floors{}, start.Add(31 * 24 * time.Hour), CodeExpired},
		"older":       {f.root(), stick, b, Floors{Timestamp: 2}, start, CodeRollback},
		"old targets": {f.root(), stick, b, Floors{Targets: 2}, start, CodeRollback},
		"no metadata": {f.root(), fstest.MapFS{}, b, Floors{}, start, CodeNotFound},
		"no root":     {nil, stick, b, Floors{}, start, CodeConfig},
	} {
		if _, err := VerifyWithMetadata(c.root, c.dir, c.b, c.floors, c.now); CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

func TestPrune(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	c := f.client("")
	offers := mustRefresh(t, c).Offers
	for _, o := range offers {
		if _, err := c.Fetch(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Prune(func(sum string) bool { return sum == offers[1].SHA256 }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.cache.target(offers[0].SHA256)); !errors.Is(err, os.ErrNotExist) {
		t.Error("not pruned")
	}
	if _, err := os.Stat(c.cache.target(offers[1].SHA256)); err != nil {
		t.Error(err)
	}
}
