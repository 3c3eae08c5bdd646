package release

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
)

// manifestName is the first entry of every container.
const manifestName = "release.json"

// Release is a container, read and checked.
type Release struct {
	Manifest
	SHA256   string // of the container, lower-case hex
	contents map[string][]byte
}

// ImageBytes is the hotpatch image of Images[i]. It must not be changed.
func (r *Release) ImageBytes(i int) []byte { return r.contents[r.Images[i].File] }

// FileBytes is the content of Files[i]. It must not be changed.
func (r *Release) FileBytes(i int) []byte { return r.contents[r.Files[i].File] }

// Open reads a container whose length and hash are already known to be the
// signed ones. The first entry is release.json, the others are exactly those
// it names, each of the size and hash it gives. The result may share b's memory.
func Open(b []byte) (*Release, error) {
	if len(b) > MaxRelease {
		return nil, fmt.Errorf("cannot open release: %d bytes, more than %d", len(b), MaxRelease)
	}
	entries, err := readZip(b)
	if err != nil {
		return nil, fmt.Errorf("cannot open release: %w", err)
	}
	if entries[0].name != manifestName {
		return nil, fmt.Errorf("cannot open release: the first entry is %q, not %q", clip(entries[0].name), manifestName)
	}
	text, err := entries[0].expand(MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("cannot open release: %w", err)
	}
	m, err := ReadManifest(text)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	r := &Release{Manifest: *m, SHA256: hex.EncodeToString(sum[:]), contents: map[string][]byte{}}
	want := m.wanted()
	for _, e := range entries[1:] {
		w, ok := want[e.name]
		if !ok {
			return nil, fmt.Errorf("cannot open release %s: entry %q is not named by release.json", m.ID, clip(e.name))
		}
		delete(want, e.name)
		content, err := e.expand(w.size)
		if err != nil {
			return nil, fmt.Errorf("cannot open release %s: %w", m.ID, err)
		}
		if err := w.check(e.name, content); err != nil {
			return nil, fmt.Errorf("cannot open release %s: %w", m.ID, err)
		}
		r.contents[e.name] = content
	}
	for _, name := range sortedKeys(want) {
		return nil, fmt.Errorf("cannot open release %s: entry %q is missing", m.ID, name)
	}
	return r, nil
}

// content is what the manifest says of one entry.
type content struct {
	size   int64
	sha256 string
}

func (c content) check(name string, b []byte) error {
	if int64(len(b)) != c.size {
		return fmt.Errorf("%s has %d bytes, release.json says %d", name, len(b), c.size)
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != c.sha256 {
		return fmt.Errorf("%s has the hash %x, release.json says %s", name, sum, c.sha256)
	}
	return nil
}

// wanted lists the entries the manifest names.
func (m *Manifest) wanted() map[string]content {
	want := map[string]content{}
	for _, i := range m.Images {
		want[i.File] = content{i.Size, i.SHA256}
	}
	for _, f := range m.Files {
		want[f.File] = content{f.Size, f.SHA256}
	}
	return want
}

// Write makes a container. files maps the entries the manifest names to their
// bytes, which must have the sizes and hashes it gives. Same arguments, same
// bytes: entries are stored uncompressed, sorted by name, without times.
func Write(m *Manifest, files map[string][]byte) ([]byte, error) {
	copied := *m
	copied.fill()
	if err := copied.Check(); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(&copied, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("cannot write release %s: %w", m.ID, err)
	}
	text = append(text, '\n')
	if _, err := ReadManifest(text); err != nil {
		return nil, fmt.Errorf("cannot write release %s: its manifest would not be read: %w", m.ID, err)
	}
	want := copied.wanted()
	for name := range files {
		if _, ok := want[name]; !ok {
			return nil, fmt.Errorf("cannot write release %s: %q is not named by the manifest", m.ID, clip(name))
		}
	}
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	if err := store(w, manifestName, text); err != nil {
		return nil, fmt.Errorf("cannot write release %s: %w", m.ID, err)
	}
	for _, name := range sortedKeys(want) {
		b, ok := files[name]
		if !ok {
			return nil, fmt.Errorf("cannot write release %s: %q is missing", m.ID, name)
		}
		if err := want[name].check(name, b); err != nil {
			return nil, fmt.Errorf("cannot write release %s: %w", m.ID, err)
		}
		if err := store(w, name, b); err != nil {
			return nil, fmt.Errorf("cannot write release %s: %w", m.ID, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("cannot write release %s: %w", m.ID, err)
	}
	if buf.Len() > MaxRelease {
		return nil, fmt.Errorf("cannot write release %s: %d bytes, more than %d", m.ID, buf.Len(), MaxRelease)
	}
	return buf.Bytes(), nil
}

// store adds an entry whose sizes stand in its local header, so that a reader
// needs no second opinion on where it ends.
func store(w *zip.Writer, name string, b []byte) error {
	h := &zip.FileHeader{
		Name: name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(b),
		CompressedSize64: uint64(len(b)), UncompressedSize64: uint64(len(b)),
		ModifiedDate: 1<<5 | 1, // 1 January 1980, the zero of the format
	}
	body, err := w.CreateRaw(h)
	if err != nil {
		return err
	}
	_, err = body.Write(b)
	return err
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
