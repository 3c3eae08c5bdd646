package pehost

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"hotpatchd/pe"
)

// mapped is an image in our own memory.
type mapped struct {
	base, entry uintptr
}

// open opens the image that --image names.
func open(name string) (*os.File, error) {
	n, ok := strings.CutPrefix(name, "fd:")
	if !ok {
		return os.Open(name)
	}
	fd, err := strconv.ParseUint(n, 10, 16)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%q is no file that was handed down", name)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// load maps the image at a random base: sections with their own protections,
// base relocations done.
func load(c config) (*mapped, error) {
	f, err := open(c.image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxImage {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", c.image, maxImage)
	}
	im, err := pe.Parse(f, st.Size())
	if err != nil {
		return nil, err
	}
	if im.Machine != 0x8664 {
		return nil, fmt.Errorf("machine %#x, this host runs x86-64 (0x8664) only", im.Machine)
	}
	imports, err := im.Imports()
	if err != nil {
		return nil, err
	}
	if len(imports) > 0 {
		return nil, fmt.Errorf("it imports %s from %s; this host binds no imports", imports[0].Name, imports[0].DLL)
	}
	rva, err := exported(im, c.export)
	if err != nil {
		return nil, err
	}
	mem, err := reserve(uintptr(im.SizeOfImage))
	if err != nil {
		return nil, err
	}
	base := uintptr(unsafe.Pointer(&mem[0]))
	placed, err := im.Place(uint64(base))
	if err != nil {
		return nil, err
	}
	if err := fill(mem, placed); err != nil {
		return nil, err
	}
	if c.header == "file" {
		if err := mapHeader(mem, f); err != nil {
			return nil, err
		}
	}
	return &mapped{base: base, entry: base + uintptr(rva)}, nil
}

func exported(im *pe.Image, name string) (uint32, error) {
	list, err := im.Exports()
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		if e.Name == name && e.Forward == "" {
			if s := im.SectionAt(e.RVA); s == nil || !s.Exec() {
				return 0, fmt.Errorf("export %q is no code", name)
			}
			return e.RVA, nil
		}
	}
	return 0, fmt.Errorf("it does not export %q", name)
}

// The area for random bases: above what the Go heap uses first, below where
// the kernel puts mappings of its own choice. tries bounds the search in it; it
// is all but empty.
const (
	areaStart = 0x200_0000_0000
	areaEnd   = 0x5000_0000_0000
	tries     = 64
	grain     = 64 << 10 // allocation granularity of Windows
	pageSize  = 4096
)

const anonymous = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS

// reserve maps size bytes of zeros, writable, at a random base.
func reserve(size uintptr) ([]byte, error) {
	size = (size + pageSize - 1) &^ (pageSize - 1)
	var err error
	for range tries {
		var b [8]byte
		rand.Read(b[:])
		at := unsafe.Add(nil, areaStart+uintptr(binary.LittleEndian.Uint64(b[:])%((areaEnd-areaStart)/grain))*grain)
		var got unsafe.Pointer
		got, err = unix.MmapPtr(-1, 0, at, size, unix.PROT_READ|unix.PROT_WRITE, anonymous|unix.MAP_FIXED_NOREPLACE)
		if err == nil && got == at {
			return unsafe.Slice((*byte)(got), size), nil
		}
		if err == nil { // a kernel before 4.17 takes the address for a hint
			unix.MunmapPtr(got, size)
			err = errors.New("it was mapped elsewhere")
		}
	}
	return nil, fmt.Errorf("no room for %d bytes: %w", size, err)
}

// fill copies a placed image into the memory reserved for it and protects it.
func fill(mem []byte, placed *pe.Placed) error {
	copy(mem, placed.Bytes)
	for _, s := range placed.Segments {
		prot := unix.PROT_READ
		if s.Exec {
			prot |= unix.PROT_EXEC
		}
		if s.Write {
			prot |= unix.PROT_WRITE
		}
		if err := unix.Mprotect(mem[s.Begin:s.End], prot); err != nil {
			return fmt.Errorf("cannot protect %#x to %#x: %w", s.Begin, s.End, err)
		}
	}
	return nil
}

// mapHeader puts the file's own first page over the copy of the header, so
// that the mappings of this process name the file, as they do under Wine.
func mapHeader(mem []byte, f *os.File) error {
	at := unsafe.Pointer(&mem[0])
	if _, err := unix.MmapPtr(int(f.Fd()), 0, at, pageSize, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_FIXED); err != nil {
		return fmt.Errorf("cannot map the header: %w", err)
	}
	return nil
}

// stackSize is what a call has, above a page that is not mapped.
const stackSize = 256 << 10

// newStack maps a stack for calls and tells its top, 16-byte aligned.
func newStack() (uintptr, error) {
	got, err := unix.MmapPtr(-1, 0, nil, stackSize+pageSize, unix.PROT_READ|unix.PROT_WRITE, anonymous)
	if err != nil {
		return 0, fmt.Errorf("cannot map a stack: %w", err)
	}
	mem := unsafe.Slice((*byte)(got), stackSize+pageSize)
	if err := unix.Mprotect(mem[:pageSize], unix.PROT_NONE); err != nil {
		return 0, fmt.Errorf("cannot protect a stack: %w", err)
	}
	return uintptr(got) + stackSize + pageSize, nil
}
