package pe

// Imports reads the ordinary import directory, then the delayed one, each in
// its own order. In memory the names come from the lookup table: an image
// without one has lost them when it was bound, which is a FormatError.
func (im *Image) Imports() ([]Import, error) {
	rd := &importReader{im: im, w: im.window("import descriptors"), t: im.window("import lookup table"), s: im.window("import names")}
	if d := im.Directories[dirImport]; d.RVA != 0 {
		if err := rd.descriptors(d.RVA, 20, im.ordinary); err != nil {
			return nil, err
		}
	}
	if d := im.Directories[dirDelayImport]; d.RVA != 0 {
		if err := rd.descriptors(d.RVA, 32, im.delayed); err != nil {
			return nil, err
		}
	}
	return rd.list, nil
}

type importReader struct {
	im      *Image
	w, t, s *window
	list    []Import
}

// descriptor is what both kinds of import descriptor say: where the name, the
// lookup table and the address table lie. A zero name ends the list.
type descriptor struct {
	name, lookup, slots uint32
	delay               bool
}

// ordinary decodes IMAGE_IMPORT_DESCRIPTOR.
func (im *Image) ordinary(b []byte, at uint32) (descriptor, error) {
	d := descriptor{lookup: le.Uint32(b), name: le.Uint32(b[12:]), slots: le.Uint32(b[16:])}
	if d.slots == 0 {
		return descriptor{}, nil // the loader ends the list here, too
	}
	if d.lookup == 0 && d.name != 0 {
		if im.Mapped {
			return d, badRVA("import descriptors", at, "no lookup table: the names were overwritten when the image was loaded")
		}
		d.lookup = d.slots
	}
	return d, nil
}

// delayed decodes IMAGE_DELAYLOAD_DESCRIPTOR.
func (im *Image) delayed(b []byte, at uint32) (descriptor, error) {
	d := descriptor{name: le.Uint32(b[4:]), slots: le.Uint32(b[12:]), lookup: le.Uint32(b[16:]), delay: true}
	if d.name != 0 && le.Uint32(b)&1 == 0 {
		return d, badRVA("delay import descriptors", at, "addresses instead of RVAs, which only 32-bit images use")
	}
	return d, nil
}

func (rd *importReader) descriptors(rva uint32, size int, decode func([]byte, uint32) (descriptor, error)) error {
	for n := 0; ; n++ {
		at := rva + uint32(n*size)
		if n > MaxImportDLLs {
			return badRVA(rd.w.where, rva, "more than %d descriptors", MaxImportDLLs)
		}
		b, err := rd.w.bytes(at, size)
		if err != nil {
			return err
		}
		d, err := decode(b, at)
		if err != nil {
			return err
		}
		if d.name == 0 {
			return nil
		}
		dll, err := rd.s.name(d.name)
		if err != nil {
			return err
		}
		if err := rd.symbols(dll, d); err != nil {
			return err
		}
	}
}

func (rd *importReader) symbols(dll string, d descriptor) error {
	for i := uint32(0); ; i++ {
		b, err := rd.t.bytes(d.lookup+8*i, 8)
		if err != nil {
			return err
		}
		v := le.Uint64(b)
		if v == 0 {
			return nil
		}
		if len(rd.list) == MaxImports {
			return badRVA(rd.t.where, d.lookup, "more than %d imports", MaxImports)
		}
		imp := Import{DLL: dll, Slot: d.slots + 8*i, Delay: d.delay}
		if uint64(d.slots)+8*uint64(i)+8 > uint64(rd.im.SizeOfImage) {
			return badRVA(rd.t.where, d.lookup+8*i, "slot outside the image")
		}
		if v>>63 != 0 {
			if v<<1>>17 != 0 {
				return badRVA(rd.t.where, d.lookup+8*i, "ordinal 0x%x", v)
			}
			imp.Ordinal = uint16(v)
		} else {
			if v >= uint64(rd.im.SizeOfImage) {
				return badRVA(rd.t.where, d.lookup+8*i, "name at 0x%x outside the image", v)
			}
			h, err := rd.s.bytes(uint32(v), 2)
			if err != nil {
				return err
			}
			imp.Hint = le.Uint16(h)
			if imp.Name, err = rd.s.name(uint32(v) + 2); err != nil {
				return err
			}
		}
		rd.list = append(rd.list, imp)
	}
}
