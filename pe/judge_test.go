package pe

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// readobj is the independent judge of what an image says.
const readobj = "llvm-readobj-22"

// node is one line of llvm-readobj's output, with the lines inside its brackets.
type node struct {
	key, val string
	kids     []*node
}

func readobjTree(out []byte) *node {
	root := &node{}
	stack := []*node{root}
	for _, line := range strings.Split(string(out), "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "":
		case line == "}" || line == "]" || line == ")":
			stack = stack[:len(stack)-1]
		default:
			n := &node{}
			top := stack[len(stack)-1]
			top.kids = append(top.kids, n)
			if name, rest, ok := cutBracket(line); ok {
				n.key, n.val = name, rest
				stack = append(stack, n)
			} else if key, val, ok := strings.Cut(line, ":"); ok {
				n.key, n.val = key, strings.TrimSpace(val)
			} else {
				n.val = line
			}
		}
	}
	return root
}

// cutBracket tells whether the line opens a bracket: "Name {", "Name [ (0x1)".
func cutBracket(line string) (name, rest string, ok bool) {
	for _, b := range []string{" {", " [", " ("} {
		if name, ok := strings.CutSuffix(line, b); ok {
			return name, "", true
		}
	}
	if i := strings.Index(line, " [ ("); i > 0 {
		return line[:i], line[i+3:], true
	}
	return "", "", false
}

func (n *node) all(key string) (out []*node) {
	for _, k := range n.kids {
		if k.key == key {
			out = append(out, k)
		}
	}
	return out
}

// one is the only child of that key; an empty node if there is none.
func (n *node) one(key string) *node {
	if l := n.all(key); len(l) > 0 {
		return l[0]
	}
	return &node{}
}

// num is the number of a child: "12", "0xc", "name (0xc)"; 0 if there is no child.
func (n *node) num(key string) uint64 { return number(n.one(key).val) }

func number(s string) uint64 {
	if i := strings.LastIndexByte(s, '('); i >= 0 {
		s = strings.TrimSuffix(s[i+1:], ")")
	}
	v, _ := strconv.ParseUint(strings.TrimSpace(s), 0, 64)
	return v
}

// judge compares all that llvm-readobj prints of a file with what we read.
func judge(t *testing.T, file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	im := parse(t, b)
	root := readobjTree(command(t, ".", readobj, "--file-headers", "--sections", "--coff-exports", "--coff-imports",
		"--coff-basereloc", "--coff-load-config", "--coff-debug-directory", "--unwind", file))
	same := func(what string, got, want any) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %s:\n got %v\nwant %v", filepath.Base(file), what, got, want)
		}
	}
	fh, oh := root.one("ImageFileHeader"), root.one("ImageOptionalHeader")
	for what, p := range map[string][2]uint64{
		"machine":           {uint64(im.Machine), fh.num("Machine")},
		"sections":          {uint64(len(im.Sections)), fh.num("SectionCount")},
		"stamp":             {uint64(im.TimeDateStamp), fh.num("TimeDateStamp")},
		"characteristics":   {uint64(im.Characteristics), number(fh.one("Characteristics").val)},
		"entry":             {uint64(im.EntryPoint), oh.num("AddressOfEntryPoint")},
		"base":              {im.ImageBase, oh.num("ImageBase")},
		"section alignment": {uint64(im.SectionAlignment), oh.num("SectionAlignment")},
		"file alignment":    {uint64(im.FileAlignment), oh.num("FileAlignment")},
		"size of image":     {uint64(im.SizeOfImage), oh.num("SizeOfImage")},
		"size of headers":   {uint64(im.SizeOfHeaders), oh.num("SizeOfHeaders")},
		"checksum":          {uint64(im.CheckSum), oh.num("CheckSum")},
		"subsystem":         {uint64(im.Subsystem), oh.num("Subsystem")},
		"dll":               {uint64(im.DLLCharacteristics), number(oh.one("Characteristics").val)},
	} {
		same(what, p[0], p[1])
	}
	dirs := oh.one("DataDirectory").kids
	for i := 0; i+1 < len(dirs); i += 2 {
		same(dirs[i].key, im.Directories[i/2], Directory{uint32(number(dirs[i].val)), uint32(number(dirs[i+1].val))})
	}
	var sections []Section
	for _, s := range root.one("Sections").kids {
		name, _, _ := strings.Cut(s.one("Name").val, " (")
		sections = append(sections, Section{name, uint32(s.num("VirtualAddress")), uint32(s.num("VirtualSize")),
			uint32(s.num("PointerToRawData")), uint32(s.num("RawDataSize")), uint32(number(s.one("Characteristics").val))})
	}
	same("section table", im.Sections, sections)
	judgeExports(t, im, root, same)
	judgeImports(t, im, root, same)
	var relocs []Reloc
	for _, r := range root.one("BaseReloc").kids {
		if typ := r.one("Type").val; typ != "ABSOLUTE" {
			relocs = append(relocs, Reloc{uint32(r.num("Address")), map[string]uint8{"DIR64": 10, "HIGHLOW": 3}[typ]})
		}
	}
	slices.SortFunc(relocs, func(a, b Reloc) int { return cmp.Compare(a.RVA, b.RVA) })
	same("relocations", must(im.Relocs())(t), relocs)
	judgeLoadConfig(t, im, root, same)
	judgeDebug(t, im, root, same)
	judgeUnwind(t, im, root, same)
}

