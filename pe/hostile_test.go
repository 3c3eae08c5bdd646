package pe

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"testing"
)

// victims are small images with much in them.
func victims(t testing.TB) map[string][]byte {
	all := fixtures(t)
	out := map[string][]byte{"sample": withTable(table4())}
	for _, name := range []string{"demo/demo.dll", "clang/app.dll", "arm64/app.dll"} {
		out[name] = all[name]
		if all[name] == nil {
			t.Fatalf("no fixture %s", name)
		}
	}
	im := parse(t, all["clang/app.dll"])
	spec := HotPatchSpec{Sequence: 1, Machine: im.Machine, Functions: []FunctionSpec{{Place: 0x1000, Target: im.Sections[0].RVA,
		Extra: FunctionExtra{Length: 20, Ranges: []FunctionRange{{RVA: 1, Length: 1}}}}}}
	out["patched"] = must(AddHotPatch(all["clang/app.dll"], spec))(t)
	return out
}

// allocated is what f allocates in all, in bytes.
func allocated(f func()) uint64 {
	var a, b runtime.MemStats
	runtime.ReadMemStats(&a)
	f()
	runtime.ReadMemStats(&b)
	return b.TotalAlloc - a.TotalAlloc
}

// attack reads hostile variants of one image in every way. Nothing may panic;
// what is allocated stays in proportion to what there is to read: a fixed part
// for buffers (some twenty of 16 to 64 KiB) and a small multiple. Variants are
// measured together, to make do with one look at the heap.
func attack(t testing.TB, what string, mapped bool, variants ...[]byte) {
	t.Helper()
	defer func() {
		if x := recover(); x != nil {
			t.Fatalf("%s: %v", what, x)
		}
	}()
	most := uint64(0)
	n := allocated(func() {
		for _, b := range variants {
			most += uint64(1<<20 + 64*len(b))
			im, err := Parse(bytes.NewReader(b), int64(len(b)))
			if mapped {
				im, err = ParseMapped(bytes.NewReader(b), 0x7ff6_0000_0000)
			}
			if err != nil {
				continue
			}
			im.SetPreferredBase(0x180000000)
			_ = readers(im)
			if im.SizeOfImage < 1<<16 {
				if p, err := im.Place(0x10000); err == nil {
					_ = p.Put64(0x2000, 1)
				}
			}
		}
	})
	if n > most {
		t.Fatalf("%s: %d bytes allocated, at most %d", what, n, most)
	}
}

// mutants are b with the word at off replaced by all that may hurt.
func mutants(b []byte, off int) (out [][]byte) {
	old := le.Uint32(b[off:])
	for _, v := range []uint32{0, 1, old + 1, old - 1, old + 0x1000, old ^ 0x80, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffff000} {
		c := bytes.Clone(b)
		le.PutUint32(c[off:], v)
		out = append(out, c)
	}
	return out
}

// Every word of the headers and of everything the directories lead to, with
// every value that may hurt.
func TestEveryField(t *testing.T) {
	for name, b := range victims(t) {
		t.Run(name, func(t *testing.T) {
			for off := 0; off+4 <= len(b); off += 4 {
				if off > 0x600 && bytes.Equal(b[off-4:off+4], make([]byte, 8)) {
					continue // padding
				}
				if name != "sample" && off > 0x400 && off%20 != 0 {
					continue // the sample has it all, the others a fair part
				}
				attack(t, fmt.Sprintf("%s, word at 0x%x", name, off), false, mutants(b, off)...)
			}
		})
	}
}

// Laid out in memory the same fields are hostile too, and there they can
// reach everything.
func TestEveryFieldMapped(t *testing.T) {
	for name, file := range victims(t) {
		t.Run(name, func(t *testing.T) {
			p := must(parse(t, file).Place(0x7ff6_0000_0000))(t)
			for off := 0; off+4 <= len(p.Bytes); off += 4 {
				if off > 0x400 && (le.Uint32(p.Bytes[off:]) == 0 || name != "sample" && off%20 != 0) {
					continue
				}
				attack(t, fmt.Sprintf("%s, word at rva 0x%x", name, off), true, mutants(p.Bytes, off)...)
			}
		})
	}
}

