package release

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"unicode"
)

var rangeOfLetters = unicode.L

// part is one entry of a hand-made zip file.
type part struct {
	name   string
	data   []byte
	method uint16
	change func(*zip.FileHeader)
	tail   []byte // after the packed data, inside the entry
}

func zipOf(t testing.TB, comment string, parts ...part) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := zip.NewWriter(&buf)
	for _, p := range parts {
		h := &zip.FileHeader{Name: p.name, Method: p.method, CRC32: crc32.ChecksumIEEE(p.data), UncompressedSize64: uint64(len(p.data))}
		data := p.data
		if p.method == zip.Deflate {
			var packed bytes.Buffer
			d, _ := flate.NewWriter(&packed, flate.BestCompression)
			if _, err := d.Write(p.data); err != nil {
				t.Fatal(err)
			}
			d.Close()
			data = append(packed.Bytes(), p.tail...)
		}
		h.CompressedSize64 = uint64(len(data))
		if p.change != nil {
			p.change(h)
		}
		body, err := w.CreateRaw(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := body.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.SetComment(comment); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type evilZip struct {
	name, want string
	bytes      []byte
}

// evilZips are containers that a lenient reader would take, one evil each.
func evilZips(t testing.TB) []evilZip {
	m, files := sample()
	m.fill()
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	manifest := part{name: manifestName, data: text}
	image := part{name: "images/app-1.dll", data: files["images/app-1.dll"]}
	named := func(name string) []byte {
		return zipOf(t, "", manifest, part{name: name, data: image.data})
	}
	changed := func(change func(*zip.FileHeader)) []byte {
		p := image
		p.change = change
		return zipOf(t, "", manifest, p)
	}
	bombManifest := *m
	bombManifest.Images = bombManifest.Images[:1:1]
	zeros := make([]byte, 8<<20)
	if err := func() error {
		i := &bombManifest.Images[0]
		i.Size, i.SHA256 = 0, ""
		return fill(zeros, &i.Size, &i.SHA256)
	}(); err != nil {
		t.Fatal(err)
	}
	bombText, err := json.Marshal(&bombManifest)
	if err != nil {
		t.Fatal(err)
	}
	var crowd []part
	for i := range MaxImages + 1 {
		crowd = append(crowd, part{name: fmt.Sprintf("images/%d", i), data: []byte("x")})
	}
	sound := zipOf(t, "", manifest, image)
	// A second directory, of which only the last is the real one.
	hidden := append(bytes.Clone(sound[:len(sound)-endLength]), sound...)
	lying := bytes.Clone(sound) // the local record says another name than the directory
	copy(lying[bytes.Index(lying, append([]byte("images/app-1.dll"), image.data...)):], "images/app-9.dll")
	shortSize := bytes.Clone(sound) // the directory says fewer bytes than the local record
	central := bytes.LastIndex(shortSize, []byte("images/app-1.dll")) - centralLength
	binary.LittleEndian.PutUint32(shortSize[central+24:], 1)
	announced := bytes.Clone(sound)
	announced[len(announced)-2] = 1
	offset := bytes.Clone(sound) // the directory says another place
	binary.LittleEndian.PutUint32(offset[central+42:], 7)
	longSize := bytes.Clone(sound) // the local record says more bytes than the directory
	local := bytes.Index(longSize, append([]byte("images/app-1.dll"), image.data...)) - localLength
	binary.LittleEndian.PutUint32(longSize[local+22:], 49)
	gap := bytes.Clone(sound) // bytes that no entry owns, before the directory
	directory := int(binary.LittleEndian.Uint32(gap[len(gap)-endLength+16:]))
	gap = slices.Insert(gap, directory, []byte("hidden")...)
	binary.LittleEndian.PutUint32(gap[len(gap)-endLength+16:], uint32(directory+6))
	return []evilZip{
		{"comment", "follows its end", zipOf(t, "hello", manifest, image)},
		{"comment announced", "comment", announced},
		{"trailing data", "follows its end", append(bytes.Clone(sound), 0)},
		{"leading data", "directory does not end", append([]byte("MZ"), sound...)},
		{"second directory", "directory does not end", hidden},
		{"names disagree", "disagree", lying},
		{"sizes disagree", "instead of", shortSize},
		{"place disagrees", "begins at 7", offset},
		{"local size disagrees", "disagree", longSize},
		{"gap", "belong to no entry", gap},
		{"bytes after the packed end", "follow its end", zipOf(t, "", manifest, part{name: image.name, data: image.data, method: zip.Deflate, tail: []byte("hidden")})},
		{"manifest not first", "first entry", zipOf(t, "", image, manifest)},
		{"no manifest", "first entry", zipOf(t, "", image)},
		{"nothing", "empty", zipOf(t, "")},
		{"entry not named", "not named by release.json", zipOf(t, "", manifest, image, part{name: "images/more.dll", data: []byte("x")})},
		{"entry missing", "is missing", zipOf(t, "", manifest)},
		{"entry twice", "there twice", zipOf(t, "", manifest, image, image)},
		{"manifest twice", "there twice", zipOf(t, "", manifest, image, manifest)},
		{"absolute", "one plain name", named("/images/app-1.dll")},
		{"drive", "one plain name", named(`C:\app-1.dll`)},
		{"backslash", "one plain name", named(`images\app-1.dll`)},
		{"way out", "one plain name", named("images/../../app-1.dll")},
		{"dot", "one plain name", named("./images/app-1.dll")},
		{"folder", "one plain name", zipOf(t, "", manifest, part{name: "images/"})},
		{"deeper folder", "one plain name", named("images/a/app-1.dll")},
		{"NUL", "one plain name", named("images/app-1.dll\x00.txt")},
		{"other content", "has the hash", zipOf(t, "", manifest, part{name: image.name, data: bytes.ToUpper(image.data)})},
		{"shorter content", "bytes, release.json says", zipOf(t, "", manifest, part{name: image.name, data: image.data[:9]})},
		{"longer content", "more than 48", zipOf(t, "", manifest, part{name: image.name, data: append(bytes.Clone(image.data), 'x')})},
		{"encrypted", "encrypted", changed(func(h *zip.FileHeader) { h.Flags |= flagEncrypted })},
		{"data descriptor", "sizes must stand before", changed(func(h *zip.FileHeader) { h.Flags |= 8 })},
		{"symbolic link", "a link", changed(func(h *zip.FileHeader) { h.SetMode(fs.ModeSymlink | 0o777) })},
		{"folder by mode", "a folder", changed(func(h *zip.FileHeader) { h.SetMode(fs.ModeDir | 0o755) })},
		{"extra field", "extra fields", changed(func(h *zip.FileHeader) { h.Extra = []byte{1, 0, 0, 0} })},
		{"entry comment", "a comment", changed(func(h *zip.FileHeader) { h.Comment = "x" })},
		{"packing method", "method 12", changed(func(h *zip.FileHeader) { h.Method = 12 })},
		{"checksum", "has the checksum", changed(func(h *zip.FileHeader) { h.CRC32++ })},
		{"bomb", "more than 200-fold", zipOf(t, "", part{name: manifestName, data: bombText}, part{name: image.name, data: zeros, method: zip.Deflate})},
		{"bomb that lies", "expand to 48 bytes", zipOf(t, "", manifest, part{name: image.name, data: zeros, method: zip.Deflate,
			change: func(h *zip.FileHeader) { h.UncompressedSize64 = 48 }})},
		{"sum of bombs", "more than 536870912 bytes", zipOf(t, "", append([]part{manifest}, liars(20)...)...)},
		{"crowd", "entries, more than", zipOf(t, "", append([]part{manifest}, crowd...)...)},
		{"not a zip file", "too short", []byte("PK")},
	}
}

// liars are entries that each say they expand as far as the ratio allows.
func liars(n int) []part {
	var list []part
	for i := range n {
		data := bytes.Repeat([]byte{byte(i)}, 1<<18)
		list = append(list, part{name: fmt.Sprintf("images/%d", i), data: data, change: func(h *zip.FileHeader) {
			h.Method = zip.Deflate
			h.UncompressedSize64 = uint64(len(data)) * 120
		}})
	}
	return list
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range evilZips(t) {
		_, err := Open(c.bytes)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.want)
		}
	}
}

// Other writers may compress: that is no reason to refuse.
func TestOpenDeflated(t *testing.T) {
	m, files := sample()
	m.fill()
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	b := zipOf(t, "", part{name: manifestName, data: text, method: zip.Deflate},
		part{name: "images/app-1.dll", data: files["images/app-1.dll"], method: zip.Deflate})
	r, err := Open(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(r.ImageBytes(0), files["images/app-1.dll"]) {
		t.Error("content differs")
	}
}