func judgeExports(t *testing.T, im *Image, root *node, same func(string, any, any)) {
	var want []Export
	for _, e := range root.all("Export") {
		x := Export{Name: e.one("Name").val, Ordinal: uint32(e.num("Ordinal")), RVA: uint32(e.num("RVA")), Forward: e.one("ForwardedTo").val}
		if x.RVA != 0 || x.Forward != "" {
			want = append(want, x)
		}
	}
	same("exports", must(im.Exports())(t), want)
}

func judgeImports(t *testing.T, im *Image, root *node, same func(string, any, any)) {
	var want []Import
	symbol := func(dll, s string, slot uint64, delay bool) {
		name, n, _ := strings.Cut(s, "(")
		x := Import{DLL: dll, Name: strings.TrimSpace(name), Slot: uint32(slot), Delay: delay}
		if v := uint16(number("(" + n)); x.Name == "" {
			x.Ordinal = v
		} else {
			x.Hint = v
		}
		want = append(want, x)
	}
	for _, d := range root.all("Import") {
		for i, s := range d.all("Symbol") {
			symbol(d.one("Name").val, s.val, d.num("ImportAddressTableRVA")+8*uint64(i), false)
		}
	}
	for _, d := range root.all("DelayImport") {
		for i, s := range d.all("Import") {
			symbol(d.one("Name").val, s.one("Symbol").val, d.num("ImportAddressTable")+8*uint64(i), true)
		}
	}
	same("imports", must(im.Imports())(t), want)
}

func judgeLoadConfig(t *testing.T, im *Image, root *node, same func(string, any, any)) {
	lc := must(im.LoadConfig())(t)
	n := root.one("LoadConfig")
	if lc == nil {
		same("no load configuration", len(n.kids), 0)
		return
	}
	var functions []GuardFunction
	for _, k := range root.one("GuardFidTable").kids {
		v, flags, _ := strings.Cut(k.val, " flags ")
		f, _ := strconv.ParseUint(flags, 16, 8)
		functions = append(functions, GuardFunction{uint32(number(v) - im.ImageBase), uint8(f)})
	}
	var eh []uint32
	for _, k := range root.one("GuardEHContTable").kids {
		eh = append(eh, uint32(number(k.val)-im.ImageBase))
	}
	same("load configuration", *lc, LoadConfig{im.Directories[10].RVA, uint32(n.num("Size")), uint32(number(n.one("GuardFlags").val)),
		functions, eh, n.num("CHPEMetadataPointer"), uint32(n.num("HotPatchTableOffset"))})
}

func judgeDebug(t *testing.T, im *Image, root *node, same func(string, any, any)) {
	rsds, ex := "", uint64(0)
	for _, d := range root.one("DebugDirectory").kids {
		if p := d.one("PDBInfo"); len(p.kids) > 0 && rsds == "" && d.num("AddressOfRawData") != 0 {
			rsds = fmt.Sprintf("%s/%d %s", strings.ToLower(strings.Trim(p.one("PDBGUID").val, "{}")), p.num("PDBAge"), p.one("PDBFileName").val)
		}
		if c := d.one("ExtendedCharacteristics"); c.key != "" {
			ex = number(c.val)
		}
	}
	got := ""
	if r := must(im.RSDS())(t); r != nil {
		got = r.String() + " " + r.Path
	}
	same("rsds", got, rsds)
	same("extended characteristics", uint64(must(im.ExDLLCharacteristics())(t)), ex)
}

func judgeUnwind(t *testing.T, im *Image, root *node, same func(string, any, any)) {
	rva := func(v uint64) uint32 { return uint32(v - im.ImageBase) }
	var want []UnwindSpan
	type link struct {
		primary uint32
		handler uint32
	}
	chain := map[uint32]link{} // begin of a record → what it is chained to
	for _, f := range root.one("UnwindInformation").kids {
		if im.Machine == MachineARM64 {
			begin := rva(f.num("Function"))
			x := f.one("ExceptionData")
			s := UnwindSpan{Span{begin, begin + uint32(f.num("FunctionLength")+x.num("FunctionLength"))}, begin, 0}
			if h := x.one("ExceptionHandler"); len(h.kids) > 0 {
				s.Handler = rva(h.num("Routine"))
			}
			want = append(want, s)
			continue
		}
		s := UnwindSpan{Span: Span{rva(f.num("StartAddress")), rva(f.num("EndAddress"))}, Primary: rva(f.num("StartAddress"))}
		info := f.one("UnwindInfo")
		if h := info.one("Handler"); h.val != "" {
			s.Handler = rva(number(h.val))
		}
		if c := info.one("Chained"); len(c.kids) > 0 {
			chain[s.Begin] = link{primary: rva(c.num("StartAddress"))}
		}
		want = append(want, s)
	}
	handlers := map[uint32]uint32{}
	for _, s := range want {
		handlers[s.Begin] = s.Handler
	}
	for i := range want {
		for l, ok := chain[want[i].Begin]; ok; l, ok = chain[l.primary] {
			want[i].Primary, want[i].Handler = l.primary, handlers[l.primary]
		}
	}
	slices.SortStableFunc(want, func(a, b UnwindSpan) int { return cmp.Compare(a.Begin, b.Begin) })
	got := must(im.UnwindSpans())(t)
	if im.Machine == MachineARM64 {
		for i := range got {
			got[i].Primary = got[i].Begin // llvm-readobj does not join fragments
		}
	}
	same("unwind", got, want)
}

