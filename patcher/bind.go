package patcher

import (
	"encoding/binary"
	"fmt"
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

// binder finds the values of all slots in one process. It reads only.
type binder struct {
	p       target.Process
	base    Loaded
	modules []Loaded
}

// bind resolves the inverse records and the ordinary imports of a hotpatch
// image. What cannot be bound is refused by name.
func (b *binder) bind(patch *Patch) ([]Bind, error) {
	var binds []Bind
	bound := map[uint32]bool{}
	for _, r := range patch.inverse {
		switch r.Type {
		case pe.HotPatchAbsolute:
			binds = append(binds, Bind{r.Place, uint64(b.base.Base) + uint64(r.Target), fmt.Sprintf("%s+%x", b.base.Name, r.Target), "pointer"})
			bound[r.Place] = true
		case pe.HotPatchIndirect:
			v, err := read(b.p, b.base.Base+target.Addr(r.Target), 8)
			if err != nil {
				return nil, fmt.Errorf("cannot read slot %x of %s: %w", r.Target, b.base.Name, err)
			}
			value := binary.LittleEndian.Uint64(v)
			if value == 0 {
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
	if lower := strings.ToLower(i.DLL); strings.HasPrefix(lower, "api-") || strings.HasPrefix(lower, "ext-") {
		return 0, blocked("import", Author, "%s: API sets need the target's own map, which this backend does not give", name)
	}
	m, ok := b.module(i.DLL)
	if !ok {
		return 0, blocked("import", Author, "%s: the process has not loaded %s", name, i.DLL)
	}
	if !permanent(m.Name) && !b.inClosure(m) {
		return 0, blocked("import", Author, "%s: %s could be unloaded before %s", name, i.DLL, b.base.Name)
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

func (b *binder) module(dll string) (Loaded, bool) {
	for _, m := range b.modules {
		if m.Is(dll) {
			return m, true
		}
	}
	return Loaded{}, false
}

// inClosure tells whether the base imports m statically, at any depth.
func (b *binder) inClosure(m Loaded) bool {
	seen := map[target.Addr]bool{b.base.Base: true}
	queue := []Loaded{b.base}
	for len(queue) > 0 {
		l := queue[0]
		queue = queue[1:]
		imports, err := l.Image.Imports()
		if err != nil {
			continue // not part of what can be shown; refusal follows
		}
		for _, i := range imports {
			d, ok := b.module(i.DLL)
			if !ok || i.Delay || seen[d.Base] {
				continue
			}
			if d.Base == m.Base {
				return true
			}
			seen[d.Base] = true
			queue = append(queue, d)
		}
	}
	return false
}

func (b *binder) export(m Loaded, name string, ordinal uint32, what string, depth int) (uint64, error) {
	if depth > maxForwards {
		return 0, blocked("import", Author, "%s: forwarded more than %d times", what, maxForwards)
	}
	exports, err := m.Image.Exports()
	if err != nil {
		return 0, fmt.Errorf("cannot read exports of %s: %w", m.Name, err)
	}
	for _, e := range exports {
		if (name != "" && e.Name != name) || (name == "" && e.Ordinal != ordinal) {
			continue
		}
		if e.Forward == "" {
			return uint64(m.Base) + uint64(e.RVA), nil
		}
		dll, symbol, ok := strings.Cut(e.Forward, ".")
		if !ok {
			return 0, blocked("import", Author, "%s: forwarder %q makes no sense", what, e.Forward)
		}
		next, ok := b.module(dll + ".dll")
		if !ok {
			return 0, blocked("import", Author, "%s: forwarded to %s, which is not loaded", what, dll)
		}
		var n uint32
		if _, err := fmt.Sscanf(symbol, "#%d", &n); err == nil {
			symbol = ""
		}
		return b.export(next, symbol, n, what, depth+1)
	}
	return 0, blocked("import", Author, "%s: %s exports no such symbol", what, m.Name)
}
