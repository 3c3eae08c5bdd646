package pe

import (
	"bytes"
	"encoding/binary"
	"io"
	"strconv"
	"sync"
)

var le = binary.LittleEndian

// Directory is one IMAGE_DATA_DIRECTORY.
type Directory struct{ RVA, Size uint32 }

// Indexes into Image.Directories (IMAGE_DIRECTORY_ENTRY_*). RVA of dirSecurity is a file offset.
const (
	dirExport      = 0
	dirImport      = 1
	dirException   = 3
	dirSecurity    = 4
	dirReloc       = 5
	dirDebug       = 6
	dirLoadConfig  = 10
	dirBoundImport = 11
	dirDelayImport = 13
)

// Image is a PE32+ image for amd64 or arm64: the fields of its headers, and
// methods that read its directories. Sections ascend and do not overlap. An Image may be used by several goroutines if its reader may.
type Image struct {
	Machine          uint16
	TimeDateStamp    uint32
	CheckSum         uint32
	SizeOfImage      uint32
	SizeOfHeaders    uint32
	EntryPoint       uint32
	SectionAlignment uint32
	FileAlignment    uint32
	ImageBase        uint64 // of the header; in memory a loader may have overwritten it

	Characteristics    uint16
	DLLCharacteristics uint16
	Subsystem          uint16

	Sections    []Section
	Directories [16]Directory
	Mapped      bool   // read from live memory
	Base        uint64 // load address; ImageBase for files

	r         io.ReaderAt
	size      int64 // of the file, 0 when mapped
	preferred uint64

	optional int64 // offset of the optional header
	table    int64 // offset of the section table
	symbols  uint32
	nsymbols uint32
	ndirs    uint32
	head     []byte // start of the headers, while they are parsed

	mu       sync.Mutex // guards what follows
	relocs   []Reloc
	relocsOK bool
}

// Parse reads the headers of the file in r, which has size bytes. Directories
// are read by the methods, when asked for.
func Parse(r io.ReaderAt, size int64) (*Image, error) {
	im := &Image{r: r, size: size}
	if err := im.parse(); err != nil {
		return nil, err
	}
	im.Base, im.preferred = im.ImageBase, im.ImageBase
	return im, nil
}

// ParseMapped reads the headers of an image that a loader has laid out in
// memory: an offset in r is an RVA, base is where RVA 0 lies. Nothing is known
// of what is mapped; reads outside are r's errors.
func ParseMapped(r io.ReaderAt, base uint64) (*Image, error) {
	im := &Image{r: r, Mapped: true, Base: base}
	if err := im.parse(); err != nil {
		return nil, err
	}
	im.preferred = im.ImageBase
	return im, nil
}

// SetPreferredBase tells the true preferred base of a mapped image. Windows
// overwrites the header's ImageBase in memory with the load address; a release
// knows what it was. On a file it changes nothing.
func (im *Image) SetPreferredBase(base uint64) {
	if im.Mapped {
		im.preferred = base
	}
}

// header returns n bytes of the headers at off. All common headers end in the
// first page: one read of a live process shall do for a whole image.
func (im *Image) header(where string, off int64, n int) ([]byte, error) {
	if off < 0 || off+int64(n) > MaxHeaders {
		return nil, im.badHeader(where, off, "%d bytes end beyond %d bytes of headers", n, MaxHeaders)
	}
	if !im.Mapped && off+int64(n) > im.size {
		return nil, badFile(where, off, "%d bytes needed, the file has %d", n, im.size)
	}
	if im.head == nil {
		im.head = make([]byte, pageSize)
		if !im.Mapped {
			im.head = im.head[:min(im.size, pageSize)]
		}
		if im.readAt(im.head, 0, where) != nil {
			im.head = im.head[:0] // then piece by piece, to say where it fails
		}
	}
	if off+int64(n) <= int64(len(im.head)) {
		return im.head[off : off+int64(n)], nil
	}
	p := make([]byte, n)
	if err := im.readAt(p, off, where); err != nil {
		return nil, err
	}
	return p, nil
}

