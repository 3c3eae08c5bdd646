package build

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"hotpatchd/pe"
)

const (
	machineAMD64 = 0x8664
	machineARM64 = 0xAA64

	directoryDebug = 6  // IMAGE_DIRECTORY_ENTRY_DEBUG
	directoryTLS   = 9  // IMAGE_DIRECTORY_ENTRY_TLS
	directoryCLR   = 14 // IMAGE_DIRECTORY_ENTRY_COM_DESCRIPTOR

	fileIsDLL = 0x2000 // IMAGE_FILE_DLL
)

// SymbolFile is an unstripped twin of the base: the same sections, byte for
// byte, and a COFF symbol table.
type SymbolFile struct {
	Name string // for messages
	Data []byte
}

// file is one image with all that the builder asks of it read once.
type file struct {
	*pe.Image
	role    string // "base" or "fix"
	imports []pe.Import
	exports []pe.Export
	spans   []pe.UnwindSpan // sorted by Begin
	relocs  []pe.Reloc
	coff    bool                   // has a COFF symbol table, its own or a twin's
	byName  map[string][]pe.Symbol // distinct RVAs
	names   []string               // keys of byName in order: a map's order must never reach the output
	bounds  []uint32               // where functions may begin, sorted
	shared  map[string]bool        // names of imports
	lands   *landings              // of the base, found when first asked for
}

// load reads an image of either role.
func load(role string, data []byte, twins []SymbolFile) (*file, error) {
	im, err := pe.Parse(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return nil, damaged(role, err)
	}
	f := &file{Image: im, role: role, byName: map[string][]pe.Symbol{}}
	if f.imports, err = im.Imports(); err != nil {
		return nil, damaged(role, err)
	}
	if f.exports, err = im.Exports(); err != nil {
		return nil, damaged(role, err)
	}
	if f.spans, err = im.UnwindSpans(); err != nil {
		return nil, damaged(role, err)
	}
	slices.SortFunc(f.spans, func(a, b pe.UnwindSpan) int { return int(a.Begin) - int(b.Begin) })
	if f.relocs, err = im.Relocs(); err != nil {
		return nil, damaged(role, err)
	}
	lc, err := im.LoadConfig()
	if err != nil {
		return nil, damaged(role, err)
	}
	if lc != nil && lc.CHPEMetadata != 0 {
		return nil, refuse(CodeHybrid, role, "", lc.RVA, "the %s is a hybrid image (CHPE metadata): only one of its two sets of code would be patched", role)
	}
	if im.Directories[directoryCLR].RVA != 0 {
		return nil, refuse(CodeManaged, role, "", im.Directories[directoryCLR].RVA, "the %s is a managed image: its code is compiled at run time", role)
	}
	own, err := im.Symbols()
	if err != nil {
		return nil, damaged(role, err)
	}
	f.add(own)
	for _, t := range twins {
		list, err := f.twin(t)
		if err != nil {
			return nil, err
		}
		f.add(list)
	}
	f.names = slices.Sorted(maps.Keys(f.byName))
	f.shared = map[string]bool{}
	for _, i := range f.imports {
		f.shared[i.Name] = true
	}
	f.findBounds()
	return f, nil
}

// programDatabases begin so: MSF containers (LLVM, "The MSF File Format") and
// portable ones (ECMA-335 II.24.2.1).
var programDatabases = []string{"Microsoft C/C++ MSF 7.00\r\n\x1aDS", "Microsoft C/C++ program database", "BSJB"}

// twin reads the symbols of an unstripped copy after comparing every section.
func (f *file) twin(t SymbolFile) ([]pe.Symbol, error) {
	for _, magic := range programDatabases {
		if bytes.HasPrefix(t.Data, []byte(magic)) {
			return nil, refuse(CodeSymbolFile, t.Name, "", 0, "%s is a program database (PDB), which is not read: give an image with COFF symbols (link the base with lld-link /debug:symtab or GNU ld, and keep a copy from before strip)", t.Name)
		}
	}
	im, err := pe.Parse(bytes.NewReader(t.Data), int64(len(t.Data)))
	if err != nil {
		return nil, damaged(t.Name, err)
	}
	if im.Machine != f.Machine {
		return nil, refuse(CodeSymbolFile, t.Name, "", 0, "%s is for machine %#x, the base for %#x", t.Name, im.Machine, f.Machine)
	}
	for _, s := range f.Sections {
		i := slices.IndexFunc(im.Sections, func(o pe.Section) bool { return o.RVA == s.RVA })
		if i < 0 || im.Sections[i].Extent() < s.Extent() {
			return nil, refuse(CodeSymbolFile, t.Name, "", s.RVA, "%s has no section like %s of the base: it is of another build", t.Name, s.Name)
		}
		ours, theirs := make([]byte, s.Extent()), make([]byte, s.Extent())
		if err := f.Canonical(ours, s.RVA); err != nil {
			return nil, damaged(f.role, err)
		}
		if err := im.Canonical(theirs, s.RVA); err != nil {
			return nil, damaged(t.Name, err)
		}
		f.maskRawPointers(ours, s.RVA)
		f.maskRawPointers(theirs, s.RVA)
		if at := firstDifference(ours, theirs); at >= 0 {
			return nil, refuse(CodeSymbolFile, t.Name, "", s.RVA+uint32(at), "%s differs from the base in section %s: it is of another build", t.Name, s.Name)
		}
	}
	list, err := im.Symbols()
	if err != nil {
		return nil, damaged(t.Name, err)
	}
	if !hasCOFF(list) {
		return nil, refuse(CodeSymbolFile, t.Name, "", 0, "%s has no COFF symbols (link with /debug:symtab, or do not strip)", t.Name)
	}
	return list, nil
}

