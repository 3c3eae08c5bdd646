package pe

// Flags of a chunk header (IMAGE_HOT_PATCH_CHUNK_*).
const (
	chunkInverse    = 0x80000000
	chunkObligatory = 0x40000000
	chunkReserved   = 0x3FF03000
	chunkType       = 0x000FC000
	chunkTargetRVA  = 0x00004000
	chunkSize       = 0x00000FFF // number of records, the most one chunk holds
)

// Flags of HotPatchBase (IMAGE_HOT_PATCH_BASE_*).
const (
	HotPatchBaseI386  = 0x04
	HotPatchBaseARM64 = 0x08
	HotPatchBaseAMD64 = 0x10
)

const (
	hotPatchBaseSize   = 32 // 28 before version 2
	hotPatchHashesSize = 52 // SHA-256, then SHA-1
	functionRangeSize  = 40 // rva, length, SHA-256
	hotPatchWhere      = "hot patch table"
)

// hotPatchHeader is the size of IMAGE_HOT_PATCH_INFO by version.
var hotPatchHeader = [...]uint32{1: 20, 2: 24, 3: 28, 4: 36}

// HotPatch reads the hot patch table that the load configuration points at; nil,
// nil if there is none. It is validated as the kernel does before it applies
// one (reserved bits, kinds allowed in each direction, extents inside the
// images, everything below Size) and by our caps.
func (im *Image) HotPatch() (*HotPatchInfo, error) {
	lc, err := im.LoadConfig()
	if err != nil || lc == nil || lc.HotPatchTableOffset == 0 {
		return nil, err
	}
	rva := lc.HotPatchTableOffset
	if d := im.Directories[dirLoadConfig]; d.Size != lc.Size {
		return nil, badRVA("load configuration", lc.RVA, "directory says %d bytes, the structure %d", d.Size, lc.Size)
	}
	if lc.CHPEMetadata != 0 {
		return nil, badRVA("load configuration", lc.RVA, "a hybrid image cannot be a hotpatch image")
	}
	var head [36]byte
	if err := im.ReadRVA(head[:20], rva); err != nil {
		return nil, err
	}
	h := &HotPatchInfo{RVA: rva, Version: le.Uint32(head[0:]), Size: le.Uint32(head[4:]), SequenceNumber: le.Uint32(head[8:])}
	if h.Version < 1 || h.Version > 4 {
		return nil, badRVA(hotPatchWhere, rva, "version %d, want 1 to 4", h.Version)
	}
	n := hotPatchHeader[h.Version]
	if h.Size < n || h.Size > MaxHotPatchTable || uint64(rva)+uint64(h.Size) > uint64(im.SizeOfImage) {
		return nil, badRVA(hotPatchWhere, rva+4, "size %d, want %d to %d inside the image", h.Size, n, MaxHotPatchTable)
	}
	if !im.backed(rva, uint64(h.Size)) {
		return nil, badRVA(hotPatchWhere, rva+4, "size %d ends outside the section", h.Size)
	}
	if h.SequenceNumber == 0 {
		return nil, badRVA(hotPatchWhere, rva+8, "sequence number 0")
	}
	if h.Table, err = im.readGrowing(rva, h.Size); err != nil {
		return nil, err
	}
	copy(head[:n], h.Table)
	h.BufferOffset = le.Uint32(head[20:])
	h.ExtraPatchSize = le.Uint32(head[24:])
	h.MinSequenceNumber = le.Uint32(head[28:])
	h.Flags = le.Uint32(head[32:])
	if h.ExtraPatchSize > MaxHotPatchExtra {
		return nil, badRVA(hotPatchWhere, rva+24, "%d extra words a record, at most %d", h.ExtraPatchSize, MaxHotPatchExtra)
	}
	if h.BufferOffset >= h.Size {
		return nil, badRVA(hotPatchWhere, rva+20, "buffer offset 0x%x, size 0x%x", h.BufferOffset, h.Size)
	}
	list, count := le.Uint32(head[12:]), le.Uint32(head[16:])
	if count == 0 || count > MaxHotPatchBases {
		return nil, badRVA(hotPatchWhere, rva+16, "%d base images, want 1 to %d", count, MaxHotPatchBases)
	}
	d := tableDecoder{im: im, h: h}
	for i := range count {
		at, err := d.word(list + 4*i)
		if err != nil {
			return nil, err
		}
		b, err := d.base(at)
		if err != nil {
			return nil, err
		}
		h.Bases = append(h.Bases, b)
	}
	return h, nil
}

