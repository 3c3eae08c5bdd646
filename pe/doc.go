// Package pe reads PE/COFF images from files and from live memory, places them
// at an address, and writes hot patch tables into DLLs.
//
// Everything read is hostile until shown otherwise: each count and length that
// comes from the image is capped before it is used, the first oddity is an
// error that names offset and reason, nothing panics, and memory used is a
// small multiple of what was read. debug/pe supplies constants only. The
// package knows no process and does no I/O but through io.ReaderAt.
//
// Formats: Microsoft PE/COFF specification; IMAGE_HOT_PATCH_* of winnt.h.
package pe