func TestEveryTruncation(t *testing.T) {
	for name, b := range victims(t) {
		t.Run(name, func(t *testing.T) {
			for n := 0; n < len(b); n += 8 {
				var cuts [][]byte
				for i := n; i < min(n+8, len(b)); i++ {
					cuts = append(cuts, b[:i])
					if _, err := Parse(bytes.NewReader(b[:i]), int64(i)); err == nil && name == "sample" {
						t.Fatalf("accepted %d of %d bytes", i, len(b))
					}
				}
				attack(t, fmt.Sprintf("%s, %d bytes", name, n), false, cuts...)
			}
		})
	}
}

// vast is memory of any size that holds an image at its start and repeats a
// pattern behind it: a process that really maps what its headers claim.
type vast struct {
	head, pattern []byte
	read          int
}

func (v *vast) ReadAt(p []byte, off int64) (int, error) {
	v.read += len(p)
	if off < 0 || off > MaxImageSize {
		return 0, io.ErrUnexpectedEOF
	}
	n := 0
	if off < int64(len(v.head)) {
		n = copy(p, v.head[off:])
	}
	for i := n; i < len(p); i++ {
		p[i] = v.pattern[(off+int64(i)-min(off, 0x2000))%int64(len(v.pattern))]
	}
	return len(p), nil
}

// Directories that claim as much as they may, over memory that is really there.
func TestVastDirectories(t *testing.T) {
	f := sample()
	f.sects = []forged{{".text", 0x1000, 0x1000, code, nil}, {".data", 0x2000, 0x7f000000, rw, nil}}
	for _, pattern := range [][]byte{{0}, {0xff}, {1, 0, 0, 0}, {0, 0x20, 0, 0}, {0, 0x20, 0, 0, 12, 0, 0, 0, 0, 0xa0, 0, 0}, {'a', 'a', 'a', 'a', 'a', 'a', 'a', 0}, {8, 0x20, 0, 0, 0, 0, 0, 0}} {
		for i := range f.dirs {
			f.dirs[i] = Directory{0x2000, MaxDirectory}
		}
		f.dirs[dirException].Size = 8 * MaxUnwindRecords
		v := &vast{head: f.bytes()[:forgeHeaders], pattern: pattern}
		n := allocated(func() {
			im := must(ParseMapped(v, 0x10000))(t)
			if err := readers(im); err == nil && len(pattern) > 1 {
				t.Errorf("pattern % x: no error", pattern)
			}
			if _, err := im.Relocs(); err == nil && len(pattern) == 12 {
				t.Error("overlapping relocations accepted")
			}
		})
		t.Logf("pattern % x: %d bytes read, %d allocated", pattern, v.read, n)
		if n > uint64(4<<20+16*v.read) {
			t.Errorf("pattern % x: %d bytes allocated, %d read", pattern, n, v.read)
		}
	}
}

// Overlapping names must not make much of little.
func TestNamesOverlap(t *testing.T) {
	const n = 60000
	f := sample()
	d := put(nil, 0, make([]byte, 16), uint32(1), uint32(1), uint32(n), uint32(0x9040), uint32(0x9100), uint32(0x9100+4*n))
	d = put(d, 0x40, uint32(0x1000))
	names := uint32(0x9100 + 6*n)
	for i := range n {
		d = put(d, 0x100+4*i, names+uint32(i%3000))
	}
	d = put(d, 0x100+6*n, bytes.Repeat([]byte("x"), 4000), uint8(0))
	f.sects = append(f.sects, forged{".edata", 0x9000, uint32(len(d)), ro, d})
	f.dirs[dirExport] = Directory{0x9000, 0x40}
	im := parse(t, f.bytes())
	_, err := im.Exports()
	wantFormat(t, err, "in all")
}

// Memory that lies about the table's length is read no further than it is there.
func TestLyingTableSize(t *testing.T) {
	f := sample()
	f.sects[1].data = put(f.sects[1].data, 0x400+lcHotPatch, uint32(0x9000))
	f.sects = append(f.sects, forged{".hotp", 0x9000, MaxHotPatchTable, ro, put(nil, 0, uint32(3), uint32(MaxHotPatchTable), uint32(1), make([]byte, 0x100))})
	p := must(parse(t, f.bytes()).Place(0x10000))(t)
	var err error
	n := allocated(func() {
		im := must(ParseMapped(bytes.NewReader(p.Bytes[:0xa000]), p.Base))(t)
		_, err = im.HotPatch()
	})
	if err == nil || n > 1<<20 {
		t.Errorf("%v, %d bytes allocated", err, n)
	}
	// In a file, what is not there at all is refused at once.
	_, err = parse(t, f.bytes()).HotPatch()
	wantFormat(t, err, "outside the section")
}