// maskRawPointers clears PointerToRawData of each debug directory entry within
// p, the bytes at rva: a file offset, which strip changes as it drops sections
// (Microsoft PE specification, "Debug Directory (Image Only)").
func (f *file) maskRawPointers(p []byte, rva uint32) {
	const entry, field, size = 28, 24, 4
	d := f.Directories[directoryDebug]
	for i := uint64(0); i < pe.MaxDebugEntries && (i+1)*entry <= uint64(d.Size); i++ {
		at := uint64(d.RVA) + i*entry + field
		if at >= uint64(rva) && at+size <= uint64(rva)+uint64(len(p)) {
			clear(p[at-uint64(rva):][:size])
		}
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// hasCOFF tells whether any symbol comes from more than the export directory.
func hasCOFF(list []pe.Symbol) bool {
	return slices.ContainsFunc(list, func(s pe.Symbol) bool { return !s.Exported || s.Size != 0 })
}

// add merges symbols: one entry for a name and an RVA, with the most that any table says.
func (f *file) add(list []pe.Symbol) {
	f.coff = f.coff || hasCOFF(list)
	for _, s := range list {
		if s.Name == "" {
			continue
		}
		have := f.byName[s.Name]
		i := slices.IndexFunc(have, func(o pe.Symbol) bool { return o.RVA == s.RVA })
		if i < 0 {
			f.byName[s.Name] = append(have, s)
			continue
		}
		o := &have[i]
		o.Size = max(o.Size, s.Size)
		o.Function = o.Function || s.Function
		o.Exported = o.Exported || s.Exported
		o.External = o.External || s.External
	}
}

// findBounds collects every place where something else than the middle of a
// function begins: symbols and unwind records in executable sections.
func (f *file) findBounds() {
	for _, list := range f.byName {
		for _, s := range list {
			if sec := f.SectionAt(s.RVA); sec != nil && sec.Exec() && !sectionName(s.Name) {
				f.bounds = append(f.bounds, s.RVA)
			}
		}
	}
	for _, u := range f.spans {
		f.bounds = append(f.bounds, u.Begin)
	}
	slices.Sort(f.bounds)
	f.bounds = slices.Compact(f.bounds)
}

// after is the first bound beyond rva, or the end of its section.
func (f *file) after(rva uint32) uint32 {
	end := uint32(0)
	if sec := f.SectionAt(rva); sec != nil {
		end = sec.RVA + sec.Extent()
	}
	if i, _ := slices.BinarySearch(f.bounds, rva+1); i < len(f.bounds) && f.bounds[i] < end {
		return f.bounds[i]
	}
	return end
}

// lookup finds the one place a name stands for. An export outranks a local
// symbol of the same name; two local ones are a refusal.
func (f *file) lookup(name string) (pe.Symbol, error) {
	for _, e := range f.exports {
		if e.Name == name && e.Forward != "" {
			return pe.Symbol{}, refuse(CodeSymbol, f.role, name, 0, "the %s only forwards it to %s", f.role, e.Forward)
		}
	}
	list := f.byName[name]
	if i := slices.IndexFunc(list, func(s pe.Symbol) bool { return s.Exported }); i >= 0 {
		return list[i], nil
	}
	switch len(list) {
	case 0:
		if !f.coff {
			return pe.Symbol{}, refuse(CodeSymbol, f.role, name, 0, "the %s does not export it and has no COFF symbols; give an unstripped twin by --symbols", f.role)
		}
		return pe.Symbol{}, refuse(CodeSymbol, f.role, name, 0, "the %s has no such symbol", f.role)
	case 1:
		return list[0], nil
	}
	return pe.Symbol{}, refuse(CodeAmbiguous, f.role, name, list[1].RVA, "the %s has it at %x and at %x", f.role, list[0].RVA, list[1].RVA)
}

// sectionName tells names of sections (".text", ".rdata$zzz"), which symbol
// tables hold beside real symbols.
func sectionName(name string) bool { return strings.HasPrefix(name, ".") }

// linkerMade tells marks that GNU ld's PE script sets ("__data_start__",
// "___CTOR_LIST__", "__ImageBase"): places, not things, in every image alike.
func linkerMade(name string) bool {
	if strings.HasPrefix(name, "__") && strings.HasSuffix(name, "__") {
		return true
	}
	if strings.HasPrefix(name, "__rt_psrelocs_") {
		return true
	}
	return name == "__ImageBase" || name == "etext" || name == "_tls_index" || name == "_load_config_used"
}

// importName tells symbols that stand for imports: slots, thunks, descriptors.
func (f *file) importName(name string) bool {
	if strings.HasPrefix(name, "__imp_") || strings.HasPrefix(name, "_head_") || strings.HasPrefix(name, "__IMPORT_DESCRIPTOR_") ||
		strings.HasPrefix(name, "__NULL_IMPORT") || strings.HasPrefix(name, "\x7f") || strings.HasSuffix(name, "_iname") {
		return true
	}
	if _, ok := f.byName["__imp_"+name]; ok {
		return true
	}
	return f.shared[name]
}

// inExec and inWritable tell where an RVA lies.
func (f *file) inExec(rva uint32) bool {
	s := f.SectionAt(rva)
	return s != nil && s.Exec()
}

func (f *file) inWritable(rva uint32) bool {
	s := f.SectionAt(rva)
	return s != nil && s.Writable() && !s.Exec()
}
