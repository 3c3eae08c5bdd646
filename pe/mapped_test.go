package pe

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// mapped is the image as a loader would lay it out at base.
func mapped(t testing.TB, b []byte, base uint64) *Image {
	t.Helper()
	p := must(parse(t, b).Place(base))(t)
	return must(ParseMapped(bytes.NewReader(p.Bytes), base))(t)
}

// images are the fixtures and the sample.
func images(t testing.TB) map[string][]byte {
	m := fixtures(t)
	m["sample"] = sample().bytes()
	return m
}

// A file and its image in memory answer alike, wherever it lies.
func TestMappedEqualsFile(t *testing.T) {
	for name, b := range images(t) {
		f := parse(t, b)
		if f.Characteristics&1 != 0 {
			continue
		}
		want := must(f.Identity())(t)
		for _, base := range []uint64{0x7ff6_1234_0000, f.ImageBase, 0x10000} {
			m := mapped(t, b, base)
			if got := must(m.Identity())(t); got != want {
				t.Errorf("%s at 0x%x: identity\n%+v, want\n%+v", name, base, got, want)
			}
			for what, pair := range map[string][2]any{
				"exports": {must(f.Exports())(t), must(m.Exports())(t)},
				"imports": {must(f.Imports())(t), must(m.Imports())(t)},
				"relocs":  {must(f.Relocs())(t), must(m.Relocs())(t)},
				"load":    {must(f.LoadConfig())(t), must(m.LoadConfig())(t)},
				"unwind":  {must(f.UnwindSpans())(t), must(m.UnwindSpans())(t)},
				"rsds":    {must(f.RSDS())(t), must(m.RSDS())(t)},
			} {
				if what == "load" && f.Directories[dirLoadConfig].RVA != 0 && pair[0].(*LoadConfig).Hybrid() {
					continue
				}
				if !reflect.DeepEqual(pair[0], pair[1]) {
					t.Errorf("%s at 0x%x: %s differ", name, base, what)
				}
			}
		}
	}
}

// A loader may write the load address into the header: then only the true
// preferred base makes memory canonical.
func TestPreferredBase(t *testing.T) {
	for name, b := range images(t) {
		f := parse(t, b)
		want := must(f.Identity())(t)
		base := uint64(0x7ff6_1234_0000)
		p := must(f.Place(base))(t)
		put(p.Bytes, int(f.optional)+24, base)
		m := must(ParseMapped(bytes.NewReader(p.Bytes), base))(t)
		if name == "sample" {
			if got := must(m.Identity())(t); got.TextSHA256 == want.TextSHA256 || got.ImageBase != base {
				t.Errorf("identity without the preferred base: %+v", got)
			}
		}
		m.SetPreferredBase(f.ImageBase)
		if got := must(m.Identity())(t); got != want {
			t.Errorf("%s: identity %+v, want %+v", name, got, want)
		}
		head := make([]byte, f.SizeOfHeaders)
		if err := m.Canonical(head, 0); err != nil || !bytes.Equal(head, b[:f.SizeOfHeaders]) {
			t.Errorf("%s: headers differ, %v", name, err)
		}
	}
}

// Identity by hand: whole sections at once, with another reader.
func TestIdentityByHand(t *testing.T) {
	f := sample()
	f.sects[3].flags |= 0x20000000 // a second executable section, zero-filled at its end
	f.sects[3].size = 0x23000
	f.sects[4].rva = 0x2a000
	f.dirs[dirReloc].RVA = 0x2a000
	h := sha256.New()
	h.Write(f.sects[0].data)
	h.Write(append(bytes.Clone(f.sects[3].data), make([]byte, 0x23000-len(f.sects[3].data))...))
	id := must(parse(t, f.bytes()).Identity())(t)
	want := Identity{0x8664, 0x2b000, 0x5eed, 0xc5, "00112233-4455-6677-8899-aabbccddeeff/12", hex.EncodeToString(h.Sum(nil)), 0x180000000}
	if id != want {
		t.Errorf("got  %+v\nwant %+v", id, want)
	}
}

