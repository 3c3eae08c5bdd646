package pe

// Section is one entry of the section table, names resolved.
type Section struct {
	Name            string
	RVA             uint32 // VirtualAddress
	VirtualSize     uint32
	RawOffset       uint32 // PointerToRawData
	RawSize         uint32 // SizeOfRawData
	Characteristics uint32
}

// Exec, Writable and Readable tell of the section's characteristics.
func (s Section) Exec() bool     { return s.Characteristics&0x20000000 != 0 }
func (s Section) Readable() bool { return s.Characteristics&0x40000000 != 0 }
func (s Section) Writable() bool { return s.Characteristics&0x80000000 != 0 }

// Export is one entry of the export directory. Forward is "DLL.Name" or
// "DLL.#7" for a forwarder, whose RVA is then 0.
type Export struct {
	Name    string // "" if exported by ordinal only
	Ordinal uint32
	RVA     uint32
	Forward string
}

// Import is one imported symbol and the slot in the import address table that holds it.
type Import struct {
	DLL     string
	Name    string // "" if by ordinal
	Ordinal uint16
	Hint    uint16
	Slot    uint32 // RVA of the 8-byte IAT slot
	Delay   bool   // from the delay import directory
}

// Reloc is one base relocation that changes bytes.
type Reloc struct {
	RVA  uint32
	Type uint8 // IMAGE_REL_BASED_*; only DIR64 (10) and HIGHLOW (3) occur, others are refused
}

// Width is the number of bytes the relocation covers.
func (r Reloc) Width() int {
	if r.Type == 3 {
		return 4
	}
	return 8
}

// Span is a run of bytes of the image by RVA; End is exclusive.
type Span struct{ Begin, End uint32 }

// UnwindSpan is one .pdata record, chained records joined: Primary is the entry
// of the function the span belongs to (its own Begin unless it is a chained
// or cold part).
type UnwindSpan struct {
	Span
	Primary uint32
	Handler uint32 // RVA of the exception or termination handler, 0 if none
}

// GuardFunction is one entry of a CFG function table (GFIDS).
type GuardFunction struct {
	RVA   uint32
	Flags uint8 // IMAGE_GUARD_FLAG_*: 0x08 = an XFG hash lies before the function
}

// XFG tells that an 8-byte type hash lies immediately before the function.
func (g GuardFunction) XFG() bool { return g.Flags&0x08 != 0 }

// LoadConfig holds the fields of IMAGE_LOAD_CONFIG_DIRECTORY that matter here.
// Fields the image's own Size does not cover are zero.
type LoadConfig struct {
	RVA, Size           uint32
	GuardFlags          uint32
	GuardFunctions      []GuardFunction
	GuardEHCont         []uint32 // RVAs
	CHPEMetadata        uint64   // virtual address, 0 if the image is not hybrid
	HotPatchTableOffset uint32   // RVA despite its name
}

// RSDS is the CodeView record that names the program database.
type RSDS struct {
	GUID [16]byte // as stored
	Age  uint32
	Path string
}

// Debug extended DLL characteristics (IMAGE_DLLCHARACTERISTICS_EX_*).
const (
	ExCETCompat          = 0x01
	ExForwardCFICompat   = 0x40
	ExHotpatchCompatible = 0x80
)

// Identity tells one build of one image from every other. Checksum is recorded,
// never compared: signing changes it. TextSHA256 covers every executable
// section in table order, VirtualSize bytes each, with base relocations undone.
type Identity struct {
	Machine       uint16 `json:"machine" toml:"machine"`
	SizeOfImage   uint32 `json:"size_of_image" toml:"size_of_image"`
	TimeDateStamp uint32 `json:"time_stamp" toml:"time_stamp"`
	CheckSum      uint32 `json:"checksum" toml:"checksum"`
	RSDS          string `json:"rsds" toml:"rsds"`                                 // "GUID/age", "" if none: 8-4-4-4-12 lower-case hex / decimal
	TextSHA256    string `json:"text_sha256" toml:"text_sha256"`                   // lower-case hex
	ImageBase     uint64 `json:"image_base,omitempty" toml:"image_base,omitempty"` // preferred base: a loader may overwrite the header's
}

// HotPatchType is the type code of a chunk of records.
type HotPatchType uint32

// Values of IMAGE_HOT_PATCH_CHUNK_TYPE (winnt.h).
const (
	HotPatchNone         HotPatchType = 0x00000
	HotPatchFunction     HotPatchType = 0x1C000
	HotPatchAbsolute     HotPatchType = 0x2C000
	HotPatchREL32        HotPatchType = 0x3C000
	HotPatchCallTarget   HotPatchType = 0x44000
	HotPatchIndirect     HotPatchType = 0x5C000
	HotPatchNoCallTarget HotPatchType = 0x64000
	HotPatchDynamicValue HotPatchType = 0x78000
)

// HotPatchInfo is IMAGE_HOT_PATCH_INFO, versions 1 to 4.
type HotPatchInfo struct {
	RVA               uint32 // where the table lies in the image
	Version           uint32
	Size              uint32 // bytes, all of the table
	SequenceNumber    uint32
	BufferOffset      uint32
	ExtraPatchSize    uint32 // 32-bit words after each record's two
	MinSequenceNumber uint32
	Flags             uint32
	Bases             []HotPatchBase
	Table             []byte // the raw table, Size bytes; offsets inside it count from its start
}

// HotPatchBase is IMAGE_HOT_PATCH_BASE with its records decoded.
type HotPatchBase struct {
	SequenceNumber        uint32
	Flags                 uint32
	OriginalTimeDateStamp uint32
	OriginalCheckSum      uint32
	SHA256                []byte // of IMAGE_HOT_PATCH_HASHES; nil if none
	SHA1                  []byte
	BufferOffset          uint32
	Records               []HotPatchRecord
}

// HotPatchRecord is one record of a chunk.
type HotPatchRecord struct {
	Type    HotPatchType
	Inverse bool     // changes the patch image; else the base image
	Place   uint32   // word 0
	Target  uint32   // word 1
	Extra   []uint32 // ExtraPatchSize words
	Offset  uint32   // of the record in the table
}

// FunctionRange is a further part of a replaced function: a cold part, a chained record.
type FunctionRange struct {
	RVA, Length uint32
	SHA256      [32]byte // relocations undone
}

// FunctionExtra is what our 16 extra words of a forward FUNCTION record hold.
type FunctionExtra struct {
	Original [16]byte // first min(16, Length) bytes, relocations undone, rest zero
	Length   uint32   // of the body
	SHA256   [32]byte // of the body, relocations undone
	Ranges   []FunctionRange
	Flags    uint32
}

// FunctionExtraWords is ExtraPatchSize of the tables we write.
const FunctionExtraWords = 16

// Symbol is one COFF symbol or export of a file, by RVA.
type Symbol struct {
	Name     string
	RVA      uint32
	Size     uint32 // bytes, 0 if the table does not say
	Function bool   // COFF type says function, or it lies in an executable section
	Exported bool
	External bool // storage class external
}
