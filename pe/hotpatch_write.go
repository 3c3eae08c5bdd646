package pe

import (
	"bytes"
	"fmt"
	"strings"
)

const (
	hotPatchSection = ".hotp"
	loadConfigSize  = 0x140 // of the load configurations we write: ends after the XFG pointers
)

// AddHotPatch gives a DLL a hot patch table: a new section ".hotp" with the
// table, a load configuration that points at it (an existing one is kept in
// place, or moved if it is too short to have the field), the import descriptors
// of RemoveImports dropped, sizes, directories and the checksum brought up to
// date. The result depends on nothing but the arguments and is read back before
// it is returned. Signed DLLs are refused: sign the result.
func AddHotPatch(dll []byte, spec HotPatchSpec) ([]byte, error) {
	im, err := Parse(bytes.NewReader(dll), int64(len(dll)))
	if err != nil {
		return nil, fmt.Errorf("cannot add a hot patch table: %w", err)
	}
	e := editor{im: im, b: bytes.Clone(dll)}
	if err := e.run(&spec); err != nil {
		return nil, fmt.Errorf("cannot add a hot patch table: %w", err)
	}
	if err := e.readBack(); err != nil {
		return nil, fmt.Errorf("cannot read back the hot patch table: %w", err)
	}
	return e.b, nil
}

func (e *editor) readBack() error {
	im, err := Parse(bytes.NewReader(e.b), int64(len(e.b)))
	if err != nil {
		return err
	}
	h, err := im.HotPatch()
	if err == nil && h == nil {
		return badRVA("load configuration", im.Directories[dirLoadConfig].RVA, "no hot patch table")
	}
	return err
}

// editor changes the bytes of a file. im is the file as it was.
type editor struct {
	im   *Image
	b    []byte
	rva  uint32 // of the new section
	sect []byte // its content
}

func (e *editor) run(spec *HotPatchSpec) error {
	im := e.im
	const isDLL = 0x2000 // IMAGE_FILE_DLL
	if im.Characteristics&isDLL == 0 {
		return badFile("file header", im.optional-2, "no DLL")
	}
	switch {
	case im.Directories[dirSecurity].RVA != 0:
		return badFile("optional header", e.directory(dirSecurity), "it is signed: sign the result instead")
	case im.Directories[dirBoundImport].RVA != 0:
		return badFile("optional header", e.directory(dirBoundImport), "its imports are bound")
	case im.ndirs <= dirLoadConfig:
		return badFile("optional header", im.optional+108, "%d data directories, no room for the load configuration", im.ndirs)
	}
	if err := spec.check(im); err != nil {
		return err
	}
	if err := e.removeImports(spec); err != nil {
		return err
	}
	end := uint64(im.SizeOfHeaders)
	for _, s := range im.Sections {
		end = max(end, uint64(s.RVA)+uint64(s.Extent()))
	}
	if end = alignUp(end, uint64(im.SectionAlignment)); end > MaxImageSize {
		return badFile("section table", im.table, "no room for another section at 0x%x", end)
	}
	e.rva = uint32(end)
	table, err := spec.encode()
	if err != nil {
		return err
	}
	if err := e.pointTo(table); err != nil {
		return err
	}
	return e.addSection()
}

// directory is the file offset of a data directory.
func (e *editor) directory(i int) int64 { return e.im.optional + 112 + 8*int64(i) }

func (e *editor) setDirectory(i int, d Directory) {
	le.PutUint32(e.b[e.directory(i):], d.RVA)
	le.PutUint32(e.b[e.directory(i)+4:], d.Size)
}

// raw gives the n bytes of the file that become rva, for writing.
func (e *editor) raw(where string, rva, n uint32) ([]byte, error) {
	if !e.im.backed(rva, uint64(n)) {
		return nil, badRVA(where, rva, "%d bytes are not in the file", n)
	}
	r, _ := e.im.runAt(rva)
	off := r.off + int64(rva-r.begin)
	return e.b[off : off+int64(n) : off+int64(n)], nil
}

