package build

import (
	"bytes"
	"crypto/sha256"
	debugpe "debug/pe"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hotpatchd/pe"
)

// built lists every pair of fixtures that makes a hotpatch image, with what it must hold.
var built = []struct {
	base, fix, committed                   string
	sequence                               uint32
	only                                   []Replacement
	functions                              string // by place
	absolute, indirect, inverse, remaining string // remaining: imports the device binds
}{
	{"demo/demo.dll", "demo/demo-fix.dll", "demo/demo-1.dll", 1, nil, "answer", "", "", "", ""},
	{"demo/demo.dll", "demo/demo-fix2.dll", "demo/demo-2.dll", 2, nil, "answer", "", "", "", ""},
	{"demo-clang/demo.dll", "demo-clang/demo-fix.dll", "demo-clang/demo-1.dll", 1, nil, "answer", "", "", "", ""},
	{"demo-arm64/demo.dll", "demo-arm64/demo-fix.dll", "demo-arm64/demo-1.dll", 1, nil, "answer", "", "", "", ""},
	{"mingw/app.dll", "mingw/fix-ref-1.dll", "mingw/app-ref-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"mingw/app.dll", "mingw/fix-ref-2.dll", "mingw/app-ref-2.dll", 2, nil, "vuln recurse parted", "answer_base calls helper", "Sleep", "", "GetCurrentThreadId"},
	{"mingw/app.dll", "mingw/fix-import-1.dll", "mingw/app-import-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"mingw/app.dll", "mingw/fix-import-2.dll", "mingw/app-import-2.dll", 2, nil, "vuln recurse parted", "answer_base calls helper", "Sleep", "", "GetCurrentThreadId"},
	{"mingw/app.dll", "mingw/fix-copy-1.dll", "mingw/app-copy-1.dll", 1, nil, "vuln slow", "answer_base calls", "Sleep", "helper", ""},
	{"mingw/app.dll", "mingw/fix-copy-2.dll", "mingw/app-copy-2.dll", 2, nil, "vuln recurse parted", "answer_base calls", "Sleep", "helper", "GetCurrentThreadId"},
	{"mingw/app.dll", "mingw/fix-throw-1.dll", "mingw/app-throw-1.dll", 1, nil, "vuln", "", "", "", "RaiseException"},
	{"plain/app.dll", "mingw/fix-ref-1.dll", "plain/app-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"clang/app.dll", "clang/fix-ref-1.dll", "clang/app-ref-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"clang/app.dll", "clang/fix-import-1.dll", "clang/app-import-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"clang/app.dll", "clang/fix-import-2.dll", "clang/app-import-2.dll", 2, nil, "vuln recurse parted", "answer_base calls helper", "Sleep", "", "GetCurrentThreadId"},
	{"clang/app.dll", "clang/fix-marked-1.dll", "clang/app-marked-1.dll", 1, []Replacement{{"vuln", ""}}, "vuln", "answer_pointer calls", "GetTickCount64 Sleep",
		"DllMain call_back choose count halt hand_over helper loop parted recurse serve slow ticks trouble", ""},
	{"arm64/app.dll", "arm64/fix-import-1.dll", "arm64/app-import-1.dll", 1, nil, "vuln slow", "answer_base calls helper", "Sleep", "", ""},
	{"arm64/app.dll", "arm64/fix-import-2.dll", "arm64/app-import-2.dll", 2, nil, "vuln recurse parted", "answer_base calls helper", "Sleep", "", "GetCurrentThreadId"},
	{"entries/entries.dll", "entries/fix-entries.dll", "entries/entries-1.dll", 1, nil, "entry_a entry_b entry_c inner", "", "", "", ""},
	{"many/many.dll", "many/many-fix.dll", "many/many-1.dll", 1, nil, "", "", "", "", ""},
}

func TestImage(t *testing.T) {
	for _, c := range built {
		t.Run(c.committed, func(t *testing.T) {
			base, fix := fixture(t, c.base), fixture(t, c.fix)
			r := buildImage(t, c.base, c.fix, c.sequence, c.only...)
			if again := buildImage(t, c.base, c.fix, c.sequence, c.only...); !bytes.Equal(r.DLL, again.DLL) {
				t.Error("the same input made other bytes")
			}
			if !bytes.Equal(r.DLL, fixture(t, c.committed)) {
				t.Error("the committed image differs: run scripts/fixtures")
			}
			var names []string
			for _, f := range r.Functions {
				names = append(names, f.Name)
			}
			if got := strings.Join(names, " "); c.functions != "" && got != c.functions {
				t.Errorf("replaces %q, want %q", got, c.functions)
			}
			checkTable(t, r, c.sequence, base)
			checkReach(t, r, base, fix, c.absolute, c.indirect, c.inverse)
			checkImports(t, r, c.remaining)
		})
	}
}

// checkTable reads the finished image as a stranger would and holds every
// record against the base's own bytes.
func checkTable(t *testing.T, r *Result, sequence uint32, base []byte) {
	t.Helper()
	old, now := parse(t, base), parse(t, r.DLL)
	info, err := now.HotPatch()
	if err != nil || info == nil {
		t.Fatalf("no hot patch table: %v", err)
	}
	b := info.Bases[0]
	if info.Version != 3 || info.SequenceNumber != sequence || len(info.Bases) != 1 || info.ExtraPatchSize != pe.FunctionExtraWords {
		t.Errorf("table: %+v", info)
	}
	if b.OriginalTimeDateStamp != old.TimeDateStamp || b.OriginalCheckSum != old.CheckSum {
		t.Errorf("base is stamp %x checksum %x, want %x %x", b.OriginalTimeDateStamp, b.OriginalCheckSum, old.TimeDateStamp, old.CheckSum)
	}
	if id, err := old.Identity(); err != nil || id != r.Base {
		t.Errorf("identity %+v, want %+v (%v)", r.Base, id, err)
	}
	within := func(im *pe.Image, rva, n uint32, exec bool) {
		t.Helper()
		s := im.SectionAt(rva)
		if s == nil || rva-s.RVA+n > s.Extent() || exec != s.Exec() && exec {
			t.Errorf("%x, %d bytes: not inside a section of the right kind", rva, n)
		}
	}
	forward := 0
	for _, rec := range b.Records {
		if rec.Inverse {
			switch rec.Type {
			case pe.HotPatchFunction:
				within(now, rec.Place, 5, true)
				within(old, rec.Target, 1, true)
			default:
				within(now, rec.Place, 8, false)
				within(old, rec.Target, 1, false)
			}
			continue
		}
		forward++
		x, err := info.Function(rec)
		if err != nil {
			t.Fatal(err)
		}
		within(old, rec.Place, x.Length, true)
		within(now, rec.Target, 1, true)
		sum := func(rva, n uint32) ([32]byte, []byte) {
			p := make([]byte, n)
			if err := old.Canonical(p, rva); err != nil {
				t.Fatal(err)
			}
			return sha256.Sum256(p), p
		}
		got, body := sum(rec.Place, x.Length)
		if got != x.SHA256 {
			t.Errorf("%x: hash of the body is wrong", rec.Place)
		}
		var first [16]byte
		copy(first[:], body)
		if first != x.Original {
			t.Errorf("%x: first bytes % x, want % x", rec.Place, x.Original, first)
		}
		for _, part := range x.Ranges {
			within(old, part.RVA, part.Length, true)
			if got, _ := sum(part.RVA, part.Length); got != part.SHA256 {
				t.Errorf("%x: hash of the further range at %x is wrong", rec.Place, part.RVA)
			}
		}
	}
	if forward != len(r.Functions) || len(b.Records)-forward != len(r.Inverse) {
		t.Errorf("%d forward and %d inverse records, want %d and %d", forward, len(b.Records)-forward, len(r.Functions), len(r.Inverse))
	}
}

// checkReach names what each inverse record leads to.
func checkReach(t *testing.T, r *Result, base, fix []byte, absolute, indirect, inverse string) {
	t.Helper()
	got := map[pe.HotPatchType][]string{}
	imports, err := parse(t, fix).Imports()
	if err != nil {
		t.Fatal(err)
	}
	for _, rec := range r.Inverse {
		name := "?"
		for _, i := range imports {
			if i.Slot == rec.Place {
				name = i.Name
			}
		}
		if rec.Type != pe.HotPatchIndirect {
			syms, err := parse(t, base).Symbols()
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range syms {
				if s.RVA == rec.Target && !strings.HasPrefix(s.Name, ".") && !strings.HasPrefix(s.Name, "__") {
					name = s.Name
				}
			}
		}
		if rec.Type == pe.HotPatchIndirect {
			theirs, err := parse(t, base).Imports()
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(theirs, func(i pe.Import) bool { return i.Slot == rec.Target && i.Name == name }) {
				t.Errorf("slot %x of the base does not hold %s", rec.Target, name)
			}
		}
		got[rec.Type] = append(got[rec.Type], name)
	}
	for kind, want := range map[pe.HotPatchType]string{pe.HotPatchAbsolute: absolute, pe.HotPatchIndirect: indirect, pe.HotPatchFunction: inverse} {
		slices.Sort(got[kind])
		if have := strings.Join(got[kind], " "); have != want {
			t.Errorf("records of type %x lead to %q, want %q", kind, have, want)
		}
	}
}

// checkImports looks at what is left for a device to bind, by debug/pe too.
func checkImports(t *testing.T, r *Result, remaining string) {
	t.Helper()
	imports, err := parse(t, r.DLL).Imports()
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, i := range imports {
		if strings.EqualFold(i.DLL, "app.dll") {
			t.Errorf("still imports %s from the base", i.Name)
		}
		if !slices.ContainsFunc(r.Inverse, func(rec pe.HotPatchRecord) bool { return rec.Place == i.Slot }) {
			left = append(left, i.Name)
		}
	}
	if got := strings.Join(left, " "); got != remaining {
		t.Errorf("the device has to bind %q, want %q", got, remaining)
	}
	f, err := debugpe.NewFile(bytes.NewReader(r.DLL))
	if err != nil {
		t.Fatalf("debug/pe: %v", err)
	}
	symbols, err := f.ImportedSymbols()
	if err != nil {
		t.Fatalf("debug/pe: %v", err)
	}
	if len(symbols) != len(imports) {
		t.Errorf("debug/pe sees imports %v", symbols)
	}
}

// TestReadobj lets LLVM's reader judge the result: another parser than ours
// finds the table where the load configuration says, and nothing to complain about.
func TestReadobj(t *testing.T) {
	tool := need(t, "llvm-readobj-22")
	for _, c := range built {
		file := fixtures + "/" + c.committed
		out, err := exec.Command(tool, "--coff-load-config", "--coff-imports", "--coff-exports", "--coff-basereloc", "--unwind", "--sections", file).CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("warning:")) {
			t.Errorf("%s: %v\n%s", c.committed, err, out)
		}
		info, err := parse(t, fixture(t, c.committed)).HotPatch()
		if err != nil || info == nil {
			t.Fatalf("%s: %v", c.committed, err)
		}
		if want := fmt.Sprintf("HotPatchTableOffset: 0x%X\n", info.RVA); !bytes.Contains(out, []byte(want)) {
			t.Errorf("%s: llvm-readobj does not say %q", c.committed, want)
		}
	}
}

func TestColdPartsAreRanges(t *testing.T) {
	r := buildImage(t, "mingw/app.dll", "mingw/fix-ref-2.dll", 2)
	base := fixture(t, "mingw/app.dll")
	for _, f := range r.Functions {
		if f.Name != "parted" {
			continue
		}
		if len(f.Extra.Ranges) != 1 || f.Extra.Ranges[0].RVA != symbol(t, base, "parted.cold") {
			t.Fatalf("ranges %+v, want parted.cold at %x", f.Extra.Ranges, symbol(t, base, "parted.cold"))
		}
		return
	}
	t.Fatal("parted is not replaced")
}

func TestUnwindWord(t *testing.T) {
	for fix, want := range map[string]string{"mingw/fix-ref-1.dll": UnwindNone, "mingw/fix-throw-1.dll": UnwindRequired} {
		if r := buildImage(t, "mingw/app.dll", fix, 1); r.Unwind != want {
			t.Errorf("%s: unwind %q, want %q", fix, r.Unwind, want)
		}
	}
	bare := editOf(t, fixture(t, "mingw/fix-throw-1.dll")).stripped().b // an import without a symbol
	r, err := Image(Options{Base: fixture(t, "mingw/app.dll"), Fix: bare, Sequence: 1})
	if err != nil {
		t.Fatal(err)
	}
	if r.Unwind != UnwindRequired {
		t.Errorf("stripped: unwind %q, want %q", r.Unwind, UnwindRequired)
	}
}

// TestUnwindHandler gives vuln's unwind record a handler: exceptions then come
// by it though neither image throws.
func TestUnwindHandler(t *testing.T) {
	b := fixture(t, "mingw/app.dll")
	e := editOf(t, b)
	vuln := symbol(t, b, "vuln")
	info := e.grow(".xdata", 8)
	o := e.at(info)
	copy(e.b[o:], []byte{1 | 1<<3, 0, 0, 0}) // UNWIND_INFO: version 1, UNW_FLAG_EHANDLER, no codes
	e.word32(o+4, vuln)                      // the handler
	e.word32(e.pdata(vuln)+8, info)
	r, err := Image(Options{Base: e.b, Fix: fixture(t, "mingw/fix-ref-1.dll"), Sequence: 1})
	if err != nil {
		t.Fatal(err)
	}
	if r.Unwind != UnwindRequired {
		t.Errorf("unwind %q, want %q", r.Unwind, UnwindRequired)
	}
}

func u32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// TestSymbolsFromTwin builds against a stripped base with its unstripped twin.
func TestSymbolsFromTwin(t *testing.T) {
	whole, fix := fixture(t, "mingw/app.dll"), fixture(t, "mingw/fix-import-1.dll")
	bare := editOf(t, whole).stripped().b
	_, err := Image(Options{Base: bare, Fix: fix, Sequence: 1})
	r := wantRefusal(t, err, CodeSymbol, "base", "answer_base")
	if !strings.Contains(r.Text, "--symbols") {
		t.Errorf("no hint at --symbols: %v", r)
	}
	got, err := Image(Options{Base: bare, Fix: fix, Sequence: 1, Symbols: []SymbolFile{{"app.sym", whole}}})
	if err != nil {
		t.Fatal(err)
	}
	if want := buildImage(t, "mingw/app.dll", "mingw/fix-import-1.dll", 1); !bytes.Equal(got.DLL, want.DLL) {
		t.Error("a twin's symbols made another image than the base's own")
	}
	_, err = Image(Options{Base: bare, Fix: fix, Sequence: 1, Symbols: []SymbolFile{{"app.sym", fixture(t, "other/app.dll")}}})
	wantRefusal(t, err, CodeSymbolFile, "app.sym", "")
	_, err = Image(Options{Base: bare, Fix: fix, Sequence: 1, Symbols: []SymbolFile{{"app.sym", bare}}})
	wantRefusal(t, err, CodeSymbolFile, "app.sym", "")
	if _, err = Image(Options{Base: bare, Fix: fix, Sequence: 1, Symbols: []SymbolFile{{"/bin/ls", []byte("ELF")}}}); err == nil || !strings.Contains(err.Error(), "cannot read /bin/ls: ") {
		t.Errorf("no PE file: %v", err)
	}
}

// TestSymbolsFromTwinOfStrip takes the twin as the linker made it and the base as
// GNU strip left it: dropping debug sections moves what the debug directory
// (the build id) points at in the file.
func TestSymbolsFromTwinOfStrip(t *testing.T) {
	gcc, strip := need(t, "x86_64-w64-mingw32-gcc"), need(t, "x86_64-w64-mingw32-strip")
	dir := t.TempDir()
	source, full, app := filepath.Join(dir, "app.c"), filepath.Join(dir, "full.dll"), filepath.Join(dir, "app.dll")
	const text = "static volatile int state = 41;\n__attribute__((noinline)) int helper(int x) { return x + state; }\n" +
		"__declspec(dllexport) int answer(void) { return helper(1); }\n"
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{gcc, "-O2", "-g", "-fno-ipa-ra", "-shared", "-Wl,--build-id", "-o", full, source},
		{strip, "-o", app, full},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", c[0], err, out)
		}
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	base, twin := read(app), read(full)
	if id, err := parse(t, base).Identity(); err != nil || id.RSDS == "" {
		t.Fatalf("the base has no build id (%v)", err)
	}
	_, names, _, err := ImportLibrary(ImportLibraryOptions{Base: base, BaseName: "app.dll", Symbols: []SymbolFile{{"full.dll", twin}}})
	if err != nil || names == 0 {
		t.Fatalf("%d names (%v)", names, err)
	}
	// Only the pointer may differ: a twin with another build id is another build.
	d := parse(t, twin).Directories[directoryDebug]
	e := editOf(t, twin)
	id := e.at(binary.LittleEndian.Uint32(e.b[e.at(d.RVA)+20:])) // AddressOfRawData
	e.b[id+4] ^= 1
	_, _, _, err = ImportLibrary(ImportLibraryOptions{Base: base, BaseName: "app.dll", Symbols: []SymbolFile{{"full.dll", e.b}}})
	wantRefusal(t, err, CodeSymbolFile, "full.dll", "")
}

// TestNamedFunctions replaces helper, which neither image exports by that name.
func TestNamedFunctions(t *testing.T) {
	base := fixture(t, "mingw/app.dll")
	r := buildImage(t, "mingw/app.dll", "mingw/fix-throw-1.dll", 1, Replacement{"helper", "vuln"})
	if len(r.Functions) != 1 || r.Functions[0].Place != symbol(t, base, "helper") || r.Functions[0].NewName != "vuln" {
		t.Fatalf("functions %+v", r.Functions)
	}
	_, err := Image(Options{Base: base, Fix: fixture(t, "mingw/fix-throw-1.dll"), Sequence: 1, Functions: []Replacement{{"nobody", "vuln"}}})
	wantRefusal(t, err, CodeSymbol, "base", "nobody")
	_, err = Image(Options{Base: base, Fix: fixture(t, "mingw/fix-throw-1.dll"), Sequence: 1, Functions: []Replacement{{"answer_base", "vuln"}}})
	wantRefusal(t, err, CodeKind, "base", "answer_base")
	_, err = Image(Options{Base: base, Fix: fixture(t, "mingw/fix-throw-1.dll"), Sequence: 1, Functions: []Replacement{{"vuln", ""}, {"vuln", ""}}})
	wantRefusal(t, err, CodeOverlap, "base", "vuln")
}

func TestWarnings(t *testing.T) {
	r := buildImage(t, "mingw/app.dll", "mingw/fix-copy-1.dll", 1)
	if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "helper") {
		t.Errorf("warnings %q, want one on helper", r.Warnings)
	}
	bare := editOf(t, fixture(t, "demo/demo-fix.dll")).stripped().b
	r, err := Image(Options{Base: fixture(t, "demo/demo.dll"), Fix: bare, Sequence: 1})
	if err != nil || len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "no COFF symbols") {
		t.Errorf("not one warning on missing symbols (%v)", err)
	}
}
