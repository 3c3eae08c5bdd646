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
// only a __ref_ variable points at (which will point at the base) is harmless:
// compilers that emit __ref_ variables leave such copies.
func checkData(base, fix *file, dead []pe.Span) error {
	var covered []variable
	for _, name := range fix.names() {
		if linkerMade(name) || sectionName(name) || strings.HasPrefix(name, refPrefix) || fix.importName(name) {
			continue
		}
		for _, s := range fix.byName[name] {
			if !fix.inWritable(s.RVA) || !slices.ContainsFunc(base.byName[name], func(b pe.Symbol) bool { return base.inWritable(b.RVA) }) {
				continue
			}
			v := variable{Span: pe.Span{Begin: s.RVA, End: fix.dataEnd(s.RVA)}, name: name}
			for _, r := range fix.byName[refPrefix+name] {
				v.slot = r.RVA
			}
			if v.slot == 0 {
				return refuse(CodeWritable, fix.role, name, s.RVA, "the base has this variable; the fix would use a copy. Declare it and import it from the base, or reach it by %s%s", refPrefix, name)
			}
			covered = append(covered, v)
		}
	}
	if len(covered) == 0 {
		return nil
	}
	if fix.Machine != machineAMD64 {
		return refuse(CodeWritable, fix.role, covered[0].name, covered[0].Begin, "the base has this variable, and uses of the fix's copy can be told apart on x64 only; import it from the base instead")
	}
	if err := fix.checkPointers(covered); err != nil {
		return err
	}
	return fix.checkOperands(covered, dead)
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

// checkPointers refuses an initialised pointer to a covered copy, other than
// in its __ref_ variable or in another covered copy.
func (f *file) checkPointers(covered []variable) error {
	for _, r := range f.relocs {
		var p [8]byte
		if r.Width() != 8 || f.ReadRVA(p[:], r.RVA) != nil {
			continue
		}
		to := binary.LittleEndian.Uint64(p[:]) - f.ImageBase
		if to >= uint64(f.SizeOfImage) {
			continue
		}
		v, hit := within(covered, uint32(to))
		if !hit || r.RVA == v.slot {
			continue
		}
		if _, inCopy := within(covered, r.RVA); inCopy {
			continue
		}
		return refuse(CodeWritable, f.role, v.name, r.RVA, "a pointer of the fix leads to the fix's own copy of this variable of the base")
	}
	return nil
}

// checkOperands refuses code that addresses a covered copy directly. Every
// four bytes of code are read as a RIP-relative displacement, with each length
// of what may follow: a false find only refuses.
func (f *file) checkOperands(covered []variable, dead []pe.Span) error {
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
				v, hit := within(covered, at+4+immediate+disp)
				if hit {
					return refuse(CodeWritable, f.role, v.name, at, "code of the fix uses its own copy of this variable of the base; reach it by %s%s everywhere", refPrefix, v.name)
				}
			}
		}
	}
	return nil
}
