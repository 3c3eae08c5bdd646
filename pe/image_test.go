package pe

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"testing"
)

func TestSample(t *testing.T) {
	b := sample().bytes()
	im := parse(t, b)
	check := func(what string, got, want any) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
		}
	}
	check("headers", []any{im.Machine, im.TimeDateStamp, im.CheckSum, im.SizeOfImage, im.SizeOfHeaders, im.ImageBase, im.Base, im.Characteristics, im.DLLCharacteristics, im.Subsystem},
		[]any{uint16(0x8664), uint32(0x5eed), uint32(0xc5), uint32(0x9000), uint32(0x400), uint64(0x180000000), uint64(0x180000000), uint16(0x2022), uint16(0x160), uint16(3)})
	check("section", im.Sections[2], Section{".data", 0x4000, 0x2400, 0xe00, 0x1200, rw})
	check("exports", must(im.Exports())(t), []Export{
		{"first", 5, 0x1010, ""}, {"second", 5, 0x1010, ""}, {"", 7, 0, "other.thing"}, {"data", 8, 0x4008, ""}})
	check("name", must(im.ExportName())(t), "own.dll")
	check("imports", must(im.Imports())(t), []Import{
		{DLL: "a.dll", Name: "alpha", Hint: 9, Slot: 0x4100}, {DLL: "a.dll", Ordinal: 77, Slot: 0x4108},
		{DLL: "B.DLL", Name: "beta", Slot: 0x4120}, {DLL: "d.dll", Name: "delta", Hint: 3, Slot: 0x4140, Delay: true}})
	check("relocations", must(im.Relocs())(t), []Reloc{{0x1102, 10}, {0x1200, 3}, {0x2480, 10}, {0x2508, 10}, {0x4010, 10}, {0x4ffc, 10}})
	check("rsds", must(im.RSDS())(t).String(), "00112233-4455-6677-8899-aabbccddeeff/12")
	check("pdb", must(im.RSDS())(t).Path, "x.pdb")
	check("extended", must(im.ExDLLCharacteristics())(t), uint32(ExHotpatchCompatible|ExCETCompat))
	lc := must(im.LoadConfig())(t)
	check("load configuration", *lc, LoadConfig{RVA: 0x2400, Size: 0x140, GuardFlags: 0x20c00500,
		GuardFunctions: []GuardFunction{{0x1010, 0}, {0x1100, 8}}, GuardEHCont: []uint32{0x1108}})
	check("guards", []bool{lc.CFG(), lc.XFG(), lc.EHCont(), lc.Hybrid(), lc.GuardFunctions[1].XFG()}, []bool{true, true, true, false, true})
	check("unwind", must(im.UnwindSpans())(t), []UnwindSpan{
		{Span{0x1010, 0x1020}, 0x1010, 0x1200}, {Span{0x1020, 0x1030}, 0x1010, 0x1200},
		{Span{0x1030, 0x1040}, 0x1010, 0x1200}, {Span{0x1100, 0x1110}, 0x1010, 0x1200}})
	check("symbols", must(im.Symbols())(t), []Symbol{
		{Name: "first", RVA: 0x1010, Exported: true, External: true, Function: true},
		{Name: "second", RVA: 0x1010, Exported: true, External: true, Function: true},
		{Name: "data", RVA: 0x4008, Exported: true, External: true}})
	if h, err := im.HotPatch(); h != nil || err != nil {
		t.Errorf("hot patch table %v, %v", h, err)
	}
}

// Memory has lost the names of an import without lookup table; a file has not.
func TestImportWithoutLookupTable(t *testing.T) {
	f := sample()
	f.sects[1].data = put(f.sects[1].data, 0x100+20, uint32(0))
	f.sects[2].data = put(f.sects[2].data, 0x120, uint64(0x22b0), uint64(0))
	b := f.bytes()
	if list := must(parse(t, b).Imports())(t); list[2].Name != "beta" {
		t.Errorf("imports %+v", list)
	}
	m := mapped(t, b, 0x7ff000000000)
	_, err := m.Imports()
	wantFormat(t, err, "lookup table")
}

// A short load configuration has zeros for what it does not cover.
func TestShortLoadConfig(t *testing.T) {
	for _, c := range []struct {
		size          uint32
		flags         uint32
		functions, eh int
	}{{0x140, 0x20c00500, 2, 1}, {0x118, 0x20c00500, 2, 1}, {0x117, 0x20c00500, 2, 0}, {0x94, 0x20c00500, 2, 0}, {0x93, 0, 2, 0}, {0x8f, 0, 0, 0}, {4, 0, 0, 0}} {
		f := sample()
		f.sects[1].data = put(f.sects[1].data, 0x400, c.size)
		if c.flags == 0 && c.functions > 0 { // then a table has entries of four bytes
			f.sects[1].data = put(f.sects[1].data, 0x560, uint32(0x1010), uint32(0x1100))
		}
		lc := must(parse(t, f.bytes()).LoadConfig())(t)
		if lc.GuardFlags != c.flags || len(lc.GuardFunctions) != c.functions || len(lc.GuardEHCont) != c.eh {
			t.Errorf("size 0x%x: %+v", c.size, lc)
		}
	}
}