func (im *Image) parse() error {
	if im.size < 0 {
		return badFile("DOS header", 0, "file size %d", im.size)
	}
	notPE := func(off int64, reason string) error {
		return &FormatError{Off: off, Where: "DOS header, file offset", Reason: reason, kind: ErrNotPE}
	}
	if !im.Mapped && im.size < 64 {
		return notPE(0, "too short for a PE image")
	}
	dos, err := im.header("DOS header", 0, 64)
	if err != nil {
		return err
	}
	if dos[0] != 'M' || dos[1] != 'Z' {
		return notPE(0, "no MZ signature")
	}
	pe := int64(le.Uint32(dos[0x3c:]))
	if pe%4 != 0 || pe < 4 || pe > MaxHeaders {
		return notPE(0x3c, "e_lfanew 0x"+strconv.FormatInt(pe, 16)+" is no offset of PE headers")
	}
	coff, err := im.header("PE headers", pe, 24+2)
	if err != nil {
		return err
	}
	if !bytes.Equal(coff[:4], []byte("PE\x00\x00")) {
		return notPE(pe, "no PE signature")
	}
	im.Machine = le.Uint16(coff[4:])
	nsect := int(le.Uint16(coff[6:]))
	im.TimeDateStamp = le.Uint32(coff[8:])
	im.symbols, im.nsymbols = le.Uint32(coff[12:]), le.Uint32(coff[16:])
	optSize := int(le.Uint16(coff[20:]))
	im.Characteristics = le.Uint16(coff[22:])
	im.optional = pe + 24
	im.table = im.optional + int64(optSize)
	switch magic := le.Uint16(coff[24:]); magic {
	case 0x20b:
	case 0x10b:
		err := im.badHeader("optional header", im.optional, "PE32, machine 0x%x: a 32-bit image", im.Machine)
		err.(*FormatError).kind = ErrNot64
		return err
	default:
		return im.badHeader("optional header", im.optional, "magic 0x%x is neither PE32 nor PE32+", magic)
	}
	if im.Machine != MachineAMD64 && im.Machine != MachineARM64 {
		return im.badHeader("file header", pe+4, "machine 0x%x, want 0x8664 (amd64) or 0xaa64 (arm64)", im.Machine)
	}
	if nsect > MaxSections {
		return im.badHeader("file header", pe+6, "%d sections, at most %d", nsect, MaxSections)
	}
	if optSize < 112 {
		return im.badHeader("file header", pe+20, "optional header of %d bytes, want at least 112", optSize)
	}
	if err := im.parseOptional(optSize); err != nil {
		return err
	}
	err = im.parseSections(nsect)
	im.head = nil
	return err
}

func (im *Image) parseOptional(size int) error {
	at := im.optional
	if size > 112+16*8 {
		size = 112 + 16*8 // anything more is padding
	}
	opt, err := im.header("optional header", at, size)
	if err != nil {
		return err
	}
	im.EntryPoint = le.Uint32(opt[16:])
	im.ImageBase = le.Uint64(opt[24:])
	im.SectionAlignment = le.Uint32(opt[32:])
	im.FileAlignment = le.Uint32(opt[36:])
	im.SizeOfImage = le.Uint32(opt[56:])
	im.SizeOfHeaders = le.Uint32(opt[60:])
	im.CheckSum = le.Uint32(opt[64:])
	im.Subsystem = le.Uint16(opt[68:])
	im.DLLCharacteristics = le.Uint16(opt[70:])
	im.ndirs = le.Uint32(opt[108:])
	n := min(im.ndirs, 16) // the loader looks at 16
	if int(n)*8 > size-112 {
		return im.badHeader("optional header", at+108, "%d data directories do not fit %d bytes", im.ndirs, size)
	}
	for i := range n {
		im.Directories[i] = Directory{le.Uint32(opt[112+8*i:]), le.Uint32(opt[116+8*i:])}
	}
	pow2 := func(v uint32) bool { return v != 0 && v&(v-1) == 0 }
	switch {
	case !pow2(im.SectionAlignment) || im.SectionAlignment < pageSize:
		return im.badHeader("optional header", at+32, "section alignment 0x%x, want a power of two of at least a page", im.SectionAlignment)
	case !pow2(im.FileAlignment) || im.FileAlignment < 512 || im.FileAlignment > im.SectionAlignment:
		return im.badHeader("optional header", at+36, "file alignment 0x%x, want a power of two from 512 to the section alignment", im.FileAlignment)
	case im.SizeOfImage == 0 || im.SizeOfImage > MaxImageSize:
		return im.badHeader("optional header", at+56, "size of image 0x%x, want 1 to 0x%x", im.SizeOfImage, MaxImageSize)
	case im.SizeOfHeaders > MaxHeaders || im.SizeOfHeaders > im.SizeOfImage:
		return im.badHeader("optional header", at+60, "size of headers 0x%x exceeds 0x%x or the image", im.SizeOfHeaders, MaxHeaders)
	case !im.Mapped && int64(im.SizeOfHeaders) > im.size:
		return im.badHeader("optional header", at+60, "size of headers 0x%x, the file has 0x%x bytes", im.SizeOfHeaders, im.size)
	case im.EntryPoint >= im.SizeOfImage:
		return im.badHeader("optional header", at+16, "entry point 0x%x outside the image", im.EntryPoint)
	}
	base := im.ImageBase
	if im.Mapped {
		base = im.Base
	}
	if base%pageSize != 0 || base+uint64(im.SizeOfImage) < base {
		return im.badHeader("optional header", at+24, "base 0x%x is not page-aligned or the image wraps around", base)
	}
	return nil
}

