package build

import (
	"crypto/sha256"
	"slices"
	"strings"

	"hotpatchd/pe"
)

// extent is the body of a function and its further parts.
type extent struct {
	pe.Span
	ranges []pe.Span // cold parts and chained records, sorted
}

// extentOf finds where a function of the base ends. Three witnesses: the
// symbol's own size, the unwind record, and where the next thing begins. They
// must not contradict each other; where only the last speaks, the code itself
// is followed.
func (f *file) extentOf(s pe.Symbol) (extent, error) {
	limit := f.after(s.RVA)
	e := extent{Span: pe.Span{Begin: s.RVA, End: limit}}
	span, within := f.spanAt(s.RVA)
	switch {
	case within && span.Begin != s.RVA:
		return e, refuse(CodeLength, f.role, s.Name, s.RVA, "the unwind record %x-%x begins before it", span.Begin, span.End)
	case within:
		e.End = span.End
		for i := range f.spans { // pieces that follow without a gap are body, too
			if u := f.spans[i]; u.Begin == e.End && u.Primary == s.RVA {
				e.End = u.End
			}
		}
		if inner := f.boundIn(s.RVA+1, e.End, s.RVA); inner != 0 {
			return e, refuse(CodeLength, f.role, s.Name, s.RVA, "its unwind record says %d bytes, but something else begins at %x", e.End-s.RVA, inner)
		}
		if s.Size != 0 && s.Size != e.End-s.RVA {
			return e, refuse(CodeLength, f.role, s.Name, s.RVA, "its unwind record says %d bytes, its symbol %d", e.End-s.RVA, s.Size)
		}
	case s.Size != 0:
		e.End = s.RVA + s.Size
		if e.End > limit || e.End < s.RVA {
			return e, refuse(CodeLength, f.role, s.Name, s.RVA, "its symbol says %d bytes, but something else begins at %x", s.Size, limit)
		}
	default:
		end, err := f.endByFlow(s, limit)
		if err != nil {
			return e, err
		}
		e.End = end
	}
	if e.End <= e.Begin {
		return e, refuse(CodeLength, f.role, s.Name, s.RVA, "it has no bytes")
	}
	f.addRanges(s, &e)
	return e, nil
}

// spanAt is the unwind record that covers rva.
func (f *file) spanAt(rva uint32) (pe.UnwindSpan, bool) {
	i := slices.IndexFunc(f.spans, func(u pe.UnwindSpan) bool { return rva >= u.Begin && rva < u.End })
	if i < 0 {
		return pe.UnwindSpan{}, false
	}
	return f.spans[i], true
}

// boundIn is the first bound in [begin, end) that is not one of primary's own pieces.
func (f *file) boundIn(begin, end, primary uint32) uint32 {
	i, _ := slices.BinarySearch(f.bounds, begin)
	for ; i < len(f.bounds) && f.bounds[i] < end; i++ {
		if u, ok := f.spanAt(f.bounds[i]); ok && u.Begin == f.bounds[i] && u.Primary == primary {
			continue
		}
		return f.bounds[i]
	}
	return 0
}

// addRanges finds the parts of a function elsewhere: unwind records chained to
// it, and gcc's and LLVM's "NAME.cold" symbols.
func (f *file) addRanges(s pe.Symbol, e *extent) {
	for _, u := range f.spans {
		if u.Primary == s.RVA && (u.Begin < e.Begin || u.Begin >= e.End) {
			e.ranges = append(e.ranges, u.Span)
		}
	}
	for name, list := range f.byName {
		if name != s.Name+".cold" && !strings.HasPrefix(name, s.Name+".cold.") {
			continue
		}
		for _, c := range list {
			if !f.inExec(c.RVA) {
				continue
			}
			part := pe.Span{Begin: c.RVA, End: f.after(c.RVA)}
			if u, ok := f.spanAt(c.RVA); ok && u.Begin == c.RVA {
				part.End = u.End
			}
			if !slices.Contains(e.ranges, part) {
				e.ranges = append(e.ranges, part)
			}
		}
	}
	slices.SortFunc(e.ranges, func(a, b pe.Span) int { return int(a.Begin) - int(b.Begin) })
}

func allZero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

// extra fills our 16 words of a forward FUNCTION record.
func (f *file) extra(e extent) (pe.FunctionExtra, error) {
	body := make([]byte, e.End-e.Begin)
	if err := f.Canonical(body, e.Begin); err != nil {
		return pe.FunctionExtra{}, damaged(f.role, err)
	}
	x := pe.FunctionExtra{Length: uint32(len(body)), SHA256: sha256.Sum256(body)}
	copy(x.Original[:], body)
	for _, r := range e.ranges {
		part := make([]byte, r.End-r.Begin)
		if err := f.Canonical(part, r.Begin); err != nil {
			return pe.FunctionExtra{}, damaged(f.role, err)
		}
		x.Ranges = append(x.Ranges, pe.FunctionRange{RVA: r.Begin, Length: uint32(len(part)), SHA256: sha256.Sum256(part)})
	}
	return x, nil
}
