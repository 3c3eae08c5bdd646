package patcher

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf16"

	"hotpatchd/patcher/target"
)

// An API set is a name for a group of functions that some module of the system
// has. Which one, the map says that every process has in its environment block
// (API_SET_NAMESPACE version 6, Windows 10 and later).
const (
	pebApiSetMap    = 0x68
	apiSetVersion   = 6
	apiSetEntry     = 24 // bytes of API_SET_NAMESPACE_ENTRY
	apiSetValue     = 20 // bytes of API_SET_VALUE_ENTRY
	maxApiSetMap    = 1 << 20
	maxApiSets      = 16 << 10
	maxApiSetValues = 64
	maxApiSetName   = 512 // bytes
)

// apiSetMap is a process's map, read once.
type apiSetMap struct{ b []byte }

// readApiSetMap reads the map of a process; nil if the backend does not know
// where its environment block is.
func readApiSetMap(p target.Process) (*apiSetMap, error) {
	peb := p.Info().PEB
	if peb == 0 {
		return nil, nil
	}
	at, err := read(p, peb+pebApiSetMap, 8)
	if err != nil {
		return nil, fmt.Errorf("cannot read where the API sets are: %w", err)
	}
	start := target.Addr(binary.LittleEndian.Uint64(at))
	head, err := read(p, start, 8)
	if err != nil {
		return nil, fmt.Errorf("cannot read the map of API sets: %w", err)
	}
	version, size := binary.LittleEndian.Uint32(head), binary.LittleEndian.Uint32(head[4:])
	if version != apiSetVersion || size < 28 || size > maxApiSetMap {
		return nil, fmt.Errorf("the map of API sets has version %d and %d bytes; known is version %d up to %d bytes", version, size, apiSetVersion, maxApiSetMap)
	}
	m := &apiSetMap{}
	if m.b, err = read(p, start, int(size)); err != nil {
		return nil, fmt.Errorf("cannot read the map of API sets: %w", err)
	}
	return m, nil
}

func (m *apiSetMap) word(at uint64) uint32 {
	if at+4 > uint64(len(m.b)) {
		return 0
	}
	return binary.LittleEndian.Uint32(m.b[at:])
}

// name is n bytes of UTF-16 at at; "" where there are none.
func (m *apiSetMap) name(at, n uint32) string {
	if n > maxApiSetName || uint64(at)+uint64(n) > uint64(len(m.b)) {
		return ""
	}
	u := make([]uint16, n/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(m.b[at+uint32(2*i):])
	}
	return string(utf16.Decode(u))
}

// host is the module that stands for an API set where importer asks for it; ""
// if the map has none. Versions behind the last hyphen do not count.
func (m *apiSetMap) host(set, importer string) string {
	set = strings.TrimSuffix(strings.ToLower(set), ".dll")
	count, entries := m.word(12), uint64(m.word(16))
	for i := range uint64(min(count, maxApiSets)) {
		e := entries + i*apiSetEntry
		full := m.name(m.word(e+4), m.word(e+8))
		hashed := min(int(m.word(e+12)/2), len(full))
		if hashed == 0 || !strings.EqualFold(full[:hashed], unversioned(set)) {
			continue
		}
		host := ""
		values, n := uint64(m.word(e+16)), m.word(e+20)
		for k := range uint64(min(n, maxApiSetValues)) {
			v := values + k*apiSetValue
			// The first value is for all; a later one for the module it names.
			who, to := m.name(m.word(v+4), m.word(v+8)), m.name(m.word(v+12), m.word(v+16))
			if k == 0 || who != "" && strings.EqualFold(who, importer) {
				host = to
			}
		}
		return host
	}
	return ""
}

func unversioned(set string) string {
	if i := strings.LastIndexByte(set, '-'); i > 0 {
		return set[:i]
	}
	return set
}