// judgeImages builds testdata/judge for both machines and gives the files.
func judgeImages(t *testing.T) []string {
	need(t, "clang-cl-22", "clang-22", "lld-link-22", "llvm-dlltool-22", readobj)
	dir := t.TempDir()
	src, err := filepath.Abs("testdata/judge")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range []struct{ target, machine, tool, pad string }{
		{"x86_64", "x64", "i386:x86-64", "6"}, {"aarch64", "arm64", "arm64", "8"}} {
		var libs []string
		for _, l := range []string{"crt", "k32", "late"} {
			lib := l + "-" + a.machine + ".lib"
			command(t, dir, "llvm-dlltool-22", "-m", a.tool, "-d", filepath.Join(src, l+".def"), "-l", lib)
			libs = append(libs, lib)
		}
		flags := []string{"clang-cl-22", "--target=" + a.target + "-pc-windows-msvc", "/O2", "/GS-", "/Zl", "/Z7", "/guard:cf", "/guard:ehcont", "/hotpatch", "/Brepro", "/clang:-fno-builtin", "/c"}
		command(t, dir, append(flags, "/Fojudge.obj", "--", filepath.Join(src, "judge.c"))...)
		command(t, dir, append(flags, "/Foloadcfg.obj", "--", filepath.Join(src, "loadcfg.c"))...)
		link := []string{"lld-link-22", "/dll", "/noentry", "/machine:" + a.machine, "/functionpadmin:" + a.pad, "/hotpatchcompatible", "/cetcompat",
			"/guard:cf,ehcont", "/debug:full,symtab", "/pdbaltpath:%_PDB%", "/Brepro", "/dynamicbase", "/highentropyva", "/delayload:late.dll",
			"/def:" + filepath.Join(src, "judge.def"), "/out:judge-" + a.machine + ".dll", "judge.obj", "loadcfg.obj"}
		if a.machine == "x64" {
			command(t, dir, "clang-22", "--target=x86_64-pc-windows-msvc", "-c", filepath.Join(src, "chained.s"), "-o", "chained.obj")
			link = append(link, "chained.obj", "/include:parted")
		}
		command(t, dir, append(link, libs...)...)
		out = append(out, filepath.Join(dir, "judge-"+a.machine+".dll"))
	}
	return out
}

func TestJudgeBuilt(t *testing.T) {
	for _, f := range judgeImages(t) {
		judge(t, f)
		// It shall hold what it was made to hold.
		b, _ := os.ReadFile(f)
		im := parse(t, b)
		lc := must(im.LoadConfig())(t)
		if !lc.CFG() || !lc.EHCont() || len(lc.GuardEHCont) != 2 || len(lc.GuardFunctions) < 5 {
			t.Errorf("load configuration %+v", lc)
		}
		if ex := must(im.ExDLLCharacteristics())(t); ex != ExCETCompat|ExHotpatchCompatible {
			t.Errorf("extended characteristics 0x%x", ex)
		}
		if im.Machine == MachineAMD64 {
			chained := 0
			for _, s := range must(im.UnwindSpans())(t) {
				if s.Primary != s.Begin {
					chained++
				}
			}
			if chained != 1 {
				t.Errorf("%d chained records", chained)
			}
		}
	}
}

func TestJudgeFixtures(t *testing.T) {
	need(t, readobj)
	for name := range fixtures(t) {
		judge(t, filepath.Join("../testdata/fixtures", name))
	}
}

// The compiler's own libraries: large, with thousands of symbols and records.
func TestJudgeLibraries(t *testing.T) {
	need(t, readobj)
	files, _ := filepath.Glob("/usr/lib/gcc/x86_64-w64-mingw32/*-win32/*.dll")
	if len(files) == 0 {
		skip(t, "needs the libraries of gcc-mingw-w64-x86-64")
	}
	for _, f := range files {
		judge(t, f)
	}
}

// Go's images have no load configuration, no RSDS, and on ARM64 no unwind records.
func TestJudgeGo(t *testing.T) {
	need(t, readobj, "go")
	if os.Getenv("HOTPATCH_TEST_ALL") != "1" {
		t.Skip("needs HOTPATCH_TEST_ALL=1: builds Go's runtime for Windows")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() { println(1) }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		command(t, dir, "env", "GOOS=windows", "GOARCH="+arch, "CGO_ENABLED=0", "go", "build", "-trimpath", "-o", arch+".exe", "main.go")
		judge(t, filepath.Join(dir, arch+".exe"))
	}
}
