package pe

import (
	"bytes"
	stdpe "debug/pe"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// hosts are DLLs that tables are added to: with load configuration and without,
// of three tools and both machines.
func hosts(t testing.TB) map[string][]byte {
	out := map[string][]byte{"sample": sample().bytes()}
	for name, b := range fixtures(t) {
		if strings.Contains(name, "/fix-") || strings.Contains(name, "-fix") {
			out[name] = b
		}
	}
	return out
}

// drawSpec draws a spec that is right for the image.
func drawSpec(r *rapid.T, im *Image) HotPatchSpec {
	spec := HotPatchSpec{
		Sequence:          rapid.Uint32Range(1, 1<<32-1).Draw(r, "sequence"),
		MinSequence:       rapid.SampledFrom([]uint32{0, 0, 1, 77}).Draw(r, "least sequence"),
		BaseTimeDateStamp: rapid.Uint32().Draw(r, "stamp"),
		BaseCheckSum:      rapid.Uint32().Draw(r, "checksum"),
		Machine:           im.Machine,
	}
	var text, data Section
	for _, s := range im.Sections {
		if s.Exec() && text.Name == "" {
			text = s
		}
		if !s.Exec() && s.Extent() >= 8 && data.Extent() < s.Extent() {
			data = s
		}
	}
	hash := func() (h [32]byte) {
		copy(h[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(r, "hash"))
		return h
	}
	places := rapid.SliceOfNDistinct(rapid.Uint32Range(6, 1<<30), 0, 20, rapid.ID).Draw(r, "places")
	for _, p := range places {
		f := FunctionSpec{Place: p, Target: rapid.Uint32Range(text.RVA, text.RVA+text.Extent()-1).Draw(r, "target")}
		f.Target = min(f.Target, im.SizeOfImage-8)
		f.Extra.Length = rapid.Uint32Range(1, 1<<20).Draw(r, "length")
		f.Extra.SHA256 = hash()
		f.Extra.Flags = rapid.Uint32().Draw(r, "flags")
		n := min(16, int(f.Extra.Length))
		copy(f.Extra.Original[:], rapid.SliceOfN(rapid.Byte(), n, n).Draw(r, "original"))
		for range rapid.IntRange(0, 3).Draw(r, "ranges") {
			f.Extra.Ranges = append(f.Extra.Ranges, FunctionRange{rapid.Uint32Range(0, 1<<30).Draw(r, "rva"), rapid.Uint32Range(1, 1<<20).Draw(r, "size"), hash()})
		}
		spec.Functions = append(spec.Functions, f)
	}
	slots := rapid.SliceOfNDistinct(rapid.Uint32Range(0, (data.Extent()-8)/8), 0, 20, rapid.ID).Draw(r, "slots")
	for _, s := range slots {
		rec := HotPatchRecord{Inverse: true, Place: data.RVA + 8*s, Target: rapid.Uint32Range(0, 1<<30).Draw(r, "target"), Extra: make([]uint32, 16)}
		rec.Type = rapid.SampledFrom([]HotPatchType{HotPatchAbsolute, HotPatchIndirect}).Draw(r, "type")
		spec.Inverse = append(spec.Inverse, rec)
	}
	for range rapid.IntRange(0, 3).Draw(r, "inverse functions") {
		rec := HotPatchRecord{Type: HotPatchFunction, Inverse: true, Place: rapid.Uint32Range(text.RVA, text.RVA+text.Extent()-1).Draw(r, "copy"), Target: 0x1000, Extra: make([]uint32, 16)}
		rec.Place = min(rec.Place, im.SizeOfImage-8)
		at := rapid.IntRange(0, len(spec.Inverse)).Draw(r, "at")
		spec.Inverse = slices.Insert(spec.Inverse, at, rec)
	}
	return spec
}

// same holds what was written against what is read.
func (s *HotPatchSpec) same(h *HotPatchInfo) string {
	version := uint32(3)
	if s.MinSequence != 0 {
		version = 4
	}
	if h.Version != version || h.SequenceNumber != s.Sequence || h.MinSequenceNumber != s.MinSequence || h.ExtraPatchSize != 16 || len(h.Bases) != 1 || h.Flags != 0 {
		return "header"
	}
	b := h.Bases[0]
	if b.SequenceNumber != s.Sequence || b.OriginalTimeDateStamp != s.BaseTimeDateStamp || b.OriginalCheckSum != s.BaseCheckSum || b.SHA256 != nil {
		return "base"
	}
	if len(b.Records) != len(s.Inverse)+len(s.Functions) {
		return "number of records"
	}
	for i, r := range b.Records {
		if i < len(s.Inverse) {
			want := s.Inverse[i]
			want.Offset = r.Offset
			if !reflect.DeepEqual(r, want) {
				return "inverse record"
			}
			continue
		}
		want := s.Functions[i-len(s.Inverse)]
		got, err := h.Function(r)
		if err != nil || r.Inverse || r.Place != want.Place || r.Target != want.Target || !reflect.DeepEqual(got, want.Extra) {
			return "function record"
		}
	}
	return ""
}

// What AddHotPatch writes is what is read, in a file and in memory, and all
// else of the DLL is as it was.
func TestAddHotPatchRoundTrip(t *testing.T) {
	all := hosts(t)
	names := slices.Sorted(maps.Keys(all))
	rapid.Check(t, func(r *rapid.T) {
		name := rapid.SampledFrom(names).Draw(r, "host")
		dll := all[name]
		im := parse(t, dll)
		before := must(im.Identity())(t)
		spec := drawSpec(r, im)
		out, err := AddHotPatch(dll, spec)
		if err != nil {
			r.Fatalf("%s: %v", name, err)
		}
		again, _ := AddHotPatch(bytes.Clone(dll), spec)
		if !bytes.Equal(out, again) {
			r.Fatalf("%s: two runs differ", name)
		}
		h := sameTable(t, out)
		if what := spec.same(h); what != "" {
			r.Fatalf("%s: %s differs: %+v", name, what, h)
		}
		got := parse(t, out)
		after := must(got.Identity())(t)
		if after.TextSHA256 != before.TextSHA256 || after.RSDS != before.RSDS || after.TimeDateStamp != before.TimeDateStamp {
			r.Fatalf("%s: identity %+v, was %+v", name, after, before)
		}
		if got.CheckSum != fileCheckSum(out, got.optional+64) || len(got.Sections) != len(im.Sections)+1 || got.SizeOfImage%got.SectionAlignment != 0 {
			r.Fatalf("%s: headers %+v", name, got)
		}
		base := rapid.Uint64Range(1, 1<<34).Draw(r, "base") << 12
		m := mapped(t, out, base)
		if id := must(m.Identity())(t); id != after {
			r.Fatalf("%s: identity in memory %+v, want %+v", name, id, after)
		}
		hm, err := m.HotPatch()
		if err != nil || !reflect.DeepEqual(hm, h) {
			r.Fatalf("%s: table in memory %+v, %v", name, hm, err)
		}
		lc, lm := must(got.LoadConfig())(t), must(m.LoadConfig())(t)
		if lm.CHPEMetadata = lc.CHPEMetadata; !reflect.DeepEqual(lc, lm) {
			r.Fatalf("%s: load configuration in memory %+v, want %+v", name, lm, lc)
		}
		unchanged(r, name, im, dll, got, out)
	})
}

// unchanged demands that all sections hold what they held but for the table's offset.
func unchanged(t interface{ Fatalf(string, ...any) }, name string, im *Image, dll []byte, got *Image, out []byte) {
	lc, _ := im.LoadConfig()
	for i, s := range im.Sections {
		if got.Sections[i] != s {
			t.Fatalf("%s: section %+v was %+v", name, got.Sections[i], s)
		}
		a, b := bytes.Clone(dll[s.RawOffset:][:s.RawSize]), out[s.RawOffset:][:s.RawSize]
		if lc != nil && lc.Size >= lcHotPatchEnd && lc.RVA >= s.RVA && lc.RVA-s.RVA < s.Extent() {
			put(a, int(lc.RVA-s.RVA+lcHotPatch), got.Sections[len(im.Sections)].RVA)
		}
		if !bytes.Equal(a, b) {
			t.Fatalf("%s: section %s was changed", name, s.Name)
		}
	}
}

// A load configuration too short for the field moves; its pointers stay
// relocated, at the new place.
func TestAddHotPatchMovesLoadConfig(t *testing.T) {
	for _, size := range []uint32{4, 0x70, 0x94, 0xf0, 0xf3, 0xf4, 0x118, 0x140} {
		f := sample()
		f.sects[1].data = put(f.sects[1].data, 0x400, size)
		f.dirs[dirLoadConfig].Size = size
		dll := f.bytes()
		spec := HotPatchSpec{Sequence: 1, Machine: MachineAMD64}
		out, err := AddHotPatch(dll, spec)
		if err != nil {
			t.Fatalf("size 0x%x: %v", size, err)
		}
		old, im := must(parse(t, dll).LoadConfig())(t), parse(t, out)
		lc := must(im.LoadConfig())(t)
		if moved := size < 0xf4; moved != (lc.RVA == 0x9000) || moved != (lc.Size != size) || im.Directories[dirLoadConfig].Size != lc.Size {
			t.Errorf("size 0x%x: now 0x%x at 0x%x, directory %v", size, lc.Size, lc.RVA, im.Directories[dirLoadConfig])
		}
		if lc.GuardFlags != old.GuardFlags || !reflect.DeepEqual(lc.GuardFunctions, old.GuardFunctions) || !reflect.DeepEqual(lc.GuardEHCont, old.GuardEHCont) {
			t.Errorf("size 0x%x: %+v, was %+v", size, lc, old)
		}
		m := must(mapped(t, out, 0x7ff6_0000_0000).LoadConfig())(t)
		if !reflect.DeepEqual(m, lc) {
			t.Errorf("size 0x%x: in memory %+v, want %+v", size, m, lc)
		}
		sameTable(t, out)
	}
	// A relocated pointer over the end of what counts cannot move.
	f := sample()
	f.sects[1].data = put(f.sects[1].data, 0x400, uint32(0x84))
	f.dirs[dirLoadConfig].Size = 0x84
	_, err := AddHotPatch(f.bytes(), HotPatchSpec{Sequence: 1, Machine: MachineAMD64})
	wantFormat(t, err, "reaches over")
}

// An image that had no directory size of the structure's own gets it.
func TestAddHotPatchDirectorySize(t *testing.T) {
	f := sample()
	f.dirs[dirLoadConfig].Size = 64
	out := must(AddHotPatch(f.bytes(), HotPatchSpec{Sequence: 1, Machine: MachineAMD64}))(t)
	if d := parse(t, out).Directories[dirLoadConfig]; d != (Directory{0x2400, 0x140}) {
		t.Errorf("directory %v", d)
	}
}

func TestAddHotPatchRemovesImports(t *testing.T) {
	all := []HotPatchRecord{
		{Type: HotPatchAbsolute, Place: 0x4100}, {Type: HotPatchAbsolute, Place: 0x4108}, {Type: HotPatchIndirect, Place: 0x4120}}
	for _, c := range []struct {
		remove []string
		left   []string
		dir    Directory
	}{
		{nil, []string{"a.dll", "a.dll", "B.DLL", "d.dll"}, Directory{0x2100, 60}},
		{[]string{"A.dll"}, []string{"B.DLL", "d.dll"}, Directory{0x2100, 40}},
		{[]string{"b.dll"}, []string{"a.dll", "a.dll", "d.dll"}, Directory{0x2100, 40}},
		{[]string{"b.dll", "a.dll"}, []string{"d.dll"}, Directory{}},
	} {
		out := must(AddHotPatch(sample().bytes(), HotPatchSpec{Sequence: 1, Machine: MachineAMD64, Inverse: all, RemoveImports: c.remove}))(t)
		im := parse(t, out)
		var left []string
		for _, i := range must(im.Imports())(t) {
			left = append(left, i.DLL)
		}
		if !reflect.DeepEqual(left, c.left) || im.Directories[dirImport] != c.dir {
			t.Errorf("without %v: %v, directory %v", c.remove, left, im.Directories[dirImport])
		}
		// The list ends with zeros where descriptors were.
		p := make([]byte, 60)
		if err := im.ReadRVA(p, 0x2100); err != nil || len(bytes.Trim(p[60-20*(1+len(c.remove)):], "\x00")) != 0 {
			t.Errorf("without %v: %x, %v", c.remove, p, err)
		}
	}
	for what, spec := range map[string]HotPatchSpec{
		"no import of":   {Inverse: all, RemoveImports: []string{"c.dll"}},
		"no record that": {Inverse: all[:1], RemoveImports: []string{"a.dll"}},
		"with delay":     {Inverse: all, RemoveImports: []string{"D.dll"}},
	} {
		spec.Sequence, spec.Machine = 1, MachineAMD64
		_, err := AddHotPatch(sample().bytes(), spec)
		wantFormat(t, err, what)
	}
}

func TestAddHotPatchRefuses(t *testing.T) {
	type edit func(f *forge, s *HotPatchSpec)
	function := FunctionSpec{Place: 0x1010, Target: 0x1100, Extra: FunctionExtra{Length: 3}}
	absolute := HotPatchRecord{Type: HotPatchAbsolute, Place: 0x4100}
	for what, e := range map[string]edit{
		"sequence": func(f *forge, s *HotPatchSpec) { s.Sequence = 0 },
		"machine":  func(f *forge, s *HotPatchSpec) { s.Machine = MachineARM64 },
		"no DLL":   func(f *forge, s *HotPatchSpec) { f.flags = 0x22 },
		"signed":   func(f *forge, s *HotPatchSpec) { f.dirs[dirSecurity] = Directory{0x2000, 8} },
		"bound":    func(f *forge, s *HotPatchSpec) { f.dirs[dirBoundImport] = Directory{0x380, 8} },
		"already":  func(f *forge, s *HotPatchSpec) { put(f.sects[1].data, 0x4f0, uint32(0x2600)) },
		"hybrid":   func(f *forge, s *HotPatchSpec) { put(f.sects[1].data, 0x4c8, uint64(0x180002000)) },
		"not in the file": func(f *forge, s *HotPatchSpec) {
			f.dirs[dirLoadConfig].RVA = 0x51e0 // the last 32 bytes that are
			f.sects[2].data = put(f.sects[2].data, 0x11e0, uint32(0x140))
		},
		"there are two":            func(f *forge, s *HotPatchSpec) { s.Functions = append(s.Functions, function) },
		"no executable section":    func(f *forge, s *HotPatchSpec) { s.Functions[0].Target = 0x4000 },
		"lies in no executable":    func(f *forge, s *HotPatchSpec) { s.Functions[0].Target = 0x1300 },
		"place outside its image":  func(f *forge, s *HotPatchSpec) { s.Functions[0].Place = 5 },
		"target outside its image": func(f *forge, s *HotPatchSpec) { s.Functions[0].Target = 0x8ff9 },
		"length 0":                 func(f *forge, s *HotPatchSpec) { s.Functions[0].Extra.Length = 0 },
		"original bytes":           func(f *forge, s *HotPatchSpec) { s.Functions[0].Extra.Original[3] = 1 },
		"a range of length 0":      func(f *forge, s *HotPatchSpec) { s.Functions[0].Extra.Ranges = []FunctionRange{{RVA: 1}} },
		"too many ranges": func(f *forge, s *HotPatchSpec) {
			s.Functions[0].Extra.Ranges = slices.Repeat([]FunctionRange{{Length: 1}}, MaxFunctionRanges+1)
		},
		"want ABSOLUTE":          func(f *forge, s *HotPatchSpec) { s.Inverse[0].Type = HotPatchREL32 },
		"0x0, want ABSOLUTE":     func(f *forge, s *HotPatchSpec) { s.Inverse[0].Type = HotPatchNone },
		"one section of data":    func(f *forge, s *HotPatchSpec) { s.Inverse[0].Place = 0x1010 },
		"not lie in one section": func(f *forge, s *HotPatchSpec) { s.Inverse[0].Place = 0x30fc },
		"0x4104: overlaps another": func(f *forge, s *HotPatchSpec) {
			s.Inverse = append(s.Inverse, HotPatchRecord{Type: HotPatchIndirect, Place: 0x4104})
		},
		"0x40f9: overlaps another": func(f *forge, s *HotPatchSpec) {
			s.Inverse = append(s.Inverse, HotPatchRecord{Type: HotPatchIndirect, Place: 0x40f9})
		},
		"0x9000: place outside":   func(f *forge, s *HotPatchSpec) { s.Inverse[0].Place = 0x9000 },
		"0x4100: lies in no":      func(f *forge, s *HotPatchSpec) { s.Inverse[0].Type = HotPatchFunction },
		"more than 65536 records": func(f *forge, s *HotPatchSpec) { s.Functions = make([]FunctionSpec, MaxHotPatchRecords) },
		"strip debug sections":    func(f *forge, s *HotPatchSpec) { fill(f, 17); clear(f.sects[0].data[:64]) }, // the headers have room for 17
	} {
		f := sample()
		s := HotPatchSpec{Sequence: 1, Machine: MachineAMD64, Functions: []FunctionSpec{function}, Inverse: []HotPatchRecord{absolute}}
		e(f, &s)
		out, err := AddHotPatch(f.bytes(), s)
		if err == nil {
			t.Errorf("%s: accepted, %d bytes", what, len(out))
			continue
		}
		wantFormat(t, err, what)
	}
}

// fill adds empty sections until there are n.
func fill(f *forge, n int) {
	for len(f.sects) < n {
		f.sects = append(f.sects, forged{name: ".x", rva: uint32(0x9000 + 0x1000*len(f.sects)), size: 1, flags: ro})
	}
}

// More records than one chunk holds.
func TestAddHotPatchManyRecords(t *testing.T) {
	spec := HotPatchSpec{Sequence: 1, Machine: MachineAMD64}
	for i := range uint32(9000) {
		spec.Functions = append(spec.Functions, FunctionSpec{Place: 0x1000 + 16*i, Target: 0x1100, Extra: FunctionExtra{Length: 1 + i}})
	}
	h := sameTable(t, must(AddHotPatch(sample().bytes(), spec))(t))
	if what := spec.same(h); what != "" {
		t.Errorf("%s differs", what)
	}
}

// The linker's own checksums judge ours.
func TestCheckSum(t *testing.T) {
	n := 0
	for name, b := range fixtures(t) {
		if im := parse(t, b); im.CheckSum != 0 {
			n++
			if got := fileCheckSum(b, im.optional+64); got != im.CheckSum {
				t.Errorf("%s: 0x%x, want 0x%x", name, got, im.CheckSum)
			}
		}
	}
	if n == 0 {
		t.Error("no fixture has a checksum")
	}
	if fileCheckSum([]byte{1, 2, 3}, 100) != 0x0201+3+3 {
		t.Error("odd length")
	}
}

// Other readers open what is written, and see the table's offset.
func TestAddHotPatchJudged(t *testing.T) {
	dir := t.TempDir()
	for name, dll := range hosts(t) {
		im := parse(t, dll)
		spec := HotPatchSpec{Sequence: 3, Machine: im.Machine}
		for _, i := range must(im.Imports())(t) {
			if strings.EqualFold(i.DLL, "app.dll") {
				spec.Inverse = append(spec.Inverse, HotPatchRecord{Type: HotPatchAbsolute, Place: i.Slot, Target: 0x1000})
				spec.RemoveImports = []string{i.DLL}
			}
		}
		out, err := AddHotPatch(dll, spec)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		std, err := stdpe.NewFile(bytes.NewReader(out))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		libs, err := std.ImportedSymbols()
		if err != nil || slices.ContainsFunc(libs, func(s string) bool { return strings.HasSuffix(s, ":app.dll") }) {
			t.Errorf("%s: imports %v, %v", name, libs, err)
		}
		file := filepath.Join(dir, strings.ReplaceAll(name, "/", "-"))
		if err := os.WriteFile(file, out, 0o600); err != nil {
			t.Fatal(err)
		}
		need(t, readobj)
		if name != "sample" { // which has what no linker makes
			judge(t, file)
		}
		lc := readobjTree(command(t, ".", readobj, "--coff-load-config", file)).one("LoadConfig")
		if got, want := lc.num("HotPatchTableOffset"), must(parse(t, out).HotPatch())(t).RVA; got != uint64(want) || want == 0 {
			t.Errorf("%s: llvm-readobj sees the table at 0x%x, we at 0x%x", name, got, want)
		}
	}
}
