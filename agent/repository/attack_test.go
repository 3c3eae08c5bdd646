package repository

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// An attacker who owns the server, but no key, serves an older state.
func TestRollback(t *testing.T) {
	f := newFixture(t)
	old := f.save()
	f.publish("ACME-2", 2)
	for name, url := range f.sources() {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := f.clientIn(url, dir, Floors{})
			mustRefresh(t, c)
			now := f.read("metadata/timestamp.json")
			f.write("metadata/timestamp.json", old["metadata/timestamp.json"])
			defer f.write("metadata/timestamp.json", now)
			e := refused(t, c, CodeRollback)
			if !errors.Is(e, &metadata.ErrBadVersionNumber{}) || !strings.Contains(e.Text, "timestamp.json has version 1, but this device has trusted version 2") {
				t.Errorf("%v (%v)", e, e.Err)
			}
			t.Run("restarted", func(t *testing.T) {
				if _, err := f.clientIn(url, dir, Floors{}).Refresh(t.Context()); CodeOf(err) != CodeRollback {
					t.Errorf("%v", err)
				}
			})
			t.Run("cache lost, floors kept", func(t *testing.T) {
				refused(t, f.clientIn(url, t.TempDir(), c.Floors()), CodeRollback)
			})
		})
	}
}

// An attacker who also stole the timestamp key signs a new timestamp that
// names the old snapshot.
func TestRollbackOfSnapshot(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	dir := t.TempDir()
	c := f.clientIn("", dir, Floors{})
	mustRefresh(t, c)
	ts := parse(f, metadata.Timestamp(), "timestamp.json")
	ts.Signed.Version = 9
	meta, err := metaFile(1, f.read("metadata/1.snapshot.json"))
	if err != nil {
		t.Fatal(err)
	}
	ts.Signed.Meta["snapshot.json"] = meta
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
	e := refused(t, c, CodeRollback)
	if !strings.Contains(e.Text, "snapshot.json has version 1") {
		t.Error(e)
	}
	refused(t, f.clientIn("", t.TempDir(), c.Floors()), CodeRollback)
}

// An attacker who stole timestamp and snapshot keys names the old targets.
func TestRollbackOfTargets(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	c := f.client("")
	mustRefresh(t, c)
	snap := parse(f, metadata.Snapshot(), "2.snapshot.json")
	snap.Signed.Version = 8
	meta, err := metaFile(1, f.read("metadata/1.targets.json"))
	if err != nil {
		t.Fatal(err)
	}
	snap.Signed.Meta["targets.json"] = meta
	signSnapshot(f, snap)
	e := refused(t, c, CodeRollback)
	if !strings.Contains(e.Text, "targets.json has version 1") {
		t.Error(e)
	}
	refused(t, f.clientIn("", t.TempDir(), c.Floors()), CodeRollback)
}

// signSnapshot signs snap and a timestamp of version 9 that names it.
func signSnapshot(f *fixture, snap *metadata.Metadata[metadata.SnapshotType]) {
	f.t.Helper()
	b := resign(f, snap, metadata.SNAPSHOT, versioned(snap.Signed.Version, metadata.SNAPSHOT), f.keys)
	meta, err := metaFile(snap.Signed.Version, b)
	if err != nil {
		f.t.Fatal(err)
	}
	ts := parse(f, metadata.Timestamp(), "timestamp.json")
	ts.Signed.Version = 9
	ts.Signed.Meta["snapshot.json"] = meta
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
}

