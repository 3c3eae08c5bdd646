package build

import (
	"encoding/binary"
	"slices"
	"strings"

	"hotpatchd/pe"
)

// variable is a writable variable that base and fix both define.
type variable struct {
	pe.Span
	name string
	slot uint32 // of __ref_NAME in the fix, 0 if there is none
}

// checkData refuses a fix that has its own copy of a writable variable of the
// base and uses it: old and new code would see different values. A copy that
// nothing but a __ref_ variable (which will point at the base), a copy that is
// led back, or another such variable refers to is harmless: compilers that
// emit __ref_ variables for a whole image leave such copies.
func checkData(base, fix *file, dead []pe.Span) error {
	var copies []variable
	for _, name := range fix.names {
		if linkerMade(name) || sectionName(name) || strings.HasPrefix(name, refPrefix) || fix.importName(name) {
			continue
		}
		for _, s := range fix.byName[name] {
			if fix.inImports(s.RVA) || !fix.inWritable(s.RVA) || !slices.ContainsFunc(base.byName[name], func(b pe.Symbol) bool { return base.inWritable(b.RVA) }) {
				continue
			}
			v := variable{Span: pe.Span{Begin: s.RVA, End: fix.dataEnd(s.RVA)}, name: name}
			for _, r := range fix.byName[refPrefix+name] {
				v.slot = r.RVA
			}
			copies = append(copies, v)
		}
	}
	if len(copies) == 0 {
		return nil
	}
	if fix.Machine != machineAMD64 {
		return refuse(CodeWritable, fix.role, copies[0].name, copies[0].Begin, "the base has this variable, and whether the fix uses its own copy can be told on x64 only; import it from the base")
	}
	if err := fix.checkPointers(copies); err != nil {
		return err
	}
	return fix.checkOperands(copies, dead)
}

// inImports tells a label of the import tables (import libraries of binutils
// put fthunk and hname there) from a variable.
func (f *file) inImports(rva uint32) bool {
	const importDirectory, addressTable = 1, 12
	for _, n := range []int{importDirectory, addressTable} {
		if d := f.Directories[n]; d.Size > 0 && rva >= d.RVA && rva-d.RVA < d.Size {
			return true
		}
	}
	return slices.ContainsFunc(f.imports, func(i pe.Import) bool { return rva >= i.Slot && rva < i.Slot+8 })
}

// dataEnd is where the next symbol behind a variable begins, or its section ends.
func (f *file) dataEnd(rva uint32) uint32 {
	s := f.SectionAt(rva)
	end := s.RVA + s.Extent()
	for name, list := range f.byName {
		for _, o := range list {
			if o.RVA > rva && o.RVA < end && !sectionName(name) {
				end = o.RVA
			}
		}
	}
	return end
}

func within(list []variable, rva uint32) (variable, bool) {
	i := slices.IndexFunc(list, func(v variable) bool { return rva >= v.Begin && rva < v.End })
	if i < 0 {
		return variable{}, false
	}
	return list[i], true
}

// checkPointers refuses an initialised pointer to a copy, other than
// in its __ref_ variable or in another copy.
func (f *file) checkPointers(copies []variable) error {
	for _, r := range f.relocs {
		var p [8]byte
		if r.Width() != 8 || f.ReadRVA(p[:], r.RVA) != nil {
			continue
		}
		to := binary.LittleEndian.Uint64(p[:]) - f.ImageBase
		if to >= uint64(f.SizeOfImage) {
			continue
		}
		v, hit := within(copies, uint32(to))
		if !hit || r.RVA == v.slot {
			continue
		}
		if _, inCopy := within(copies, r.RVA); inCopy {
			continue
		}
		return refuse(CodeWritable, f.role, v.name, r.RVA, "a pointer of the fix leads to the fix's own copy of this variable of the base")
	}
	return nil
}

// checkOperands refuses code that addresses a copy directly. Every
// four bytes of code are read as a RIP-relative displacement, with each length
// of what may follow: a false find only refuses.
func (f *file) checkOperands(copies []variable, dead []pe.Span) error {
	for _, s := range f.Sections {
		if !s.Exec() {
			continue
		}
		code := make([]byte, s.Extent())
		if err := f.Canonical(code, s.RVA); err != nil {
			return damaged(f.role, err)
		}
		for i := 0; i+4 <= len(code); i++ {
			at := s.RVA + uint32(i)
			if slices.ContainsFunc(dead, func(d pe.Span) bool { return at >= d.Begin && at < d.End }) {
				continue
			}
			disp := binary.LittleEndian.Uint32(code[i:])
			for _, immediate := range []uint32{0, 1, 2, 4} {
				v, hit := within(copies, at+4+immediate+disp)
				if hit {
					return refuse(CodeWritable, f.role, v.name, at, "code of the fix uses its own copy of this variable of the base: old and new code would see different values. Import it from the base, or reach it by %s%s everywhere", refPrefix, v.name)
				}
			}
		}
	}
	return nil
}
