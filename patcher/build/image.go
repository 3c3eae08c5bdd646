package build

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"hotpatchd/pe"
)

// Options are the inputs of one hotpatch image.
type Options struct {
	Base      []byte        // the image to be fixed, as shipped
	Fix       []byte        // a DLL with the new functions, linked without an entry point
	BaseName  string        // file name of the base: imports from it lead to the base. "": the name in its export directory
	Symbols   []SymbolFile  // unstripped twins of the base
	Functions []Replacement // none: every export of the fix whose name is a function of the base
	Sequence  uint32        // not 0
}

// Replacement names a function of the base and the one of the fix that takes
// its place. NewName "" means the same name.
type Replacement struct{ Name, NewName string }

// Function is one replaced function.
type Function struct {
	Name    string // in the base
	NewName string // in the fix
	pe.FunctionSpec
}

// Result is a hotpatch image and what is to be said about it.
type Result struct {
	DLL       []byte
	Base      pe.Identity
	Functions []Function // by RVA in the base
	Inverse   []pe.HotPatchRecord
	Unwind    string   // UnwindNone or UnwindRequired
	Warnings  []string // for the author; nothing is wrong for certain
}

// Image makes a hotpatch image of a base and a fix. An error is a *Refusal.
// The same options give the same bytes.
func Image(o Options) (*Result, error) {
	if o.Sequence == 0 {
		return nil, refuse(CodeSequence, "", "", 0, "0 is not a sequence number, the first is 1")
	}
	base, err := load("base", o.Base, o.Symbols)
	if err != nil {
		return nil, err
	}
	fix, err := load("fix", o.Fix, nil)
	if err != nil {
		return nil, err
	}
	if base.Machine != fix.Machine {
		return nil, refuse(CodeMachine, fix.role, "", 0, "the fix is for machine %#x, the base for %#x", fix.Machine, base.Machine)
	}
	if err := checkFix(fix); err != nil {
		return nil, err
	}
	functions, err := replacements(base, fix, o.Functions)
	if err != nil {
		return nil, err
	}
	targets := map[uint32]string{}
	for _, f := range functions {
		targets[f.Target] = f.NewName
	}
	to, err := reachBase(base, fix, baseNames(base, o.BaseName), targets)
	if err != nil {
		return nil, err
	}
	if err := checkData(base, fix, to.dead); err != nil {
		return nil, err
	}
	surprised, err := checkCallers(base, fix, functions, to.dead)
	if err != nil {
		return nil, err
	}
	spec := pe.HotPatchSpec{
		Sequence:          o.Sequence,
		BaseTimeDateStamp: base.TimeDateStamp,
		BaseCheckSum:      base.CheckSum,
		Machine:           base.Machine,
		Inverse:           to.inverse,
		RemoveImports:     to.remove,
	}
	for _, f := range functions {
		spec.Functions = append(spec.Functions, f.FunctionSpec)
	}
	dll, err := pe.AddHotPatch(o.Fix, spec)
	if err != nil {
		return nil, &Refusal{Code: CodeFormat, Image: fix.role, Text: fmt.Sprintf("cannot add the hot patch table: %v", err), Err: err}
	}
	if err := readBack(dll, spec); err != nil {
		return nil, err
	}
	identity, err := base.Identity()
	if err != nil {
		return nil, damaged(base.role, err)
	}
	return &Result{DLL: dll, Base: identity, Functions: functions, Inverse: to.inverse,
		Unwind: unwindWord(base, fix, functions), Warnings: append(warnings(base, fix, functions, to), surprised...)}, nil
}

// readBack compares the table of the finished image with what it should say.
func readBack(dll []byte, spec pe.HotPatchSpec) error {
	im, err := pe.Parse(bytes.NewReader(dll), int64(len(dll)))
	if err != nil {
		return damaged("result", err)
	}
	info, err := im.HotPatch()
	if err != nil {
		return damaged("result", err)
	}
	if info == nil || len(info.Bases) != 1 || len(info.Bases[0].Records) != len(spec.Functions)+len(spec.Inverse) {
		return refuse(CodeFormat, "result", "", 0, "the hot patch table cannot be read back as it was written")
	}
	return nil
}

