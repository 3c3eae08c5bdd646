package patcher

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"hotpatchd/pe"
)

// forge makes PE images byte by byte, without a compiler and without the
// packages under test. Addresses are RVAs.
type forge struct {
	text     []byte // at forgeText
	flags    uint32 // of .text; 0: code
	textSize uint32 // in memory; 0: as long as text
	more     []byte // further code, at forgeMore; nil: no such section
	rdata    []byte // at forgeRData
	data     []byte // at forgeData
	records  []record
	exports  []pe.Export // sorted by name; by ordinal only where there is no name
	relocs   []uint32    // DIR64
	guard    []pe.GuardFunction
	ehcont   []uint32
	imports  []pe.Import // grouped by DLL; slots are at forgeSlots in their order
	noLoad   bool
	stamp    uint32
	rsds     bool
	name     string               // of the export directory
	dirs     map[int]pe.Directory // set by hand
}

// record is one unwind record.
type record struct{ begin, end, handler uint32 }

const (
	forgeBase  = 0x180000000
	forgeText  = 0x1000
	forgeRData = 0x8000
	forgeDirs  = 0xc000
	forgeSlots = 0xe000 // at the start of .data
	forgeData  = 0xe800
	forgeReloc = 0x10000
	forgeMore  = 0x12000
)

func lay(b []byte, off int, values ...any) []byte {
	for _, v := range values {
		var w []byte
		switch v := v.(type) {
		case string:
			w = append([]byte(v), 0)
		case []byte:
			w = v
		default:
			var err error
			if w, err = binary.Append(nil, binary.LittleEndian, v); err != nil {
				panic(err)
			}
		}
		if n := off + len(w); n > len(b) {
			b = append(b, make([]byte, n-len(b))...)
		}
		copy(b[off:], w)
		off += len(w)
	}
	return b
}

// blob is a run of bytes at an RVA that grows.
type blob struct {
	at uint32
	b  []byte
}

func (x *blob) next(align uint32) uint32 {
	for uint32(len(x.b))%align != 0 {
		x.b = append(x.b, 0)
	}
	return x.at + uint32(len(x.b))
}

func (x *blob) add(values ...any) uint32 {
	at := x.next(1)
	x.b = lay(x.b, len(x.b), values...)
	return at
}

func (f *forge) bytes() []byte {
	var dirs [16]pe.Directory
	d := &blob{at: forgeDirs}
	f.putExports(d, &dirs)
	f.putUnwind(d, &dirs)
	slots := f.putImports(d, &dirs)
	if len(f.guard)+len(f.ehcont) > 0 {
		f.putLoadConfig(d, &dirs)
	}
	if f.rsds {
		at := d.next(4)
		d.add(make([]byte, 12), uint32(2), uint32(30), at+28, uint32(0))
		d.add([]byte("RSDS"), []byte("0123456789abcdef"), uint32(3), "x.pdb")
		dirs[6] = pe.Directory{RVA: at, Size: 28}
	}
	data := lay(slots, forgeData-forgeSlots, f.data)
	reloc := &blob{at: forgeReloc}
	rs := slices.Sorted(slices.Values(f.relocs))
	for len(rs) > 0 {
		page := rs[0] &^ 0xfff
		var entries []byte
		for len(rs) > 0 && rs[0]&^0xfff == page {
			entries = binary.LittleEndian.AppendUint16(entries, 0xa000|uint16(rs[0]&0xfff))
			rs = rs[1:]
		}
		if len(entries)%4 != 0 {
			entries = append(entries, 0, 0)
		}
		reloc.add(page, uint32(8+len(entries)), entries)
	}
	if len(reloc.b) > 0 {
		dirs[5] = pe.Directory{RVA: forgeReloc, Size: uint32(len(reloc.b))}
	}
	for i, d := range f.dirs {
		dirs[i] = d
	}
	flags := f.flags
	if flags == 0 {
		flags = 0x60000020
	}
	textSize := max(f.textSize, uint32(len(f.text)))
	type section struct {
		name  string
		rva   uint32
		size  uint32
		flags uint32
		data  []byte
	}
	list := []section{{".text", forgeText, textSize, flags, f.text}, {".rdata", forgeRData, max(uint32(len(f.rdata)), 1), 0x40000040, f.rdata},
		{".dirs", forgeDirs, max(uint32(len(d.b)), 1), 0x40000040, d.b}, {".data", forgeSlots, uint32(len(data)), 0xC0000040, data},
		{".reloc", forgeReloc, max(uint32(len(reloc.b)), 1), 0x42000040, reloc.b}}
	size := uint32(forgeMore)
	if f.more != nil {
		list = append(list, section{".more", forgeMore, uint32(len(f.more)), flags, f.more})
		size = (forgeMore + uint32(len(f.more)) + 0xfff) &^ 0xfff
	}
	stamp := f.stamp
	if stamp == 0 {
		stamp = 0x5eed
	}
	b := lay(nil, 0, "MZ")
	b = lay(b, 0x3c, uint32(0x40))
	b = lay(b, 0x40, []byte("PE\x00\x00"), uint16(machineAMD64), uint16(len(list)), stamp, uint32(0), uint32(0), uint16(240), uint16(0x2022))
	b = lay(b, 0x58, uint16(0x20b))
	b = lay(b, 0x58+24, uint64(forgeBase), uint32(0x1000), uint32(0x200))
	b = lay(b, 0x58+56, size, uint32(0x400), uint32(0xc5), uint16(3), uint16(0x160))
	b = lay(b, 0x58+108, uint32(16), dirs)
	at := 0x400
	b = lay(b, at-1, uint8(0))
	for i, s := range list {
		raw := (len(s.data) + 0x1ff) &^ 0x1ff
		name := make([]byte, 8)
		copy(name, s.name)
		off := uint32(at)
		if raw == 0 {
			off = 0
		}
		b = lay(b, 0x58+240+40*i, name, s.size, s.rva, uint32(raw), off, uint32(0), uint32(0), uint32(0), s.flags)
		if raw > 0 {
			b = lay(b, at, s.data)
			b = append(b, make([]byte, at+raw-len(b))...)
			at += raw
		}
	}
	return b
}

