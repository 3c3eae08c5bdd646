package patcher

import (
	"encoding/binary"
	"fmt"
	"path"
	"strconv"
	"strings"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// Bind is one slot of the hotpatch image and what is put there.
type Bind struct {
	Slot  uint32 // RVA in the hotpatch image
	Value uint64
	What  string // for people: "base+2010", "KERNEL32.dll!Sleep"
	Kind  string // "pointer" into the base, "shared" slot of the base, "import"
}

// binder finds the values of all slots of one image's fix. It reads only.
type binder struct {
	*Survey
	base Loaded
}

// bind resolves the inverse records and the ordinary imports of a hotpatch
// image. What cannot be bound is refused by name.
func (b *binder) bind(patch *Patch) ([]Bind, error) {
	regions, err := b.now()
	if err != nil {
		return nil, err
	}
	var binds []Bind
	bound := map[uint32]bool{}
	for _, r := range patch.inverse {
		switch r.Type {
		case pe.HotPatchAbsolute:
			binds = append(binds, Bind{r.Place, uint64(b.base.Base) + uint64(r.Target), fmt.Sprintf("%s+%x", b.base.Name, r.Target), "pointer"})
			bound[r.Place] = true
		case pe.HotPatchIndirect:
			if uint64(r.Target)+8 > uint64(b.base.Size) {
				return nil, blocked("record", Author, "slot %x lies outside %s", r.Target, b.base.Name)
			}
			v, err := read(b.p, b.base.Base+target.Addr(r.Target), 8)
			if err != nil {
				return nil, fmt.Errorf("cannot read slot %x of %s: %w", r.Target, b.base.Name, err)
			}
			value := binary.LittleEndian.Uint64(v)
			// Before it is bound a slot holds nothing, or where its name lies in the file.
			if _, ok := regionAt(regions, target.Addr(value)); !ok || value < uint64(b.base.Size) {
				return nil, blocked("import", Wait, "slot %x of %s is not bound yet", r.Target, b.base.Name)
			}
			binds = append(binds, Bind{r.Place, value, fmt.Sprintf("contents of %s+%x", b.base.Name, r.Target), "shared"})
			bound[r.Place] = true
		case pe.HotPatchFunction:
			// Written when the image is placed: a jump back into the base.
		default:
			return nil, blocked("record", Author, "record type %#x of the hot patch table is not supported", uint32(r.Type))
		}
	}
	imports, err := patch.image.Imports()
	if err != nil {
		return nil, err
	}
	for _, i := range imports {
		if bound[i.Slot] {
			continue
		}
		name := importName(i)
		if i.Delay {
			return nil, blocked("import", Author, "%s is a delay import of the hotpatch image", name)
		}
		v, err := b.resolve(i)
		if err != nil {
			return nil, err
		}
		binds = append(binds, Bind{i.Slot, v, name, "import"})
	}
	return binds, nil
}

func importName(i pe.Import) string {
	if i.Name == "" {
		return fmt.Sprintf("%s!#%d", i.DLL, i.Ordinal)
	}
	return i.DLL + "!" + i.Name
}

// maxForwards bounds a chain of forwarded exports.
const maxForwards = 8

// resolve binds an ordinary import against a module that cannot go away before
// the base: one of its static import closure, or one that no process unloads.
func (b *binder) resolve(i pe.Import) (uint64, error) {
	name := importName(i)
	dll, err := b.host(i.DLL, b.base.Name, name)
	if err != nil {
		return 0, err
	}
	m, err := b.module(dll, name)
	if err != nil {
		return 0, err
	}
	return b.export(m, i.Name, uint32(i.Ordinal), name, 0)
}

// permanent modules are never unloaded (Windows' own loader needs them).
func permanent(name string) bool {
	switch strings.ToLower(name) {
	case "ntdll.dll", "kernel32.dll", "kernelbase.dll":
		return true
	}
	return false
}

// module finds a module that stays as long as the base does; what is for people.
func (b *binder) module(dll, what string) (Loaded, error) {
	list, err := b.named(dll)
	if err != nil {
		return Loaded{}, err
	}
	if len(list) == 1 && !permanent(list[0].Name) && list[0].Base != b.base.Base {
		stays, err := b.inClosure(list[0])
		if err != nil {
			return Loaded{}, err
		}
		if !stays {
			return Loaded{}, blocked("import", Author, "%s: %s could be unloaded before %s", what, dll, b.base.Name)
		}
	}
	switch {
	case len(list) == 0:
		return Loaded{}, blocked("import", Author, "%s: the process has not loaded %s", what, dll)
	case len(list) > 1:
		return Loaded{}, blocked("import", Author, "%s: the process has loaded more than one %s", what, dll)
	}
	return list[0], nil
}

// inClosure tells whether the base imports m statically, at any depth.
func (b *binder) inClosure(m Loaded) (bool, error) {
	seen := map[target.Addr]bool{b.base.Base: true}
	queue := []Loaded{b.base}
	for len(queue) > 0 {
		if err := b.ctx.Err(); err != nil {
			return false, err
		}
		l := queue[0]
		queue = queue[1:]
		for _, name := range b.importsOf(l) {
			dll, err := b.host(name, l.Name, name)
			if err != nil {
				continue // it cannot be told what stays
			}
			list, err := b.named(dll)
			if err != nil {
				return false, err
			}
			if len(list) != 1 || seen[list[0].Base] {
				continue // of two by one name it cannot be told which stays
			}
			if list[0].Base == m.Base {
				return true, nil
			}
			seen[list[0].Base] = true
			queue = append(queue, list[0])
		}
	}
	return false, nil
}

func (b *binder) export(m Loaded, name string, ordinal uint32, what string, depth int) (uint64, error) {
	if depth > maxForwards {
		return 0, blocked("import", Author, "%s: forwarded more than %d times", what, maxForwards)
	}
	exports, err := b.exportsOf(m)
	if err != nil {
		return 0, err
	}
	for _, e := range exports {
		if (name != "" && e.Name != name) || (name == "" && e.Ordinal != ordinal) {
			continue
		}
		if e.Forward == "" {
			return uint64(m.Base) + uint64(e.RVA), nil
		}
		dll, symbol, n, ok := forwarded(e.Forward)
		if !ok {
			return 0, blocked("import", Author, "%s: forwarder %q makes no sense", what, e.Forward)
		}
		dll, err := b.host(dll, m.Name, what)
		if err != nil {
			return 0, err
		}
		next, err := b.module(dll, what)
		if err != nil {
			return 0, err
		}
		return b.export(next, symbol, n, what, depth+1)
	}
	return 0, blocked("import", Author, "%s: %s exports no such symbol", what, m.Name)
}

// forwarded parts a forwarder, "DLL.Name" or "DLL.#7"; the DLL's name may hold
// dots of its own, and stands without its extension.
func forwarded(s string) (dll, symbol string, ordinal uint32, ok bool) {
	i := strings.LastIndexByte(s, '.')
	if i <= 0 || i == len(s)-1 {
		return "", "", 0, false
	}
	dll, symbol = s[:i], s[i+1:]
	if !strings.EqualFold(path.Ext(dll), ".dll") {
		dll += ".dll"
	}
	if number, is := strings.CutPrefix(symbol, "#"); is {
		n, err := strconv.ParseUint(number, 10, 16)
		return dll, "", uint32(n), err == nil
	}
	return dll, symbol, 0, true
}

// host is the module that a name of an import means: itself, or what the
// target's own map says of an API set. importer is who asks, what is for people.
func (b *binder) host(dll, importer, what string) (string, error) {
	if !apiSet(dll) {
		return dll, nil
	}
	sets, err := b.apiSets()
	if err != nil {
		return "", err
	}
	if sets == nil {
		return "", blocked("import", Author, "%s: %s is an API set and needs the target's own map, which this backend does not give", what, dll)
	}
	host := sets.host(dll, importer)
	if host == "" {
		return "", blocked("import", Author, "%s: no module of this system stands for %s", what, dll)
	}
	return host, nil
}

func apiSet(dll string) bool {
	lower := strings.ToLower(dll)
	return strings.HasPrefix(lower, "api-") || strings.HasPrefix(lower, "ext-")
}