// baseNames are the names under which the fix may import from the base.
func baseNames(base *file, given string) []string {
	var names []string
	if given != "" {
		names = append(names, path.Base(strings.ReplaceAll(given, `\`, "/")))
	}
	if n, err := base.ExportName(); err == nil && n != "" {
		names = append(names, n)
	}
	return names
}

// checkFix refuses what a late image cannot have: it is placed, relocated and
// bound, but nothing of it is ever called before its functions are.
func checkFix(fix *file) error {
	if fix.Characteristics&fileIsDLL == 0 {
		return refuse(CodeKind, fix.role, "", 0, "the fix is not a DLL")
	}
	hp, err := fix.HotPatch()
	if err != nil {
		return damaged(fix.role, err)
	}
	if hp != nil {
		return refuse(CodeKind, fix.role, "", hp.RVA, "the fix carries a hot patch table already: give the DLL the linker made")
	}
	if d := fix.Directories[directoryTLS]; d.RVA != 0 {
		return refuse(CodeTLS, fix.role, "", d.RVA, "the fix has thread-local storage: running threads would have no room for it")
	}
	if fix.EntryPoint != 0 {
		return refuse(CodeEntryPoint, fix.role, "", fix.EntryPoint, "the fix has an entry point, which nobody would call; link with /noentry (GNU ld: --entry with the image base)")
	}
	if at := fix.initialisers(); at != 0 {
		return refuse(CodeEntryPoint, fix.role, "", at, "the fix has static initialisers or constructors, which nobody would call")
	}
	if at := fix.pseudoRelocs(); at != 0 {
		return refuse(CodeRuntimeFixup, fix.role, "", at, "the fix has data imports that the C runtime would fix up at start; declare the variables dllimport (GNU ld: --disable-auto-import shows which)")
	}
	return nil
}

// initialisers finds pointers to code that should run at load: GNU's
// constructor list (a count or -1, then pointers, then 0), MSVC's and LLVM's
// .CRT section. 0 if there are none.
func (f *file) initialisers() uint32 {
	for _, name := range []string{"__CTOR_LIST__", "___CTOR_LIST__"} {
		for _, s := range f.byName[name] {
			var p [8]byte
			if f.ReadRVA(p[:], s.RVA+8) == nil && binary.LittleEndian.Uint64(p[:]) != 0 {
				return s.RVA + 8
			}
		}
	}
	for _, s := range f.Sections {
		if s.Name != ".CRT" {
			continue
		}
		b := make([]byte, s.Extent())
		if f.ReadRVA(b, s.RVA) == nil && !allZero(b) {
			return s.RVA
		}
	}
	return 0
}

// pseudoRelocs finds a list of mingw's runtime pseudo relocations, version 2:
// the words 0, 0, 1, then {slot, place, bits} each. It is recognised by its
// first entry, whose slot is an import's, so that stripping does not hide it.
func (f *file) pseudoRelocs() uint32 {
	slots := map[uint32]bool{}
	for _, i := range f.imports {
		slots[i.Slot] = true
	}
	for _, s := range f.Sections {
		if s.Exec() {
			continue
		}
		b := make([]byte, s.Extent())
		if f.ReadRVA(b, s.RVA) != nil {
			continue
		}
		word := func(i int) uint32 { return binary.LittleEndian.Uint32(b[i:]) }
		for i := 0; i+24 <= len(b); i += 4 {
			if word(i) == 0 && word(i+4) == 0 && word(i+8) == 1 && slots[word(i+12)] && slices.Contains([]uint32{8, 16, 32, 64}, word(i+20)&0xff) {
				return s.RVA + uint32(i)
			}
		}
	}
	return 0
}

// replacements pairs functions of the base with those of the fix.
func replacements(base, fix *file, given []Replacement) ([]Function, error) {
	list := slices.Clone(given)
	used := map[string]bool{}
	for i := range list {
		if list[i].NewName == "" {
			list[i].NewName = list[i].Name
		}
		used[list[i].NewName] = true
	}
	for _, e := range fix.exports {
		if e.Name == "" || used[e.Name] || strings.HasPrefix(e.Name, refPrefix) {
			continue
		}
		if e.Forward != "" || len(base.byName[e.Name]) == 0 {
			hint := ""
			if !base.coff {
				hint = "; the base has no COFF symbols, give an unstripped twin by --symbols"
			}
			return nil, refuse(CodeExports, fix.role, e.Name, e.RVA, "the fix exports it, the base has nothing of that name%s", hint)
		}
		if len(given) == 0 && fix.inExec(e.RVA) {
			list = append(list, Replacement{e.Name, e.Name})
		}
	}
	if len(list) == 0 {
		return nil, refuse(CodeNothing, fix.role, "", 0, "the fix exports no function of the base; export them, or name them by --function")
	}
	var functions []Function
	for _, r := range list {
		f, err := replacement(base, fix, r)
		if err != nil {
			return nil, err
		}
		functions = append(functions, f)
	}
	slices.SortFunc(functions, func(a, b Function) int { return int(a.Place) - int(b.Place) })
	for i := 1; i < len(functions); i++ {
		if a, b := functions[i-1], functions[i]; a.Place+a.Extra.Length > b.Place {
			return nil, refuse(CodeOverlap, base.role, b.Name, b.Place, "it shares bytes with %s: one function under two names can be replaced once", a.Name)
		}
	}
	return functions, nil
}

func replacement(base, fix *file, r Replacement) (Function, error) {
	old, err := base.lookup(r.Name)
	if err != nil {
		return Function{}, err
	}
	if !base.inExec(old.RVA) {
		return Function{}, refuse(CodeKind, base.role, r.Name, old.RVA, "it is not code")
	}
	now, err := fix.lookup(r.NewName)
	if err != nil {
		return Function{}, err
	}
	if !fix.inExec(now.RVA) {
		return Function{}, refuse(CodeKind, fix.role, r.NewName, now.RVA, "it is not code")
	}
	e, err := base.extentOf(old)
	if err != nil {
		return Function{}, err
	}
	if err := base.checkEntry(r.Name, e); err != nil {
		return Function{}, err
	}
	extra, err := base.extra(e)
	if err != nil {
		return Function{}, err
	}
	return Function{Name: r.Name, NewName: r.NewName, FunctionSpec: pe.FunctionSpec{Place: old.RVA, Target: now.RVA, Extra: extra}}, nil
}

// warnings are what an author should look at before release.
func warnings(base, fix *file, functions []Function, to *reach) []string {
	var w []string
	if !fix.coff {
		w = append(w, "the fix has no COFF symbols: __ref_ variables, copies and duplicated data cannot be seen (GNU ld keeps symbols unless -s; lld-link: /debug:symtab)")
	}
	for _, r := range to.inverse {
		if r.Type == pe.HotPatchFunction {
			w = append(w, fmt.Sprintf("%s in the fix is not a replacement: calls of it lead back to the base (%x)", fix.nameAt(r.Place), r.Target))
		}
	}
	for _, f := range functions {
		if of, _, _ := strings.Cut(f.Name, "."); clone(f.Name, of) {
			w = append(w, fmt.Sprintf("%s is a piece of %s the compiler made for some callers: its parameters need not be those of the source, compare with the code of the base", f.Name, of))
		}
		for _, name := range base.names {
			if clone(name, f.Name) {
				w = append(w, fmt.Sprintf("the base has %s, a piece of %s the compiler made for some callers: they will not reach the new function", name, f.Name))
			}
		}
	}
	return w
}

// clone tells gcc's names for specialised copies of a function: NAME.constprop.0,
// NAME.isra.0, NAME.part.0.
func clone(name, of string) bool {
	rest, ok := strings.CutPrefix(name, of+".")
	return ok && (strings.HasPrefix(rest, "constprop") || strings.HasPrefix(rest, "isra") || strings.HasPrefix(rest, "part"))
}

// nameAt is any symbol at an RVA, for people.
func (f *file) nameAt(rva uint32) string {
	for _, name := range f.names {
		if slices.ContainsFunc(f.byName[name], func(s pe.Symbol) bool { return s.RVA == rva }) && !sectionName(name) && !linkerMade(name) {
			return name
		}
	}
	return fmt.Sprintf("%x", rva)
}

func uitoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
