package e2e

import (
	"archive/zip"
	"bytes"
	"crypto"
	"hash/crc32"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/repository"
)

// mirror is a web server on this machine that serves a device's repository, and
// can be told to do it badly.
type mirror struct {
	t       *testing.T
	address string
	http    *http.Server
	closed  chan struct{} // when the server is taken down

	mu  sync.Mutex
	bad map[string]http.HandlerFunc // by a part of the path
}

// mirrored serves the repository of a device, and has the device ask there.
func mirrored(t *testing.T, d *device) *mirror {
	t.Helper()
	m := &mirror{t: t, bad: map[string]http.HandlerFunc{}}
	m.up(d.path("repo"), "127.0.0.1:0")
	t.Cleanup(m.down)
	set := d.set
	set.url = "http://" + m.address
	d.configure(set)
	return m
}

// up listens; again at the same address after down.
func (m *mirror) up(dir, address string) {
	m.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		m.t.Fatal(err)
	}
	m.address = l.Addr().String()
	files := http.FileServer(http.Dir(dir))
	m.closed = make(chan struct{})
	m.http = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		var serve http.HandlerFunc = files.ServeHTTP
		for _, part := range slices.Sorted(maps.Keys(m.bad)) {
			if strings.Contains(r.URL.Path, part) {
				serve = m.bad[part]
			}
		}
		m.mu.Unlock()
		serve(w, r)
	})}
	go m.http.Serve(l)
}

// down closes the server with everything that is under way.
func (m *mirror) down() {
	select {
	case <-m.closed:
	default:
		close(m.closed)
		m.http.Close()
	}
}

// serves answers requests for paths with that part by a handler of the test, until well.
func (m *mirror) serves(part string, h http.HandlerFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bad[part] = h
}

func (m *mirror) well() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bad)
}

// content is a handler that always answers with these bytes.
func content(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(b) }
}

// endless sends for as long as anybody reads.
func endless(w http.ResponseWriter, _ *http.Request) {
	for b := bytes.Repeat([]byte(" "), 64<<10); ; {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// stalled never answers.
func (m *mirror) stalled(_ http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-m.closed:
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (d *device) keys() repository.Keys {
	d.t.Helper()
	keys, err := repository.LoadKeys(d.path("keys"))
	if err != nil {
		d.t.Fatal(err)
	}
	return keys
}

// refresh signs the repository anew, as of a moment.
func (d *device) refresh(now time.Time) {
	d.t.Helper()
	if _, err := repository.Refresh(d.path("repo"), d.keys(), repository.PublishOptions{Now: now}); err != nil {
		d.t.Fatal(err)
	}
}

// retold is a release whose release.json has been edited.
func retold(t testing.TB, b []byte, old, new string) []byte {
	t.Helper()
	in, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := zip.NewWriter(&out)
	for i, f := range in.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if !bytes.Contains(text, []byte(old)) {
				t.Fatalf("release.json has no %s: %s", old, text)
			}
			text = bytes.Replace(text, []byte(old), []byte(new), 1)
		}
		h := zip.FileHeader{Name: f.Name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(text), CompressedSize64: uint64(len(text)), UncompressedSize64: uint64(len(text))}
		e, err := w.CreateRaw(&h)
		if err == nil {
			_, err = e.Write(text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// exchange signs other bytes for a release that is published, as a publisher
// with other tools than ours could.
func (d *device) exchange(id string, b []byte) {
	d.t.Helper()
	dir := d.path("repo/metadata")
	name := "releases/" + id + ".hotpatch"
	targets := parsed(d, metadata.Targets(), newest(d, dir, "targets"))
	old := targets.Signed.Targets[name]
	if old == nil {
		d.t.Fatalf("%s is not published", id)
	}
	t, err := metadata.TargetFile().FromBytes(name, b, "sha256")
	if err != nil {
		d.t.Fatal(err)
	}
	t.Custom = old.Custom
	targets.Signed.Targets[name] = t
	targets.Signed.Version++
	path := filepath.Join(d.path("repo/targets/releases"), t.Hashes["sha256"].String()+"."+id+".hotpatch")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		d.t.Fatal(err)
	}
	resign(d, targets, "targets", filepath.Join(dir, version(targets.Signed.Version, "targets")))

	snapshot := parsed(d, metadata.Snapshot(), newest(d, dir, "snapshot"))
	snapshot.Signed.Version++
	snapshot.Signed.Meta["targets.json"] = named(d, targets.Signed.Version, filepath.Join(dir, version(targets.Signed.Version, "targets")))
	resign(d, snapshot, "snapshot", filepath.Join(dir, version(snapshot.Signed.Version, "snapshot")))

	timestamp := parsed(d, metadata.Timestamp(), filepath.Join(dir, "timestamp.json"))
	timestamp.Signed.Version++
	timestamp.Signed.Meta["snapshot.json"] = named(d, snapshot.Signed.Version, filepath.Join(dir, version(snapshot.Signed.Version, "snapshot")))
	resign(d, timestamp, "timestamp", filepath.Join(dir, "timestamp.json"))
}

func version(n int64, role string) string { return strconv.FormatInt(n, 10) + "." + role + ".json" }

// newest is the file of a role with the highest version.
func newest(d *device, dir, role string) string {
	d.t.Helper()
	for n := int64(1); ; n++ {
		if _, err := os.Stat(filepath.Join(dir, version(n+1, role))); err != nil {
			return filepath.Join(dir, version(n, role))
		}
	}
}

func parsed[T metadata.Roles](d *device, m *metadata.Metadata[T], path string) *metadata.Metadata[T] {
	d.t.Helper()
	m, err := m.FromFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	return m
}

// resign signs with the key of the role and puts the file there at once, as a whole.
func resign[T metadata.Roles](d *device, m *metadata.Metadata[T], role, path string) {
	d.t.Helper()
	signer, err := signature.LoadSigner(d.keys()[role][0], crypto.Hash(0))
	if err != nil {
		d.t.Fatal(err)
	}
	m.ClearSignatures()
	if _, err := m.Sign(signer); err != nil {
		d.t.Fatal(err)
	}
	if err := m.ToFile(path+".new", true); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		d.t.Fatal(err)
	}
}

// named names a metadata file as the one above it does.
func named(d *device, n int64, path string) *metadata.MetaFiles {
	d.t.Helper()
	b := read(d.t, path)
	t, err := metadata.TargetFile().FromBytes("", b, "sha256")
	if err != nil {
		d.t.Fatal(err)
	}
	m := metadata.MetaFile(n)
	m.Length, m.Hashes = t.Length, t.Hashes
	return m
}