func (im *Image) parseSections(n int) error {
	if end := im.table + int64(n)*40; end > int64(im.SizeOfHeaders) {
		return im.badHeader("section table", im.table, "%d entries end at 0x%x, beyond the headers' 0x%x bytes", n, end, im.SizeOfHeaders)
	}
	raw, err := im.header("section table", im.table, n*40)
	if err != nil {
		return err
	}
	im.Sections = make([]Section, 0, n)
	next := uint64(im.SizeOfHeaders)
	limit := alignUp(uint64(im.SizeOfImage), uint64(im.SectionAlignment))
	for i := range n {
		b, at := raw[i*40:], im.table+int64(i)*40
		s := Section{
			Name:            string(bytes.TrimRight(b[:8], "\x00")),
			VirtualSize:     le.Uint32(b[8:]),
			RVA:             le.Uint32(b[12:]),
			RawSize:         le.Uint32(b[16:]),
			RawOffset:       le.Uint32(b[20:]),
			Characteristics: le.Uint32(b[36:]),
		}
		where := "section " + strconv.Itoa(i+1)
		switch end := uint64(s.RVA) + uint64(s.Extent()); {
		case uint64(s.RVA) < next:
			return im.badHeader(where, at+12, "rva 0x%x overlaps what lies before it, up to 0x%x", s.RVA, next)
		case s.RVA%im.SectionAlignment != 0:
			return im.badHeader(where, at+12, "rva 0x%x is no multiple of the section alignment 0x%x", s.RVA, im.SectionAlignment)
		case end > limit:
			return im.badHeader(where, at+8, "ends at 0x%x, the image at 0x%x", end, limit)
		default:
			next = end
		}
		if !im.Mapped && s.raw() != 0 {
			switch end := int64(s.RawOffset) + int64(s.RawSize); {
			case s.RawOffset%512 != 0:
				return im.badHeader(where, at+20, "raw data at 0x%x, want a multiple of 512", s.RawOffset)
			case end > im.size:
				return im.badHeader(where, at+16, "raw data ends at 0x%x, the file has 0x%x bytes", end, im.size)
			}
		}
		im.Sections = append(im.Sections, s)
	}
	im.resolveNames()
	return nil
}

// Extent is the number of bytes the section takes in memory: VirtualSize, or
// RawSize where that is zero, as the loader sees it.
func (s Section) Extent() uint32 {
	if s.VirtualSize == 0 {
		return s.RawSize
	}
	return s.VirtualSize
}

// raw is the number of bytes of Extent that the file holds; the rest is zero.
func (s Section) raw() uint32 {
	if s.RawOffset == 0 {
		return 0
	}
	return min(s.RawSize, s.Extent())
}

// SectionAt finds the section that holds rva; nil if none does.
func (im *Image) SectionAt(rva uint32) *Section {
	for i := range im.Sections {
		if s := &im.Sections[i]; rva >= s.RVA && rva-s.RVA < s.Extent() {
			return s
		}
	}
	return nil
}

func alignUp[T uint32 | uint64 | int64](v, a T) T { return (v + a - 1) &^ (a - 1) }
