package repository

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// export is the repository of f in one file.
func (f *fixture) export(ids ...string) []byte {
	f.t.Helper()
	b, _, err := Export(f.dir, ids, f.now)
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

// isolated is a client that reaches no repository.
func (f *fixture) isolated(dir string, floors Floors) *Client {
	f.t.Helper()
	c, err := New(Config{Dir: dir, InitialRoot: f.root(), Floors: floors, Now: func() time.Time { return f.now }})
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// unwanted imports b, which must be refused with this code, and leave c as it was.
func unwanted(t *testing.T, c *Client, b []byte, code string, words ...string) {
	t.Helper()
	before, _ := c.Cached()
	_, _, err := c.Import(b)
	if CodeOf(err) != code {
		t.Fatalf("%v (%s), wanted %s", err, CodeOf(err), code)
	}
	e := err.(*Error)
	for _, w := range words {
		if !strings.Contains(e.Text+"; "+e.Hint, w) {
			t.Errorf("%q (%q) does not say %q", e.Text, e.Hint, w)
		}
	}
	if e.Hint == "" {
		t.Errorf("%q says nothing about what to do", e.Text)
	}
	if after, _ := c.Cached(); before != nil && after != before {
		t.Error("a refused export changed the catalog")
	}
}

func TestExportImport(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	f.publish("ACME-3", 3)
	b := f.export("ACME-3", "ACME-1")
	if !bytes.Equal(b, f.export("ACME-1", "ACME-3", "ACME-1")) {
		t.Error("the same repository gives other bytes")
	}
	if !IsExport(b) || IsExport(container(t, "ACME-1", 1, 1)) || IsExport(nil) {
		t.Error("an export is not known by its first bytes")
	}
	dir := t.TempDir()
	c := f.isolated(dir, Floors{})
	refused(t, c, CodeConfig)
	cat, held, err := c.Import(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(cat.Offers) != 3 || len(held) != 2 || held[0].ID != "ACME-1" || held[1].ID != "ACME-3" {
		t.Fatalf("%d offers, held %+v", len(cat.Offers), held)
	}
	for _, o := range held {
		if got, err := c.Fetch(t.Context(), o); err != nil || !matches(o, got) {
			t.Errorf("%s: %v", o.ID, err)
		}
	}
	if _, err := c.Fetch(t.Context(), cat.Offers[1]); CodeOf(err) != CodeConfig || !strings.Contains(err.(*Error).Hint, "export") {
		t.Errorf("a release that did not come along: %v", err)
	}
	// A later life knows it all without the file, and an import again is no news.
	c = f.isolated(dir, c.Floors())
	if cat, err := c.Cached(); err != nil || len(cat.Offers) != 3 {
		t.Errorf("%+v %v", cat, err)
	}
	if _, held, err := c.Import(b); err != nil || len(held) != 2 {
		t.Errorf("%v %v", held, err)
	}
	// Unpacked it is a repository.
	stick := t.TempDir()
	r, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(stick, r); err != nil {
		t.Fatal(err)
	}
	on := f.client(folderURL(stick))
	if _, err := on.Fetch(t.Context(), mustRefresh(t, on).Offers[2]); err != nil {
		t.Error(err)
	}
}

// An export and the network keep one count: neither brings back what the other
// has left behind.
func TestExportFloors(t *testing.T) {
	f := newFixture(t)
	old, saved := f.export(), f.save()
	f.publish("ACME-2", 2)
	now := f.export()
	for name, floors := range map[string]bool{"cache": false, "floors kept by the caller": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := f.isolated(dir, Floors{})
			if _, _, err := c.Import(now); err != nil {
				t.Fatal(err)
			}
			unwanted(t, c, old, CodeRollback, "version 1, but this device has trusted version 2", "newest export")
			if floors {
				dir, c = t.TempDir(), f.isolated(t.TempDir(), c.Floors())
			} else {
				c = f.isolated(dir, Floors{}) // another life; the caller lost his
			}
			unwanted(t, c, old, CodeRollback)
			f2 := *f
			f2.dir = filepath.Join(t.TempDir(), "old")
			for file, b := range saved {
				if err := os.MkdirAll(filepath.Dir(f2.file(file)), 0o700); err != nil {
					t.Fatal(err)
				}
				f2.write(file, b)
			}
			refused(t, f2.clientIn("", dir, c.Floors()), CodeRollback) // the network, after an export
		})
	}
	c := f.client("")
	mustRefresh(t, c)
	unwanted(t, c, old, CodeRollback) // an export, after the network
	// The same for a lone release with metadata beside it.
	if _, _, err := c.ImportFile(metadataOf(t, old), releaseOf(t, old)); CodeOf(err) != CodeRollback {
		t.Error(err)
	}
	if _, held, err := c.ImportFile(metadataOf(t, now), releaseOf(t, now)); err != nil || len(held) != 1 {
		t.Errorf("%v %v", held, err)
	}
}

func metadataOf(t *testing.T, export []byte) map[string][]byte {
	e, err := readExport(export)
	if err != nil {
		t.Fatal(err)
	}
	return e.metadata
}

func releaseOf(t *testing.T, export []byte) []byte {
	e, err := readExport(export)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range e.targets {
		return b
	}
	t.Fatal("no release")
	return nil
}

func TestExportFollowsRoots(t *testing.T) {
	f := newFixture(t)
	c := f.isolated(t.TempDir(), Floors{})
	next := Keys{"timestamp": {newKey(t)}}
	if _, err := Rotate(f.dir, f.keys, "timestamp", next, f.options()); err != nil {
		t.Fatal(err)
	}
	f.keys["timestamp"] = next["timestamp"]
	f.publish("ACME-2", 2)
	if _, held, err := c.Import(f.export()); err != nil || len(held) != 2 {
		t.Fatal(err)
	}
	if c.Floors().Root != 3 { // signed by the old key and the new one, then by the new one alone
		t.Errorf("%+v", c.Floors())
	}
}

// piece is one entry of a hostile export.
type piece struct {
	name   string
	b      []byte
	method uint16
	mode   os.FileMode
	extra  []byte
}

func pack(t *testing.T, pieces []piece) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, p := range pieces {
		h := &zip.FileHeader{Name: p.name, Method: p.method, CRC32: crc32.ChecksumIEEE(p.b), Extra: p.extra,
			CompressedSize64: uint64(len(p.b)), UncompressedSize64: uint64(len(p.b))}
		if p.mode != 0 {
			h.SetMode(p.mode)
		}
		if p.method != zip.Store {
			h.UncompressedSize64 = 1 << 31 // says that it grows to 2 GiB
		}
		e, err := w.CreateRaw(h)
		if err != nil {
			t.Fatal(err)
		}
		e.Write(p.b)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestHostileExports(t *testing.T) {
	f := newFixture(t)
	good := f.export()
	r, err := zip.NewReader(bytes.NewReader(good), int64(len(good)))
	if err != nil {
		t.Fatal(err)
	}
	var parts []piece
	for _, e := range r.File {
		raw, err := e.OpenRaw()
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := b.ReadFrom(raw); err != nil {
			t.Fatal(err)
		}
		parts = append(parts, piece{name: e.Name, b: b.Bytes()})
	}
	if !bytes.Equal(pack(t, parts), good) {
		t.Fatal("the test does not make what Export makes")
	}
	with := func(more ...piece) []byte { return pack(t, append(append([]piece{}, parts...), more...)) }
	changed := func(i int, change func(*piece)) []byte {
		list := append([]piece{}, parts...)
		list[i].b = bytes.Clone(list[i].b)
		change(&list[i])
		return pack(t, list)
	}
	last := len(parts) - 1
	sum := strings.Repeat("a", 64)
	bytesOf := func(change func([]byte)) []byte { b := bytes.Clone(good); change(b); return b }
	for name, c := range map[string]struct {
		b     []byte
		code  string
		words string
	}{
		"bomb":              {with(piece{name: "metadata/2.targets.json", b: []byte("x"), method: zip.Deflate}), CodeDamaged, "an export holds everything as it is"},
		"upwards":           {with(piece{name: "../../etc/cron.d/x", b: []byte("x")}), CodeDamaged, `"../../etc/cron.d/x", which is neither metadata nor a release`},
		"upwards, hidden":   {with(piece{name: "metadata/../../2.root.json", b: []byte("x")}), CodeDamaged, "neither metadata nor a release"},
		"absolute":          {with(piece{name: "/metadata/2.root.json", b: []byte("x")}), CodeDamaged, "neither metadata nor a release"},
		"of Windows":        {with(piece{name: `targets\releases\x`, b: []byte("x")}), CodeDamaged, "neither metadata nor a release"},
		"its own root":      {with(piece{name: "root.json", b: []byte("x")}), CodeDamaged, "neither metadata nor a release"},
		"twice":             {with(piece{name: "metadata/timestamp.json", b: []byte("{}")}), CodeDamaged, "holds metadata/timestamp.json twice"},
		"link":              {with(piece{name: "metadata/2.root.json", b: []byte("/etc/shadow"), mode: os.ModeSymlink | 0o777}), CodeDamaged, "a link, a folder or a device"},
		"folder":            {with(piece{name: "metadata/", mode: os.ModeDir | 0o755}), CodeDamaged, "a link, a folder or a device"},
		"extra field":       {with(piece{name: "metadata/2.root.json", b: []byte("x"), extra: []byte{1, 0, 0, 0}}), CodeDamaged, "extra field"},
		"release put in":    {with(piece{name: "targets/releases/" + sum + ".EVIL-1.hotpatch", b: []byte("x")}), CodeUnknown, "names no release " + sum},
		"release changed":   {changed(last, func(p *piece) { p.b[len(p.b)/2] ^= 1 }), CodeSignature, "not the file that was signed"},
		"metadata changed":  {changed(2, func(p *piece) { p.b[len(p.b)/2] ^= 1 }), CodeSignature, ""},
		"not first":         {pack(t, parts[1:]), CodeDamaged, "instead of export.json"},
		"newer format":      {changed(0, func(p *piece) { p.b = []byte(`{"format":"hotpatch-export/2"}`) }), CodeDamaged, "newer daemons may"},
		"no timestamp":      {pack(t, append(append([]piece{}, parts[:4]...), parts[5:]...)), CodeNotFound, "does not hold timestamp.json"},
		"cut off":           {good[:len(good)-1], CodeDamaged, "cut off"},
		"half":              {good[:len(good)/2], CodeDamaged, "cut off"},
		"something behind":  {append(bytes.Clone(good), 0), CodeDamaged, "something follows its end"},
		"something before":  {append([]byte("MZ"), good...), CodeDamaged, ""},
		"two directories":   {bytesOf(func(b []byte) { b[zipLocal] = 'X' }), CodeDamaged, "disagree"},
		"sum":               {bytesOf(func(b []byte) { b[zipLocal+len(exportHead)] ^= 1 }), CodeDamaged, "checksum"},
		"count":             {bytesOf(func(b []byte) { binary.LittleEndian.PutUint16(b[len(b)-zipEnd+10:], 65535) }), CodeDamaged, ""},
		"empty":             {nil, CodeDamaged, "too short"},
		"too long":          {make([]byte, MaxExport+1), CodeTooLarge, "at most"},
		"nothing but a zip": {pack(t, []piece{{name: "x"}, {name: "y"}}), CodeDamaged, ""},
	} {
		t.Run(name, func(t *testing.T) {
			unwanted(t, f.isolated(t.TempDir(), Floors{}), c.b, c.code, c.words)
		})
	}

	c := f.isolated(t.TempDir(), Floors{})
	f.now = start.Add(31 * 24 * time.Hour)
	unwanted(t, c, good, CodeExpired, "timestamp.json ended", "bring a newer export")
	if _, _, err := Export(f.dir, nil, f.now); CodeOf(err) != CodeExpired {
		t.Errorf("an export of ended metadata: %v", err)
	}
	f.now = start
	unwanted(t, c, newFixture(t).export(), CodeSignature, "not signed by the keys that this device trusts")
	if got := c.Floors(); got.Snapshot != 0 || got.Targets != 0 {
		t.Errorf("what was refused raised the floors: %+v", got)
	}
	if _, _, err := Export(f.dir, []string{"ACME-9"}, f.now); CodeOf(err) != CodeUnknown {
		t.Error(err)
	}
	if err := os.Remove(f.file("metadata/1.root.json")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Export(f.dir, nil, f.now); err == nil || !strings.Contains(err.Error(), "every one since the first") {
		t.Error(err)
	}
}

// Whatever an export is, taking it apart ends, and what it gives is its own bytes.
func FuzzReadExport(f *testing.F) {
	e := exported{metadata: map[string][]byte{"timestamp.json": []byte("{}"), "1.root.json": []byte("{}")}, targets: map[string][]byte{}}
	b, err := e.write()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := readExport(b)
		if err != nil {
			return
		}
		sum := len(headText)
		for _, list := range []map[string][]byte{e.metadata, e.targets} {
			for _, x := range list {
				sum += len(x)
			}
		}
		if sum > len(b) {
			t.Errorf("%d bytes out of %d", sum, len(b))
		}
	})
}

// A stick that is pulled out in the middle is being away, not damage: what came
// so far is kept, and goes on when it is back.
func TestStickPulledOut(t *testing.T) {
	f := newFixture(t)
	c := brisk(f.client(""))
	c.transport.limits.attempts = 1
	cat := mustRefresh(t, c)
	o := cat.Offers[0]
	away := f.dir + "-away"
	pull := func() {
		if err := os.Rename(f.dir, away); err != nil {
			t.Fatal(err)
		}
	}
	half := int64(0)
	c.cfg.Progress = func(done, total int64) {
		if half == 0 {
			half = done
		}
	}
	pull()
	if e := refused(t, c, CodeOffline); !strings.Contains(e.Text, "there is no folder") || !strings.Contains(e.Hint, "on a stick") {
		t.Errorf("%+v", e)
	}
	if _, err := c.Fetch(t.Context(), o); CodeOf(err) != CodeOffline {
		t.Error(err)
	}
	if known, err := c.Cached(); err != nil || known != cat {
		t.Errorf("%v %v", known, err)
	}
	if err := os.Rename(away, f.dir); err != nil {
		t.Fatal(err)
	}
	// Pulled out while a file is copied: an end too early, as the system says it or as a short file.
	file := f.file("targets/" + targetFile(o.Target, o.SHA256))
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Fetch(t.Context(), o); CodeOf(err) != CodeUnreachable {
		t.Error(err)
	}
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	half = 0
	if b, err := c.Fetch(t.Context(), o); err != nil || !matches(o, b) {
		t.Fatal(err)
	}
	if half <= int64(len(whole)/2) {
		t.Errorf("it began anew: the first bytes that came brought it to %d", half)
	}
}

// A share whose server has gone holds up nobody for longer than a server on the
// web would, is not tried over and over, and is tried again once it is back.
func TestShareThatHangs(t *testing.T) {
	f := newFixture(t)
	for _, where := range []string{"open", "read"} {
		t.Run(where, func(t *testing.T) {
			c := f.client("")
			c.transport.limits.document = 100 * time.Millisecond
			back := make(chan struct{})
			var tries atomic.Int32
			c.transport.openLocal = func(path string) (*os.File, os.FileInfo, error) {
				info, err := os.Stat(path)
				if err != nil { // the next root, which is not there
					return nil, nil, err
				}
				tries.Add(1)
				if where == "open" {
					<-back
					return openRegular(path)
				}
				r, w, err := os.Pipe() // nobody writes: a read does not come back
				go func() { <-back; w.Close() }()
				return r, info, err
			}
			for range 4 {
				refused(t, c, CodeTooSlow)
			}
			if n := tries.Load(); n != maxHanging {
				t.Errorf("%d calls hang", n)
			}
			close(back)
			c.transport.openLocal = openRegular
			deadline := time.Now().Add(30 * time.Second)
			for c.transport.hanging.Load() > 0 {
				if time.Now().After(deadline) {
					t.Fatal("what hung is counted for ever")
				}
				time.Sleep(time.Millisecond)
			}
			mustRefresh(t, c)
		})
	}
}
