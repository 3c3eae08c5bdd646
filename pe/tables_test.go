package pe

import (
	"bytes"
	"reflect"
	"testing"
)

// with is the sample, changed.
func with(t testing.TB, change func(f *forge)) *Image {
	t.Helper()
	f := sample()
	change(f)
	return parse(t, f.bytes())
}

func TestRelocsRefused(t *testing.T) {
	block := func(values ...any) func(f *forge) {
		return func(f *forge) {
			f.sects[4].data = put(nil, 0, values...)
			f.sects[4].size = uint32(len(f.sects[4].data))
			f.dirs[dirReloc].Size = f.sects[4].size
		}
	}
	for says, change := range map[string]func(f *forge){
		"rva 0x8000: block of 0 bytes": block(uint32(0x1000), uint32(0)),
		"rva 0x8000: block of 7 bytes": block(uint32(0x1000), uint32(7)),
		"block of 11 bytes":            block(uint32(0x1000), uint32(11), uint32(0)),
		"block of 16 bytes":            block(uint32(0x1000), uint32(16), uint32(0)),
		"rva 0x800c: 4 stray bytes":    block(uint32(0x1000), uint32(12), uint32(0), uint32(0)),
		"page 0x1008 is not aligned":   block(uint32(0x1008), uint32(8)),
		"page 0x9000":                  block(uint32(0x9000), uint32(8)),
		"rva 0x8008: type 1 is":        block(uint32(0x1000), uint32(10), uint16(0x1000)),
		"type 9 is":                    block(uint32(0x1000), uint32(10), uint16(0x9000)),
		"place 0x8ff9 outside":         block(uint32(0x8000), uint32(10), uint16(0xaff9)),
		"rva 0x1007: overlaps":         block(uint32(0x1000), uint32(12), uint16(0xa000), uint16(0xa007)),
		"rva 0x1003: overlaps":         block(uint32(0x1000), uint32(12), uint16(0x3000), uint16(0x3003)),
		"rva 0x1000: overlaps":         block(uint32(0x1000), uint32(12), uint16(0xa000), uint16(0xa000)),
		"rva 0x1004: overlaps":         block(uint32(0x1000), uint32(12), uint16(0xa004), uint16(0xa000)),
		"16777217 bytes, at most":      func(f *forge) { f.dirs[dirReloc].Size = MaxDirectory + 1 },
		"end outside the image":        func(f *forge) { f.dirs[dirReloc].Size = 0x1001 },
	} {
		list, err := with(t, change).Relocs()
		if err == nil {
			t.Errorf("%s: accepted, %v", says, list)
			continue
		}
		wantFormat(t, err, says)
	}
	im := with(t, block(uint32(0x1000), uint32(14), uint16(0xa000), uint16(0xa008), uint16(0x3010), uint32(0x8000), uint32(10), uint16(0xaff8)))
	want := []Reloc{{0x1000, 10}, {0x1008, 10}, {0x1010, 3}, {0x8ff8, 10}}
	if got := must(im.Relocs())(t); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestExportsRefused(t *testing.T) {
	at := func(off int, values ...any) func(f *forge) {
		return func(f *forge) { f.sects[1].data = put(f.sects[1].data, off, values...) }
	}
	for says, change := range map[string]func(f *forge){
		"65537 functions":                at(20, uint32(65537)),
		"65537 names":                    at(24, uint32(65537)),
		"ordinal base":                   at(16, uint32(0xfffffffd)),
		"index 4 of 4":                   at(0x44, uint16(4)),
		"rva 0x9000 outside":             at(0x28, uint32(0x9000)),
		"not DLL.Name":                   at(0xb0, "other_thing"),
		"\"other.\" is not":              at(0xb0, "other."),
		"rva 0x20a1: name holds byte 0x": at(0xa1, uint8(0x1b)),
		"empty name":                     at(0x9d, uint8(0)),
		"longer than 4096": func(f *forge) {
			at(0x38, uint32(0x4400))(f)
			f.sects[2].data = put(f.sects[2].data, 0x400, bytes.Repeat([]byte("x"), 0x1400))
		},
		"outside headers and sections": at(0x38, uint32(0x3200)),
	} {
		list, err := with(t, change).Exports()
		if err == nil {
			t.Errorf("%s: accepted, %+v", says, list)
			continue
		}
		wantFormat(t, err, says)
	}
}

func TestImportsRefused(t *testing.T) {
	at := func(off int, values ...any) func(f *forge) {
		return func(f *forge) { f.sects[1].data = put(f.sects[1].data, off, values...) }
	}
	for says, change := range map[string]func(f *forge){
		"ordinal 0x8000000000010000": at(0x200, uint64(1<<63|1<<16)),
		"name at 0x9000 outside":     at(0x200, uint64(0x9000)),
		"slot outside the image":     at(0x110, uint32(0x8ff9)),
		"instead of RVAs":            at(0x180, uint32(0)),
		"holds byte 0x07":            at(0x281, uint8(7)),
		"rva 0x3500: outside":        at(0x10c, uint32(0x3500)),
		"more than 4096 descriptors": func(f *forge) {
			f.dirs[dirImport].RVA = 0x9000
			one := put(nil, 0, uint32(0x2228), uint32(0), uint32(0), uint32(0x2280), uint32(0x4100)) // no symbols
			var all []byte
			for range MaxImportDLLs + 2 {
				all = append(all, one...)
			}
			f.sects = append(f.sects, forged{".idata", 0x9000, uint32(len(all)), ro, all})
		},
		"more than 65536 imports": func(f *forge) {
			f.dirs[dirImport].RVA = 0x2100
			var all []byte
			for range MaxImports + 1 {
				all = put(all, len(all), uint64(1<<63|1))
			}
			f.sects = append(f.sects, forged{".idata", 0x9000, uint32(len(all)) + 8, ro, all})
			at(0x100, uint32(0x9000))(f)
		},
	} {
		list, err := with(t, change).Imports()
		if err == nil {
			t.Errorf("%s: accepted, %d", says, len(list))
			continue
		}
		wantFormat(t, err, says)
	}
}

func TestLoadConfigRefused(t *testing.T) {
	at := func(off int, values ...any) func(f *forge) {
		return func(f *forge) { f.sects[1].data = put(f.sects[1].data, off, values...) }
	}
	for says, change := range map[string]func(f *forge){
		"size 3,":                      at(0x400, uint32(3)),
		"size 4097,":                   at(0x400, uint32(4097)),
		"address 0x180009000 outside":  at(0x480, uint64(0x180009000)),
		"address 0x17fffffff outside":  at(0x480, uint64(0x17fffffff)),
		"2097153 entries":              at(0x488, uint64(MaxGuardFunctions+1)),
		"18446744073709551615 entries": at(0x488, uint64(1<<64-1)),
		"1000 entries end outside":     at(0x488, uint64(1000)),
		"2 entries end outside": func(f *forge) { // though the file has bytes there
			f.sects[1].size = 0x56b
			f.dirs[dirDelayImport], f.dirs[dirDebug] = Directory{}, Directory{}
		},
		"CFG function table, rva 0x2560: ":  at(0x560, uint32(0x9000)),
		"EH continuation table, rva 0x2570": at(0x570, uint32(0xffffffff)),
	} {
		lc, err := with(t, change).LoadConfig()
		if err == nil {
			t.Errorf("%s: accepted, %+v", says, lc)
			continue
		}
		wantFormat(t, err, says)
	}
}

func TestDebugRefused(t *testing.T) {
	at := func(off int, values ...any) func(f *forge) {
		return func(f *forge) { f.sects[1].data = put(f.sects[1].data, off, values...) }
	}
	for says, change := range map[string]func(f *forge){
		"129 entries":         func(f *forge) { f.dirs[dirDebug].Size = 129 * 28 },
		"23 bytes, want":      at(0x31c+16, uint32(23)),
		"3 bytes, want 4":     at(0x338+16, uint32(3)),
		"rva 0x3200":          at(0x31c+20, uint32(0x3200)),
		"extended":            at(0x338+16, uint32(0)),
		"outside the image":   func(f *forge) { f.dirs[dirDebug].RVA = 0x8ff0 },
		"rva 0x3180: outside": func(f *forge) { f.dirs[dirDebug].RVA = 0x3180 },
	} {
		im := with(t, change)
		_, err := im.RSDS()
		if err == nil {
			_, err = im.ExDLLCharacteristics()
		}
		if err == nil {
			t.Errorf("%s: accepted", says)
			continue
		}
		wantFormat(t, err, says)
	}
	// A path is a label: as far as it can be shown.
	im := with(t, func(f *forge) {
		at(0x31c+16, uint32(0x40))(f)
		at(0x378, []byte("a\x1b[31mb\x7fc"), uint32(0))(f)
	})
	if r := must(im.RSDS())(t); r.Path != "a?[31mb?c" {
		t.Errorf("path %q", r.Path)
	}
	// One that is not RSDS, or lies outside the image, is passed over.
	im = with(t, at(0x360, []byte("NB10")))
	if r, err := im.RSDS(); r != nil || err != nil {
		t.Errorf("NB10: %v, %v", r, err)
	}
}

func TestUnwindRefused(t *testing.T) {
	at := func(off int, values ...any) func(f *forge) {
		return func(f *forge) { f.sects[3].data = put(f.sects[3].data, off, values...) }
	}
	for says, change := range map[string]func(f *forge){
		"spans 0x1010 to 0x1010":         at(4, uint32(0x1010)),
		"spans 0x1010 to 0x9001":         at(4, uint32(0x9001)),
		"version 3":                      at(0x100, uint8(3)),
		"version 0":                      at(0x120, uint8(0x20)),
		"rva 0x7108: handler":            at(0x108, uint32(0x9000)),
		"chained to 0x9000":              at(0x124, uint32(0x9000)),
		"chain longer than":              at(0x12c, uint32(0x7120)),
		"unwind information, rva 0x3500": at(8, uint32(0x3500)),
		"at most 1048576 records": func(f *forge) {
			f.dirs[dirException] = Directory{0x9000, 8*MaxUnwindRecords + 8}
			f.sects = append(f.sects, forged{".p", 0x9000, 8*MaxUnwindRecords + 8, ro, nil})
		},
		"more chained records than functions": func(f *forge) {
			var all []byte
			for i := range uint32(2000) {
				all = put(all, len(all), 0x1000+i, 0x1001+i, uint32(0x20000)) // each as long as may be
			}
			all = put(all, 0x17000, make([]byte, 0))
			for i := range uint32(30) {
				all = put(all, int(0x17000+16*i), []byte{1 | 4<<3, 0, 0, 0}, uint32(0x1000), uint32(0x1001), 0x20010+16*i)
			}
			all = put(all, 0x17000+16*30, []byte{1, 0, 0, 0})
			f.sects = append(f.sects, forged{".p", 0x9000, uint32(len(all)), ro, all})
			f.dirs[dirException] = Directory{0x9000, 12 * 2000}
		},
	} {
		list, err := with(t, change).UnwindSpans()
		if err == nil {
			t.Errorf("%s: accepted, %+v", says, list)
			continue
		}
		wantFormat(t, err, says)
	}
}

// ARM64 records by hand: the format's text is the source, for no compiler here
// makes all of them.
func TestUnwindARM64(t *testing.T) {
	arm := func(records []any, xdata ...any) *Image {
		return with(t, func(f *forge) {
			f.machine = MachineARM64
			f.sects[3].data = put(nil, 0, records...)
			f.dirs[dirException].Size = uint32(len(f.sects[3].data))
			f.sects[3].data = put(f.sects[3].data, 0x100, xdata...)
			f.sects[3].size = uint32(len(f.sects[3].data))
		})
	}
	const x, e = 1 << 20, 1 << 21
	records := []any{
		uint32(0x1000), uint32(1 | 5<<2), // packed, 20 bytes
		uint32(0x1014), uint32(2 | 3<<2), // fragment right behind it
		uint32(0x1020), uint32(2 | 1<<2), // and another
		uint32(0x1030), uint32(2 | 1<<2), // fragment of something unknown
		uint32(0x1040), uint32(0x7100), // no handler
		uint32(0x1060), uint32(0x7110), // handler, one epilog in the header, two code words
		uint32(0x1080), uint32(0x7130), // handler, two epilog scopes, one code word
		uint32(0x10a0), uint32(0x7150), // handler, extended header
		uint32(0x10c0), uint32(0x7100 + 60), // header in the last word of its section
		uint32(0), uint32(0),
	}
	head := put(nil, 0, uint32(4|1<<27|e), uint32(0xe4e4e4e4))
	head = put(head, 0x10, uint32(3|2<<27|x|e|7<<22), uint32(0), uint32(0), uint32(0x1200))
	head = put(head, 0x30, uint32(2|1<<27|x|2<<22), uint32(0), uint32(0), uint32(0), uint32(0x1204))
	head = put(head, 0x50, uint32(2|x), uint32(1|2<<16), uint32(0), uint32(0), uint32(0), uint32(0x1208))
	im := arm(records, head)
	s := &im.Sections[3]
	s.VirtualSize = 0x168 + 4
	if err := im.ReadRVA(make([]byte, 4), 0x7168); err != nil {
		t.Fatal(err)
	}
	records[17] = uint32(0x7168)
	im = arm(records, put(head, 0x68, uint32(2)))
	want := []UnwindSpan{
		{Span{0x1000, 0x1014}, 0x1000, 0}, {Span{0x1014, 0x1020}, 0x1000, 0}, {Span{0x1020, 0x1024}, 0x1000, 0},
		{Span{0x1030, 0x1034}, 0x1030, 0}, {Span{0x1040, 0x1050}, 0x1040, 0}, {Span{0x1060, 0x106c}, 0x1060, 0x1200},
		{Span{0x1080, 0x1088}, 0x1080, 0x1204}, {Span{0x10a0, 0x10a8}, 0x10a0, 0x1208}, {Span{0x10c0, 0x10c8}, 0x10c0, 0},
	}
	if got := must(im.UnwindSpans())(t); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for says, im := range map[string]*Image{
		"reserved kind 3":         arm([]any{uint32(0x1000), uint32(3 | 5<<2)}),
		"spans 0x1000 to 0x1000":  arm([]any{uint32(0x1000), uint32(1)}),
		"version 1":               arm([]any{uint32(0x1000), uint32(0x7100)}, uint32(1|1<<18), uint32(0)),
		"handler 0x9000 outside":  arm([]any{uint32(0x1000), uint32(0x7100)}, uint32(1|x|e|1<<27), uint32(0), uint32(0x9000)),
		"rva 0x7108: outside":     arm([]any{uint32(0x1000), uint32(0x7100)}, uint32(1|x|e|1<<27), uint32(0)),
		"rva 0x3500: outside":     arm([]any{uint32(0x1000), uint32(0x3500)}),
		"spans 0xfffff000 to 0x0": arm([]any{uint32(0xfffff000), uint32(1 | 0x400<<2)}),
	} {
		list, err := im.UnwindSpans()
		if err == nil {
			t.Errorf("%s: accepted, %+v", says, list)
			continue
		}
		wantFormat(t, err, says)
	}
}