// readGrowing reads n bytes at rva in pieces, so that a lying length in memory
// costs no more than what is really there.
func (im *Image) readGrowing(rva, n uint32) ([]byte, error) {
	var out []byte
	for at := uint32(0); at < n; {
		k := min(n-at, hashChunk)
		out = append(out, make([]byte, k)...)
		if err := im.ReadRVA(out[at:], rva+at); err != nil {
			return nil, err
		}
		at += k
	}
	return out, nil
}

type tableDecoder struct {
	im      *Image
	h       *HotPatchInfo
	records int
}

// part returns n bytes at off of the table.
func (d *tableDecoder) part(off, n uint32) ([]byte, error) {
	if uint64(off)+uint64(n) > uint64(d.h.Size) {
		return nil, d.bad(off, "%d bytes end outside the table of %d", n, d.h.Size)
	}
	return d.h.Table[off : off+n], nil
}

func (d *tableDecoder) word(off uint32) (uint32, error) {
	b, err := d.part(off, 4)
	if err != nil {
		return 0, err
	}
	return le.Uint32(b), nil
}

func (d *tableDecoder) bad(off uint32, format string, args ...any) error {
	return badRVA(hotPatchWhere, d.h.RVA+off, format, args...)
}

func (d *tableDecoder) base(at uint32) (HotPatchBase, error) {
	size := uint32(hotPatchBaseSize)
	if d.h.Version < 2 {
		size = 28
	}
	b, err := d.part(at, size)
	if err != nil {
		return HotPatchBase{}, err
	}
	out := HotPatchBase{
		SequenceNumber:        le.Uint32(b[0:]),
		Flags:                 le.Uint32(b[4:]),
		OriginalTimeDateStamp: le.Uint32(b[8:]),
		OriginalCheckSum:      le.Uint32(b[12:]),
	}
	integrity, integritySize, chunks := le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint32(b[24:])
	if size == hotPatchBaseSize {
		out.BufferOffset = le.Uint32(b[28:])
		if out.BufferOffset >= d.h.Size {
			return out, d.bad(at+28, "buffer offset 0x%x, size 0x%x", out.BufferOffset, d.h.Size)
		}
	}
	machine := uint32(HotPatchBaseAMD64)
	if d.im.Machine == MachineARM64 {
		machine = HotPatchBaseARM64
	}
	if m := out.Flags & (HotPatchBaseI386 | HotPatchBaseARM64 | HotPatchBaseAMD64); m != 0 && m&machine == 0 {
		return out, d.bad(at+4, "base flags 0x%x name another machine than the image's 0x%x", out.Flags, d.im.Machine)
	}
	if integrity != 0 || integritySize != 0 {
		if integritySize < hotPatchHashesSize {
			return out, d.bad(at+20, "%d bytes of hashes, want %d", integritySize, hotPatchHashesSize)
		}
		h, err := d.part(integrity, hotPatchHashesSize)
		if err != nil {
			return out, err
		}
		out.SHA256, out.SHA1 = h[:32:32], h[32:52:52]
	}
	out.Records, err = d.chunks(chunks)
	return out, err
}

func (d *tableDecoder) chunks(at uint32) ([]HotPatchRecord, error) {
	var list []HotPatchRecord
	for {
		head, err := d.word(at)
		if err != nil {
			return nil, err
		}
		if head == 0 {
			return list, nil
		}
		typ, inverse := HotPatchType(head&chunkType), head&chunkInverse != 0
		switch {
		case head&(chunkReserved|chunkObligatory) != 0:
			return nil, d.bad(at, "chunk header 0x%08x has reserved bits or OBLIGATORY", head)
		case !knownHotPatchType(typ):
			return nil, d.bad(at, "chunk header 0x%08x has an unknown type", head)
		case !inverse && typ != HotPatchFunction:
			return nil, d.bad(at, "chunk header 0x%08x: only function entries of the base image may be changed", head)
		}
		n := head & chunkSize
		if d.records += int(n); d.records > MaxHotPatchRecords {
			return nil, d.bad(at, "more than %d records", MaxHotPatchRecords)
		}
		at += 4
		// The chunk must lie in the table before its records are made.
		b, err := d.part(at, n*4*(2+d.h.ExtraPatchSize))
		if err != nil {
			return nil, err
		}
		extra := make([]uint32, n*d.h.ExtraPatchSize)
		for range n {
			r := HotPatchRecord{Type: typ, Inverse: inverse, Place: le.Uint32(b), Target: le.Uint32(b[4:]), Offset: at}
			r.Extra, extra = extra[:d.h.ExtraPatchSize:d.h.ExtraPatchSize], extra[d.h.ExtraPatchSize:]
			for i := range r.Extra {
				r.Extra[i] = le.Uint32(b[8+4*i:])
			}
			if err := d.check(r); err != nil {
				return nil, err
			}
			list = append(list, r)
			b = b[8+4*d.h.ExtraPatchSize:]
			at += 8 + 4*d.h.ExtraPatchSize
		}
	}
}