func TestReadRVA(t *testing.T) {
	b := sample().bytes()
	im := parse(t, b)
	p := make([]byte, 0x420)
	if err := im.ReadRVA(p, 0x2f00); err != nil {
		// .rdata ends at 0x3100; the gap to 0x4000 belongs to nothing
		wantFormat(t, err, "outside headers and sections")
	} else {
		t.Error("read a gap")
	}
	p = bytes.Repeat([]byte{0xee}, 0x300)
	if err := im.ReadRVA(p, 0x5000); err != nil {
		t.Fatal(err)
	}
	// Raw data of .data ends at 0x5200: zeros from there on.
	if !bytes.Equal(p, append(append([]byte(nil), b[0xe00+0x1000:0xe00+0x1200]...), make([]byte, 0x100)...)) {
		t.Error("file and zeros do not follow each other")
	}
	for _, rva := range []uint32{0x6400, 0x63ff, 0xffffffff, 0x9000, 0x400} {
		if err := im.ReadRVA(make([]byte, 2), rva); err == nil {
			t.Errorf("read 2 bytes at 0x%x", rva)
		}
	}
	if err := im.ReadRVA(nil, 0xffffffff); err != nil {
		t.Errorf("reading nothing: %v", err)
	}
}

// A structure may begin in one section and end in the next; VirtualSize 0 means RawSize.
func TestAdjacentSections(t *testing.T) {
	f := sample()
	f.sects = []forged{
		{".a", 0x1000, 0, ro, make([]byte, 0x1000)},
		{".b", 0x2000, 0x1000, code, []byte("own.dll\x00\x00\x00second half")}}
	f.dirs = [16]Directory{}
	f.dirs[dirExport] = Directory{0x1ff0, 40}
	put(f.sects[0].data, 0xffc, uint32(0x200a)) // the name
	b := f.bytes()
	im := parse(t, b)
	if n := im.Sections[0].Extent(); n != 0x1000 {
		t.Errorf("extent 0x%x", n)
	}
	for _, im := range []*Image{im, mapped(t, b, 0x10000)} {
		if got := must(im.ExportName())(t); got != "second half" {
			t.Errorf("name %q", got)
		}
	}
	// A gap between them is no part of anything.
	f.sects[0].size = 0xff8
	_, err := parse(t, f.bytes()).ExportName()
	wantFormat(t, err, "outside headers and sections")
}

func TestParseRefuses(t *testing.T) {
	base := sample().bytes()
	const o, s = forgeOptional, forgeTable
	for _, c := range []struct {
		what string
		off  int
		v    any
		says string
	}{
		{"no MZ", 0, uint8('X'), "MZ"},
		{"PE offset unaligned", 0x3c, uint32(0x41), "e_lfanew"},
		{"PE offset zero", 0x3c, uint32(0), "e_lfanew"},
		{"PE offset huge", 0x3c, uint32(0xfffffff0), "e_lfanew"},
		{"PE offset at the end", 0x3c, uint32(len(base) - 4), "bytes needed"},
		{"no PE", 0x40, uint8('X'), "PE signature"},
		{"i386 PE32+", 0x44, uint16(0x14c), "machine 0x14c"},
		{"too many sections", 0x46, uint16(97), "sections"},
		{"sections beyond headers", 0x46, uint16(20), "section table"},
		{"short optional header", 0x54, uint16(111), "optional header"},
		{"ROM image", o, uint16(0x107), "magic"},
		{"entry outside", o + 16, uint32(0x9000), "entry point"},
		{"base unaligned", o + 24, uint64(0x180000800), "base"},
		{"base wraps", o + 24, uint64(0xfffffffffffff000), "base"},
		{"section alignment 0", o + 32, uint32(0), "section alignment"},
		{"section alignment small", o + 32, uint32(0x200), "section alignment"},
		{"section alignment odd", o + 32, uint32(0x1800), "section alignment"},
		{"file alignment 0", o + 36, uint32(0), "file alignment"},
		{"file alignment large", o + 36, uint32(0x2000), "file alignment"},
		{"image 0", o + 56, uint32(0), "size of image"},
		{"image huge", o + 56, uint32(0x7fff0001), "size of image"},
		{"image small", o + 56, uint32(0x8000), "ends at"},
		{"headers larger than image", o + 60, uint32(0xa000), "size of headers"},
		{"headers larger than file", o + 60, uint32(0x8000), "size of headers"},
		{"headers over section", o + 60, uint32(0x1400), "overlaps"},
		{"headers small", o + 60, uint32(0x100), "section table"},
		{"directories beyond header", 0x54, uint16(112 + 8*15), "data directories"},
		{"section overlaps headers", s + 12, uint32(0), "overlaps"},
		{"section unaligned", s + 12, uint32(0x1001), "section alignment"},
		{"section overlaps next", s + 8, uint32(0x1001), "overlaps"},
		{"section wraps", s + 160 + 8, uint32(0xffffffff), "ends at"},
		{"raw data unaligned", s + 20, uint32(0x401), "512"},
		{"raw data beyond file", s + 20, uint32(len(base)), "raw data ends"},
		{"raw size huge", s + 16, uint32(0xffffffff), "raw data ends"},
	} {
		b := put(bytes.Clone(base), c.off, c.v)
		_, err := Parse(bytes.NewReader(b), int64(len(b)))
		if err == nil {
			t.Errorf("%s: accepted", c.what)
			continue
		}
		wantFormat(t, err, c.says)
	}
}

