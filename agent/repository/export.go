package repository

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
)

// An export is a repository in one file, for devices that reach none: a zip
// file whose entries are stored as they are, in this order,
//
//	export.json                            says what this is
//	metadata/N.root.json …                 every root since the first
//	metadata/N.snapshot.json, N.targets.json, timestamp.json
//	targets/releases/SHA256.ID.hotpatch …  the releases that were asked for
//
// The same repository gives the same bytes. Unpacked it is a repository again,
// but for root.json: the root of trust never travels with what it judges.
const (
	ExportFormat = "hotpatch-export/1"

	// MaxExport bounds the whole file, in bytes: what one request on the control
	// socket holds.
	MaxExport = release.MaxRelease
	// MaxExported bounds the releases of one export.
	MaxExported = 64

	exportHead  = "export.json"
	metadataDir = "metadata/"
	targetsDir  = "targets/"
	maxEntries  = 1 + maxRootRotations + 1 + 3 + MaxExported
	maxEntry    = 200 // bytes of an entry's name: folder, hash, id and suffix have 160
)

// headText is export.json, to the byte: there is nothing else to say.
const headText = `{"format":"` + ExportFormat + `"}` + "\n"

// exported is an export taken apart. Nothing of it is verified.
type exported struct {
	metadata map[string][]byte // by name without folder
	targets  map[string][]byte // by path below targets/
}

// IsExport tells whether b begins like an export, of this format or another.
func IsExport(b []byte) bool {
	const at = zipLocal + len(exportHead)
	return len(b) > at && binary.LittleEndian.Uint32(b) == zipLocalSignature && string(b[zipLocal:at]) == exportHead
}

// Export writes the repository in dir, as of now, with the releases of these
// ids (none: all) into one file. What it returns was verified as a device would
// that trusts the repository's root.json.
func Export(dir string, ids []string, now time.Time) (b []byte, r Report, err error) {
	root, err := os.ReadFile(filepath.Join(dir, "root.json"))
	if err != nil {
		return nil, r, fmt.Errorf("%s is not a repository: %w", dir, err)
	}
	from := folderSource(os.DirFS(filepath.Join(dir, "metadata")))
	set, s, err := verify(root, from, now)
	if err != nil {
		return nil, r, err
	}
	offers, _, err := readOffers(set.targets.Signed.Targets)
	if err != nil {
		return nil, r, err
	}
	chosen, err := chosenBy(ids, offers)
	if err != nil {
		return nil, r, err
	}
	e := exported{metadata: map[string][]byte{}, targets: map[string][]byte{}}
	for n := int64(1); n <= set.root.Signed.Version; n++ {
		name := versioned(n, metadata.ROOT)
		old, err := from(name, maxRootLength)
		if err != nil {
			return nil, r, fmt.Errorf("devices that trust an older root need every one since the first: %w", err)
		}
		e.metadata[name] = old
	}
	for name, file := range s.got {
		e.metadata[name] = file
	}
	for _, o := range chosen {
		if err := verifyRelease(dir, o); err != nil {
			return nil, r, err
		}
		file := targetFile(o.Target, o.SHA256)
		if e.targets[file], err = folderSource(os.DirFS(filepath.Join(dir, "targets")))(file, o.Length); err != nil {
			return nil, r, err
		}
		r.Releases = append(r.Releases, TargetReport{Target: o.Target, ID: o.ID, Length: o.Length, SHA256: o.SHA256})
	}
	if b, err = e.write(); err != nil {
		return nil, r, err
	}
	if _, _, _, err = verifyExport(root, b, now); err != nil {
		return nil, r, fmt.Errorf("what was written does not verify: %w", err)
	}
	end, name := set.ends()
	r.Root, r.Timestamp, r.Snapshot, r.Targets = set.root.Signed.Version, set.timestamp.Signed.Version, set.snapshot.Signed.Version, set.targets.Signed.Version
	r.Expires = map[string]string{strings.TrimSuffix(name, ".json"): end.UTC().Format(time.RFC3339)}
	return b, r, nil
}

