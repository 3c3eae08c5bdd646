package repository

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"regexp"
	"strings"
)

// Records of the zip format (PKWARE APPNOTE 4.3): signatures and fixed lengths.
const (
	zipLocalSignature   = 0x04034b50
	zipCentralSignature = 0x02014b50
	zipEndSignature     = 0x06054b50
	zipLocal            = 30
	zipCentral          = 46
	zipEnd              = 22

	zipFlagUTF8 = 1 << 11
)

// What an export may hold, by name. Nothing of a name is ever used as a path.
var (
	metadataEntry = regexp.MustCompile(`^metadata/(timestamp|[1-9][0-9]{0,17}\.(root|snapshot|targets))\.json$`)
	targetsEntry  = regexp.MustCompile(`^targets/releases/[0-9a-f]{64}\.[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.hotpatch$`)
)

// readExport takes apart the one form of zip file that an export may have:
// records without gaps from the first byte to the last, local and central
// headers that agree, everything stored as it is, no comment, extra field, link
// or folder. What is stored as it is cannot grow, so that an export has no more
// bytes than were sent. Nothing is copied.
func readExport(b []byte) (exported, error) {
	e := exported{metadata: map[string][]byte{}, targets: map[string][]byte{}}
	bad := func(format string, args ...any) (exported, error) {
		return exported{}, fail(CodeDamaged, nil, "it is not a sound export: "+format, args...).hint("make it with hotpatch-build export, and copy it again")
	}
	le := binary.LittleEndian
	switch {
	case len(b) > MaxExport:
		return exported{}, fail(CodeTooLarge, nil, "an export has at most %d bytes, this one %d", MaxExport, len(b)).hint("export fewer releases at a time")
	case len(b) < zipEnd:
		return bad("it is too short")
	}
	end := b[len(b)-zipEnd:]
	count := int(le.Uint16(end[10:]))
	length, start := int64(le.Uint32(end[12:])), int64(le.Uint32(end[16:]))
	switch {
	case le.Uint32(end) != zipEndSignature:
		return bad("it is cut off, or something follows its end")
	case le.Uint16(end[20:]) != 0 || le.Uint32(end[4:]) != 0 || int(le.Uint16(end[8:])) != count:
		return bad("it has a comment or is one of several parts")
	case count < 2 || count > maxEntries:
		return bad("it has %d entries, not 2 to %d", count, maxEntries)
	case start+length != int64(len(b)-zipEnd):
		return bad("its directory does not end where its last record begins")
	}
	directory, local := b[start:start+length], b[:start]
	at := int64(0)
	for i := range count {
		if len(directory) < zipCentral || le.Uint32(directory) != zipCentralSignature {
			return bad("entry %d: its directory record is missing", i)
		}
		n := int(le.Uint16(directory[28:]))
		if n == 0 || n > maxEntry || len(directory) < zipCentral+n {
			return bad("entry %d: its name has %d bytes", i, n)
		}
		name := string(directory[zipCentral : zipCentral+n])
		content, err := readStored(directory[:zipCentral+n], local, at)
		if err != nil {
			return bad("entry %d, %.100q: %v", i, name, err)
		}
		directory = directory[zipCentral+n:]
		at += int64(zipLocal + n + len(content))
		if err := e.put(i, name, content); err != nil {
			return exported{}, err
		}
	}
	if len(directory) != 0 || at != start {
		return bad("%d bytes belong to no entry", int64(len(directory))+start-at)
	}
	return e, nil
}

// readStored compares a directory record with the local one, which must be at
// at, and returns the entry's bytes.
func readStored(record, local []byte, at int64) ([]byte, error) {
	const (
		hostUnix         = 3 // upper byte of "version made by"
		typeMask, isFile = 0o170000, 0o100000
	)
	le := binary.LittleEndian
	flags, method, crc := le.Uint16(record[8:]), le.Uint16(record[10:]), le.Uint32(record[16:])
	stored, size := int64(le.Uint32(record[20:])), int64(le.Uint32(record[24:]))
	kind := uint32(0)
	if record[5] == hostUnix {
		kind = le.Uint32(record[38:]) >> 16 & typeMask
	}
	name := record[zipCentral:]
	n := int64(zipLocal + len(name))
	switch {
	case flags&^zipFlagUTF8 != 0:
		return nil, fmt.Errorf("it has flags %#x", flags)
	case method != 0 || stored != size:
		return nil, fmt.Errorf("it is packed (method %d, %d bytes to %d): an export holds everything as it is", method, stored, size)
	case le.Uint32(record[30:]) != 0 || le.Uint16(record[34:]) != 0:
		return nil, fmt.Errorf("it has an extra field, a comment or lies elsewhere")
	case kind != 0 && kind != isFile:
		return nil, fmt.Errorf("it is a link, a folder or a device (mode %o)", kind)
	case int64(le.Uint32(record[42:])) != at:
		return nil, fmt.Errorf("it begins at %d, not where the one before ends, %d", le.Uint32(record[42:]), at)
	case int64(len(local))-at < n+size:
		return nil, fmt.Errorf("it is cut off")
	}
	l := local[at : at+n]
	if le.Uint32(l) != zipLocalSignature || le.Uint16(l[6:]) != flags || le.Uint16(l[8:]) != method || le.Uint32(l[14:]) != crc ||
		int64(le.Uint32(l[18:])) != stored || int64(le.Uint32(l[22:])) != size || int(le.Uint16(l[26:])) != len(name) ||
		le.Uint16(l[28:]) != 0 || string(l[zipLocal:]) != string(name) {
		return nil, fmt.Errorf("its record and the directory disagree")
	}
	content := local[at+n : at+n+size : at+n+size]
	if sum := crc32.ChecksumIEEE(content); sum != crc {
		return nil, fmt.Errorf("it has the checksum %08x, its record says %08x", sum, crc)
	}
	return content, nil
}

// put takes entry i of an export to its place.
func (e exported) put(i int, name string, content []byte) error {
	bad := func(format string, args ...any) error {
		return fail(CodeDamaged, nil, "it is not a sound export: "+format, args...).hint("make it with hotpatch-build export, and copy it again")
	}
	var to map[string][]byte
	short := ""
	switch {
	case i == 0 && name == exportHead:
		if string(content) != headText {
			return bad("its format is %.64q: this daemon reads %s; newer daemons may", strings.TrimSpace(string(content[:min(len(content), 64)])), ExportFormat)
		}
		return nil
	case i == 0:
		return bad("it begins with %.100q instead of %s", name, exportHead)
	case metadataEntry.MatchString(name):
		to, short = e.metadata, strings.TrimPrefix(name, metadataDir)
	case targetsEntry.MatchString(name):
		to, short = e.targets, strings.TrimPrefix(name, targetsDir)
	default:
		return bad("it holds %.100q, which is neither metadata nor a release", name)
	}
	if _, twice := to[short]; twice {
		return bad("it holds %s twice", name)
	}
	if len(e.targets) == MaxExported && short != "" && strings.HasPrefix(name, targetsDir) {
		return bad("it holds more than %d releases", MaxExported)
	}
	to[short] = content
	return nil
}