func TestSentinels(t *testing.T) {
	b := put(sample().bytes(), forgeOptional, uint16(0x10b))
	b = put(b, 0x44, uint16(0x14c))
	_, err := Parse(bytes.NewReader(b), int64(len(b)))
	if !errors.Is(err, ErrNot64) || errors.Is(err, ErrNotPE) {
		t.Errorf("32-bit image: %v", err)
	}
	wantFormat(t, err, "32-bit")
	for _, b := range [][]byte{nil, []byte("MZ"), bytes.Repeat([]byte("\x7fELF"), 100)} {
		if _, err := Parse(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrNotPE) {
			t.Errorf("%d bytes: %v", len(b), err)
		}
	}
	if _, err := ParseMapped(bytes.NewReader(make([]byte, 4096)), 0x1000); !errors.Is(err, ErrNotPE) {
		t.Errorf("zeros: %v", err)
	}
}

// flaky fails every read that touches at or later.
type flaky struct {
	io.ReaderAt
	at  int64
	err error
}

func (f flaky) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.at {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(p, off)
}

// What fails to be read is the reader's error, never a format error; what lies
// before it is still read.
func TestReaderErrors(t *testing.T) {
	b := sample().bytes()
	gone := errors.New("process is gone")
	var format *FormatError
	needed := int64(len(b)) - 0x200 + int64(len(sample().sects[4].data)) // the rest is padding
	for at := int64(0); at < needed; at += 8 {
		im, err := Parse(flaky{bytes.NewReader(b), at, gone}, int64(len(b)))
		if err == nil {
			err = everything(im)
		}
		if !errors.Is(err, gone) || errors.As(err, &format) {
			t.Fatalf("reads fail from 0x%x: %v", at, err)
		}
	}
	p := must(parse(t, b).Place(0x10000))(t)
	for at := int64(0); at < 0x8000; at += 0x100 {
		im, err := ParseMapped(flaky{bytes.NewReader(p.Bytes), at, gone}, p.Base)
		if err == nil {
			err = everything(im)
		}
		if !errors.Is(err, gone) || errors.As(err, &format) {
			t.Fatalf("memory ends at 0x%x: %v", at, err)
		}
	}
	// A page that cannot be read behind what is asked for does no harm.
	im, err := Parse(flaky{bytes.NewReader(b), 0x600 + 0x200 + 0x240 + 24, gone}, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.ExportName(); err != nil {
		t.Error(err)
	}
}

// everything calls all readers of an image, and Place, and gives the first error.
func everything(im *Image) error {
	first := readers(im)
	p, err := im.Place(0x7fff0000)
	if p != nil && first == nil {
		first = p.Put64(uint32(len(p.Bytes)-8), 1)
	}
	if first == nil {
		first = err
	}
	return first
}

func readers(im *Image) error {
	var first error
	note := func(err error) {
		if first == nil {
			first = err
		}
	}
	_, err := im.Exports()
	note(err)
	_, err = im.ExportName()
	note(err)
	_, err = im.Imports()
	note(err)
	_, err = im.Relocs()
	note(err)
	_, err = im.LoadConfig()
	note(err)
	h, err := im.HotPatch()
	note(err)
	if h != nil {
		for _, b := range h.Bases {
			for _, r := range b.Records {
				if r.Type == HotPatchFunction && !r.Inverse {
					_, err := h.Function(r)
					note(err)
				}
			}
		}
	}
	_, err = im.RSDS()
	note(err)
	_, err = im.ExDLLCharacteristics()
	note(err)
	_, err = im.UnwindSpans()
	note(err)
	_, err = im.Symbols()
	note(err)
	_, err = im.Identity()
	note(err)
	return first
}