// A server that freezes its state is noticed when the timestamp ends; a clock
// that is ahead looks the same, and the sentence says both.
func TestExpired(t *testing.T) {
	f := newFixture(t)
	for name, url := range f.sources() {
		t.Run(name, func(t *testing.T) {
			f.now = start
			c := f.client(url)
			mustRefresh(t, c)
			f.now = start.Add(DefaultExpires + 25*time.Hour)
			e := refused(t, c, CodeExpired)
			want := "timestamp.json ended 10 Dec 2026 12:00 UTC; this clock says 11 Dec 2026 13:00 UTC. Either the publisher has stopped signing or the clock is ahead"
			if e.Text != want || !errors.Is(e, &metadata.ErrExpiredMetadata{}) {
				t.Errorf("%q", e.Text)
			}
			catalog, err := c.Cached()
			if err != nil || len(catalog.Offers) != 1 || !catalog.Ended(f.now) || catalog.Ended(start) {
				t.Errorf("what was known is gone: %+v, %v", catalog, err)
			}
			refused(t, f.client(url), CodeExpired) // one that starts now
		})
	}
}

func TestEveryRoleExpires(t *testing.T) {
	for _, role := range []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT} {
		f := newFixture(t)
		c := f.client("")
		long := PublishOptions{Now: f.now, Expires: 3 * longExpires}
		switch role {
		case metadata.SNAPSHOT:
			snap := parse(f, metadata.Snapshot(), "1.snapshot.json")
			snap.Signed.Version, snap.Signed.Expires = 7, start.Add(time.Hour)
			signSnapshot(f, snap)
			f.now = start.Add(2 * time.Hour)
		case metadata.ROOT, metadata.TARGETS:
			// Each is left behind by refreshes without its key.
			keys := Keys{}
			for r, k := range f.keys {
				if r != role {
					keys[r] = k
				}
			}
			long.Now = start.Add(longExpires - time.Hour)
			if _, err := Refresh(f.dir, keys, long); err != nil {
				t.Fatal(err)
			}
			f.now = start.Add(longExpires + time.Hour)
		}
		if e := refused(t, c, CodeExpired); !strings.HasPrefix(e.Text, role+".json ended") && !strings.Contains(e.Text, "."+role+".json ended") {
			t.Errorf("%s: %v", role, e)
		}
	}
}

func TestWrongKey(t *testing.T) {
	f := newFixture(t)
	thief := Keys{metadata.TIMESTAMP: {newKey(t)}}
	ts := parse(f, metadata.Timestamp(), "timestamp.json")
	ts.Signed.Version = 2
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", thief)
	for name, url := range f.sources() {
		if e := refused(t, f.client(url), CodeSignature); !errors.Is(e, &metadata.ErrUnsignedMetadata{}) || !strings.Contains(e.Text, "timestamp.json") {
			t.Errorf("%s: %v", name, e)
		}
	}
}

// Genuine files of another time under the new names.
func TestMixed(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	good := f.save()
	for _, c := range []struct{ name, put, as string }{
		{"older targets", "metadata/1.targets.json", "metadata/2.targets.json"},
		{"older snapshot", "metadata/1.snapshot.json", "metadata/2.snapshot.json"},
	} {
		f.write(c.as, good[c.put])
		for via, url := range f.sources() {
			e := refused(t, f.client(url), CodeMixed)
			if !errors.Is(e, &metadata.ErrLengthOrHashMismatch{}) || !strings.Contains(e.Text, filepath.Base(c.as)) {
				t.Errorf("%s by %s: %v", c.name, via, e)
			}
		}
		f.write(c.as, good[c.as])
	}
	// The same where the snapshot gives no hashes: the version tells.
	snap := parse(f, metadata.Snapshot(), "2.snapshot.json")
	snap.Signed.Version = 3
	snap.Signed.Meta["targets.json"] = metadata.MetaFile(2)
	signSnapshot(f, snap)
	f.write("metadata/2.targets.json", good["metadata/1.targets.json"])
	if e := refused(t, f.client(""), CodeMixed); !errors.Is(e, &metadata.ErrBadVersionNumber{}) {
		t.Error(e, e.Err)
	}
}