func (f *forge) putExports(d *blob, dirs *[16]pe.Directory) {
	if len(f.exports) == 0 {
		return
	}
	name := f.name
	if name == "" {
		name = "forged.dll"
	}
	start := d.next(4)
	d.add(make([]byte, 40))
	dll := d.add(name)
	var names, at []uint32
	var ordinals []uint16
	for i, e := range f.exports {
		rva := e.RVA
		if e.Forward != "" {
			rva = d.add(e.Forward)
		}
		at = append(at, rva)
		if e.Name != "" {
			names = append(names, d.add(e.Name))
			ordinals = append(ordinals, uint16(i))
		}
	}
	d.next(4)
	functions := d.add(at)
	named := d.add(names)
	numbers := d.add(ordinals)
	lay(d.b, int(start-d.at), uint32(0), uint32(0), uint32(0), dll, uint32(1), uint32(len(at)), uint32(len(names)), functions, named, numbers)
	dirs[0] = pe.Directory{RVA: start, Size: d.next(1) - start}
}

func (f *forge) putUnwind(d *blob, dirs *[16]pe.Directory) {
	if len(f.records) == 0 {
		return
	}
	d.next(4)
	var table []byte
	for _, r := range f.records {
		var info uint32
		if r.handler == 0 {
			info = d.add([]byte{1, 0, 0, 0})
		} else {
			info = d.add([]byte{1 | 1<<3, 0, 0, 0}, r.handler)
		}
		table = lay(table, len(table), r.begin, r.end, info)
	}
	dirs[3] = pe.Directory{RVA: d.add(table), Size: uint32(len(table))}
}

func (f *forge) putImports(d *blob, dirs *[16]pe.Directory) (slots []byte) {
	if len(f.imports) == 0 {
		return nil
	}
	var descriptors []byte
	for i := 0; i < len(f.imports); {
		dll := f.imports[i].DLL
		first := uint32(forgeSlots + len(slots))
		var lookup []byte
		for ; i < len(f.imports) && f.imports[i].DLL == dll; i++ {
			v := uint64(1)<<63 | uint64(f.imports[i].Ordinal)
			if n := f.imports[i].Name; n != "" {
				d.next(2)
				v = uint64(d.add(uint16(0), n))
			}
			f.imports[i].Slot = forgeSlots + uint32(len(slots))
			lookup = lay(lookup, len(lookup), v)
			slots = lay(slots, len(slots), v)
		}
		slots = lay(slots, len(slots), uint64(0))
		d.next(8)
		table := d.add(lookup, uint64(0))
		name := d.add(dll)
		descriptors = lay(descriptors, len(descriptors), table, uint32(0), uint32(0), name, first)
	}
	d.next(4)
	dirs[1] = pe.Directory{RVA: d.add(descriptors, make([]byte, 20)), Size: uint32(len(descriptors) + 20)}
	return slots
}

func (f *forge) putLoadConfig(d *blob, dirs *[16]pe.Directory) {
	at := d.next(16)
	lc := make([]byte, 0x140)
	d.add(lc)
	var guard []byte
	for _, g := range f.guard {
		guard = lay(guard, len(guard), g.RVA, g.Flags)
	}
	var eh []byte
	for _, r := range f.ehcont {
		eh = lay(eh, len(eh), r, uint8(0))
	}
	guardAt, ehAt := d.add(guard), d.add(eh)
	lc = d.b[at-d.at:]
	lay(lc, 0, uint32(0x140))
	lay(lc, 0x80, uint64(forgeBase)+uint64(guardAt), uint64(len(f.guard)), uint32(0x10c00500))
	lay(lc, 0x108, uint64(forgeBase)+uint64(ehAt), uint64(len(f.ehcont)))
	for _, r := range []uint32{at + 0x80, at + 0x108} {
		if !slices.Contains(f.relocs, r) { // it may be forged twice
			f.relocs = append(f.relocs, r)
		}
	}
	dirs[10] = pe.Directory{RVA: at, Size: 0x140}
}

// image parses what was forged.
func (f *forge) image(t testing.TB) *pe.Image {
	t.Helper()
	b := f.bytes()
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("forged image: %v", err)
	}
	return im
}

// rel32 is the distance from the end of an instruction.
func rel32(end, to uint32) []byte {
	return binary.LittleEndian.AppendUint32(nil, to-end)
}

func cat(parts ...any) []byte { return lay(nil, 0, parts...) }
