package pe

import (
	"fmt"
)

// Debug directory types (IMAGE_DEBUG_TYPE_*).
const (
	debugCodeView = 2
	debugExDLL    = 20
)

// debugData finds the first debug entry of the type and returns RVA and size of
// its data; 0, 0 if there is none. Entries whose data is not mapped into the
// image are passed over: memory and file must answer alike.
func (im *Image) debugData(w *window, kind uint32, sign string) (rva, size uint32, err error) {
	d := im.Directories[dirDebug]
	if d.RVA == 0 || d.Size == 0 {
		return 0, 0, nil
	}
	if err := im.checkDirectory(w.where, d); err != nil {
		return 0, 0, err
	}
	n := d.Size / 28
	if n > MaxDebugEntries {
		return 0, 0, badRVA(w.where, d.RVA, "%d entries, at most %d", n, MaxDebugEntries)
	}
	for i := range n {
		b, err := w.bytes(d.RVA+28*i, 28)
		if err != nil {
			return 0, 0, err
		}
		typ, size, rva := le.Uint32(b[12:]), le.Uint32(b[16:]), le.Uint32(b[20:])
		if typ != kind || rva == 0 || size < uint32(len(sign)) {
			continue
		}
		b, err = w.bytes(rva, len(sign))
		if err != nil {
			return 0, 0, err
		}
		if string(b) == sign {
			return rva, size, nil
		}
	}
	return 0, 0, nil
}

// RSDS reads the CodeView record that names the program database; nil, nil if
// the image has none.
func (im *Image) RSDS() (*RSDS, error) {
	w := im.window("debug directory")
	rva, size, err := im.debugData(w, debugCodeView, "RSDS")
	if err != nil || rva == 0 {
		return nil, err
	}
	if size < 24 {
		return nil, badRVA("RSDS record", rva, "%d bytes, want at least 24", size)
	}
	b, err := w.bytes(rva, int(min(size, 24+MaxNameLength)))
	if err != nil {
		return nil, err
	}
	r := &RSDS{Age: le.Uint32(b[20:])}
	copy(r.GUID[:], b[4:20])
	path := make([]byte, 0, len(b)-24)
	for _, c := range b[24:] {
		if c == 0 {
			break
		}
		if c < 0x20 || c == 0x7f {
			c = '?' // a label for people; control bytes must not reach a terminal
		}
		path = append(path, c)
	}
	r.Path = string(path)
	return r, nil
}

// String is "GUID/age": 8-4-4-4-12 lower-case hex digits, age in decimal.
func (r *RSDS) String() string {
	g := r.GUID
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x/%d",
		le.Uint32(g[0:]), le.Uint16(g[4:]), le.Uint16(g[6:]), g[8:10], g[10:16], r.Age)
}

// ExDLLCharacteristics reads the extended DLL characteristics (Ex… constants),
// debug entry type 20; 0 if the image has none.
func (im *Image) ExDLLCharacteristics() (uint32, error) {
	w := im.window("debug directory")
	rva, size, err := im.debugData(w, debugExDLL, "")
	if err != nil || rva == 0 {
		return 0, err
	}
	if size < 4 {
		return 0, badRVA("extended DLL characteristics", rva, "%d bytes, want 4", size)
	}
	return w.u32(rva)
}