func TestFlippedBit(t *testing.T) {
	f := newFixture(t)
	good := f.save()
	for name, b := range good {
		if !strings.HasPrefix(name, "metadata/") || strings.HasSuffix(name, "root.json") {
			continue
		}
		for at := 0; at < len(b); at += 1 + len(b)/40 {
			bad := bytes.Clone(b)
			bad[at] ^= 1
			f.write(name, bad)
			c := f.client("")
			catalog, err := c.Refresh(t.Context())
			if err == nil {
				// Space between words is not signed; what is signed must be as it was.
				if len(catalog.Offers) != 1 || name != "metadata/timestamp.json" {
					t.Errorf("%s: byte %d may change", name, at)
				}
				continue
			}
			if code := CodeOf(err); code != CodeSignature && code != CodeDamaged && code != CodeMixed && code != CodeExpired && code != CodeNotFound {
				t.Errorf("%s: byte %d: %v (%s)", name, at, err, code)
			}
			if left, err := os.ReadDir(c.cache.metadata("")); err != nil || len(left) != 0 {
				t.Fatalf("%s: byte %d: the cache holds %v", name, at, left)
			}
		}
		f.write(name, b)
	}
}

// endless answers with bytes that never stop.
func endless(w http.ResponseWriter) {
	chunk := bytes.Repeat([]byte(" "), 64<<10)
	for {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func TestEndless(t *testing.T) {
	for _, name := range []string{"/metadata/timestamp.json", "/metadata/2.root.json", "/metadata/1.snapshot.json", "/metadata/1.targets.json"} {
		f := newFixture(t)
		s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != name {
				return false
			}
			endless(w)
			return true
		})
		if e := refused(t, f.client(s.URL), CodeTooLarge); !errors.Is(e, &metadata.ErrDownloadLengthMismatch{}) || !strings.Contains(e.Text, filepath.Base(name)) {
			t.Errorf("%s: %v", name, e)
		}
	}
	f := newFixture(t)
	f.write("metadata/timestamp.json", append(f.read("metadata/timestamp.json"), bytes.Repeat([]byte(" "), maxTimestampLength)...))
	refused(t, f.client(""), CodeTooLarge)
}

// rotate makes the next root with change, signed by the keys of both.
func rotate(f *fixture, old, now Keys, change func(*metadata.Metadata[metadata.RootType])) {
	f.t.Helper()
	root, err := metadata.Root().FromBytes(f.root())
	if err != nil {
		f.t.Fatal(err)
	}
	root.Signed.Version++
	change(root)
	both := Keys{metadata.ROOT: slices.Clone(old[metadata.ROOT])}
	for _, key := range now[metadata.ROOT] {
		if !slices.ContainsFunc(both[metadata.ROOT], func(k ed25519.PrivateKey) bool { return k.Equal(key) }) {
			both[metadata.ROOT] = append(both[metadata.ROOT], key)
		}
	}
	b := resign(f, root, metadata.ROOT, versioned(root.Signed.Version, metadata.ROOT), both)
	f.write("root.json", b)
}

// replaceKey gives role one new key and no other.
func replaceKey(t testing.TB, root *metadata.Metadata[metadata.RootType], role string, key ed25519.PrivateKey) {
	t.Helper()
	for _, id := range slices.Clone(root.Signed.Roles[role].KeyIDs) {
		if err := root.Signed.RevokeKey(id, role); err != nil {
			t.Fatal(err)
		}
	}
	k, _, err := tufKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := root.Signed.AddKey(k, role); err != nil {
		t.Fatal(err)
	}
}

