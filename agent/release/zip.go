package release

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Records of the zip format (PKWARE APPNOTE 4.3): signatures and fixed lengths.
const (
	localSignature   = 0x04034b50
	centralSignature = 0x02014b50
	endSignature     = 0x06054b50
	localLength      = 30
	centralLength    = 46
	endLength        = 22

	methodStore   = 0
	methodDeflate = 8
	flagUTF8      = 1 << 11
	flagEncrypted = 1 << 0

	hostUnix   = 3 // upper byte of "version made by"
	typeMask   = 0o170000
	typeFile   = 0o100000
	typeAbsent = 0
)

// entry is one file of a container, not yet expanded.
type entry struct {
	name   string
	method uint16
	crc    uint32
	size   uint32 // bytes, expanded
	stored uint32 // bytes in the container
	data   []byte // as stored
}

// readZip reads the one form of zip file that a release may have: records
// without gaps from the first byte to the last, local and central headers that
// agree, no comments, extra fields, encryption, links, folders or 64-bit sizes.
// A general reader would look for the directory from the end and believe it;
// two readers could then see two different releases in the same signed bytes.
func readZip(b []byte) ([]entry, error) {
	if len(b) < endLength {
		return nil, errors.New("not a zip file: too short")
	}
	le := binary.LittleEndian
	end := b[len(b)-endLength:]
	if le.Uint32(end) != endSignature {
		return nil, errors.New("not a zip file, or something follows its end")
	}
	count := int(le.Uint16(end[10:]))
	length, start := int64(le.Uint32(end[12:])), int64(le.Uint32(end[16:]))
	switch {
	case le.Uint16(end[20:]) != 0:
		return nil, errors.New("the zip file has a comment")
	case le.Uint16(end[4:]) != 0 || le.Uint16(end[6:]) != 0 || le.Uint16(end[8:]) != uint16(count):
		return nil, errors.New("the zip file is one of several parts")
	case count == 0:
		return nil, errors.New("the zip file is empty")
	case count > MaxImages+1:
		return nil, fmt.Errorf("the zip file has %d entries, more than %d", count, MaxImages+1)
	case start+length != int64(len(b)-endLength):
		return nil, errors.New("the zip file's directory does not end where its last record begins")
	}
	directory := b[start : start+length]
	local := b[:start]
	entries := make([]entry, 0, count)
	names := map[string]bool{}
	var total int64
	at := int64(0) // in local
	for i := range count {
		if len(directory) < centralLength || le.Uint32(directory) != centralSignature {
			return nil, fmt.Errorf("entry %d: its directory record is missing", i)
		}
		n := int(le.Uint16(directory[28:]))
		if len(directory) < centralLength+n {
			return nil, fmt.Errorf("entry %d: its name is cut off", i)
		}
		e, err := readCentral(directory[:centralLength+n], at)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		directory = directory[centralLength+n:]
		if names[e.name] {
			return nil, fmt.Errorf("entry %d: %q is there twice", i, e.name)
		}
		names[e.name] = true
		if total += int64(e.size); total > MaxExpanded {
			return nil, fmt.Errorf("entries expand to more than %d bytes", MaxExpanded)
		}
		used, err := e.readLocal(local[at:])
		if err != nil {
			return nil, fmt.Errorf("entry %q: %w", e.name, err)
		}
		at += used
		entries = append(entries, e)
	}
	if len(directory) != 0 || at != int64(len(local)) {
		return nil, fmt.Errorf("%d bytes belong to no entry", int64(len(directory))+int64(len(local))-at)
	}
	return entries, nil
}

