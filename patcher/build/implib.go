package build

import (
	"slices"

	"hotpatchd/pe"
)

// ImportLibraryOptions are the inputs of one import library.
type ImportLibraryOptions struct {
	Base     []byte
	BaseName string       // DLL name that imports will bear; "": the name in the export directory
	Symbols  []SymbolFile // unstripped twins
}

// ImportLibrary is a static library that lets a fix be linked against every
// function and variable the base has a symbol for, exported or not. Names the
// base has twice are left out and returned.
func ImportLibrary(o ImportLibraryOptions) (library []byte, names int, ambiguous []string, err error) {
	base, err := load("base", o.Base, o.Symbols)
	if err != nil {
		return nil, 0, nil, err
	}
	dll := append(baseNames(base, o.BaseName), "")[0]
	if dll == "" {
		return nil, 0, nil, refuse(CodeSymbol, base.role, "", 0, "the base has no name in its export directory; give one")
	}
	var entries []importEntry
	for _, name := range base.names {
		if linkerMade(name) || sectionName(name) || base.importName(name) || name == "DllMain" {
			continue
		}
		s, err := base.lookup(name)
		if err != nil {
			if list := base.byName[name]; len(list) > 1 && !slices.ContainsFunc(list, func(s pe.Symbol) bool { return s.Exported }) {
				ambiguous = append(ambiguous, name)
			}
			continue // a forwarder: nothing of the base
		}
		entries = append(entries, importEntry{Name: name, Data: !base.inExec(s.RVA)})
	}
	if len(entries) == 0 {
		return nil, 0, nil, refuse(CodeSymbol, base.role, "", 0, "the base has no symbols and no exports; give an unstripped twin by --symbols")
	}
	library, err = writeImportLibrary(dll, base.Machine, entries)
	return library, len(entries), ambiguous, err
}
