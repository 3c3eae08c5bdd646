package agent

import (
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

// image is one hotpatch image of the fixtures for a release.
type image struct{ file string }

// base is the file name of the image it is for: mingw/app-ref-1.dll → app.dll.
func (i image) base() string {
	name, _, _ := strings.Cut(filepath.Base(i.file), "-")
	return name + ".dll"
}

// container makes a release of fixtures.
func (r *rig) container(m *release.Manifest, images ...image) ([]byte, error) {
	files := map[string][]byte{}
	for n, i := range images {
		b, err := os.ReadFile(filepath.Join(fixtures, i.file))
		if err != nil {
			return nil, err
		}
		side, err := os.ReadFile(filepath.Join(fixtures, i.file+".base.json"))
		if err != nil {
			return nil, err
		}
		base, err := release.ReadBase(side)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("images/%d-%s", n, filepath.Base(i.file))
		files[name] = b
		m.Images = append(m.Images, release.Image{Name: i.base(), Arch: release.ArchOf(base.Machine), File: name, Size: int64(len(b)),
			SHA256: sum(b), Base: base.Identity})
	}
	m.Format, m.Kind = release.Format, release.KindHotpatch
	return release.Write(m, files)
}

// publish signs and publishes a release, and puts the first root of trust where the device has it.
func (r *rig) publish(opts repository.PublishOptions, m *release.Manifest, images ...image) error {
	b, err := r.container(m, images...)
	if err != nil {
		return err
	}
	opts.Now = r.now()
	if _, err := repository.Publish(r.path("repo"), r.keys, [][]byte{b}, opts); err != nil {
		return err
	}
	return r.trust()
}

// trust gives the device its first root, once.
func (r *rig) trust() error {
	if _, err := os.Stat(r.path("root.json")); err == nil {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(r.path("repo"), "root.json"))
	if err != nil {
		return err
	}
	return os.WriteFile(r.path("root.json"), b, 0o600)
}

// edit takes releases out, which no command of the publisher does, and signs
// everything anew.
func (r *rig) edit(change func(targets map[string]*metadata.TargetFiles) error) error {
	dir := filepath.Join(r.path("repo"), "metadata")
	timestamp, err := metadata.Timestamp().FromFile(filepath.Join(dir, "timestamp.json"))
	if err != nil {
		return err
	}
	snapshot, err := metadata.Snapshot().FromFile(numbered(dir, timestamp.Signed.Meta["snapshot.json"].Version, "snapshot"))
	if err != nil {
		return err
	}
	targets, err := metadata.Targets().FromFile(numbered(dir, snapshot.Signed.Meta["targets.json"].Version, "targets"))
	if err != nil {
		return err
	}
	if err := change(targets.Signed.Targets); err != nil {
		return err
	}
	targets.Signed.Version++
	b, err := resign(r, targets, "targets")
	if err != nil {
		return err
	}
	if err := os.WriteFile(numbered(dir, targets.Signed.Version, "targets"), b, 0o600); err != nil {
		return err
	}
	snapshot.Signed.Version++
	if snapshot.Signed.Meta["targets.json"], err = named(targets.Signed.Version, b); err != nil {
		return err
	}
	if b, err = resign(r, snapshot, "snapshot"); err != nil {
		return err
	}
	if err := os.WriteFile(numbered(dir, snapshot.Signed.Version, "snapshot"), b, 0o600); err != nil {
		return err
	}
	timestamp.Signed.Version++
	if timestamp.Signed.Meta["snapshot.json"], err = named(snapshot.Signed.Version, b); err != nil {
		return err
	}
	if b, err = resign(r, timestamp, "timestamp"); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "timestamp.json"), b, 0o600)
}

func numbered(dir string, version int64, role string) string {
	return filepath.Join(dir, strconv.FormatInt(version, 10)+"."+role+".json")
}

func named(version int64, b []byte) (*metadata.MetaFiles, error) {
	t, err := metadata.TargetFile().FromBytes("", b, "sha256")
	if err != nil {
		return nil, err
	}
	m := metadata.MetaFile(version)
	m.Length, m.Hashes = t.Length, t.Hashes
	return m, nil
}

func resign[T metadata.Roles](r *rig, m *metadata.Metadata[T], role string) ([]byte, error) {
	m.ClearSignatures()
	for _, key := range r.keys[role] {
		signer, err := signature.LoadSigner(key, crypto.Hash(0))
		if err != nil {
			return nil, err
		}
		if _, err := m.Sign(signer); err != nil {
			return nil, err
		}
	}
	return m.ToBytes(true)
}

// withdraw takes a release out of the repository.
func (r *rig) withdraw(id string) error {
	return r.edit(func(targets map[string]*metadata.TargetFiles) error {
		name := "releases/" + id + ".hotpatch"
		if targets[name] == nil {
			return fmt.Errorf("no release %s is published", id)
		}
		delete(targets, name)
		return nil
	})
}
