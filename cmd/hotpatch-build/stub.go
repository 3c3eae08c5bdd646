package main

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// stubDLL makes the smallest image that exports the given names: it stands in
// for a system DLL in a simulation, where imports have to lead somewhere. All
// names lead to one RET. Layout: Microsoft PE/COFF specification.
func stubDLL(name string, machine uint16, exports []string) []byte {
	const (
		headers = 0x200
		text    = 0x1000 // RVA of the code, then of the export directory
		edata   = 0x2000
		page    = 0x1000
		align   = 0x200
	)
	names := slices.Compact(slices.Sorted(slices.Values(exports)))
	code := []byte{0xc3} // ret
	if machine == 0xaa64 {
		code = []byte{0xc0, 0x03, 0x5f, 0xd6}
	}
	n := uint32(len(names))
	functions, pointers, ordinals := uint32(edata+40), uint32(edata+40)+4*n, uint32(edata+40)+8*n
	texts := ordinals + 2*n
	var strings bytes.Buffer
	strings.WriteString(name + "\x00")
	var addresses, namePointers, numbers bytes.Buffer
	for i, s := range names {
		put(&addresses, uint32(text))
		put(&namePointers, texts+uint32(strings.Len()))
		put(&numbers, uint16(i))
		strings.WriteString(s + "\x00")
	}
	var directory bytes.Buffer // IMAGE_EXPORT_DIRECTORY
	put(&directory, uint32(0), uint32(0), uint32(0), texts, uint32(1), n, n, functions, pointers, ordinals)
	for _, part := range []*bytes.Buffer{&addresses, &namePointers, &numbers, &strings} {
		directory.Write(part.Bytes())
	}
	size := uint32(directory.Len())
	raw := (size + align - 1) &^ (align - 1)

	var b bytes.Buffer
	dos := make([]byte, 64)
	copy(dos, "MZ")
	binary.LittleEndian.PutUint32(dos[0x3c:], 64)
	b.Write(dos)
	b.WriteString("PE\x00\x00")
	put(&b, machine, uint16(2), uint32(1), uint32(0), uint32(0), uint16(240), uint16(0x2022)) // executable, large addresses, DLL
	put(&b, uint16(0x20b), uint16(0), uint32(align), raw, uint32(0), uint32(0), uint32(text),
		uint64(0x7ff000000000), uint32(page), uint32(align), uint64(6), uint64(6), // versions: only subsystem 6 says anything
		uint32(edata+(size+page-1)&^(page-1)), uint32(headers), uint32(0), uint16(2), uint16(0x160),
		uint64(1<<20), uint64(page), uint64(1<<20), uint64(page), uint32(0), uint32(16))
	directories := make([]uint32, 32)
	directories[0], directories[1] = edata, size
	put(&b, directories)
	section := func(name string, rva, virtual, at, raw, flags uint32) {
		var label [8]byte
		copy(label[:], name)
		put(&b, label, virtual, rva, raw, at, uint32(0), uint32(0), uint32(0), flags)
	}
	section(".text", text, uint32(len(code)), headers, align, 0x60000020)
	section(".edata", edata, size, headers+align, raw, 0x40000040)
	b.Write(make([]byte, headers-b.Len()))
	b.Write(code)
	b.Write(make([]byte, headers+align-b.Len()))
	b.Write(directory.Bytes())
	b.Write(make([]byte, headers+align+int(raw)-b.Len()))
	return b.Bytes()
}

// put writes fixed-size values little endian; a bytes.Buffer never fails.
func put(b *bytes.Buffer, values ...any) {
	for _, v := range values {
		_ = binary.Write(b, binary.LittleEndian, v)
	}
}
