package sim

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// image is a PE file that processes of the machine map.
type image struct {
	pe      *pe.Image
	name    string // of its export directory, else of its file
	exports []pe.Export
	imports []pe.Import
	path    string
}

// file reads and parses a module's file, once.
func (m *Machine) file(x Module) (*image, error) {
	if x.Image == nil {
		if img := m.images[x.File]; img != nil {
			return img, nil
		}
	}
	b := x.Image
	if b == nil {
		f, err := m.files.open(x.File)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if b, err = readAtMost(f, maxImageBytes); err != nil {
			return nil, err
		}
	}
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	img := &image{pe: im, name: base(x.File), path: m.files.path(x.File)}
	if img.exports, err = im.Exports(); err != nil {
		return nil, err
	}
	if img.imports, err = im.Imports(); err != nil {
		return nil, err
	}
	if name, err := im.ExportName(); err == nil && name != "" {
		img.name = name
	}
	if x.Image == nil {
		m.images[x.File] = img
	}
	return img, nil
}

// load maps a module into a process: sections with their protections, base
// relocations done, imports bound to what is there already. DLL entry points
// do not run.
func (m *Machine) load(p *process, x Module) (target.Addr, error) {
	name := x.Name
	if name == "" {
		name = base(x.File)
	}
	fail := func(err error) (target.Addr, error) { return 0, fmt.Errorf("module %s: %w", name, err) }
	if name == "" || name == "." {
		return fail(errors.New("it has neither name nor file"))
	}
	if _, ok := p.modules[name]; ok {
		return fail(errors.New("it is mapped already"))
	}
	if len(p.modules) >= maxPerProcess {
		return fail(fmt.Errorf("there are %d modules", len(p.modules)))
	}
	img, err := m.file(x)
	if err != nil {
		return fail(err)
	}
	want, err := p.word(x.Base)
	if err != nil {
		return fail(err)
	}
	at := target.Addr(want)
	if at == 0 {
		if at, err = m.place(p, uint64(img.pe.SizeOfImage), moduleArea); err != nil {
			return fail(err)
		}
	}
	placed, err := img.pe.Place(uint64(at))
	if err != nil {
		return fail(err)
	}
	if err := m.bind(p, img, placed); err != nil {
		return fail(err)
	}
	sp := target.Span{Start: at, End: at + target.Addr(len(placed.Bytes))}
	if !p.mem.free(sp) {
		return fail(fmt.Errorf("base %s: %w", at, target.ErrTaken))
	}
	where := x.Path
	if where == "" {
		where = img.path
	}
	if err := m.mapSegments(p, x.Header, where, name, placed); err != nil {
		return fail(err)
	}
	p.modules[name] = module{base: at, span: sp, img: img}
	return at, nil
}

// mapSegments maps a placed image as the loader named by header does: with
// what the regions then say of the file.
func (m *Machine) mapSegments(p *process, header, where, name string, placed *pe.Placed) error {
	headers := uint32(pageSize)
	if header != "" && header != "file" && header != "anonymous" && header != "image" {
		return fmt.Errorf("unknown header %q", header)
	}
	for _, s := range placed.Segments {
		prot := target.Read
		if s.Exec {
			prot |= target.Exec
		}
		if s.Write {
			prot |= target.Write
		}
		parts := []pe.Span{s.Span}
		if s.Begin < headers && s.End > headers {
			parts = []pe.Span{{Begin: s.Begin, End: headers}, {Begin: headers, End: s.End}}
		}
		for _, part := range parts {
			r := target.Region{Start: target.Addr(placed.Base + uint64(part.Begin)), End: target.Addr(placed.Base + uint64(part.End)), Prot: prot}
			backed := header == "image" || header != "anonymous" && part.Begin == 0
			if backed {
				r.Kind, r.Path, r.Inode, r.Offset = target.File, where, m.node(where), uint64(part.Begin)
			}
			if err := p.mem.add(mapping{Region: r, module: name}); err != nil {
				return err
			}
		}
	}
	for off := 0; off < len(placed.Bytes); off += pageSize {
		c := page(placed.Bytes[off : off+pageSize])
		if c == zeros {
			continue
		}
		*p.mem.frame(target.Addr(placed.Base) + target.Addr(off)) = frame{mem: &c, cache: &c}
	}
	return nil
}

// bind fills the import slots: with the exports of modules mapped before, else
// with places in code of no module, as imports from the system are.
func (m *Machine) bind(p *process, img *image, placed *pe.Placed) error {
	for _, im := range img.imports {
		to, ok := p.export(im)
		if !ok {
			idle, err := m.idle(p)
			if err != nil {
				return err
			}
			to = idle + target.Addr(im.Slot%(pageSize/2))
		}
		if err := placed.Put64(im.Slot, uint64(to)); err != nil {
			return err
		}
	}
	return nil
}

func (p *process) export(im pe.Import) (target.Addr, bool) {
	for _, mod := range p.modules {
		if !strings.EqualFold(mod.img.name, im.DLL) {
			continue
		}
		for _, e := range mod.img.exports {
			if e.Forward == "" && (im.Name != "" && e.Name == im.Name || im.Name == "" && e.Ordinal == uint32(im.Ordinal)) {
				return mod.base + target.Addr(e.RVA), true
			}
		}
	}
	return 0, false
}

// unload unmaps a module. What we allocated near it stays.
func (m *Machine) unload(p *process, name string) error {
	mod, ok := p.modules[name]
	if !ok {
		return fmt.Errorf("there is no module %q", name)
	}
	p.mem.remove(mod.span)
	delete(p.modules, name)
	m.changed(p)
	return nil
}

// LoadModule maps a module into a running process and tells its base.
func (m *Machine) LoadModule(pid int, x Module) (target.Addr, error) {
	var at target.Addr
	err := m.with(pid, "load a module into", func(p *process) (err error) {
		if p.frozen != nil {
			return errFrozen
		}
		if at, err = m.load(p, x); err == nil {
			m.changed(p)
			m.tell(target.Event{Kind: target.Mapped, PID: pid})
		}
		return err
	})
	return at, err
}

// UnloadModule unmaps the module of that name.
func (m *Machine) UnloadModule(pid int, name string) error {
	return m.with(pid, "unload a module of", func(p *process) error {
		if p.frozen != nil {
			return errFrozen
		}
		return m.unload(p, name)
	})
}

// Module tells where the module of that name is mapped.
func (m *Machine) Module(pid int, name string) (target.Span, error) {
	var sp target.Span
	err := m.with(pid, "find a module of", func(p *process) error {
		mod, ok := p.modules[name]
		if !ok {
			return fmt.Errorf("there is no module %q", name)
		}
		sp = mod.span
		return nil
	})
	return sp, err
}

// Export tells where the export of a module lies: the place its callers call.
func (m *Machine) Export(pid int, mod, name string) (target.Addr, error) {
	var at target.Addr
	err := m.with(pid, "find an export of", func(p *process) error {
		x, ok := p.modules[mod]
		if !ok {
			return fmt.Errorf("there is no module %q", mod)
		}
		for _, e := range x.img.exports {
			if e.Name == name && e.Forward == "" {
				at = x.base + target.Addr(e.RVA)
				return nil
			}
		}
		return fmt.Errorf("module %s does not export %q", mod, name)
	})
	return at, err
}
