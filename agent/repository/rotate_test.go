package repository

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRotate replaces the key of each role: a client that knows only the first
// root follows; the old key signs nothing any more.
func TestRotate(t *testing.T) {
	for _, role := range Roles {
		t.Run(role, func(t *testing.T) {
			f := newFixture(t)
			first := f.root()
			c := f.client("")
			before := mustRefresh(t, c)
			keyDir := t.TempDir()
			fresh, file, err := GenerateNext(keyDir, role)
			if err != nil || filepath.Base(file) != role+"-2.pem" {
				t.Fatal(file, err)
			}
			needed := Keys{}
			for r, k := range f.keys {
				if r == "root" || role != "root" && (r != "targets" || role == "targets") {
					needed[r] = k
				}
			}
			f.now = f.now.Add(time.Hour)
			res, err := Rotate(f.dir, needed, role, fresh, f.options())
			if err != nil || !res.Changed || len(res.Warnings) != 0 {
				t.Fatalf("%+v %v", res, err)
			}
			after := mustRefresh(t, c)
			if after.Floors.Root != before.Floors.Root+2 || !bytes.Equal(after.NewestRoot, f.root()) {
				t.Errorf("the client trusts root %d", after.Floors.Root)
			}
			last := f.root()
			f.write("root.json", first) // a new device with an old config
			mustRefresh(t, f.client(""))
			f.write("root.json", last)

			old := f.keys
			if _, err := Publish(f.dir, old, [][]byte{container(t, "ACME-2", 2, 9)}, f.options()); role != "root" && (err == nil || !strings.Contains(err.Error(), role+".json needs 1 signatures")) {
				t.Errorf("the old key still signs: %v", err)
			}
			both := Keys{}
			for r, k := range old {
				both[r] = append(append(both[r], k...), fresh[r]...)
			}
			if _, err := Publish(f.dir, both, [][]byte{container(t, "ACME-3", 3, 9)}, f.options()); err != nil {
				t.Errorf("the new key does not sign: %v", err)
			}
			mustRefresh(t, c)
			again, file, err := GenerateNext(keyDir, role)
			if err != nil || filepath.Base(file) != role+"-3.pem" {
				t.Fatal(file, err)
			}
			if role == "root" {
				if _, err := Rotate(f.dir, old, role, again, f.options()); err == nil || !strings.Contains(err.Error(), "root.pem") {
					t.Errorf("rotated by the old root key: %v", err)
				}
			}
			if _, err := Rotate(f.dir, both, role, again, f.options()); err != nil {
				t.Errorf("a second time: %v", err)
			}
			mustRefresh(t, c)
		})
	}
}

// TestRotateDies: wherever it stopped, the repository verifies, clients follow,
// and the rotation can be done again.
func TestRotateDies(t *testing.T) {
	for _, role := range Roles {
		f := newFixture(t)
		first := f.save()
		fresh, _, err := GenerateNext(t.TempDir(), role)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Rotate(f.dir, f.keys, role, fresh, f.options()); err != nil {
			t.Fatal(err)
		}
		last := f.save()
		both := Keys{}
		for r, k := range f.keys {
			both[r] = append(append(both[r], k...), fresh[r]...)
		}
		// In the order in which they are written; root.json twice, and late here.
		order := []string{"metadata/2.root.json", "metadata/2.targets.json", "metadata/2.snapshot.json", "metadata/timestamp.json", "metadata/3.root.json", "root.json"}
		for n := range order {
			f.restore(first)
			c := f.client("")
			mustRefresh(t, c)
			for _, name := range order[:n+1] {
				if b, ok := last[name]; ok {
					f.write(name, b)
				}
			}
			if _, err := Verify(f.dir, f.now); err != nil {
				t.Errorf("%s, after %s: %v", role, order[n], err)
			}
			mustRefresh(t, c)
			again, _, err := GenerateNext(t.TempDir(), role)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Rotate(f.dir, both, role, again, f.options()); err != nil {
				t.Errorf("%s, again after %s: %v", role, order[n], err)
			}
			mustRefresh(t, c)
			mustRefresh(t, f.client(""))
		}
	}
}

// restore puts the folder back to what save found.
func (f *fixture) restore(files map[string][]byte) {
	f.t.Helper()
	for name := range f.save() {
		if err := os.Remove(f.file(name)); err != nil {
			f.t.Fatal(err)
		}
	}
	for name, b := range files {
		f.write(name, b)
	}
}

func TestRotateRefuses(t *testing.T) {
	f := newFixture(t)
	fresh, _, err := GenerateNext(t.TempDir(), "targets")
	if err != nil {
		t.Fatal(err)
	}
	before := f.save()
	for name, c := range map[string]struct {
		keys  Keys
		role  string
		fresh Keys
		says  string
	}{
		"no such role":   {f.keys, "mirror", fresh, "cannot rotate"},
		"another's key":  {f.keys, "root", fresh, "cannot rotate"},
		"no root key":    {Keys{"targets": f.keys["targets"], "snapshot": f.keys["snapshot"], "timestamp": f.keys["timestamp"]}, "targets", fresh, "root.pem"},
		"the same again": {f.keys, "targets", Keys{"targets": f.keys["targets"]}, "names already"},
	} {
		if _, err := Rotate(f.dir, c.keys, c.role, c.fresh, f.options()); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, b := range f.save() {
		if !bytes.Equal(b, before[name]) {
			t.Errorf("%s was changed", name)
		}
	}
}
