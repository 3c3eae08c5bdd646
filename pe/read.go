package pe

import (
	"bytes"
	"fmt"
	"io"
)

// readAt reads exactly len(p) bytes at off of the underlying reader.
func (im *Image) readAt(p []byte, off int64, where string) error {
	if len(p) == 0 {
		return nil
	}
	n, err := im.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return &readError{where, off, len(p), im.Mapped, err}
}

// readError says what could not be read. It is put into words only when someone
// asks: reading tries a neighbourhood first, often where there is none.
type readError struct {
	where  string
	off    int64
	n      int
	mapped bool
	err    error
}

func (e *readError) Error() string {
	unit := "file offset"
	if e.mapped {
		unit = "rva"
	}
	return fmt.Sprintf("cannot read %s, %d bytes at %s 0x%x: %v", e.where, e.n, unit, e.off, e.err)
}

func (e *readError) Unwrap() error { return e.err }

// run is a part of the image, the headers or one section: RVAs begin to end,
// of which the first raw bytes lie at off of the reader and the rest is zero.
type run struct {
	begin, end uint32
	off        int64
	raw        uint32
}

func (im *Image) runAt(rva uint32) (run, bool) {
	if rva < im.SizeOfHeaders {
		return run{0, im.SizeOfHeaders, 0, im.SizeOfHeaders}, true
	}
	s := im.SectionAt(rva)
	if s == nil {
		return run{}, false
	}
	if im.Mapped {
		return run{s.RVA, s.RVA + s.Extent(), int64(s.RVA), s.Extent()}, true
	}
	return run{s.RVA, s.RVA + s.Extent(), int64(s.RawOffset), s.raw()}, true
}

// ReadRVA fills p with the bytes at rva. In a file the part of a section that
// has no raw data reads as zeros. A byte outside headers and sections is a
// FormatError.
func (im *Image) ReadRVA(p []byte, rva uint32) error {
	for at := uint64(rva); len(p) > 0; {
		var r run
		ok := at < MaxImageSize
		if ok {
			r, ok = im.runAt(uint32(at))
		}
		if !ok {
			return badRVA("image", rva, "%d bytes at rva 0x%x lie outside headers and sections", len(p), at)
		}
		skip := uint32(at) - r.begin
		n := min(uint32(min(len(p), MaxImageSize)), r.end-uint32(at))
		var k uint32 // bytes that are really there
		if skip < r.raw {
			k = min(n, r.raw-skip)
			if err := im.readAt(p[:k], r.off+int64(skip), "image"); err != nil {
				return err
			}
		}
		clear(p[k:n])
		p = p[n:]
		at += uint64(n)
	}
	return nil
}

// backed tells whether the file holds the n bytes at rva. In memory only reading tells.
func (im *Image) backed(rva uint32, n uint64) bool {
	r, ok := im.runAt(rva)
	return ok && uint64(rva-r.begin)+n <= uint64(r.raw)
}

// window reads tables and strings of an image through one small buffer, so
// that a live process is not asked once per word and a lying length costs
// nothing. What it returns is valid until the next call.
type window struct {
	im    *Image
	where string
	begin uint32
	buf   []byte
	store [windowSize]byte
	// lone is the page whose neighbourhood could not be read last, plus 1: from
	// there only what is asked for is read, not all of it in vain each time.
	lone uint32

	loaded, named int // bytes read, bytes of names given out
}

func (im *Image) window(where string) *window { return &window{im: im, where: where} }

// bytes returns n bytes at rva, n at most windowSize.
func (w *window) bytes(rva uint32, n int) ([]byte, error) {
	if uint64(rva)+uint64(n) > MaxImageSize {
		return nil, badRVA(w.where, rva, "%d bytes end outside any image", n)
	}
	if b, ok := w.have(rva); ok && len(b) >= n {
		return b[:n], nil
	}
	r, ok := w.im.runAt(rva)
	if !ok {
		return nil, badRVA(w.where, rva, "outside headers and sections")
	}
	begin := rva &^ (pageSize - 1) // headers and sections begin at pages
	end := min(r.end, begin+windowSize)
	if end >= rva+uint32(n) && w.lone != begin+1 {
		if w.load(begin, end-begin) == nil {
			b, _ := w.have(rva)
			return b[:n], nil
		}
		w.lone = begin + 1
	}
	// The neighbourhood cannot be read, or n bytes reach into the next section.
	if err := w.load(rva, uint32(n)); err != nil {
		return nil, fmt.Errorf("%s: %w", w.where, err)
	}
	return w.buf, nil
}

func (w *window) have(rva uint32) ([]byte, bool) {
	if rva < w.begin || rva-w.begin >= uint32(len(w.buf)) {
		return nil, false
	}
	return w.buf[rva-w.begin:], true
}

func (w *window) load(begin, n uint32) error {
	w.begin, w.buf = begin, nil
	if err := w.im.ReadRVA(w.store[:n], begin); err != nil {
		return err
	}
	w.buf = w.store[:n]
	w.loaded += int(n)
	return nil
}

func (w *window) u32(rva uint32) (uint32, error) {
	b, err := w.bytes(rva, 4)
	if err != nil {
		return 0, err
	}
	return le.Uint32(b), nil
}

// name reads a NUL-terminated name of 1 to MaxNameLength printable bytes.
// Control bytes are refused: names reach terminals and logs.
func (w *window) name(rva uint32) (string, error) {
	var out []byte
	for at := rva; ; {
		if _, err := w.bytes(at, 1); err != nil {
			return "", err
		}
		b, _ := w.have(at)
		i := bytes.IndexByte(b, 0)
		if i >= 0 {
			b = b[:i]
		}
		if len(out)+len(b) > MaxNameLength {
			return "", badRVA(w.where, rva, "name longer than %d bytes", MaxNameLength)
		}
		out = append(out, b...)
		if i >= 0 {
			break
		}
		at += uint32(len(b))
	}
	if len(out) == 0 {
		return "", badRVA(w.where, rva, "empty name")
	}
	for i, c := range out {
		if c < 0x20 || c == 0x7f {
			return "", badRVA(w.where, rva+uint32(i), "name holds byte 0x%02x", c)
		}
	}
	w.named += len(out)
	if most := min(MaxNameBytes, nameFactor*w.loaded+nameSlack); w.named > most {
		return "", badRVA(w.where, rva, "names of more than %d bytes in all", most)
	}
	return string(out), nil
}
