package pe

// HotPatchSpec is what AddHotPatch writes.
type HotPatchSpec struct {
	Sequence          uint32 // not 0
	MinSequence       uint32 // if not 0 the table becomes version 4, which alone can say it
	BaseTimeDateStamp uint32
	BaseCheckSum      uint32
	Machine           uint16 // of base and DLL
	Functions         []FunctionSpec
	Inverse           []HotPatchRecord // ABSOLUTE, INDIRECT and FUNCTION records of the DLL; only Type, Place and Target are read
	RemoveImports     []string         // DLL names whose import descriptors are dropped, letter case ignored
}

// FunctionSpec is one forward FUNCTION record.
type FunctionSpec struct {
	Place  uint32 // entry in the base image
	Target uint32 // new function in the DLL
	Extra  FunctionExtra
}

// check refuses what the reader, the kernel or the patcher would refuse later.
func (s *HotPatchSpec) check(im *Image) error {
	const where = "hot patch record for"
	switch {
	case s.Sequence == 0:
		return badRVA(hotPatchWhere, 0, "sequence number 0")
	case s.Machine != im.Machine:
		return badRVA(hotPatchWhere, 0, "base machine 0x%x, the DLL has 0x%x", s.Machine, im.Machine)
	case len(s.Functions)+len(s.Inverse) > MaxHotPatchRecords:
		return badRVA(hotPatchWhere, 0, "more than %d records", MaxHotPatchRecords)
	}
	exec := func(rva uint32) bool { s := im.SectionAt(rva); return s != nil && s.Exec() }
	entries := make(map[uint32]bool)
	for _, f := range s.Functions {
		r := HotPatchRecord{Type: HotPatchFunction, Place: f.Place, Target: f.Target}
		if reason := r.outside(im.Machine, MaxImageSize, im.SizeOfImage); reason != "" {
			return badRVA(where, f.Place, "%s", reason)
		}
		if !exec(f.Target) {
			return badRVA(where, f.Place, "new function 0x%x lies in no executable section", f.Target)
		}
		if entries[f.Place] {
			return badRVA(where, f.Place, "there are two")
		}
		entries[f.Place] = true
		if reason := f.Extra.wrong(f.Place); reason != "" {
			return badRVA(where, f.Place, "%s", reason)
		}
	}
	places := make(map[uint32]bool)
	for _, r := range s.Inverse {
		r.Inverse = true
		if reason := r.outside(im.Machine, im.SizeOfImage, MaxImageSize); reason != "" {
			return badRVA(where, r.Place, "%s", reason)
		}
		switch r.Type {
		case HotPatchFunction:
			if !exec(r.Place) {
				return badRVA(where, r.Place, "lies in no executable section")
			}
		case HotPatchAbsolute, HotPatchIndirect:
			first, last := im.SectionAt(r.Place), im.SectionAt(r.Place+7)
			if first == nil || first != last || first.Exec() {
				return badRVA(where, r.Place, "slot does not lie in one section of data")
			}
			for d := -7; d <= 7; d++ {
				if places[r.Place+uint32(d)] {
					return badRVA(where, r.Place, "overlaps another at 0x%x", r.Place+uint32(d))
				}
			}
			places[r.Place] = true
		default:
			return badRVA(where, r.Place, "type 0x%x, want ABSOLUTE, INDIRECT or FUNCTION", uint32(r.Type))
		}
	}
	return nil
}

// wrong says what no reader of ours accepts, "" if nothing.
func (f *FunctionExtra) wrong(place uint32) string {
	if f.Length == 0 || uint64(place)+uint64(f.Length) > MaxImageSize {
		return "function length 0 or beyond any image"
	}
	for _, c := range f.Original[min(16, f.Length):] {
		if c != 0 {
			return "original bytes beyond the function's length"
		}
	}
	if len(f.Ranges) > MaxFunctionRanges {
		return "too many ranges"
	}
	for _, g := range f.Ranges {
		if g.Length == 0 || uint64(g.RVA)+uint64(g.Length) > MaxImageSize {
			return "a range of length 0 or beyond any image"
		}
	}
	return ""
}

// chunk is a header word and the records under it.
type chunk struct {
	head    uint32
	records []HotPatchRecord
}

// chunks groups neighbours of one kind, at most 4095 together. The order of
// records is kept; inverse ones come first, as they are applied first.
func (s *HotPatchSpec) chunks() []chunk {
	var list []chunk
	put := func(head uint32, r HotPatchRecord) {
		if n := len(list); n == 0 || list[n-1].head != head || len(list[n-1].records) == chunkSize {
			list = append(list, chunk{head: head})
		}
		c := &list[len(list)-1]
		c.records = append(c.records, r)
	}
	for _, r := range s.Inverse {
		put(chunkInverse|uint32(r.Type), r)
	}
	for _, f := range s.Functions {
		put(uint32(HotPatchFunction), HotPatchRecord{Place: f.Place, Target: f.Target})
	}
	return list
}

// encode makes the table: header, list of one base, base, chunks, further ranges.
func (s *HotPatchSpec) encode() ([]byte, error) {
	version := uint32(3)
	if s.MinSequence != 0 {
		version = 4
	}
	head := hotPatchHeader[version]
	list := s.chunks()
	ranges := head + 4 + hotPatchBaseSize + 4 // grows by the chunks; the last word ends their list
	for _, c := range list {
		ranges += 4 + uint32(len(c.records))*4*(2+FunctionExtraWords)
	}
	var b, tail []byte
	u32 := func(v ...uint32) {
		for _, v := range v {
			b = le.AppendUint32(b, v)
		}
	}
	machine := uint32(HotPatchBaseAMD64)
	if s.Machine == MachineARM64 {
		machine = HotPatchBaseARM64
	}
	u32(version, 0, s.Sequence, head, 1, 0, FunctionExtraWords) // size follows when it is known
	if version == 4 {
		u32(s.MinSequence, 0)
	}
	u32(head + 4)
	u32(s.Sequence, machine, s.BaseTimeDateStamp, s.BaseCheckSum, 0, 0, head+4+hotPatchBaseSize, 0)
	functions := s.Functions
	for _, c := range list {
		u32(c.head | uint32(len(c.records)))
		for _, r := range c.records {
			u32(r.Place, r.Target)
			if c.head&chunkInverse != 0 {
				b = append(b, make([]byte, 4*FunctionExtraWords)...)
				continue
			}
			f := functions[0].Extra
			functions = functions[1:]
			at := uint32(0)
			if len(f.Ranges) > 0 {
				at = ranges + uint32(len(tail))
			}
			b = append(b, f.Original[:]...)
			u32(f.Length)
			b = append(b, f.SHA256[:]...)
			u32(at, f.Flags, 0)
			for _, g := range f.Ranges {
				tail = le.AppendUint32(tail, g.RVA)
				tail = le.AppendUint32(tail, g.Length)
				tail = append(tail, g.SHA256[:]...)
			}
			if len(f.Ranges) > 0 {
				tail = append(tail, make([]byte, 8)...)
			}
		}
	}
	u32(0)
	b = append(b, tail...)
	if len(b) > MaxHotPatchTable {
		return nil, badRVA(hotPatchWhere, 0, "%d bytes, at most %d", len(b), MaxHotPatchTable)
	}
	le.PutUint32(b[4:], uint32(len(b)))
	return b, nil
}
