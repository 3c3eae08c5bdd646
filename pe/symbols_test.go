package pe

import (
	"bytes"
	stdpe "debug/pe"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// debug/pe reads the same symbols, sections and imports of all fixtures.
func TestSymbolsAsDebugPE(t *testing.T) {
	total := 0
	for name, b := range fixtures(t) {
		im := parse(t, b)
		std, err := stdpe.NewFile(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range std.Sections {
			got := im.Sections[i]
			if got.Name != s.Name || got.RVA != s.VirtualAddress || got.VirtualSize != s.VirtualSize || got.RawOffset != s.Offset || got.RawSize != s.Size {
				t.Errorf("%s: section %+v, want %+v", name, got, s.SectionHeader)
			}
		}
		symbols := must(im.Symbols())(t)
		if !slices.IsSortedFunc(symbols, func(a, b Symbol) int { return int(int64(a.RVA) - int64(b.RVA)) }) {
			t.Errorf("%s: symbols are not sorted", name)
		}
		for _, s := range std.Symbols {
			aux := false // debug/pe drops the records, COFFSymbols keeps them
			for i := range std.COFFSymbols {
				c := &std.COFFSymbols[i]
				if full, _ := c.FullName(std.StringTable); full == s.Name && c.Value == s.Value && c.SectionNumber == s.SectionNumber && c.StorageClass == s.StorageClass {
					aux = c.NumberOfAuxSymbols > 0
					break
				}
			}
			if strings.ContainsFunc(s.Name, unicode.IsControl) {
				continue // the linker's own "\x7fapp_NULL_THUNK_DATA"
			}
			if s.SectionNumber < 1 || s.StorageClass != classExternal && (s.StorageClass != classStatic || aux && s.Type == 0) {
				continue
			}
			sect := std.Sections[s.SectionNumber-1]
			if s.Value >= sect.VirtualSize {
				continue
			}
			total++
			i := slices.IndexFunc(symbols, func(y Symbol) bool { return y.Name == s.Name && y.RVA == sect.VirtualAddress+s.Value })
			if i < 0 {
				t.Errorf("%s: no symbol %q at 0x%x", name, s.Name, sect.VirtualAddress+s.Value)
				continue
			}
			y := symbols[i]
			if want := s.Type == typeFunction || sect.Characteristics&0x20000000 != 0; y.Function != want {
				t.Errorf("%s: %+v, function is %v", name, y, want)
			}
		}
		want, err := std.ImportedSymbols()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, i := range must(im.Imports())(t) {
			if !i.Delay && i.Name != "" {
				got = append(got, i.Name+":"+i.DLL)
			}
		}
		if len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Errorf("%s: imports %v, want %v", name, got, want)
		}
	}
	if total < 500 {
		t.Errorf("%d symbols compared", total)
	}
}

// withSymbols appends a COFF symbol table of the records to the sample.
func withSymbols(strings []byte, records ...[]byte) []byte {
	b := sample().bytes()
	at := len(b)
	b = put(b, 0x4c, uint32(at), uint32(len(records)))
	for _, r := range records {
		b = append(b, put(r, 17, r[17])...)
	}
	b = put(b, len(b), uint32(4+len(strings)))
	return append(b, strings...)
}

func coffSymbol(name string, value uint32, section int16, typ uint16, class, aux uint8) []byte {
	short := make([]byte, 8)
	copy(short, name)
	return put(nil, 0, short, value, section, typ, class, aux)
}

func TestSymbols(t *testing.T) {
	long := put(make([]byte, 0), 0, uint32(0), uint32(4), uint32(0x20), int16(1), uint16(0), uint8(classExternal), uint8(0))
	aux := put(nil, 0, uint32(0), uint32(0x30), make([]byte, 10))
	b := withSymbols([]byte("a_very_long_name\x00"),
		coffSymbol("sized", 0x40, 1, typeFunction, classExternal, 1), aux,
		long,
		coffSymbol(".text", 0, 1, 0, classStatic, 1), aux,
		coffSymbol("eightchr", 8, 3, 0, classStatic, 0),
		coffSymbol("first", 0x10, 1, typeFunction, classExternal, 0), // an export too
		coffSymbol("beyond", 0x300, 1, 0, classExternal, 0),
		coffSymbol("abs", 0x40, -1, 0, classExternal, 0),
		coffSymbol("file", 0x40, -2, 0, 103, 0),
		coffSymbol("nosect", 0x40, 9, 0, classExternal, 0),
		coffSymbol("e\x1bvil", 0x44, 1, 0, classExternal, 0))
	got := must(parse(t, b).Symbols())(t)
	want := []Symbol{
		{Name: "first", RVA: 0x1010, Function: true, External: true, Exported: true},
		{Name: "second", RVA: 0x1010, Function: true, External: true, Exported: true},
		{Name: "a_very_long_name", RVA: 0x1020, Function: true, External: true},
		{Name: "sized", RVA: 0x1040, Size: 0x30, Function: true, External: true},
		{Name: "data", RVA: 0x4008, External: true, Exported: true},
		{Name: "eightchr", RVA: 0x4008},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestSymbolsRefused(t *testing.T) {
	good := withSymbols(nil, coffSymbol("x", 0, 1, 0, classExternal, 0))
	for _, c := range []struct {
		off  int
		v    any
		says string
	}{
		{0x4c, uint32(len(good)), "end at"},
		{0x50, uint32(0xffffffff), "symbols, at most"},
		{0x50, uint32(100), "end at"},
		{len(good) - 4, uint32(5), "string table"},
		{len(good) - 4, uint32(0xffffffff), "string table"},
		{len(good) - 5, uint8(1), "auxiliary"},
	} {
		_, err := parse(t, put(bytes.Clone(good), c.off, c.v)).Symbols()
		wantFormat(t, err, c.says)
	}
}

func TestSectionNames(t *testing.T) {
	b := withSymbols([]byte(".debug_info\x00"), coffSymbol("x", 0, 1, 0, classExternal, 0))
	for in, want := range map[string]string{"/4": ".debug_info", "/99": "/99", "/x": "/x", "/": "/", "/0": "/0"} {
		name := make([]byte, 8)
		copy(name, in)
		if got := parse(t, put(bytes.Clone(b), forgeTable, name)).Sections[0].Name; got != want {
			t.Errorf("section %q is %q, want %q", in, got, want)
		}
	}
	if !strings.HasPrefix(parse(t, b).Sections[0].Name, ".text") {
		t.Error("a short name was changed")
	}
}
