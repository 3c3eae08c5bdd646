package pe

// Offsets in the 64-bit IMAGE_LOAD_CONFIG_DIRECTORY.
const (
	lcGuardTable  = 0x80
	lcGuardCount  = 0x88
	lcGuardFlags  = 0x90
	lcCHPE        = 0xC8
	lcHotPatch    = 0xF0
	lcHotPatchEnd = 0xF4 // Size that covers HotPatchTableOffset
	lcEHTable     = 0x108
	lcEHCount     = 0x110
	lcKnown       = 0x118
)

// GuardFlags of the load configuration (IMAGE_GUARD_*).
const (
	GuardCFInstrumented = 0x00000100
	GuardCFTable        = 0x00000400
	GuardEHContTable    = 0x00400000
	GuardXFGEnabled     = 0x00800000
)

// CFG tells whether the image checks indirect calls and lists its call targets.
func (c *LoadConfig) CFG() bool {
	return c.GuardFlags&GuardCFInstrumented != 0 && c.GuardFlags&GuardCFTable != 0
}

// XFG tells whether type hashes lie before functions and are checked.
func (c *LoadConfig) XFG() bool { return c.GuardFlags&GuardXFGEnabled != 0 }

// EHCont tells whether the image lists the places an exception may continue at.
func (c *LoadConfig) EHCont() bool { return c.GuardFlags&GuardEHContTable != 0 }

// Hybrid tells whether the image holds code of two architectures (ARM64X, ARM64EC, CHPE).
func (c *LoadConfig) Hybrid() bool { return c.CHPEMetadata != 0 }

// LoadConfig reads the load configuration and its CFG tables; nil, nil if the
// image has none. Fields beyond the structure's own Size are zero.
func (im *Image) LoadConfig() (*LoadConfig, error) {
	const where = "load configuration"
	d := im.Directories[dirLoadConfig]
	if d.RVA == 0 || d.Size == 0 {
		return nil, nil
	}
	if err := im.checkDirectory(where, d); err != nil {
		return nil, err
	}
	w := im.window(where)
	size, err := w.u32(d.RVA)
	if err != nil {
		return nil, err
	}
	if size < 4 || size > MaxLoadConfig || uint64(d.RVA)+uint64(size) > uint64(im.SizeOfImage) {
		return nil, badRVA(where, d.RVA, "size %d, want 4 to %d inside the image", size, MaxLoadConfig)
	}
	var b [lcKnown]byte
	if err := im.ReadRVA(b[:min(size, lcKnown)], d.RVA); err != nil {
		return nil, err
	}
	clearTorn(b[:], size)
	c := &LoadConfig{
		RVA:                 d.RVA,
		Size:                size,
		GuardFlags:          le.Uint32(b[lcGuardFlags:]),
		CHPEMetadata:        le.Uint64(b[lcCHPE:]),
		HotPatchTableOffset: le.Uint32(b[lcHotPatch:]),
	}
	stride := 4 + c.GuardFlags>>28
	err = im.guardTable("CFG function table", le.Uint64(b[lcGuardTable:]), le.Uint64(b[lcGuardCount:]), stride,
		func(rva uint32, flags uint8) {
			c.GuardFunctions = append(c.GuardFunctions, GuardFunction{RVA: rva, Flags: flags})
		})
	if err != nil {
		return nil, err
	}
	err = im.guardTable("EH continuation table", le.Uint64(b[lcEHTable:]), le.Uint64(b[lcEHCount:]), stride,
		func(rva uint32, _ uint8) { c.GuardEHCont = append(c.GuardEHCont, rva) })
	if err != nil {
		return nil, err
	}
	return c, nil
}

// clearTorn zeroes the fields that size covers only in part.
func clearTorn(b []byte, size uint32) {
	for _, f := range []struct{ off, width uint32 }{{lcGuardTable, 8}, {lcGuardCount, 8}, {lcGuardFlags, 4},
		{lcCHPE, 8}, {lcHotPatch, 4}, {lcEHTable, 8}, {lcEHCount, 8}} {
		if size < f.off+f.width {
			clear(b[f.off : f.off+f.width])
		}
	}
}

// guardTable reads count entries of stride bytes (an RVA, then flags) at the
// address va, which the loader has relocated.
func (im *Image) guardTable(where string, va, count uint64, stride uint32, add func(uint32, uint8)) error {
	if va == 0 || count == 0 {
		return nil
	}
	at := va - im.Base
	if at >= uint64(im.SizeOfImage) {
		return badRVA(where, im.Directories[dirLoadConfig].RVA, "address 0x%x outside the image", va)
	}
	if count > MaxGuardFunctions || at+count*uint64(stride) > uint64(im.SizeOfImage) {
		return badRVA(where, uint32(at), "%d entries of %d bytes, at most %d inside the image", count, stride, MaxGuardFunctions)
	}
	if !im.backed(uint32(at), count*uint64(stride)) {
		return badRVA(where, uint32(at), "%d entries end outside the section", count)
	}
	w := im.window(where)
	for i := range uint32(count) {
		b, err := w.bytes(uint32(at)+i*stride, int(stride))
		if err != nil {
			return err
		}
		rva, flags := le.Uint32(b), uint8(0)
		if stride > 4 {
			flags = b[4]
		}
		if rva >= im.SizeOfImage {
			return badRVA(where, uint32(at)+i*stride, "rva 0x%x outside the image", rva)
		}
		add(rva, flags)
	}
	return nil
}