// readCentral checks a directory record; at is where its local record must be.
func readCentral(b []byte, at int64) (entry, error) {
	le := binary.LittleEndian
	e := entry{name: string(b[centralLength:]), method: le.Uint16(b[10:]), crc: le.Uint32(b[16:]), size: le.Uint32(b[24:])}
	flags, stored := le.Uint16(b[8:]), le.Uint32(b[20:])
	if e.name != manifestName {
		if checkEntry(e.name, "images/") != nil && checkEntry(e.name, "files/") != nil {
			return e, fmt.Errorf("%q is not release.json, nor images/ or files/ and one plain name", clip(e.name))
		}
	}
	kind := uint32(typeAbsent)
	if b[5] == hostUnix {
		kind = le.Uint32(b[38:]) >> 16 & typeMask
	}
	switch {
	case flags&flagEncrypted != 0:
		return e, fmt.Errorf("%q is encrypted", e.name)
	case flags&^flagUTF8 != 0:
		return e, fmt.Errorf("%q has flags %#x: sizes must stand before the data", e.name, flags)
	case e.method != methodStore && e.method != methodDeflate:
		return e, fmt.Errorf("%q is packed by method %d: store (0) and deflate (8) are known", e.name, e.method)
	case le.Uint16(b[30:]) != 0 || le.Uint16(b[32:]) != 0:
		return e, fmt.Errorf("%q has extra fields or a comment", e.name)
	case le.Uint16(b[34:]) != 0:
		return e, fmt.Errorf("%q lies in another part", e.name)
	case kind != typeFile && kind != typeAbsent:
		return e, fmt.Errorf("%q is a link, a folder or a device (mode %o)", e.name, kind)
	case int64(le.Uint32(b[42:])) != at:
		return e, fmt.Errorf("%q begins at %d, not where the one before ends, %d", e.name, le.Uint32(b[42:]), at)
	case e.method == methodStore && stored != e.size:
		return e, fmt.Errorf("%q is stored as is, but in %d bytes instead of %d", e.name, stored, e.size)
	case int64(e.size) > int64(stored)*MaxRatio:
		return e, fmt.Errorf("%q expands from %d to %d bytes, more than %d-fold", e.name, stored, e.size, MaxRatio)
	}
	e.stored = stored
	return e, nil
}

// readLocal compares the local record with the directory's, takes the data and
// returns how many bytes the two occupy.
func (e *entry) readLocal(b []byte) (int64, error) {
	le := binary.LittleEndian
	n := int64(localLength + len(e.name))
	if int64(len(b)) < n+int64(e.stored) || le.Uint32(b) != localSignature {
		return 0, errors.New("its record is missing or cut off")
	}
	if le.Uint16(b[6:])&^flagUTF8 != 0 || le.Uint16(b[8:]) != e.method || le.Uint32(b[14:]) != e.crc ||
		le.Uint32(b[18:]) != e.stored || le.Uint32(b[22:]) != e.size ||
		int(le.Uint16(b[26:])) != len(e.name) || le.Uint16(b[28:]) != 0 || string(b[localLength:n]) != e.name {
		return 0, errors.New("its record and the directory disagree")
	}
	e.data = b[n : n+int64(e.stored)]
	return n + int64(e.stored), nil
}

// expand returns the entry's content, at most limit bytes.
func (e *entry) expand(limit int64) ([]byte, error) {
	if int64(e.size) > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", e.name, e.size, limit)
	}
	content := e.data
	if e.method == methodDeflate {
		var err error
		if content, err = inflate(e.data, int64(e.size)); err != nil {
			return nil, fmt.Errorf("%s cannot be unpacked: %w", e.name, err)
		}
	}
	if sum := crc32.ChecksumIEEE(content); sum != e.crc {
		return nil, fmt.Errorf("%s has the checksum %08x, its record says %08x", e.name, sum, e.crc)
	}
	return content, nil
}

// inflate unpacks exactly size bytes from all of b.
func inflate(b []byte, size int64) ([]byte, error) {
	packed := bytes.NewReader(b)
	r := flate.NewReader(packed)
	var out bytes.Buffer
	if _, err := io.Copy(&out, io.LimitReader(r, size+1)); err != nil {
		return nil, err
	}
	if int64(out.Len()) != size {
		return nil, fmt.Errorf("it does not expand to %d bytes", size)
	}
	if packed.Len() != 0 {
		return nil, fmt.Errorf("%d bytes follow its end", packed.Len())
	}
	return out.Bytes(), nil
}
