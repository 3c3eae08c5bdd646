package pe

import (
	"bytes"
	"cmp"
	"slices"
	"strconv"
)

// Storage classes and types of COFF symbols that matter here.
const (
	classExternal     = 2
	classStatic       = 3
	classWeakExternal = 105
	typeFunction      = 0x20
	symbolSize        = 18
)

// stringTable is the COFF string table of a file, at the end of the symbols.
type stringTable []byte

// at gives the name at off, "" if there is none of 1 to MaxNameLength printable bytes.
func (t stringTable) at(off uint32) string {
	if off < 4 || uint64(off) >= uint64(len(t)) {
		return ""
	}
	s, _, ok := bytes.Cut(t[off:min(uint64(len(t)), uint64(off)+MaxNameLength+1)], []byte{0})
	if !ok {
		return ""
	}
	return printable(s)
}

func printable(s []byte) string {
	for _, c := range s {
		if c < 0x20 || c == 0x7f {
			return ""
		}
	}
	return string(s)
}

// symbolTable finds where the COFF symbols and strings of a file lie; count is
// 0 if it has none or is mapped (loaders do not map them).
func (im *Image) symbolTable() (at int64, count uint32, err error) {
	if im.Mapped || im.symbols == 0 || im.nsymbols == 0 {
		return 0, 0, nil
	}
	if im.nsymbols > MaxSymbols {
		return 0, 0, badFile("COFF symbols", int64(im.symbols), "%d symbols, at most %d", im.nsymbols, MaxSymbols)
	}
	if end := int64(im.symbols) + symbolSize*int64(im.nsymbols); end > im.size {
		return 0, 0, badFile("COFF symbols", int64(im.symbols), "end at 0x%x, the file has 0x%x bytes", end, im.size)
	}
	return int64(im.symbols), im.nsymbols, nil
}

func (im *Image) stringTable() (stringTable, error) {
	at, count, err := im.symbolTable()
	if err != nil || count == 0 {
		return nil, err
	}
	at += symbolSize * int64(count)
	if at+4 > im.size {
		return nil, nil // no strings: all names are short
	}
	var n [4]byte
	if err := im.readAt(n[:], at, "COFF string table"); err != nil {
		return nil, err
	}
	size := le.Uint32(n[:])
	if size > MaxStringTable || at+int64(size) > im.size {
		return nil, badFile("COFF string table", at, "%d bytes, the file has 0x%x", size, im.size)
	}
	t := make(stringTable, size)
	return t, im.readAt(t, at, "COFF string table")
}

// resolveNames replaces section names "/123" by the name in the string table.
// A section's name is a label: one that cannot be resolved stays as it is.
func (im *Image) resolveNames() {
	long := slices.ContainsFunc(im.Sections, func(s Section) bool { return len(s.Name) > 1 && s.Name[0] == '/' })
	if !long {
		return
	}
	t, err := im.stringTable()
	if err != nil {
		return
	}
	for i := range im.Sections {
		s := &im.Sections[i]
		if len(s.Name) < 2 || s.Name[0] != '/' {
			continue
		}
		if off, err := strconv.ParseUint(s.Name[1:], 10, 32); err == nil {
			if name := t.at(uint32(off)); name != "" {
				s.Name = name
			}
		}
	}
}

// Symbols are the COFF symbols of a file that have an address, and the exports,
// by RVA and name. Sizes come from auxiliary function records where there are
// any. Names with control bytes (the linker's own "\x7fapp_NULL_THUNK_DATA") are
// left out. Of a mapped image only the exports are known.
func (im *Image) Symbols() ([]Symbol, error) {
	list, err := im.coffSymbols()
	if err != nil {
		return nil, err
	}
	exports, err := im.Exports()
	if err != nil {
		return nil, err
	}
	for _, e := range exports {
		if e.Name != "" && e.Forward == "" {
			s := im.SectionAt(e.RVA)
			list = append(list, Symbol{Name: e.Name, RVA: e.RVA, Exported: true, External: true, Function: s != nil && s.Exec()})
		}
	}
	slices.SortStableFunc(list, func(a, b Symbol) int {
		return cmp.Or(cmp.Compare(a.RVA, b.RVA), cmp.Compare(a.Name, b.Name))
	})
	// The same symbol out of both tables is one.
	out := list[:0]
	for _, s := range list {
		if n := len(out); n > 0 && out[n-1].RVA == s.RVA && out[n-1].Name == s.Name {
			o := &out[n-1]
			o.Size = max(o.Size, s.Size)
			o.Function = o.Function || s.Function
			o.Exported = o.Exported || s.Exported
			o.External = o.External || s.External
			continue
		}
		out = append(out, s)
	}
	return out, nil
}

func (im *Image) coffSymbols() ([]Symbol, error) {
	at, count, err := im.symbolTable()
	if err != nil || count == 0 {
		return nil, err
	}
	strings, err := im.stringTable()
	if err != nil {
		return nil, err
	}
	var list []Symbol
	budget := nameFactor*(len(strings)+symbolSize*int(count)) + nameSlack // names may share bytes
	const batch = 512
	buf := make([]byte, 0, batch*symbolSize)
	first := uint32(0) // index of the symbol at buf[0]
	record := func(i uint32) ([]byte, error) {
		if n := uint32(len(buf) / symbolSize); i < first || i >= first+n {
			first = i
			buf = buf[:min(count-i, batch)*symbolSize]
			if err := im.readAt(buf, at+int64(i)*symbolSize, "COFF symbols"); err != nil {
				return nil, err
			}
		}
		o := (i - first) * symbolSize
		return buf[o : o+symbolSize], nil
	}
	for i := uint32(0); i < count; {
		r, err := record(i)
		if err != nil {
			return nil, err
		}
		value, sect := le.Uint32(r[8:]), int16(le.Uint16(r[12:]))
		typ, class, aux := le.Uint16(r[14:]), r[16], uint32(r[17])
		var name string
		if le.Uint32(r) == 0 {
			name = strings.at(le.Uint32(r[4:]))
		} else {
			name = printable(bytes.TrimRight(r[:8], "\x00"))
		}
		if aux > count-i-1 {
			return nil, badFile("COFF symbols", at+int64(i)*symbolSize, "%d auxiliary records, %d records are left", aux, count-i-1)
		}
		known := class == classExternal || class == classStatic || class == classWeakExternal
		if known && name != "" && sect > 0 && int(sect) <= len(im.Sections) {
			s := im.Sections[sect-1]
			isSection := class == classStatic && aux > 0 && typ == 0 // with a section definition behind it
			if value < s.Extent() && !isSection {
				y := Symbol{Name: name, RVA: s.RVA + value, External: class != classStatic, Function: typ == typeFunction || s.Exec()}
				if typ == typeFunction && aux > 0 {
					a, err := record(i + 1)
					if err != nil {
						return nil, err
					}
					if size := le.Uint32(a[4:]); size <= s.Extent()-value {
						y.Size = size
					}
				}
				if budget -= len(name); budget < 0 {
					return nil, badFile("COFF symbols", at, "names of many times the string table's %d bytes", len(strings))
				}
				list = append(list, y)
			}
		}
		i += 1 + aux
	}
	return list, nil
}