// The timestamp key was stolen and revoked by a new root. The thief hides the
// new root and goes on signing: a device that saw it must refuse.
func TestRevokedKeyWithHiddenRoot(t *testing.T) {
	for name, damage := range map[string]func(dir string){
		"as it was": func(string) {},
		"root damaged": func(dir string) {
			if err := os.WriteFile(filepath.Join(dir, "root.json"), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cache lost": func(dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			shipped := f.root()
			dir := t.TempDir()
			client := func(floors Floors) *Client {
				c, err := New(Config{URL: folderURL(f.dir), Dir: dir, InitialRoot: shipped, Floors: floors, Now: func() time.Time { return f.now }})
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			stolen := f.keys
			f.keys = Keys{}
			for role, k := range stolen {
				f.keys[role] = k
			}
			f.keys[metadata.TIMESTAMP] = []ed25519.PrivateKey{newKey(t)}
			rotate(f, stolen, f.keys, func(root *metadata.Metadata[metadata.RootType]) {
				replaceKey(t, root, metadata.TIMESTAMP, f.keys[metadata.TIMESTAMP][0])
			})
			ts := parse(f, metadata.Timestamp(), "timestamp.json")
			ts.Signed.Version = 2
			resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
			c := client(Floors{})
			mustRefresh(t, c)
			floors := c.Floors()
			if floors.Root != 2 {
				t.Fatalf("floors %+v", floors)
			}
			if err := os.Remove(f.file("metadata/2.root.json")); err != nil {
				t.Fatal(err)
			}
			ts.Signed.Version = 3
			resign(f, ts, metadata.TIMESTAMP, "timestamp.json", stolen)
			if _, err := client(Floors{}).Refresh(t.Context()); CodeOf(err) != CodeSignature {
				t.Fatalf("without floors a revoked key was believed: %v", err)
			}
			damage(dir)
			_, err := client(floors).Refresh(t.Context())
			if code := CodeOf(err); code != CodeSignature && code != CodeRollback {
				t.Fatalf("a revoked key was believed: %v", err)
			}
			// With the new root back, all is well again.
			f.keys = Keys{metadata.ROOT: f.keys[metadata.ROOT], metadata.TIMESTAMP: f.keys[metadata.TIMESTAMP]}
			f.write("metadata/2.root.json", f.root())
			ts.Signed.Version = 4
			resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
			mustRefresh(t, client(floors))
		})
	}
}

// A thief of the timestamp key counted to the end; a root with a new key lets
// the count begin anew, and nothing less does.
func TestRecoveryFromFastForward(t *testing.T) {
	f := newFixture(t)
	ts := parse(f, metadata.Timestamp(), "timestamp.json")
	ts.Signed.Version = 1 << 50
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
	c := f.client("")
	mustRefresh(t, c)
	old := Keys{}
	for role, k := range f.keys {
		old[role] = k
	}
	ts.Signed.Version = 2
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
	refused(t, c, CodeRollback)
	f.keys[metadata.TIMESTAMP] = []ed25519.PrivateKey{newKey(t)}
	rotate(f, old, f.keys, func(root *metadata.Metadata[metadata.RootType]) {
		replaceKey(t, root, metadata.TIMESTAMP, f.keys[metadata.TIMESTAMP][0])
	})
	resign(f, ts, metadata.TIMESTAMP, "timestamp.json", f.keys)
	mustRefresh(t, c)
	if c.Floors().Timestamp != 2 {
		t.Errorf("floors %+v", c.Floors())
	}
}

func TestThreshold(t *testing.T) {
	f := newFixture(t)
	f.dir = filepath.Join(t.TempDir(), "two")
	for _, role := range Roles {
		f.keys[role] = []ed25519.PrivateKey{newKey(t), newKey(t), newKey(t)}
	}
	two := f.options()
	two.Thresholds = map[string]int{metadata.ROOT: 2, metadata.TARGETS: 2}
	release := [][]byte{container(t, "ACME-1", 1, 100)}
	if _, err := Publish(f.dir, f.keys, release, two); err != nil {
		t.Fatal(err)
	}
	mustRefresh(t, f.client(""))
	// One of the keys at hand is too few for a publisher …
	few := Keys{metadata.TARGETS: f.keys[metadata.TARGETS][:1], metadata.SNAPSHOT: f.keys[metadata.SNAPSHOT], metadata.TIMESTAMP: f.keys[metadata.TIMESTAMP]}
	if _, err := Publish(f.dir, few, [][]byte{container(t, "ACME-2", 2, 100)}, f.options()); err == nil || !strings.Contains(err.Error(), "targets.json needs 2 signatures") {
		t.Errorf("%v", err)
	}
	mustRefresh(t, f.client(""))
	// … and one signature for a device, for a new root …
	good := f.save()
	c := f.client("")
	one := Keys{metadata.ROOT: f.keys[metadata.ROOT][:1]}
	rotate(f, one, Keys{}, func(root *metadata.Metadata[metadata.RootType]) {
		replaceKey(t, root, metadata.TIMESTAMP, newKey(t))
	})
	if e := refused(t, c, CodeSignature); !strings.Contains(e.Text, "2.root.json") {
		t.Error(e)
	}
	if err := os.Remove(f.file("metadata/2.root.json")); err != nil {
		t.Fatal(err)
	}
	f.write("root.json", good["root.json"])
	// … and for targets, also if the same key signs twice.
	targets := parse(f, metadata.Targets(), "1.targets.json")
	b := resign(f, targets, metadata.TARGETS, "1.targets.json", Keys{metadata.TARGETS: f.keys[metadata.TARGETS][:1]})
	snap := parse(f, metadata.Snapshot(), "1.snapshot.json")
	meta, err := metaFile(1, b)
	if err != nil {
		t.Fatal(err)
	}
	snap.Signed.Version = 2
	snap.Signed.Meta["targets.json"] = meta
	signSnapshot(f, snap)
	if e := refused(t, f.client(""), CodeSignature); !strings.Contains(e.Text, "1.targets.json") {
		t.Error(e)
	}
}

// FuzzOffers reads what a thief of the targets key could sign.
func FuzzOffers(f *testing.F) {
	fx := newFixture(f)
	targets := parse(fx, metadata.Targets(), "1.targets.json")
	good, err := json.Marshal(targets.Signed.Targets)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"releases/x.hotpatch":null}`))
	f.Add([]byte(`{"releases/x.hotpatch":{"length":1,"hashes":{"sha256":""},"custom":null}}`))
	f.Add([]byte(`{"releases/x.hotpatch":{"length":1,"hashes":{},"custom":{"format":"hotpatch-target/1","id":"x","rollout":{"not_before":"never"}}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var targets map[string]*metadata.TargetFiles
		if json.Unmarshal(b, &targets) != nil {
			return
		}
		offers, skipped, err := readOffers(targets)
		if err != nil {
			t.Skip("too many")
		}
		if len(offers)+len(skipped) != len(targets) {
			t.Fatalf("%d offers and %d skipped of %d", len(offers), len(skipped), len(targets))
		}
		for _, o := range offers {
			if o.Length < 1 || len(o.SHA256) != 64 || o.Target != targetName(o.ID) {
				t.Fatalf("%+v", o)
			}
		}
	})
}

// FuzzRefresh feeds one hostile metadata file, as the owner of a server could.
// Nothing may panic, and each error says what kind of trouble it is.
func FuzzRefresh(f *testing.F) {
	fx := newFixture(f)
	names := []string{"timestamp.json", "1.snapshot.json", "1.targets.json", "2.root.json"}
	for i, n := range names {
		if n != "2.root.json" {
			f.Add(byte(i), fx.read("metadata/"+n))
		}
	}
	f.Add(byte(0), []byte(`{"signed":{"_type":"timestamp","meta":{"snapshot.json":null}},"signatures":[]}`))
	f.Add(byte(3), fx.root())
	root := fx.root()
	good := fx.save()
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		evil := names[int(which)%len(names)]
		_, _, err := verify(root, func(name string, limit int64) ([]byte, error) {
			if name == evil {
				return b, nil
			}
			if g, ok := good["metadata/"+name]; ok {
				return g, nil
			}
			return nil, fail(CodeNotFound, nil, "no %s", name)
		}, start)
		if err != nil && CodeOf(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
	})
}