// pointTo puts the table into the section and its RVA into the load configuration.
func (e *editor) pointTo(table []byte) error {
	im := e.im
	lc, err := im.LoadConfig()
	if err != nil {
		return err
	}
	switch {
	case lc == nil:
		lc = &LoadConfig{}
	case lc.HotPatchTableOffset != 0:
		return badRVA("load configuration", lc.RVA+lcHotPatch, "there is a hot patch table already")
	case lc.Hybrid():
		return badRVA("load configuration", lc.RVA+lcCHPE, "a hybrid image cannot be a hotpatch image")
	}
	if lc.Size >= lcHotPatchEnd {
		b, err := e.raw("load configuration", lc.RVA, lc.Size)
		if err != nil {
			return err
		}
		le.PutUint32(b[lcHotPatch:], e.place(table))
		// The kernel wants the directory to say what the structure says.
		e.setDirectory(dirLoadConfig, Directory{lc.RVA, lc.Size})
		return nil
	}
	moved := make([]byte, loadConfigSize)
	if err := im.ReadRVA(moved[:lc.Size], lc.RVA); err != nil {
		return err
	}
	le.PutUint32(moved, loadConfigSize)
	to := e.place(moved)
	if lc.Size > 0 {
		if err := e.moveRelocs(lc, to); err != nil {
			return err
		}
	}
	at := e.place(table)
	le.PutUint32(e.sect[to-e.rva+lcHotPatch:], at) // after place: it may move the bytes
	e.setDirectory(dirLoadConfig, Directory{to, loadConfigSize})
	return nil
}

// place appends b to the section, aligned to 8, and gives its RVA.
func (e *editor) place(b []byte) uint32 {
	for len(e.sect)%8 != 0 {
		e.sect = append(e.sect, 0)
	}
	at := e.rva + uint32(len(e.sect))
	e.sect = append(e.sect, b...)
	return at
}

// moveRelocs makes the pointers of the moved load configuration relocate at
// their new place: a copy of the relocation directory with one block more.
func (e *editor) moveRelocs(lc *LoadConfig, to uint32) error {
	list, err := e.im.Relocs()
	if err != nil {
		return err
	}
	var block []byte
	page := to &^ (pageSize - 1)
	for _, r := range relocsIn(list, lc.RVA, lc.RVA+lc.Size) {
		at := r.RVA - lc.RVA + to - page // a page has room: the section begins with the structure
		if r.RVA < lc.RVA || r.RVA+uint32(r.Width()) > lc.RVA+lc.Size {
			return badRVA("base relocations", r.RVA, "reaches over the end of the load configuration")
		}
		block = le.AppendUint16(block, uint16(at)|uint16(r.Type)<<12)
	}
	if block == nil {
		return nil
	}
	if len(block)%4 != 0 {
		block = append(block, 0, 0) // IMAGE_REL_BASED_ABSOLUTE: padding
	}
	d := e.im.Directories[dirReloc]
	if d.Size%4 != 0 {
		return badRVA("base relocations", d.RVA, "%d bytes, no multiple of 4", d.Size)
	}
	all := make([]byte, d.Size, d.Size+8+uint32(len(block)))
	if err := e.im.ReadRVA(all, d.RVA); err != nil {
		return err
	}
	all = le.AppendUint32(all, page)
	all = le.AppendUint32(all, 8+uint32(len(block)))
	all = append(all, block...)
	e.setDirectory(dirReloc, Directory{e.place(all), uint32(len(all))})
	return nil
}

