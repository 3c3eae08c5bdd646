package pe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// skip skips t, or fails it where everything is to be tested.
func skip(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// need skips without the tools.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			skip(t, "needs "+tool)
		}
	}
}

// command runs a tool in dir and returns what it prints.
func command(t testing.TB, dir string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return out
}

// fixtures are the images committed for tests.
func fixtures(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("../testdata/fixtures/*/*.dll")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d fixtures, %v", len(files), err)
	}
	out := make(map[string][]byte)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.ToSlash(f[len("../testdata/fixtures/"):])] = b
	}
	return out
}

func parse(t testing.TB, b []byte) *Image {
	t.Helper()
	im, err := Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// must fails t on an error and gives the value otherwise.
func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// wantFormat demands a FormatError that says what.
func wantFormat(t testing.TB, err error, what string) {
	t.Helper()
	var f *FormatError
	if !errors.As(err, &f) || !strings.Contains(err.Error(), what) {
		t.Errorf("error %q, want a format error with %q", err, what)
	}
}

// put writes values one after the other at off, growing b: integers little
// endian, strings with their NUL.
func put(b []byte, off int, values ...any) []byte {
	for _, v := range values {
		var w []byte
		switch v := v.(type) {
		case string:
			w = append([]byte(v), 0)
		case []byte:
			w = v
		default:
			var err error
			if w, err = binary.Append(nil, binary.LittleEndian, v); err != nil {
				panic(err)
			}
		}
		if n := off + len(w); n > len(b) {
			b = append(b, make([]byte, n-len(b))...)
		}
		copy(b[off:], w)
		off += len(w)
	}
	return b
}

// forge makes images byte by byte, without a compiler and without this package.
type forge struct {
	machine uint16
	base    uint64
	flags   uint16 // of the file header
	dirs    [16]Directory
	sects   []forged
}

type forged struct {
	name  string
	rva   uint32
	size  uint32 // in memory
	flags uint32
	data  []byte // in the file
}

const (
	code = 0x60000020
	ro   = 0x40000040
	rw   = 0xC0000040
)

const (
	forgeOptional = 0x58 // offset of the optional header
	forgeTable    = forgeOptional + 240
	forgeHeaders  = 0x400
)

func (f *forge) bytes() []byte {
	b := put(nil, 0, "MZ")
	b = put(b, 0x3c, uint32(0x40))
	b = put(b, 0x40, []byte("PE\x00\x00"), f.machine, uint16(len(f.sects)), uint32(0x5eed), uint32(0), uint32(0), uint16(240), f.flags)
	end := uint32(0x1000)
	for _, s := range f.sects {
		end = (s.rva + s.size + 0xfff) &^ 0xfff
	}
	b = put(b, forgeOptional, uint16(0x20b))
	b = put(b, forgeOptional+24, f.base, uint32(0x1000), uint32(0x200))
	b = put(b, forgeOptional+56, end, uint32(forgeHeaders), uint32(0xc5), uint16(3), uint16(0x160))
	b = put(b, forgeOptional+108, uint32(16), f.dirs)
	at := forgeHeaders
	b = put(b, at-1, uint8(0))
	for i, s := range f.sects {
		raw := (len(s.data) + 0x1ff) &^ 0x1ff
		name := make([]byte, 8)
		copy(name, s.name)
		off := uint32(at)
		if raw == 0 {
			off = 0
		}
		b = put(b, forgeTable+40*i, name, s.size, s.rva, uint32(raw), off, uint32(0), uint32(0), uint32(0), s.flags)
		if raw > 0 {
			b = put(b, at, s.data)
			b = append(b, make([]byte, at+raw-len(b))...)
			at += raw
		}
	}
	return b
}

// sample is a hand-made image with one of everything. Its code is no code.
func sample() *forge {
	const base = 0x180000000
	text := bytes.Repeat([]byte{0xcc}, 0x300)
	text = put(text, 0x0fd, []byte{0xcc, 0xcc, 0xcc, 0x48, 0xb8}, uint64(base+0x4010)) // movabs rax at 0x1100: relocated at 0x1102
	rdata := put(nil, 0,                                                               // export directory at 0x2000
		uint32(0), uint32(0), uint32(0), uint32(0x2090), uint32(5), uint32(4), uint32(3), uint32(0x2028), uint32(0x2038), uint32(0x2044),
		uint32(0x1010), uint32(0), uint32(0x20b0), uint32(0x4008), // functions: code, unused, forwarder, data
		uint32(0x2098), uint32(0x209d), uint32(0x20a3), // names
		uint16(3), uint16(0), uint16(0)) // data has the first name, code has two
	rdata = put(rdata, 0x90, "own.dll", "data", "first", "second")
	rdata = put(rdata, 0xb0, "other.thing")
	// Imports at 0x2100: a.dll by name and ordinal, b.dll without lookup table in
	// the file; delayed at 0x2180: d.dll.
	rdata = put(rdata, 0x100, uint32(0x2200), uint32(0), uint32(0), uint32(0x2280), uint32(0x4100),
		uint32(0x2220), uint32(0), uint32(0), uint32(0x2288), uint32(0x4120), make([]byte, 20))
	rdata = put(rdata, 0x180, uint32(1), uint32(0x2290), uint32(0x4200), uint32(0x4140), uint32(0x2240), make([]byte, 12), make([]byte, 32))
	rdata = put(rdata, 0x200, uint64(0x22a0), uint64(1<<63|77), uint64(0))
	rdata = put(rdata, 0x220, uint64(0x22b0), uint64(0))
	rdata = put(rdata, 0x240, uint64(0x22c0), uint64(0))
	rdata = put(rdata, 0x280, "a.dll")
	rdata = put(rdata, 0x288, "B.DLL")
	rdata = put(rdata, 0x290, "d.dll")
	rdata = put(rdata, 0x2a0, uint16(9), "alpha")
	rdata = put(rdata, 0x2b0, uint16(0), "beta")
	rdata = put(rdata, 0x2c0, uint16(3), "delta")
	// Debug directory at 0x2300: one unmapped entry, RSDS, extended characteristics.
	rdata = put(rdata, 0x300, make([]byte, 12), uint32(2), uint32(40), uint32(0), uint32(0x200),
		make([]byte, 12), uint32(2), uint32(30), uint32(0x2360), uint32(0),
		make([]byte, 12), uint32(20), uint32(4), uint32(0x2380), uint32(0))
	rdata = put(rdata, 0x360, []byte("RSDS"), []byte{0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}, uint32(12), "x.pdb")
	rdata = put(rdata, 0x380, uint32(0x81))
	// Load configuration at 0x2400, CFG table at 0x2560 (two flag bytes), EH table behind.
	rdata = put(rdata, 0x400, uint32(0x140))
	rdata = put(rdata, 0x480, uint64(base+0x2560), uint64(2), uint32(0x20c00500))
	rdata = put(rdata, 0x508, uint64(base+0x2570), uint64(1))
	rdata = put(rdata, 0x560, uint32(0x1010), uint8(0), uint8(7), uint32(0x1100), uint8(8), uint8(0))
	rdata = put(rdata, 0x570, uint32(0x1108), uint8(0), uint8(0))
	data := put(nil, 0x1f, uint8(0))
	data = put(data, 0x10, uint64(base+0x1100))
	data = put(data, 0xffe-0xf00, uint16(0x1111)) // relocated over the end of a page in the second copy below
	data = append(data, make([]byte, 0x1000-len(data))...)
	data = put(data, 0xffc, uint64(base+0x1010))
	data = put(data, 0x1100, make([]byte, 8))
	// x64 unwind: plain with handler, chained, chained to chained, indirect.
	pdata := put(nil, 0, uint32(0x1010), uint32(0x1020), uint32(0x7100), uint32(0x1020), uint32(0x1030), uint32(0x7120),
		uint32(0x1030), uint32(0x1040), uint32(0x7140), uint32(0x1100), uint32(0x1110), uint32(0x7001), uint32(0), uint32(0), uint32(0))
	pdata = put(pdata, 0x100, []byte{1 | 1<<3, 4, 1, 0, 4, 0x42, 0, 0}, uint32(0x1200))
	pdata = put(pdata, 0x120, []byte{1 | 4<<3, 0, 0, 0}, uint32(0x1010), uint32(0x1020), uint32(0x7100))
	pdata = put(pdata, 0x140, []byte{2 | 4<<3, 0, 2, 0, 1, 2, 3, 4}, uint32(0x1020), uint32(0x1030), uint32(0x7120))
	reloc := put(nil, 0,
		uint32(0x4000), uint32(16), uint16(0xa010), uint16(0xaffc), uint16(0), uint16(0),
		uint32(0x1000), uint32(12), uint16(0xa102), uint16(0x3200), // out of order, and one of 32 bits
		uint32(0x2000), uint32(12), uint16(0xa480), uint16(0xa508))
	f := &forge{machine: MachineAMD64, base: base, flags: 0x2022, sects: []forged{
		{".text", 0x1000, 0x300, code, text},
		{".rdata", 0x2000, 0x1100, ro, rdata},
		{".data", 0x4000, 0x2400, rw, data},
		{".pdata", 0x7000, 0x200, ro, pdata},
		{".reloc", 0x8000, uint32(len(reloc)), 0x42000040, reloc},
	}}
	f.dirs[dirExport] = Directory{0x2000, 0xd0}
	f.dirs[dirImport] = Directory{0x2100, 60}
	f.dirs[dirException] = Directory{0x7000, 60}
	f.dirs[dirReloc] = Directory{0x8000, uint32(len(reloc))}
	f.dirs[dirDebug] = Directory{0x2300, 84}
	f.dirs[dirLoadConfig] = Directory{0x2400, 0x140}
	f.dirs[dirDelayImport] = Directory{0x2180, 64}
	return f
}
