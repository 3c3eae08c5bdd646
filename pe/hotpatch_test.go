package pe

import (
	"bytes"
	stdpe "debug/pe"
	"encoding/binary"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// secondTable reads the hot patch table of a file a second time: with
// debug/pe's sections and encoding/binary's structures, into lines of text. It
// shares nothing with the decoder and checks nothing.
func secondTable(file []byte) (lines []string, err error) {
	defer func() {
		if x := recover(); x != nil {
			err = fmt.Errorf("%v", x)
		}
	}()
	f, err := stdpe.NewFile(bytes.NewReader(file))
	if err != nil {
		return nil, err
	}
	mem := map[uint32][]byte{}
	for _, s := range f.Sections {
		d, err := s.Data()
		if err != nil {
			return nil, err
		}
		mem[s.VirtualAddress] = d
	}
	at := func(rva uint32) *bytes.Reader {
		for begin, d := range mem {
			if rva >= begin && rva < begin+uint32(len(d)) {
				return bytes.NewReader(d[rva-begin:])
			}
		}
		panic(fmt.Sprintf("nothing at 0x%x", rva))
	}
	get := func(rva uint32, v any) {
		if err := binary.Read(at(rva), binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	dir := f.OptionalHeader.(*stdpe.OptionalHeader64).DataDirectory[10]
	var table uint32
	get(dir.VirtualAddress+240, &table)
	var info struct{ Version, Size, Sequence, List, Count, Buffer, Extra, MinSequence, Flags uint32 }
	var head [9]uint32
	var version uint32
	get(table, &version)
	get(table, head[:map[uint32]int{1: 5, 2: 6, 3: 7, 4: 9}[version]])
	b := new(bytes.Buffer)
	_ = binary.Write(b, binary.LittleEndian, head)
	_ = binary.Read(b, binary.LittleEndian, &info)
	lines = append(lines, fmt.Sprintf("table %+v", info))
	for i := range info.Count {
		var off uint32
		get(table+info.List+4*i, &off)
		var base struct{ Sequence, Flags, Stamp, CheckSum, Integrity, IntegritySize, Chunks uint32 }
		get(table+off, &base)
		lines = append(lines, fmt.Sprintf("base seq %d flags %x stamp %x sum %x hashes %v", base.Sequence, base.Flags, base.Stamp, base.CheckSum, base.IntegritySize > 0))
		for p := table + base.Chunks; ; {
			var head uint32
			get(p, &head)
			if p += 4; head == 0 {
				break
			}
			direction := "forward"
			if head>>31 == 1 {
				direction = "inverse"
			}
			for range head % 4096 {
				words := make([]uint32, 2+info.Extra)
				get(p, words)
				line := fmt.Sprintf("%s type %d of %x to %x %x", direction, head>>16&15, words[0], words[1], words[2:])
				if info.Extra == 16 && head == 0x1c000|head%4096 {
					for r := words[15]; r != 0; r += 40 {
						var rng struct {
							RVA, Length uint32
							Hash        [32]byte
						}
						get(table+r, &rng.RVA)
						get(table+r+4, &rng.Length)
						if rng.RVA|rng.Length == 0 {
							break
						}
						get(table+r, &rng)
						line += fmt.Sprintf(" range %x+%x %x", rng.RVA, rng.Length, rng.Hash)
					}
				}
				lines = append(lines, line)
				p += 8 + 4*info.Extra
			}
		}
	}
	return lines, nil
}

// firstTable puts what the decoder read into the same lines.
func firstTable(t testing.TB, h *HotPatchInfo) (lines []string) {
	list := uint32(0)
	count := uint32(len(h.Bases))
	if len(h.Table) >= 16 {
		list = binary.LittleEndian.Uint32(h.Table[12:])
	}
	lines = append(lines, fmt.Sprintf("table {Version:%d Size:%d Sequence:%d List:%d Count:%d Buffer:%d Extra:%d MinSequence:%d Flags:%d}",
		h.Version, h.Size, h.SequenceNumber, list, count, h.BufferOffset, h.ExtraPatchSize, h.MinSequenceNumber, h.Flags))
	for _, b := range h.Bases {
		lines = append(lines, fmt.Sprintf("base seq %d flags %x stamp %x sum %x hashes %v", b.SequenceNumber, b.Flags, b.OriginalTimeDateStamp, b.OriginalCheckSum, b.SHA256 != nil))
		for _, r := range b.Records {
			direction := "forward"
			if r.Inverse {
				direction = "inverse"
			}
			line := fmt.Sprintf("%s type %d of %x to %x %x", direction, r.Type>>16, r.Place, r.Target, r.Extra)
			if r.Type == HotPatchFunction && !r.Inverse && h.ExtraPatchSize == FunctionExtraWords {
				f, err := h.Function(r)
				if err != nil {
					t.Fatal(err)
				}
				for _, g := range f.Ranges {
					line += fmt.Sprintf(" range %x+%x %x", g.RVA, g.Length, g.SHA256)
				}
			}
			lines = append(lines, line)
		}
	}
	return lines
}

// sameTable holds both readers against each other.
func sameTable(t testing.TB, file []byte) *HotPatchInfo {
	t.Helper()
	h, err := parse(t, file).HotPatch()
	if err != nil || h == nil {
		t.Fatalf("table %v, %v", h, err)
	}
	second, err := secondTable(file)
	if err != nil {
		t.Fatal(err)
	}
	if first := firstTable(t, h); !reflect.DeepEqual(first, second) {
		t.Fatalf("the readers differ:\n%s\n\n%s", strings.Join(first, "\n"), strings.Join(second, "\n"))
	}
	return h
}

const tableAt = 0x600 // offset of the table in the sample's .rdata

// withTable is the sample with a hot patch table.
func withTable(table []byte) []byte {
	f := sample()
	f.sects[1].data = put(f.sects[1].data, 0x400+lcHotPatch, uint32(0x2000+tableAt))
	f.sects[1].data = put(f.sects[1].data, tableAt, table)
	return f.bytes()
}

// table4 is a table of version 4 with hashes and one record of each kind.
func table4() []byte {
	b := put(nil, 0, uint32(4), uint32(0), uint32(7), uint32(36), uint32(1), uint32(0), uint32(1), uint32(3), uint32(2),
		uint32(40),                                                                                          // list of bases
		uint32(7), uint32(0x13), uint32(0x11), uint32(0x22), uint32(72), uint32(52), uint32(124), uint32(0), // base
		bytes.Repeat([]byte{0xaa}, 32), bytes.Repeat([]byte{0xbb}, 20))
	b = put(b, 124,
		uint32(0x8001c001), uint32(0x1010), uint32(0x5000), uint32(1),
		uint32(0x8002c002), uint32(0x4020), uint32(0x6000), uint32(2), uint32(0x4028), uint32(0x6008), uint32(3),
		uint32(0x8003c001), uint32(0x4030), uint32(0x6000), uint32(4),
		uint32(0x80044001), uint32(0xffffffff), uint32(0x6010), uint32(5),
		uint32(0x8005c001), uint32(0x4038), uint32(0x6018), uint32(6),
		uint32(0x80064001), uint32(0), uint32(0x6020), uint32(7),
		uint32(0x80078001), uint32(0x4040), uint32(12), uint32(8),
		uint32(0x0001c002), uint32(0x70001010), uint32(0x1100), uint32(9), uint32(6), uint32(0x1108), uint32(10),
		uint32(0))
	return put(b, 4, uint32(len(b)))
}

func TestHotPatchVersions(t *testing.T) {
	v4 := table4()
	h := sameTable(t, withTable(v4))
	if h.Version != 4 || h.SequenceNumber != 7 || h.MinSequenceNumber != 3 || h.Flags != 2 || h.ExtraPatchSize != 1 || !bytes.Equal(h.Table, v4) || h.RVA != 0x2600 {
		t.Errorf("header %+v", h)
	}
	b := h.Bases[0]
	if len(b.Records) != 10 || !bytes.Equal(b.SHA256, bytes.Repeat([]byte{0xaa}, 32)) || !bytes.Equal(b.SHA1, bytes.Repeat([]byte{0xbb}, 20)) || b.OriginalTimeDateStamp != 0x11 || b.OriginalCheckSum != 0x22 || b.Flags != 0x13 {
		t.Errorf("base %+v", b)
	}
	if r := b.Records[8]; !reflect.DeepEqual(r, HotPatchRecord{HotPatchFunction, false, 0x70001010, 0x1100, []uint32{9}, uint32(len(v4) - 28)}) {
		t.Errorf("record %+v", r)
	}
	// The same records, without extra words, behind the older headers.
	for version, head := range map[uint32]uint32{1: 20, 2: 24, 3: 28} {
		base := head + 4
		chunks := base + 32
		if version == 1 {
			chunks = base + 28
		}
		b := put(nil, 0, version, uint32(0), uint32(9), head, uint32(1), make([]byte, head-20), base)
		b = put(b, int(base), uint32(9), uint32(0), uint32(1), uint32(2), uint32(0), uint32(0), chunks)
		b = put(b, int(chunks), uint32(0x8002c001), uint32(0x4020), uint32(0x6000), uint32(0x1c001), uint32(0x1010), uint32(0x1100), uint32(0))
		b = put(b, 4, uint32(len(b)))
		h := sameTable(t, withTable(b))
		if h.Version != version || len(h.Bases[0].Records) != 2 || h.Bases[0].Records[1].Target != 0x1100 || h.Bases[0].SHA256 != nil || h.MinSequenceNumber != 0 {
			t.Errorf("version %d: %+v", version, h)
		}
	}
}

// What the kernel's own validation refuses, and what our caps refuse.
func TestHotPatchRefuses(t *testing.T) {
	good := table4()
	const chunk = 124
	for _, c := range []struct {
		what string
		off  int
		v    any
		says string
	}{
		{"version 0", 0, uint32(0), "version 0"},
		{"version 5", 0, uint32(5), "version 5"},
		{"size under the header", 4, uint32(35), "size 35"},
		{"size over the cap", 4, uint32(MaxHotPatchTable + 1), "size"},
		{"size over the image", 4, uint32(0x7000), "size"},
		{"size over the section", 4, uint32(0x5000), "outside the section"},
		{"size under the chunks", 4, uint32(len(good) - 4), "outside the table"},
		{"sequence 0", 8, uint32(0), "sequence"},
		{"list outside", 12, uint32(len(good) - 3), "outside the table"},
		{"list huge", 12, uint32(0xfffffffe), "outside the table"},
		{"no base", 16, uint32(0), "base images"},
		{"many bases", 16, uint32(17), "base images"},
		{"second base is none", 16, uint32(2), ""}, // word 1 of the list is the base's sequence
		{"buffer outside", 20, uint32(len(good)), "buffer offset"},
		{"extra words", 24, uint32(257), "extra words"},
		{"extra words wrong", 24, uint32(2), ""},
		{"base outside", 36, uint32(len(good) - 31), "outside the table"},
		{"base of another machine", 44, uint32(8), "machine"},
		{"short hashes", 60, uint32(51), "hashes"},
		{"hashes outside", 56, uint32(len(good) - 51), "outside the table"},
		{"chunks outside", 64, uint32(len(good)), "outside the table"},
		{"base buffer outside", 68, uint32(len(good)), "buffer offset"},
		{"obligatory", chunk, uint32(0xC001c001), "OBLIGATORY"},
		{"reserved low", chunk, uint32(0x8001d001), "reserved"},
		{"reserved high", chunk, uint32(0x9001c001), "reserved"},
		{"none with records", chunk, uint32(0x80000001), "unknown type"},
		{"unknown type", chunk, uint32(0x80018001), "unknown type"},
		{"forward absolute", chunk, uint32(0x0002c001), "only function entries"},
		{"forward indirect", chunk, uint32(0x0005c001), "only function entries"},
		{"count beyond the table", chunk, uint32(0x8001cfff), "outside the table"},
		{"pad before the image", chunk + 4, uint32(5), "place outside"},
		{"entry beyond the image", chunk + 4, uint32(0x9000 - 7), "place outside"},
		{"target beyond any image", chunk + 8, uint32(MaxImageSize - 7), "target outside"},
		{"slot beyond the image", chunk + 20, uint32(0x9000 - 7), "place outside"},
		{"rel32 beyond the image", chunk + 48, uint32(0x9000 - 3), "place outside"},
		{"call target beyond any image", chunk + 68, uint32(MaxImageSize), "target outside"},
		{"dynamic value -1", chunk + 116, uint32(0xffffffff), "-1"},
		{"dynamic slot", chunk + 112, uint32(0xfffffff0), "place outside"},
		{"new function beyond the image", chunk + 132, uint32(0x9000 - 7), "target outside"},
		{"base entry beyond any image", chunk + 128, uint32(MaxImageSize - 7), "place outside"},
		{"no end", len(good) - 4, uint32(0x1c000), "outside the table"},
	} {
		h, err := parse(t, withTable(put(bytes.Clone(good), c.off, c.v))).HotPatch()
		if err == nil {
			t.Errorf("%s: accepted, %+v", c.what, h)
			continue
		}
		wantFormat(t, err, c.says)
	}
	// The outermost places that are still right.
	for _, c := range []struct {
		off int
		v   uint32
	}{{chunk + 4, 6}, {chunk + 4, 0x9000 - 8}, {chunk + 8, MaxImageSize - 8}, {chunk + 48, 0x9000 - 4}, {chunk + 132, 0x9000 - 8}, {44, 0}, {44, 3}} {
		if _, err := parse(t, withTable(put(bytes.Clone(good), c.off, c.v))).HotPatch(); err != nil {
			t.Errorf("0x%x at %d: %v", c.v, c.off, err)
		}
	}
	// Around the table.
	f := sample()
	f.sects[1].data = put(f.sects[1].data, 0x400+lcHotPatch, uint32(0x2000+tableAt))
	f.sects[1].data = put(f.sects[1].data, tableAt, good)
	f.dirs[dirLoadConfig].Size = 0x138
	_, err := parse(t, f.bytes()).HotPatch()
	wantFormat(t, err, "directory says")
	f.dirs[dirLoadConfig].Size = 0x140
	f.sects[1].data = put(f.sects[1].data, 0x400+lcCHPE, uint64(0x180002000))
	_, err = parse(t, f.bytes()).HotPatch()
	wantFormat(t, err, "hybrid")
	f.sects[1].data = put(f.sects[1].data, 0x400+lcCHPE, uint64(0))
	f.sects[1].data = put(f.sects[1].data, 0x400+lcHotPatch, uint32(0x8ff0))
	_, err = parse(t, f.bytes()).HotPatch()
	wantFormat(t, err, "outside")
}

// Many bases may share their chunks: the cap is on all records together.
func TestHotPatchRecordsInAll(t *testing.T) {
	const n = 4095
	f := sample()
	b := put(nil, 0, uint32(1), uint32(0), uint32(1), uint32(20), uint32(16))
	for range 16 {
		b = put(b, len(b), uint32(84))
	}
	b = put(b, 84, make([]byte, 24), uint32(112))
	for range 2 {
		b = put(b, len(b), uint32(0x80044000|n))
		for range n {
			b = put(b, len(b), uint32(1), uint32(2))
		}
	}
	b = put(b, len(b), uint32(0))
	b = put(b, 4, uint32(len(b)))
	f.sects = append(f.sects, forged{".t", 0x9000, uint32(len(b)), ro, b})
	f.sects[1].data = put(f.sects[1].data, 0x400+lcHotPatch, uint32(0x9000))
	_, err := parse(t, f.bytes()).HotPatch()
	wantFormat(t, err, "more than 65536 records")
	f.sects[5].data = put(b, 16, uint32(8))
	if h, err := parse(t, f.bytes()).HotPatch(); err != nil || len(h.Bases[7].Records) != 2*n {
		t.Errorf("8 bases: %v", err)
	}
}

func TestFunctionExtraRefuses(t *testing.T) {
	good := HotPatchRecord{Type: HotPatchFunction, Place: 0x1010, Target: 0x1100, Extra: make([]uint32, 16)}
	good.Extra[0], good.Extra[4] = 0x00112233, 3
	// Two ranges at 100, the end at 180.
	table := put(make([]byte, 200), 100, uint32(0x2000), uint32(5))
	table = put(table, 140, uint32(0x3000), uint32(6), bytes.Repeat([]byte{9}, 32))
	h := &HotPatchInfo{Size: 200, Table: table}
	with := func(i int, v uint32) HotPatchRecord {
		r := good
		r.Extra = append([]uint32(nil), good.Extra...)
		r.Extra[i] = v
		return r
	}
	if f, err := h.Function(with(13, 100)); err != nil || len(f.Ranges) != 2 || f.Ranges[1] != (FunctionRange{0x3000, 6, [32]byte(bytes.Repeat([]byte{9}, 32))}) || f.Original != [16]byte{0x33, 0x22, 0x11} || f.Length != 3 {
		t.Errorf("%+v, %v", f, err)
	}
	inverse, short, absolute := good, good, good
	inverse.Inverse, short.Extra, absolute.Type = true, good.Extra[:15], HotPatchAbsolute
	for what, r := range map[string]HotPatchRecord{
		"inverse": inverse, "short": short, "absolute": absolute,
		"no length":         with(4, 0),
		"length":            with(4, 0x80000000),
		"bytes past length": with(4, 2),
		"last word":         with(15, 1),
		"ranges outside":    with(13, 195),
		"ranges cut":        with(13, 165),
		"a range at 0":      with(13, 99),
	} {
		if f, err := h.Function(r); err == nil {
			t.Errorf("%s: accepted, %+v", what, f)
		} else {
			wantFormat(t, err, "hot patch table")
		}
	}
	h.Size, h.Table = 180, table[:180] // no end of the list
	_, err := h.Function(with(13, 100))
	wantFormat(t, err, "outside the table")
}

// The committed hotpatch images, by both readers.
func TestHotPatchFixtures(t *testing.T) {
	n := 0
	for name, b := range fixtures(t) {
		h, err := parse(t, b).HotPatch()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if h != nil {
			sameTable(t, b)
			n++
		}
	}
	if n == 0 {
		skip(t, "needs hotpatch images among the fixtures")
	}
}