// removeImports drops descriptors and closes the gaps. Every slot of theirs
// must be filled by an inverse record: nothing else would.
func (e *editor) removeImports(spec *HotPatchSpec) error {
	if len(spec.RemoveImports) == 0 {
		return nil
	}
	const where = "import descriptors"
	gone := make(map[string]bool) // lower-case DLL name → found
	for _, s := range spec.RemoveImports {
		gone[strings.ToLower(s)] = false
	}
	filled := make(map[uint32]bool)
	for _, r := range spec.Inverse {
		if r.Type != HotPatchFunction {
			filled[r.Place] = true
		}
	}
	imports, err := e.im.Imports()
	if err != nil {
		return err
	}
	for _, i := range imports {
		if _, ok := gone[strings.ToLower(i.DLL)]; !ok {
			continue
		}
		if i.Delay {
			return badRVA(where, i.Slot, "%s is imported with delay, which cannot be removed", i.DLL)
		}
		if !filled[i.Slot] {
			return badRVA(where, i.Slot, "removed import %s!%s has no record that fills its slot", i.DLL, i.Name)
		}
	}
	d := e.im.Directories[dirImport]
	w := e.im.window(where)
	kept, n := uint32(0), uint32(0)
	for ; d.RVA != 0; n++ { // Imports has read the same list: it ends
		desc, err := e.raw(where, d.RVA+20*n, 20)
		if err != nil {
			return err
		}
		x, err := e.im.ordinary(desc, d.RVA+20*n)
		if err != nil {
			return err
		}
		if x.name == 0 {
			break
		}
		name, err := w.name(x.name)
		if err != nil {
			return err
		}
		if _, ok := gone[strings.ToLower(name)]; ok {
			gone[strings.ToLower(name)] = true
			continue
		}
		to, err := e.raw(where, d.RVA+20*kept, 20)
		if err != nil {
			return err
		}
		copy(to, desc)
		kept++
	}
	for _, s := range spec.RemoveImports {
		if !gone[strings.ToLower(s)] {
			return badRVA(where, d.RVA, "no import of %q to remove", s)
		}
	}
	rest, err := e.raw(where, d.RVA+20*kept, 20*(n-kept))
	if err != nil {
		return err
	}
	clear(rest)
	switch {
	case kept == 0:
		d = Directory{}
	case d.Size == 20*(n+1): // the list alone; other linkers count names and slots in
		d.Size = 20 * (kept + 1)
	}
	e.setDirectory(dirImport, d)
	return nil
}

// addSection appends the section and brings the headers up to date.
func (e *editor) addSection() error {
	im := e.im
	n := len(im.Sections)
	at := im.table + 40*int64(n)
	if n == MaxSections || at+40 > int64(im.SizeOfHeaders) || bytes.ContainsFunc(e.b[at:at+40], func(r rune) bool { return r != 0 }) {
		return badFile("section table", at, "no room for another section in %d bytes of headers: strip debug sections, or link with fewer", im.SizeOfHeaders)
	}
	file := int64(im.FileAlignment)
	rawAt, rawSize := alignUp(int64(len(e.b)), file), alignUp(int64(len(e.sect)), file)
	if rawAt+rawSize > MaxImageSize || uint64(e.rva)+uint64(rawSize) > MaxImageSize-uint64(im.SectionAlignment) {
		return badFile("section table", at, "the file would be too large")
	}
	h := e.b[at : at+40]
	copy(h, hotPatchSection)
	le.PutUint32(h[8:], uint32(len(e.sect)))
	le.PutUint32(h[12:], e.rva)
	le.PutUint32(h[16:], uint32(rawSize))
	le.PutUint32(h[20:], uint32(rawAt))
	le.PutUint32(h[36:], 0x40000040) // initialized data, readable
	opt := e.b[im.optional:]
	le.PutUint16(e.b[im.optional-24+6:], uint16(n+1))
	le.PutUint32(opt[8:], le.Uint32(opt[8:])+uint32(rawSize)) // SizeOfInitializedData
	le.PutUint32(opt[56:], alignUp(e.rva+uint32(len(e.sect)), im.SectionAlignment))
	e.b = append(e.b, make([]byte, rawAt+rawSize-int64(len(e.b)))...)
	copy(e.b[rawAt:], e.sect)
	le.PutUint32(e.b[im.optional+64:], fileCheckSum(e.b, im.optional+64))
	return nil
}

// fileCheckSum is the optional header's CheckSum (CheckSumMappedFile): the sum
// of all 16-bit words with end-around carry, the field at off taken as zero, and
// the length of the file.
func fileCheckSum(b []byte, off int64) uint32 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i])
		if i+1 < len(b) {
			w |= uint32(b[i+1]) << 8
		}
		if int64(i) >= off && int64(i) < off+4 {
			w = 0
		}
		sum += w
		sum = sum&0xffff + sum>>16
	}
	return sum + uint32(len(b))
}