func chosenBy(ids []string, offers []Offer) ([]Offer, error) {
	if len(ids) == 0 {
		ids = make([]string, len(offers))
		for i, o := range offers {
			ids[i] = o.ID
		}
	}
	ids = slices.Compact(slices.Sorted(slices.Values(ids)))
	if len(ids) > MaxExported {
		return nil, fmt.Errorf("%d releases, more than the %d that one export holds: name those to take", len(ids), MaxExported)
	}
	var out []Offer
	for _, id := range ids {
		i := slices.IndexFunc(offers, func(o Offer) bool { return o.ID == id })
		if i < 0 {
			return nil, fail(CodeUnknown, nil, "the repository has no release %.64q", id)
		}
		out = append(out, offers[i])
	}
	if len(out) == 0 {
		return nil, errors.New("the repository has no release")
	}
	return out, nil
}

// write makes the file: names in order, no times, nothing packed, since
// releases are packed already.
func (e exported) write() ([]byte, error) {
	files := map[string][]byte{}
	for name, b := range e.metadata {
		files[metadataDir+name] = b
	}
	for name, b := range e.targets {
		files[targetsDir+name] = b
	}
	names := make([]string, 0, len(files)+1)
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	files[exportHead] = []byte(headText)
	size := int64(0)
	for _, b := range files {
		size += int64(len(b))
	}
	if size > MaxExport {
		return nil, fmt.Errorf("these releases have %d bytes together, more than %d: name fewer", size, MaxExport)
	}
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, name := range append([]string{exportHead}, names...) {
		b := files[name]
		h := &zip.FileHeader{Name: name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(b),
			CompressedSize64: uint64(len(b)), UncompressedSize64: uint64(len(b))}
		entry, err := w.CreateRaw(h)
		if err == nil {
			_, err = entry.Write(b)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot write the export: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("cannot write the export: %w", err)
	}
	if buf.Len() > MaxExport {
		return nil, fmt.Errorf("the export has %d bytes, more than %d: name fewer releases", buf.Len(), MaxExport)
	}
	return buf.Bytes(), nil
}

// verifyExport takes an export apart and verifies it from root: the metadata,
// and every release it holds. It returns what it holds by offer.
func verifyExport(root, b []byte, now time.Time) (*trustedSet, *session, map[string][]byte, error) {
	e, err := readExport(b)
	if err != nil {
		return &trustedSet{}, nil, nil, err
	}
	set, s, err := verify(root, e.source, now)
	if err != nil {
		return set, s, nil, err
	}
	offers, _, err := readOffers(set.targets.Signed.Targets)
	if err != nil {
		return set, s, nil, err
	}
	held := map[string][]byte{}
	for file, b := range e.targets {
		i := slices.IndexFunc(offers, func(o Offer) bool { return targetFile(o.Target, o.SHA256) == file })
		if i < 0 {
			return set, s, nil, fail(CodeUnknown, nil, "its metadata names no release %s", path.Base(file)).
				hint("export it again; whoever made this file put something in")
		}
		if !matches(offers[i], b) {
			return set, s, nil, fail(CodeSignature, nil, "%s is not the file that was signed", path.Base(file)).
				hint("copy the export again; %s", hintStays)
		}
		held[offers[i].ID] = b
	}
	return set, s, held, nil
}

// source is that of a session over an export.
func (e exported) source(name string, limit int64) ([]byte, error) {
	return filesSource(e.metadata)(name, limit)
}

// filesSource gives metadata that came as bytes, by name without folder.
func filesSource(files map[string][]byte) source {
	return func(name string, limit int64) ([]byte, error) {
		b, ok := files[name]
		switch {
		case !ok:
			return nil, fail(CodeNotFound, nil, "it does not hold %s", name).hint("export it again: hotpatch-build export")
		case int64(len(b)) > limit:
			return nil, tooLarge(name, limit)
		}
		return b, nil
	}
}
