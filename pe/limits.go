package pe

// Caps on what an image may claim. Each is well above what was seen in some
// 1,400 real images and far below what would hurt us.
const (
	// MaxSections is the limit of the PE specification and of the Windows loader.
	MaxSections = 96
	// MaxImageSize keeps every RVA below 2^31, so that sums of an RVA and a
	// length never wrap and a rel32 can span the image.
	MaxImageSize = 2<<30 - 64<<10
	// MaxHeaders bounds SizeOfHeaders: real headers have 512 to 4096 bytes.
	MaxHeaders = 1 << 20
	// MaxExports is the number of distinct ordinals; real images reach 25,000 names.
	MaxExports = 65536
	// MaxImports bounds imported symbols of one image; real images reach some thousands.
	MaxImports = 65536
	// MaxImportDLLs bounds import descriptors, ordinary and delayed each.
	MaxImportDLLs = 4096
	// MaxNameLength bounds one symbol or DLL name: MSVC cuts decorated names at 4096.
	MaxNameLength = 4096
	// MaxNameBytes bounds all names of one table together. Names may overlap in
	// the image: a small image must not unfold into a large answer, so they
	// also stay under nameFactor times what was read, and nameSlack.
	MaxNameBytes = 16 << 20
	// MaxDirectory bounds a data directory. The largest that are read whole are
	// relocations: an image of 100 MB has some hundred KB, each byte of which
	// takes four of ours.
	MaxDirectory = 16 << 20
	// MaxUnwindRecords bounds .pdata: images of 100 MB have some 60,000 records.
	MaxUnwindRecords = 1 << 20
	// MaxStringTable bounds the COFF string table, which is read whole.
	MaxStringTable = 64 << 20
	// MaxGuardFunctions bounds a CFG or EH continuation table; browsers have some hundred thousand.
	MaxGuardFunctions = 1 << 21
	// MaxLoadConfig bounds the load configuration's own size; today's is 0x148.
	MaxLoadConfig = 4096
	// MaxDebugEntries bounds the debug directory; real ones have up to 8 entries.
	MaxDebugEntries = 128
	// MaxSymbols bounds the COFF symbol table; unstripped images reach some hundred thousand.
	MaxSymbols = 1 << 21
	// MaxUnwindChain bounds how far a chained unwind record is followed; the
	// Windows unwinder gives up at 32 too.
	MaxUnwindChain = 32
	// MaxHotPatchTable bounds Size of IMAGE_HOT_PATCH_INFO: 65,536 records of
	// ours need 4.5 MiB.
	MaxHotPatchTable = 16 << 20
	// MaxHotPatchBases bounds BaseImageCount; newer kernels accept only 1.
	MaxHotPatchBases = 16
	// MaxHotPatchRecords bounds the records of all bases together.
	MaxHotPatchRecords = 65536
	// MaxHotPatchExtra bounds ExtraPatchSize in words; ours is 16.
	MaxHotPatchExtra = 256
	// MaxFunctionRanges bounds further ranges of one replaced function.
	MaxFunctionRanges = 1024
	// MaxPlaced bounds what Place lays out in our memory: hotpatch images are
	// small, and must lie within reach of a branch (ARM64: 128 MiB) besides.
	MaxPlaced = 64 << 20
)

const (
	pageSize = 4096
	// windowSize is how much of a table is read at once. A window costs one
	// read of a live process; 16 KiB hold 1,000 unwind records.
	windowSize = 16 << 10
	// hashChunk is the buffer of streamed hashing.
	hashChunk  = 64 << 10
	nameFactor = 4
	nameSlack  = 64 << 10
)

// Machine numbers that are parsed.
const (
	MachineAMD64 = 0x8664
	MachineARM64 = 0xAA64
)
