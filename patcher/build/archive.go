package build

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path"
	"sort"
	"strings"
)

// importEntry is one symbol of an import library.
type importEntry struct {
	Name string
	Data bool // a variable: reached through __imp_NAME only, no thunk
}

// COFF constants of the archive's objects (Microsoft PE/COFF specification,
// "Import Library Format", "COFF Relocations", "Section Flags").
const (
	relAMD64ADDR32NB = 3
	relARM64ADDR32NB = 2

	// initialised data, 4-byte aligned, readable and writable
	idataSection = 0x00000040 | 0x00300000 | 0x40000000 | 0x80000000

	importCode   = 0
	importData   = 1
	importByName = 1 << 2

	classExternal = 2
	classStatic   = 3
	classSection  = 104
)

// archiveMember is one file of an ar archive and the symbols it defines.
type archiveMember struct {
	symbols []string
	data    []byte
}

// writeImportLibrary makes an import library for dll that both GNU ld and
// lld-link read: three objects that carry the import descriptor, then one
// short import object for each entry. Entries must have distinct names.
func writeImportLibrary(dll string, machine uint16, entries []importEntry) ([]byte, error) {
	rel, ok := map[uint16]uint16{machineAMD64: relAMD64ADDR32NB, machineARM64: relARM64ADDR32NB}[machine]
	if !ok {
		return nil, fmt.Errorf("cannot write an import library for machine %#x", machine)
	}
	stem := strings.TrimSuffix(dll, path.Ext(dll))
	members := []archiveMember{
		descriptorObject(dll, stem, machine, rel),
		nullDescriptorObject(machine),
		nullThunkObject(stem, machine),
	}
	for _, e := range entries {
		members = append(members, shortImport(dll, machine, e))
	}
	return writeArchive(dll, members)
}

// shortImport is an IMPORT_OBJECT_HEADER with its two names.
func shortImport(dll string, machine uint16, e importEntry) archiveMember {
	kind := uint16(importCode | importByName)
	symbols := []string{"__imp_" + e.Name, e.Name}
	if e.Data {
		kind, symbols = importData|importByName, symbols[:1]
	}
	var b bytes.Buffer
	put(&b, uint16(0), uint16(0xffff), uint16(0), machine, uint32(0),
		uint32(len(e.Name)+1+len(dll)+1), uint16(0), kind)
	b.WriteString(e.Name + "\x00" + dll + "\x00")
	return archiveMember{symbols, b.Bytes()}
}

// coffSymbol is one IMAGE_SYMBOL; names longer than 8 bytes go to the string table.
type coffSymbol struct {
	name    string
	section int16
	class   uint8
}

// coffSection is one section; relocations are {offset, symbol index}.
type coffSection struct {
	name   string
	data   []byte
	flags  uint32
	relocs [][2]uint32
}

func descriptorObject(dll, stem string, machine, rel uint16) archiveMember {
	descriptor := "__IMPORT_DESCRIPTOR_" + stem
	name := append([]byte(dll), 0)
	if len(name)%2 != 0 {
		name = append(name, 0)
	}
	return archiveMember{[]string{descriptor}, writeObject(machine, rel, []coffSection{
		// IMAGE_IMPORT_DESCRIPTOR: OriginalFirstThunk, stamp, forwarder chain, Name, FirstThunk
		{".idata$2", make([]byte, 20), idataSection, [][2]uint32{{12, 2}, {0, 3}, {16, 4}}},
		{".idata$6", name, idataSection&^0x00300000 | 0x00200000, nil},
	}, []coffSymbol{
		{descriptor, 1, classExternal},
		{".idata$2", 1, classSection},
		{".idata$6", 2, classStatic},
		{".idata$4", 0, classSection},
		{".idata$5", 0, classSection},
		{"__NULL_IMPORT_DESCRIPTOR", 0, classExternal},
		{"\x7f" + stem + "_NULL_THUNK_DATA", 0, classExternal},
	})}
}

func nullDescriptorObject(machine uint16) archiveMember {
	const name = "__NULL_IMPORT_DESCRIPTOR"
	return archiveMember{[]string{name}, writeObject(machine, 0,
		[]coffSection{{".idata$3", make([]byte, 20), idataSection, nil}},
		[]coffSymbol{{name, 1, classExternal}})}
}

func nullThunkObject(stem string, machine uint16) archiveMember {
	name := "\x7f" + stem + "_NULL_THUNK_DATA"
	const flags = idataSection&^0x00300000 | 0x00400000 // 8-byte aligned
	return archiveMember{[]string{name}, writeObject(machine, 0,
		[]coffSection{{".idata$5", make([]byte, 8), flags, nil}, {".idata$4", make([]byte, 8), flags, nil}},
		[]coffSymbol{{name, 1, classExternal}})}
}

