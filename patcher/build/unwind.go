package build

import (
	"slices"
	"strings"

	"hotpatchd/pe"
)

// Words for Result.Unwind.
const (
	UnwindNone     = "none"     // nothing unwinds through the functions
	UnwindRequired = "required" // the hotpatch image's unwind tables must be registered
)

// throws tells names that raise exceptions or unwind: Win32, MSVC and Itanium
// C++ runtimes.
func throws(name string) bool {
	name = strings.TrimPrefix(name, "__imp_")
	return name == "RaiseException" || name == "RtlRaiseException" || name == "_CxxThrowException" ||
		name == "__cxa_throw" || name == "__cxa_rethrow" || strings.HasPrefix(name, "RtlUnwind") || strings.HasPrefix(name, "_Unwind_")
}

// unwindWord says whether a stack walk may have to go through the new
// functions: one of them or of those they replace has a handler, or one of the
// images can throw.
func unwindWord(base, fix *file, functions []Function) string {
	handled := func(f *file, entry uint32) bool {
		return slices.ContainsFunc(f.spans, func(u pe.UnwindSpan) bool { return u.Primary == entry && u.Handler != 0 })
	}
	for _, r := range functions {
		if handled(base, r.Place) || handled(fix, r.Target) {
			return UnwindRequired
		}
	}
	for _, f := range []*file{base, fix} {
		if slices.ContainsFunc(f.imports, func(i pe.Import) bool { return throws(i.Name) }) {
			return UnwindRequired
		}
		for name := range f.byName {
			if throws(name) {
				return UnwindRequired
			}
		}
	}
	return UnwindNone
}