// Any run of bytes of memory is canonical, whatever relocated fields its ends cut.
func TestCanonicalAnyRun(t *testing.T) {
	b := sample().bytes()
	file := parse(t, b)
	rapid.Check(t, func(r *rapid.T) {
		base := rapid.Uint64Range(1, 1<<34).Draw(r, "base") << 12
		m := mapped(t, b, base)
		s := rapid.SampledFrom(file.Sections[:4]).Draw(r, "section")
		begin := rapid.Uint32Range(0, s.Extent()-1).Draw(r, "begin")
		end := rapid.Uint32Range(begin, min(begin+rapid.SampledFrom([]uint32{1, 9, 64, 0x3000}).Draw(r, "most"), s.Extent())).Draw(r, "end")
		if rapid.Bool().Draw(r, "near a relocation") {
			x := rapid.SampledFrom(must(file.Relocs())(t)).Draw(r, "relocation")
			begin = x.RVA - 8 + rapid.Uint32Range(0, 16).Draw(r, "begin")
			end = begin + rapid.Uint32Range(0, 16).Draw(r, "length")
			s = *file.SectionAt(x.RVA)
			begin, end = begin-s.RVA, end-s.RVA
		}
		got, want := make([]byte, end-begin), make([]byte, end-begin)
		if err := m.Canonical(got, s.RVA+begin); err != nil {
			r.Fatal(err)
		}
		if err := file.ReadRVA(want, s.RVA+begin); err != nil {
			r.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			r.Fatalf("0x%x to 0x%x of %s: %x, want %x", begin, end, s.Name, got, want)
		}
	})
}

// A site may cover a part of a relocated field: memory holds a jump there, and
// the rest of the field was made with a carry out of bytes that are gone.
func TestOverlayInRelocatedField(t *testing.T) {
	b := sample().bytes()
	file := parse(t, b)
	want := make([]byte, 0x60)
	if err := file.ReadRVA(want, 0x10d0); err != nil {
		t.Fatal(err)
	}
	// Bases that carry out of one byte of the field into the next, or not.
	for _, base := range []uint64{0x1_ffff_f000, 0x7ff6_8000_0000, 0x1_7fff_f000, 0x2_0fed_c000, 0xff_fffe_0000_0000} {
		p := must(file.Place(base))(t)
		for begin := uint32(0x10f8); begin < 0x1110; begin++ {
			for n := range uint32(16) {
				for _, jump := range []byte{0x00, 0xe9, 0xff} {
					site := want[begin-0x10d0:][:n]
					mem := bytes.Clone(p.Bytes)
					copy(mem[begin:], bytes.Repeat([]byte{jump}, int(n)))
					m := must(ParseMapped(bytes.NewReader(mem), base))(t)
					// From reads that begin and end anywhere, too.
					for _, at := range []uint32{0x10d0, begin, begin + n/2, 0x1104} {
						got := make([]byte, 0x1130-at-n)
						if err := m.CanonicalWith(got, at, Overlay{begin, site}); err != nil {
							t.Fatal(err)
						}
						if !bytes.Equal(got, want[at-0x10d0:][:len(got)]) {
							t.Fatalf("base 0x%x, site 0x%x+%d of %02x, from 0x%x:\n% x, want\n% x", base, begin, n, jump, at, got, want[at-0x10d0:][:len(got)])
						}
					}
				}
			}
		}
	}
	// The hash takes the overlay as well, and only where it lies.
	id := must(file.Identity())(t)
	p := must(file.Place(0x7ff6_8000_0000))(t)
	copy(p.Bytes[0x1100:], "jump!")
	m := must(ParseMapped(bytes.NewReader(p.Bytes), p.Base))(t)
	if got := must(m.Identity(Overlay{0x1100, want[0x30:0x35]}))(t); got != id {
		t.Errorf("%+v, want %+v", got, id)
	}
	if got := must(m.Identity(Overlay{0x1101, want[0x31:0x35]}))(t); got == id {
		t.Error("one byte of the jump was not seen")
	}
}