func writeObject(machine, rel uint16, sections []coffSection, symbols []coffSymbol) []byte {
	const header, sectionHeader, relocation = 20, 40, 10
	at := uint32(header + sectionHeader*len(sections))
	var headers, body bytes.Buffer
	for _, s := range sections {
		var name [8]byte
		copy(name[:], s.name)
		relocsAt := uint32(0)
		if len(s.relocs) > 0 {
			relocsAt = at + uint32(len(s.data))
		}
		put(&headers, name, uint32(0), uint32(0), uint32(len(s.data)), at, relocsAt, uint32(0), uint16(len(s.relocs)), uint16(0), s.flags)
		body.Write(s.data)
		for _, r := range s.relocs {
			put(&body, r[0], r[1], rel)
		}
		at += uint32(len(s.data) + relocation*len(s.relocs))
	}
	var out, names bytes.Buffer
	put(&out, machine, uint16(len(sections)), uint32(0), at, uint32(len(symbols)), uint16(0), uint16(0))
	out.Write(headers.Bytes())
	out.Write(body.Bytes())
	for _, s := range symbols {
		if len(s.name) <= 8 {
			var name [8]byte
			copy(name[:], s.name)
			put(&out, name)
		} else {
			put(&out, uint32(0), uint32(4+names.Len()))
			names.WriteString(s.name + "\x00")
		}
		put(&out, uint32(0), s.section, uint16(0), s.class, uint8(0))
	}
	put(&out, uint32(4+names.Len()))
	out.Write(names.Bytes())
	return out.Bytes()
}

// writeArchive lays out an ar archive with both linker members. All members
// bear the DLL's name: GNU ld recognises import libraries of this kind by it.
func writeArchive(dll string, members []archiveMember) ([]byte, error) {
	if len(members) > 0xffff {
		return nil, fmt.Errorf("cannot index %d members: an import library holds 65535", len(members))
	}
	type index struct {
		name   string
		member int
	}
	var symbols []index
	for i, m := range members {
		for _, s := range m.symbols {
			symbols = append(symbols, index{s, i})
		}
	}
	names := 0
	for _, s := range symbols {
		names += len(s.name) + 1
	}
	first := 4 + 4*len(symbols) + names
	second := 4 + 4*len(members) + 4 + 2*len(symbols) + names
	memberName, long := dll+"/", ""
	if len(memberName) > 16 {
		memberName, long = "/0", dll+"\x00"
	}
	at := uint32(8 + 60 + even(first) + 60 + even(second))
	if long != "" {
		at += uint32(60 + even(len(long)))
	}
	offsets := make([]uint32, len(members))
	for i, m := range members {
		offsets[i] = at
		at += uint32(60 + even(len(m.data)))
	}

	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	memberHeader(&b, "/", first) // first linker member: big endian, in archive order
	_ = binary.Write(&b, binary.BigEndian, uint32(len(symbols)))
	for _, s := range symbols {
		_ = binary.Write(&b, binary.BigEndian, offsets[s.member])
	}
	for _, s := range symbols {
		b.WriteString(s.name + "\x00")
	}
	pad(&b)
	sort.SliceStable(symbols, func(i, j int) bool { return symbols[i].name < symbols[j].name })
	memberHeader(&b, "/", second) // second linker member: little endian, sorted by name
	put(&b, uint32(len(members)), offsets, uint32(len(symbols)))
	for _, s := range symbols {
		put(&b, uint16(s.member+1))
	}
	for _, s := range symbols {
		b.WriteString(s.name + "\x00")
	}
	pad(&b)
	if long != "" {
		memberHeader(&b, "//", len(long))
		b.WriteString(long)
		pad(&b)
	}
	for _, m := range members {
		memberHeader(&b, memberName, len(m.data))
		b.Write(m.data)
		pad(&b)
	}
	return b.Bytes(), nil
}

// memberHeader writes the 60-byte header; date, owner and mode are fixed so
// that the same symbols give the same bytes.
func memberHeader(b *bytes.Buffer, name string, size int) {
	fmt.Fprintf(b, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", name, 0, 0, 0, "644", size)
}

func even(n int) int { return n + n%2 }

func pad(b *bytes.Buffer) {
	if b.Len()%2 != 0 {
		b.WriteByte('\n')
	}
}

// put writes fixed-size values little endian; a bytes.Buffer never fails.
func put(b *bytes.Buffer, values ...any) {
	for _, v := range values {
		_ = binary.Write(b, binary.LittleEndian, v)
	}
}
