package build

import (
	"slices"
	"strings"

	"hotpatchd/pe"
)

// refPrefix begins the names of pointer variables that stand for things of
// the base. LLVM's Windows Secure Hot-Patching emits them; C can declare them.
const refPrefix = "__ref_"

// reach is how the fix gets at the base: the inverse records, and the import
// descriptors that they make superfluous.
type reach struct {
	inverse []pe.HotPatchRecord
	remove  []string
	dead    []pe.Span // bodies of copies that are led back to the base: never run
}

// reachBase turns references, imports and copies into inverse records.
// targets are the new functions, which are no copies.
func reachBase(base, fix *file, baseNames []string, targets map[uint32]string) (*reach, error) {
	r := new(reach)
	if err := r.references(base, fix); err != nil {
		return nil, err
	}
	if err := r.imports(base, fix, baseNames); err != nil {
		return nil, err
	}
	if err := r.copies(base, fix, targets); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *reach) add(kind pe.HotPatchType, place, target uint32) {
	r.inverse = append(r.inverse, pe.HotPatchRecord{Type: kind, Inverse: true, Place: place, Target: target})
}

// references: the variable __ref_NAME := address of NAME in the base.
func (r *reach) references(base, fix *file) error {
	for _, name := range fix.names {
		if !strings.HasPrefix(name, refPrefix) {
			continue
		}
		for _, slot := range fix.byName[name] {
			if fix.inExec(slot.RVA) {
				return refuse(CodeKind, fix.role, name, slot.RVA, "it is code, wanted a pointer variable")
			}
			if slot.RVA%8 != 0 {
				return refuse(CodeKind, fix.role, name, slot.RVA, "it is not aligned, wanted an 8-byte pointer variable")
			}
			to, err := base.lookup(strings.TrimPrefix(name, refPrefix))
			if err != nil {
				return err
			}
			r.add(pe.HotPatchAbsolute, slot.RVA, to.RVA)
		}
	}
	return nil
}

// imports: from the base itself (slot := address of the symbol, and the
// descriptor goes), and those the base has, too (slot := contents of its slot).
// What is left is bound on the device like any import.
func (r *reach) imports(base, fix *file, baseNames []string) error {
	for _, i := range fix.imports {
		if i.Delay {
			return refuse(CodeRuntimeFixup, fix.role, importLabel(i), i.Slot, "it is a delayed import, which code of the fix would have to resolve; import it ordinarily")
		}
		if slices.ContainsFunc(baseNames, func(n string) bool { return strings.EqualFold(n, i.DLL) }) {
			to, err := base.imported(i)
			if err != nil {
				return err
			}
			r.add(pe.HotPatchAbsolute, i.Slot, to)
			if !slices.Contains(r.remove, i.DLL) {
				r.remove = append(r.remove, i.DLL)
			}
			continue
		}
		for _, b := range base.imports {
			if !b.Delay && strings.EqualFold(b.DLL, i.DLL) && b.Name == i.Name && b.Ordinal == i.Ordinal {
				r.add(pe.HotPatchIndirect, i.Slot, b.Slot)
				break
			}
		}
	}
	return nil
}

// imported finds what an import from the base stands for.
func (f *file) imported(i pe.Import) (uint32, error) {
	if i.Name != "" {
		s, err := f.lookup(i.Name)
		return s.RVA, err
	}
	for _, e := range f.exports {
		if e.Ordinal == uint32(i.Ordinal) && e.Forward == "" {
			return e.RVA, nil
		}
	}
	return 0, refuse(CodeSymbol, f.role, importLabel(i), 0, "the %s exports nothing by this ordinal", f.role)
}

// copies: functions of the fix that bear the name of one of the base and do
// not replace it are there for the linker; whoever calls them gets the base's.
func (r *reach) copies(base, fix *file, targets map[uint32]string) error {
	for _, name := range fix.names {
		if linkerMade(name) || sectionName(name) || strings.HasPrefix(name, refPrefix) || fix.importName(name) || base.importName(name) {
			continue
		}
		for _, c := range fix.byName[name] {
			if !c.Function || !c.External || !fix.inExec(c.RVA) || targets[c.RVA] == name || len(base.byName[name]) == 0 {
				continue
			}
			if other, ok := targets[c.RVA]; ok {
				return refuse(CodeOverlap, fix.role, name, c.RVA, "the linker folded it with the new function %s; link with identical code folding off", other)
			}
			to, err := base.lookup(name)
			if err != nil {
				return err
			}
			if !base.inExec(to.RVA) {
				return refuse(CodeKind, base.role, name, to.RVA, "the fix has a function of that name, the base a variable")
			}
			e, err := fix.extentOf(c)
			if err != nil {
				return err
			}
			need := uint32(longJump)
			if fix.Machine == machineARM64 {
				need = branch
			}
			if e.End-e.Begin < need {
				return refuse(CodeShort, fix.role, name, c.RVA, "the copy of a function of the base has %d bytes, too few to lead back; import it or use %s%s", e.End-e.Begin, refPrefix, name)
			}
			r.add(pe.HotPatchFunction, c.RVA, to.RVA)
			r.dead = append(r.dead, e.Span)
			r.dead = append(r.dead, e.ranges...)
		}
	}
	return nil
}

func importLabel(i pe.Import) string {
	if i.Name != "" {
		return i.DLL + "!" + i.Name
	}
	return i.DLL + "!#" + uitoa(uint32(i.Ordinal))
}
