package agent

import (
	"bytes"
	"encoding/binary"
	"io/fs"
	"os"
	"testing/fstest"
)

// kernelDLL is the smallest image by the name of kernel32.dll that exports one
// function, a RET. Fixes of sequence 2 import it, so a process needs one to be
// patched. Layout: Microsoft PE/COFF specification.
func kernelDLL(export string) []byte {
	const page, file = 0x1000, 0x200
	name := "kernel32.dll\x00"
	b := make([]byte, 3*file)
	put := func(at int, values ...any) {
		for _, v := range values {
			var w bytes.Buffer
			_ = binary.Write(&w, binary.LittleEndian, v) // a buffer never fails
			at += copy(b[at:], w.Bytes())
		}
	}
	put(0, []byte("MZ"))
	put(0x3c, uint32(0x40))
	put(0x40, []byte("PE\x00\x00"), uint16(0x8664), uint16(2), uint32(0), uint32(0), uint32(0), uint16(240), uint16(0x2022),
		uint16(0x20b), uint16(0), uint32(file), uint32(file), uint32(0), uint32(0), uint32(page),
		uint64(0x7ff000000000), uint32(page), uint32(file), uint64(6), uint64(6),
		uint32(3*page), uint32(file), uint32(0), uint16(2), uint16(0x160),
		uint64(page), uint64(page), uint64(page), uint64(page), uint32(0), uint32(16),
		uint32(2*page), uint32(file)) // the first directory: exports
	put(0x40+24+240, [8]byte{'.', 't'}, uint32(1), uint32(page), uint32(file), uint32(file), [12]byte{}, uint32(0x60000020),
		[8]byte{'.', 'e'}, uint32(file), uint32(2*page), uint32(file), uint32(2*file), [12]byte{}, uint32(0x40000040))
	put(file, byte(0xc3))
	const dir = 2 * page
	put(2*file, uint32(0), uint32(0), uint32(0), uint32(dir+50), uint32(1), uint32(1), uint32(1),
		uint32(dir+40), uint32(dir+44), uint32(dir+48),
		uint32(page), uint32(dir+50+len(name)), uint16(0), []byte(name), []byte(export+"\x00"))
	return b
}

// overlay is the fixtures, and kernel32.dll beside them.
type overlay struct{ made fstest.MapFS }

func (o overlay) Open(name string) (fs.File, error) {
	if _, ok := o.made[name]; ok {
		return o.made.Open(name)
	}
	return os.DirFS(fixtures).Open(name)
}

func sceneFiles() fs.FS {
	return overlay{fstest.MapFS{"kernel32.dll": {Data: kernelDLL("GetCurrentThreadId")}}}
}