func TestOverlaysRefused(t *testing.T) {
	im := parse(t, sample().bytes())
	_, err := im.Identity(Overlay{0x1010, make([]byte, 5)}, Overlay{0x100c, make([]byte, 5)})
	wantFormat(t, err, "overlaps")
	_, err = im.Identity(Overlay{0xfffffffe, make([]byte, 5)})
	wantFormat(t, err, "outside any image")
}

func TestPlace(t *testing.T) {
	f := sample()
	f.sects[2].rva += 0x1000 // a gap of one page after .rdata
	f.sects = f.sects[:3]
	f.dirs = [16]Directory{}
	im := parse(t, f.bytes())
	p := must(im.Place(im.ImageBase))(t)
	want := []Segment{{Span{0, 0x1000}, false, false}, {Span{0x1000, 0x2000}, true, false}, {Span{0x2000, 0x5000}, false, false}, {Span{0x5000, 0x8000}, false, true}}
	if !reflect.DeepEqual(p.Segments, want) {
		t.Errorf("segments %v, want %v", p.Segments, want)
	}
	if err := p.Put64(0x5008, 0x1122334455667788); err != nil || p.Bytes[0x5008] != 0x88 || p.Bytes[0x500f] != 0x11 {
		t.Errorf("slot: %v, % x", err, p.Bytes[0x5008:0x5010])
	}
	for _, rva := range []uint32{0x1000, 0x1ff8, 0xff9, 0x1fff} {
		wantFormat(t, p.Put64(rva, 1), "executable")
	}
	for _, rva := range []uint32{0x7ff9, 0x8000, 0xfffffffc} {
		wantFormat(t, p.Put64(rva, 1), "outside")
	}
	if _, err := im.Place(0x1800); err == nil {
		t.Error("placed at half a page")
	}
	if _, err := im.Place(0xfffffffffffff000); err == nil {
		t.Error("placed over the end of memory")
	}
	f.flags |= 1
	im = parse(t, f.bytes())
	if _, err := im.Place(im.ImageBase); err != nil {
		t.Error(err)
	}
	_, err := im.Place(0x10000)
	wantFormat(t, err, "stripped")
	f.sects[0].flags |= 0x80000000
	_, err = parse(t, f.bytes()).Place(0x10000 + im.ImageBase)
	if err == nil || !strings.Contains(err.Error(), "stripped") && !strings.Contains(err.Error(), "writable") {
		t.Errorf("writable code: %v", err)
	}
	f.flags &^= 1
	_, err = parse(t, f.bytes()).Place(0x10000)
	wantFormat(t, err, "writable")
	f.sects[0].flags = code
	f.sects[2].size = MaxPlaced
	_, err = parse(t, f.bytes()).Place(0x10000)
	wantFormat(t, err, "at most")
}

// Place relocates as the base relocations say and changes nothing else.
func TestPlaceRelocates(t *testing.T) {
	b := sample().bytes()
	im := parse(t, b)
	p, q := must(im.Place(0x180000000))(t), must(im.Place(0x2_9000_0000))(t)
	changed := map[uint32]bool{}
	for i := range p.Bytes {
		if p.Bytes[i] != q.Bytes[i] {
			changed[uint32(i)] = true
		}
	}
	for _, r := range must(im.Relocs())(t) {
		for i := range uint32(r.Width()) {
			delete(changed, r.RVA+i)
		}
		if r.Type == relDir64 {
			if a, b := le.Uint64(p.Bytes[r.RVA:]), le.Uint64(q.Bytes[r.RVA:]); b-a != 0x1_1000_0000 {
				t.Errorf("0x%x: %x became %x", r.RVA, a, b)
			}
		} else if a, b := le.Uint32(p.Bytes[r.RVA:]), le.Uint32(q.Bytes[r.RVA:]); b-a != 0x1000_0000 {
			t.Errorf("0x%x: %x became %x", r.RVA, a, b)
		}
	}
	if len(changed) > 0 {
		t.Errorf("changed without relocation: %v", changed)
	}
}