func knownHotPatchType(t HotPatchType) bool {
	switch t {
	case HotPatchFunction, HotPatchAbsolute, HotPatchREL32, HotPatchCallTarget,
		HotPatchIndirect, HotPatchNoCallTarget, HotPatchDynamicValue:
		return true
	}
	return false
}

// check holds the extents of a record against the images they lie in. How large
// the base image is the table does not say: there the cap on images stands.
func (d *tableDecoder) check(r HotPatchRecord) error {
	place, target := uint32(MaxImageSize), d.im.SizeOfImage
	if r.Inverse {
		place, target = d.im.SizeOfImage, MaxImageSize
	}
	if reason := r.outside(d.im.Machine, place, target); reason != "" {
		return d.bad(r.Offset, "%s", reason)
	}
	return nil
}

// outside says what of the record lies outside images of the given sizes, "" if nothing.
func (r HotPatchRecord) outside(machine uint16, place, target uint32) string {
	before, after := uint32(0), uint32(8)
	switch r.Type {
	case HotPatchFunction:
		if machine == MachineAMD64 {
			before = 6 // the pad before the entry
		}
	case HotPatchREL32:
		after = 4
	case HotPatchCallTarget, HotPatchNoCallTarget:
		after = 0
	}
	if after != 0 && (r.Place < before || uint64(r.Place)+uint64(after) > uint64(place)) {
		return "place outside its image"
	}
	if r.Type == HotPatchDynamicValue && r.Target == 0xffffffff {
		return "dynamic value -1"
	}
	if r.Type&chunkTargetRVA != 0 && uint64(r.Target)+8 > uint64(target) {
		return "target outside its image"
	}
	return ""
}

// Function decodes our 16 extra words of a forward FUNCTION record, the further
// ranges out of Table.
func (h *HotPatchInfo) Function(r HotPatchRecord) (FunctionExtra, error) {
	d := tableDecoder{h: h}
	var f FunctionExtra
	if r.Type != HotPatchFunction || r.Inverse {
		return f, d.bad(r.Offset, "no forward function record")
	}
	if len(r.Extra) != FunctionExtraWords {
		return f, d.bad(r.Offset, "%d extra words, ours are %d", len(r.Extra), FunctionExtraWords)
	}
	for i, w := range r.Extra[0:4] {
		le.PutUint32(f.Original[4*i:], w)
	}
	f.Length = r.Extra[4]
	for i, w := range r.Extra[5:13] {
		le.PutUint32(f.SHA256[4*i:], w)
	}
	ranges := r.Extra[13]
	f.Flags = r.Extra[14]
	switch {
	case f.Length == 0 || uint64(r.Place)+uint64(f.Length) > MaxImageSize:
		return f, d.bad(r.Offset, "function of %d bytes", f.Length)
	case r.Extra[15] != 0:
		return f, d.bad(r.Offset, "last extra word is 0x%x, not 0", r.Extra[15])
	}
	for _, c := range f.Original[min(16, f.Length):] {
		if c != 0 {
			return f, d.bad(r.Offset, "original bytes beyond the function's %d are not 0", f.Length)
		}
	}
	if ranges == 0 {
		return f, nil
	}
	for at := ranges; ; at += functionRangeSize {
		b, err := d.part(at, 8)
		if err != nil {
			return f, err
		}
		g := FunctionRange{RVA: le.Uint32(b), Length: le.Uint32(b[4:])}
		if g.RVA == 0 && g.Length == 0 {
			return f, nil
		}
		if b, err = d.part(at, functionRangeSize); err != nil {
			return f, err
		}
		copy(g.SHA256[:], b[8:])
		if g.Length == 0 || uint64(g.RVA)+uint64(g.Length) > MaxImageSize {
			return f, d.bad(at, "range of %d bytes at rva 0x%x", g.Length, g.RVA)
		}
		if len(f.Ranges) == MaxFunctionRanges {
			return f, d.bad(at, "more than %d ranges of one function", MaxFunctionRanges)
		}
		f.Ranges = append(f.Ranges, g)
	}
}
