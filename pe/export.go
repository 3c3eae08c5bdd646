package pe

import "strings"

const exportWhere = "export directory"

func (im *Image) exportDirectory(w *window) ([]byte, error) {
	d := im.Directories[dirExport]
	if d.RVA == 0 || d.Size == 0 {
		return nil, nil
	}
	if err := im.checkDirectory(exportWhere, d); err != nil {
		return nil, err
	}
	b, err := w.bytes(d.RVA, 40)
	if err != nil {
		return nil, err
	}
	return append([]byte(nil), b...), nil
}

// ExportName is the image's own name in its export directory, "" if it has none.
func (im *Image) ExportName() (string, error) {
	w := im.window(exportWhere)
	dir, err := im.exportDirectory(w)
	if err != nil || dir == nil {
		return "", err
	}
	rva := le.Uint32(dir[12:])
	if rva == 0 {
		return "", nil
	}
	return w.name(rva)
}

// Exports reads the export directory: by ordinal, several names of one ordinal
// in the order of the name table.
func (im *Image) Exports() ([]Export, error) {
	w := im.window(exportWhere)
	dir, err := im.exportDirectory(w)
	if err != nil || dir == nil {
		return nil, err
	}
	d := im.Directories[dirExport]
	base := le.Uint32(dir[16:])
	nfunc, nname := le.Uint32(dir[20:]), le.Uint32(dir[24:])
	funcs, names, ords := le.Uint32(dir[28:]), le.Uint32(dir[32:]), le.Uint32(dir[36:])
	if nfunc > MaxExports || nname > MaxExports {
		return nil, badRVA(exportWhere, d.RVA+20, "%d functions, %d names, at most %d", nfunc, nname, MaxExports)
	}
	if uint64(base)+uint64(nfunc) > 1<<32 {
		return nil, badRVA(exportWhere, d.RVA+16, "ordinal base %d too large", base)
	}
	byOrdinal := make(map[uint32][]string)
	ow, sw := im.window("export ordinals"), im.window("export names")
	for i := range nname {
		b, err := ow.bytes(ords+2*i, 2)
		if err != nil {
			return nil, err
		}
		o := uint32(le.Uint16(b))
		if o >= nfunc {
			return nil, badRVA("export ordinals", ords+2*i, "index %d of %d functions", o, nfunc)
		}
		rva, err := w.u32(names + 4*i)
		if err != nil {
			return nil, err
		}
		s, err := sw.name(rva)
		if err != nil {
			return nil, err
		}
		byOrdinal[o] = append(byOrdinal[o], s)
	}
	var list []Export
	for i := range nfunc {
		rva, err := w.u32(funcs + 4*i)
		if err != nil {
			return nil, err
		}
		if rva == 0 {
			continue // unused ordinal
		}
		e := Export{Ordinal: base + i, RVA: rva}
		switch {
		case rva >= d.RVA && rva-d.RVA < d.Size:
			if e.Forward, err = sw.name(rva); err != nil {
				return nil, err
			}
			if i := strings.LastIndexByte(e.Forward, '.'); i <= 0 || i == len(e.Forward)-1 {
				return nil, badRVA(exportWhere, rva, "forwarder %q is not DLL.Name", e.Forward)
			}
			e.RVA = 0
		case rva >= im.SizeOfImage:
			return nil, badRVA(exportWhere, funcs+4*i, "rva 0x%x outside the image", rva)
		}
		if len(byOrdinal[i]) == 0 {
			list = append(list, e)
		}
		for _, s := range byOrdinal[i] {
			e.Name = s
			list = append(list, e)
		}
	}
	return list, nil
}
