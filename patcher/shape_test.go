package patcher

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"hotpatchd/pe"
)

// entry is where the function under test lies in forged images: far from the
// ends of its page and with room around it.
const entry = forgeText + 0x400

// site is a forged image with one function to be replaced.
type scene struct {
	forge
	at     uint32 // entry
	body   []byte
	ranges []pe.FunctionRange
}

// code of a common kind: push rbx; sub rsp, 32; mov ebx, ecx; ...; ret
var plain = []byte{0x53, 0x48, 0x83, 0xec, 0x20, 0x89, 0xcb, 0x8d, 0x43, 0x2a, 0x48, 0x83, 0xc4, 0x20, 0x5b, 0xc3}

// newScene has the body behind a function that ends right before it, and int3
// everywhere else: no filler of its own.
func newScene(body []byte) *scene {
	s := &scene{at: entry, body: body}
	s.text = bytes.Repeat([]byte{0xcc}, 0x2000)
	copy(s.text[entry-forgeText:], body)
	s.before(0x31, 0xc0, 0x0f, 0x1f, 0x40, 0x00, 0xc3) // xor eax, eax; nop; ret
	return s
}

// before puts bytes right before the entry.
func (s *scene) before(b ...byte) *scene { return s.put(s.at-uint32(len(b)), b) }

func (s *scene) put(rva uint32, b []byte) *scene {
	copy(s.text[rva-forgeText:], b)
	return s
}

func (s *scene) function() Function {
	return Function{Name: "victim", RVA: s.at, FunctionExtra: pe.FunctionExtra{Length: uint32(len(s.body)), Ranges: s.ranges}}
}

func (s *scene) shape(t testing.TB, more ...Function) (shape, error) {
	t.Helper()
	im := s.image(t)
	list, err := findShapes(im, originals{im: im, preferred: im.ImageBase}, append([]Function{s.function()}, more...))
	if err != nil {
		return shape{}, err
	}
	return list[0], nil
}

// codeOf is a refusal's code, "" if err is none.
func codeOf(err error) string {
	var r *Refusal
	if errors.As(err, &r) {
		return r.Code
	}
	return ""
}

var fill5 = []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}

// The shapes of entries by what stands there. want is the shape's kind, or the
// code of the refusal.
func TestShapes(t *testing.T) {
	short := []byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0xc3} // mov eax, ecx; add eax, 42; ret
	land := append(bytes.Clone(endbr64), plain...)
	for _, c := range []struct {
		name string
		s    *scene
		want string
		at   uint32   // of the bytes rewritten, counted from the entry
		in   []uint32 // interior, likewise
	}{
		{"several instructions", newScene(plain), shapeLong, 0, []uint32{1}},
		{"one long instruction", newScene(cat([]byte{0xb8, 42, 0, 0, 0}, []byte{0xc3})), shapeLong, 0, nil},
		{"a call first", newScene(cat([]byte{0xe8, 0, 1, 0, 0}, []byte{0xc3})), shapeLong, 0, nil},
		{"a jump first, and nothing else", newScene([]byte{0xe9, 0, 1, 0, 0}), shapeLong, 0, nil},
		{"four instructions", newScene([]byte{0x53, 0x56, 0x57, 0x55, 0x31, 0xc0, 0xc3}), shapeLong, 0, []uint32{1, 2, 3, 4}},
		{"landing pad", newScene(land), shapeLong, 4, []uint32{5}},
		{"own filler", newScene(short).before(fill5...), shapeShort, 0, nil},
		{"own filler of nops", newScene(short).before(0xc3, 0x90, 0x90, 0x90, 0x90, 0x90), shapeShort, 0, nil},
		{"much filler", newScene(short).put(entry-300, bytes.Repeat([]byte{0xcc}, 300)), shapeShort, 0, nil},
		{"filler behind jmp", newScene(short).before(0xe9, 1, 2, 0, 0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc), shapeShort, 0, nil},
		{"filler behind a tail call", newScene(short).before(0x48, 0xff, 0x25, 1, 2, 3, 0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc), shapeShort, 0, nil},
		{"filler behind ud2", newScene(short).before(0x0f, 0x0b, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc), shapeShort, 0, nil},
		{"landing pad and filler", newScene(append(bytes.Clone(endbr64), short...)).before(fill5...), shapeShort, 4, nil},
		{"filler and a one-byte instruction", newScene(plain).before(fill5...), shapeLong, 0, []uint32{1}},
		{"first instruction of the section", func() *scene {
			s := newScene(short)
			s.at = forgeText
			return s.put(forgeText, short)
		}(), shapeLong, 0, []uint32{2}},
		{"filler begins the section", func() *scene {
			s := newScene(short)
			s.at = forgeText + 16
			return s.put(s.at, short)
		}(), shapeShort, 0, nil},

		{"too short", newScene([]byte{0x89, 0xc8, 0xc3}), "too-short", 0, nil},
		{"ends inside", newScene([]byte{0x31, 0xc0, 0xc3, 0x90, 0x90, 0x90}), "too-short", 0, nil},
		{"jumps away inside", newScene([]byte{0x31, 0xc0, 0xeb, 0x10, 0x90, 0x90}), "too-short", 0, nil},
		{"traps inside", newScene([]byte{0x31, 0xc0, 0x0f, 0x0b, 0x90, 0x90}), "too-short", 0, nil},
		{"landing pad and too short", newScene(append(bytes.Clone(endbr64), 0x31, 0xc0, 0xc3)), "too-short", 0, nil},
		{"landing pad and four bytes", newScene(append(bytes.Clone(endbr64), 0x31, 0xc0, 0x31, 0xc9)), "too-short", 0, nil},
		{"unknown first", newScene([]byte{0x0f, 0xff, 0xc0, 0x90, 0x90, 0x90, 0xc3}), "unknown-instruction", 0, nil},
		{"unknown second", newScene([]byte{0x31, 0xc0, 0x0f, 0x0f, 0xc0, 0x9e, 0xc3}), "unknown-instruction", 0, nil},
		{"cut at the end", newScene([]byte{0x31, 0xc0, 0xb8, 0, 0, 0}), "unknown-instruction", 0, nil},

		// Filler that is not ours: then the long jump must do.
		{"four bytes", newScene(short).before(0xc3, 0xcc, 0xcc, 0xcc, 0xcc), shapeLong, 0, []uint32{2}},
		{"code before runs on", newScene(short).before(0x31, 0xc0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc), shapeLong, 0, []uint32{2}},
		{"odd filler", newScene(short).before(0xc3, 0xab, 0xab, 0xab, 0xab, 0xab), shapeLong, 0, []uint32{2}},
		{"zeros", newScene(short).before(0xc3, 0, 0, 0, 0, 0), shapeLong, 0, []uint32{2}},
		{"a call that does not return", newScene(short).before(0xe8, 1, 2, 3, 4, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc), shapeLong, 0, []uint32{2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.s.shape(t)
			kind := got.kind
			if err != nil {
				kind = codeOf(err)
			}
			if kind != c.want {
				t.Fatalf("%q (%v), want %q", kind, err, c.want)
			}
			if err != nil {
				if !strings.Contains(err.Error(), "victim") {
					t.Errorf("%v: the function is not named", err)
				}
				return
			}
			want := shape{kind: c.want, at: c.s.at + c.at, length: longJump}
			if c.want == shapeShort {
				want.length, want.pad = shortJump, c.s.at-longJump
			}
			for _, i := range c.in {
				want.interior = append(want.interior, c.s.at+i)
			}
			if !sameShape(got, want) {
				t.Errorf("%+v, want %+v", got, want)
			}
		})
	}
}

func sameShape(a, b shape) bool {
	if len(a.interior) != len(b.interior) {
		return false
	}
	for i := range a.interior {
		if a.interior[i] != b.interior[i] {
			return false
		}
	}
	return a.kind == b.kind && a.at == b.at && a.length == b.length && a.pad == b.pad
}

// What a zero-filled or call-ended gap needs besides.
func TestShapesByUnwindRecord(t *testing.T) {
	short := []byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0xc3}
	for _, c := range []struct {
		name    string
		before  []byte
		records []record
		want    string
	}{
		{"zeros behind a record", []byte{0xc3, 0, 0, 0, 0, 0}, []record{{entry - 0x40, entry - 5, 0}}, shapeShort},
		{"zeros inside a record", []byte{0xc3, 0, 0, 0, 0, 0}, []record{{entry - 0x40, entry - 4, 0}}, shapeLong},
		{"code that runs on, by its record not", []byte{0x31, 0xc0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x40, entry - 5, 0}}, shapeShort},
		{"int3 that the record claims", []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x40, entry - 4, 0}}, shapeLong},
		{"a record claims all of it, behind others", []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x80, entry, 0}, {entry - 0x40, entry - 0x30, 0}}, shapeLong},
		{"a record begins in it", []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 2, entry - 1, 0}}, shapeLong},
		{"a call to what does not return", []byte{0xe8, 0, 1, 0, 0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x40, entry - 5, 0}}, shapeLong},
		{"a call through a register", []byte{0x41, 0xff, 0xd0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x40, entry - 5, 0}}, shapeLong},
		{"a call through a slot", []byte{0xff, 0x15, 1, 2, 3, 0, 0x90, 0x90, 0x90, 0x90, 0x90}, []record{{entry - 0x40, entry - 5, 0}}, shapeLong},
		{"a call, and more filler", []byte{0xe8, 0, 1, 0, 0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}, []record{{entry - 0x40, entry - 6, 0}}, shapeShort},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(short).before(c.before...)
			s.records = c.records
			got, err := s.shape(t)
			if err != nil || got.kind != c.want {
				t.Errorf("%q, %v; want %q", got.kind, err, c.want)
			}
		})
	}
}

// reach is something that leads to the given RVA.
var reach = []struct {
	name string
	to   func(s *scene, rva uint32)
}{
	{"short jump from the body", func(s *scene, to uint32) {
		at := s.at + 0x30
		s.body = append(s.body, bytes.Repeat([]byte{0x90}, 0x40)...)
		s.put(s.at, s.body)
		copy(s.body[0x30:], []byte{0x75, byte(to - at - 2)})
		s.put(s.at, s.body)
	}},
	{"long jump from the body", func(s *scene, to uint32) {
		at := s.at + 0x30
		s.body = append(s.body, bytes.Repeat([]byte{0x90}, 0x40)...)
		copy(s.body[0x30:], cat([]byte{0x0f, 0x85}, rel32(at+6, to)))
		s.put(s.at, s.body)
	}},
	{"loop instruction of the body", func(s *scene, to uint32) {
		at := s.at + uint32(len(s.body))
		s.body = append(s.body, 0xe2, byte(to-at-2), 0xc3)
		s.put(s.at, s.body)
	}},
	{"short jump from the body behind data", func(s *scene, to uint32) {
		// jmp over a few bytes that read as the start of a long instruction
		at := s.at + uint32(len(s.body))
		s.body = append(s.body, 0xeb, 0x03, 0x66, 0x48, 0xb8, 0x75, byte(to-at-7), 0xc3)
		s.put(s.at, s.body)
	}},
	{"short jump of the function before", func(s *scene, to uint32) {
		s.put(s.at-0x40, []byte{0x31, 0xc0, 0x74, byte(to - (s.at - 0x40) - 4), 0xc3})
	}},
	{"short jump of the function behind", func(s *scene, to uint32) {
		s.put(s.at+0x40, []byte{0x31, 0xc0, 0xeb, byte(to - (s.at + 0x40) - 4)})
	}},
	{"short jump at the end of its reach, forwards", func(s *scene, to uint32) {
		s.put(to-2-127, []byte{0x74, 127, 0xc3})
	}},
	{"short jump at the end of its reach, backwards", func(s *scene, to uint32) {
		s.put(to-2+128, []byte{0xeb, 0x80})
	}},
	{"short jump with prefixes at the end of its reach", func(s *scene, to uint32) {
		s.put(to-4-127, []byte{0xf2, 0x2e, 0x74, 127, 0xc3})
	}},
	{"long jump from afar", func(s *scene, to uint32) {
		s.put(forgeText+0x1801, cat([]byte{0xe9}, rel32(forgeText+0x1806, to)))
	}},
	{"call from afar", func(s *scene, to uint32) {
		s.put(forgeText+0x1801, cat([]byte{0xe8}, rel32(forgeText+0x1806, to)))
	}},
	{"conditional jump from afar", func(s *scene, to uint32) {
		s.put(forgeText+0x1801, cat([]byte{0x0f, 0x8f}, rel32(forgeText+0x1807, to)))
	}},
	{"jump at the end of the section", func(s *scene, to uint32) {
		end := forgeText + uint32(len(s.text))
		s.put(end-5, cat([]byte{0xe9}, rel32(end, to)))
	}},
	{"abort of a transaction", func(s *scene, to uint32) {
		s.put(forgeText+0x1801, cat([]byte{0xc7, 0xf8}, rel32(forgeText+0x1807, to)))
	}},
	{"computed address", func(s *scene, to uint32) {
		s.put(forgeText+0x1801, cat([]byte{0x48, 0x8d, 0x0d}, rel32(forgeText+0x1808, to)))
	}},
	{"jump table of GCC", func(s *scene, to uint32) {
		const table = forgeRData + 0x40
		s.rdata = lay(s.rdata, 0x40, int32(1), int32(2), int32(to)-table)
		at := s.at + uint32(len(s.body))
		s.body = append(s.body, cat([]byte{0x4c, 0x8d, 0x05}, rel32(at+7, table), []byte{0xc3})...)
		s.put(s.at, s.body)
	}},
	{"long jump table of GCC", func(s *scene, to uint32) {
		const table = forgeRData + 0x40
		s.rdata = lay(s.rdata, 0x40, bytes.Repeat(cat(int32(s.at)+9-table), 999), int32(to)-table)
		at := s.at + uint32(len(s.body))
		s.body = append(s.body, cat([]byte{0x4c, 0x8d, 0x05}, rel32(at+7, table), []byte{0xc3})...)
		s.put(s.at, s.body)
	}},
	{"jump table of MSVC", func(s *scene, to uint32) {
		const table = forgeText + 0x1900 // in the code, off the image's base
		s.put(table, cat(uint32(forgeText), uint32(forgeText), to))
		s.body = append(s.body, cat([]byte{0x8b, 0x8c, 0x82}, uint32(table), []byte{0xc3})...)
		s.put(s.at, s.body)
	}},
	{"jump table of a cold part", func(s *scene, to uint32) {
		const table = forgeRData + 0x40
		s.rdata = lay(s.rdata, 0x40, int32(1), int32(2), int32(to)-table)
		const cold = forgeText + 0x1a00
		s.put(cold, cat([]byte{0x4c, 0x8d, 0x05}, rel32(cold+7, table), []byte{0xc3}))
		s.ranges = append(s.ranges, pe.FunctionRange{RVA: cold, Length: 8})
	}},
	{"relocated pointer", func(s *scene, to uint32) {
		s.data = lay(s.data, 0x10, uint64(forgeBase)+uint64(to))
		s.relocs = append(s.relocs, forgeData+0x10)
	}},
	{"export", func(s *scene, to uint32) { s.exports = append(s.exports, pe.Export{Name: "inside", RVA: to}) }},
	{"export by ordinal", func(s *scene, to uint32) { s.exports = append(s.exports, pe.Export{RVA: to}) }},
	{"unwind record", func(s *scene, to uint32) { s.records = append(s.records, record{to, to + 1, 0}) }},
	{"exception handler", func(s *scene, to uint32) {
		s.records = append(s.records, record{forgeText + 0x1800, forgeText + 0x1810, to})
	}},
	{"guard table", func(s *scene, to uint32) { s.guard = append(s.guard, pe.GuardFunction{RVA: to}) }},
	{"exception continuation", func(s *scene, to uint32) { s.ehcont = append(s.ehcont, to) }},
}

// Whatever leads to entry+1 … entry+4 refuses; what leads to the entry itself,
// or behind the bytes, does not.
func TestReachIntoEntry(t *testing.T) {
	for _, r := range reach {
		t.Run(r.name, func(t *testing.T) {
			for off := range uint32(7) {
				s := newScene(bytes.Clone(plain))
				r.to(s, s.at+off)
				got, err := s.shape(t)
				inside := off >= 1 && off <= 4
				if inside && codeOf(err) != "jump-into-entry" {
					t.Errorf("to entry+%d: %q, %v; want a refusal", off, got.kind, err)
				}
				if !inside && (err != nil || got.kind != shapeLong) {
					t.Errorf("to entry+%d: %q, %v", off, got.kind, err)
				}
			}
		})
	}
}

// The same behind a landing pad: nothing may reach the byte behind it either,
// which a jump to the start of an instruction could.
func TestReachBehindLandingPad(t *testing.T) {
	for _, r := range reach {
		t.Run(r.name, func(t *testing.T) {
			for off := range uint32(11) {
				for _, filler := range []bool{false, true} {
					s := newScene(append(bytes.Clone(endbr64), 0x89, 0xc8, 0x83, 0xc0, 0x2a, 0x90, 0x90, 0xc3))
					last := uint32(8)
					if filler {
						s.before(fill5...)
						last = 5 // two bytes, in filler of its own
					}
					r.to(s, s.at+off)
					got, err := s.shape(t)
					if off >= 4 && off <= last && err == nil && got.at <= s.at+off && s.at+off < got.at+got.length {
						t.Errorf("to entry+%d, filler %v: %+v", off, filler, got)
					}
					if off >= 4 && off <= 5 && codeOf(err) != "jump-into-entry" {
						t.Errorf("to entry+%d, filler %v: %+v, %v", off, filler, got, err)
					}
					if off > 8 && err != nil {
						t.Errorf("to entry+%d, filler %v: %v", off, filler, err)
					}
				}
			}
		})
	}
}

// Long branches that lie across the ends of what is read in one go.
func TestReachAcrossChunks(t *testing.T) {
	for back := range uint32(8) {
		for _, jump := range [][]byte{{0xe9}, {0x0f, 0x84}} {
			s := newScene(plain)
			s.more = bytes.Repeat([]byte{0xcc}, codeChunk+0x100)
			at := uint32(forgeMore + codeChunk - back)
			copy(s.more[codeChunk-back:], cat(jump, rel32(at+uint32(len(jump))+4, s.at+2)))
			if _, err := s.shape(t); codeOf(err) != "jump-into-entry" {
				t.Errorf("%d bytes before the end: %v", back, err)
			}
		}
	}
}

// Code that never falls into step: only one of five ways to read it has the jump.
func TestReachOutOfStep(t *testing.T) {
	for phase := range uint32(5) {
		s := newScene(plain)
		s.put(s.at-0x200, bytes.Repeat([]byte{0x05}, 0x200)) // add eax, 5050505h
		at := s.at - 40 - phase
		s.put(at, []byte{0x75, byte(s.at + 2 - at - 2)})
		if _, err := s.shape(t); codeOf(err) != "jump-into-entry" {
			t.Errorf("phase %d: %v", phase, err)
		}
	}
}

// Filler that anything leads or refers to is not ours.
func TestReachIntoFiller(t *testing.T) {
	more := append(reach[:len(reach):len(reach)], []struct {
		name string
		to   func(s *scene, rva uint32)
	}{
		{"data read", func(s *scene, to uint32) {
			s.put(forgeText+0x1801, cat([]byte{0x48, 0x8b, 0x05}, rel32(forgeText+0x1808, to)))
		}},
		{"data compared with an immediate", func(s *scene, to uint32) {
			s.put(forgeText+0x1801, cat([]byte{0x81, 0x3d}, rel32(forgeText+0x180b, to), uint32(7)))
		}},
		{"data compared with a byte", func(s *scene, to uint32) {
			s.put(forgeText+0x1801, cat([]byte{0x80, 0x3d}, rel32(forgeText+0x1808, to), []byte{7}))
		}},
		{"data compared with two bytes", func(s *scene, to uint32) {
			s.put(forgeText+0x1801, cat([]byte{0x66, 0x81, 0x3d}, rel32(forgeText+0x180a, to), uint16(7)))
		}},
	}...)
	for _, r := range more {
		t.Run(r.name, func(t *testing.T) {
			for off := range uint32(7) {
				s := newScene([]byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0xc3, 0x90, 0x90})
				s.before(fill5...)
				r.to(s, s.at-6+off) // from the RET before the filler to the entry
				got, err := s.shape(t)
				inside := off >= 1 && off <= 5
				if inside && got.kind == shapeShort {
					t.Errorf("to entry-%d: %q, %v", 6-off, got.kind, err)
				}
				if err != nil {
					t.Errorf("to entry-%d: %v", 6-off, err)
				}
				// What may be a displacement with an immediate behind it is taken for one.
				if off == 6 && got.kind != shapeShort && !strings.HasPrefix(r.name, "data compared") {
					t.Errorf("to the entry: %q", got.kind)
				}
			}
		})
	}
}

func TestGuardHashBeforeEntry(t *testing.T) {
	s := newScene([]byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0xc3})
	s.before(fill5...)
	s.guard = []pe.GuardFunction{{RVA: s.at, Flags: 0x08}}
	if got, err := s.shape(t); err != nil || got.kind != shapeLong {
		t.Errorf("with an XFG hash before the entry: %q, %v", got.kind, err)
	}
	s.guard[0].Flags = 0
	if got, err := s.shape(t); err != nil || got.kind != shapeShort {
		t.Errorf("without: %q, %v", got.kind, err)
	}
}

// Neither entry nor filler may cross a page; they may lie on two.
func TestPages(t *testing.T) {
	short := []byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0x90, 0x90, 0xc3}
	for _, c := range []struct {
		at     uint32
		filler bool
		want   string
	}{
		{0x2000, false, shapeLong}, {0x1ffb, false, shapeLong},
		{0x1ffc, false, "crosses-page"}, {0x1fff, false, "crosses-page"},
		{0x2000, true, shapeShort}, {0x2005, true, shapeShort}, {0x1ffe, true, shapeShort},
		{0x1fff, true, "crosses-page"},                       // the two bytes do
		{0x2001, true, shapeLong}, {0x2004, true, shapeLong}, // the filler does
	} {
		s := newScene(short)
		copy(s.text, bytes.Repeat([]byte{0x90, 0xc3}, len(s.text)/2)) // no filler
		s.at = c.at
		s.put(c.at, short)
		if c.filler {
			s.before(fill5...)
		}
		got, err := s.shape(t)
		kind := got.kind
		if err != nil {
			kind = codeOf(err)
		}
		if kind != c.want {
			t.Errorf("entry at %x, filler %v: %q (%v), want %q", c.at, c.filler, kind, err, c.want)
		}
	}
}

func TestOverlap(t *testing.T) {
	other := func(at, n uint32, ranges ...pe.FunctionRange) Function {
		return Function{Name: "other", RVA: at, FunctionExtra: pe.FunctionExtra{Length: n, Ranges: ranges}}
	}
	for _, c := range []struct {
		name string
		f    Function
		want string
	}{
		{"apart", other(entry+0x40, 8), ""},
		{"right behind", other(entry+uint32(len(plain)), 8), ""},
		{"inside", other(entry+5, 6), "overlap"},
		{"across the end", other(entry+10, 12), "overlap"},
		{"its cold part is our body", other(entry+0x40, 8, pe.FunctionRange{RVA: entry + 8, Length: 4}), "overlap"},
		{"its cold part is elsewhere", other(entry+0x40, 8, pe.FunctionRange{RVA: entry + 0x80, Length: 4}), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(plain)
			for i := range uint32(0x80) {
				s.put(s.at+uint32(len(plain))+i, []byte{0x90})
			}
			if _, err := s.shape(t, c.f); codeOf(err) != c.want {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("filler of one in the body of another", func(t *testing.T) {
		// The body ends in int3 that could be the next one's filler.
		body := append(bytes.Clone(plain), fill5...)
		s := newScene(body)
		next := s.at + uint32(len(body))
		s.put(next, []byte{0x89, 0xc8, 0x83, 0xc0, 0x2a, 0x90, 0x90, 0xc3})
		if _, err := s.shape(t, other(next, 8)); codeOf(err) != "overlap" {
			t.Errorf("%v, want overlap", err)
		}
	})
}

// What is no code at all.
func TestNotCode(t *testing.T) {
	s := newScene(plain)
	s.flags = 0x40000040
	if _, err := s.shape(t); codeOf(err) != "not-code" {
		t.Errorf("in a section without code: %v", err)
	}
	s = newScene(plain)
	s.at = forgeText + uint32(len(s.text)) - 4
	if _, err := s.shape(t); codeOf(err) != "not-code" {
		t.Errorf("beyond the section: %v", err)
	}
}

// No branch of real code is missed: wherever one leads, a function that began
// two bytes before would be refused for it. Functions are refused by chance now
// and then, but hardly ever.
func TestNoBranchIsMissed(t *testing.T) {
	t.Parallel()
	need(t, "objdump")
	all, short, functions, refused := 0, 0, 0, 0
	for _, name := range images(t) {
		im := open(t, name)
		if im.Machine != machineAMD64 || im.SizeOfImage > 1<<20 {
			continue
		}
		code := originals{im: im, preferred: im.ImageBase}
		spans, err := im.UnwindSpans()
		if err != nil {
			continue // odd, but not ours to judge
		}
		from := map[uint32]line{}
		var victims []Function
		for _, l := range objdump(t, "-d", name) {
			op, args := l.mnemonic()
			to, ok := destination(args)
			if !ok || flowOf(op, args) == flowNext || flowOf(op, args) == flowCall || l.odd() {
				continue
			}
			if !slices.ContainsFunc(spans, func(u pe.UnwindSpan) bool {
				return u.Begin <= uint32(l.at-im.ImageBase) && uint32(l.at-im.ImageBase) < u.End
			}) {
				continue // data that reads as code
			}
			rva := uint32(to - im.ImageBase)
			if sec := im.SectionAt(rva); sec == nil || rva < sec.RVA+8 || !sec.Exec() || from[rva].bytes != nil {
				continue
			}
			from[rva] = l
			if len(victims) < maxFunctions {
				victims = append(victims, Function{RVA: rva - 2, FunctionExtra: pe.FunctionExtra{Length: 5}})
			}
		}
		marks, err := landings(im, code, victims)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, v := range victims {
			all++
			l := from[v.RVA+2]
			if len(l.bytes) == 2 {
				short++
			}
			if _, hit := marks.in(v.RVA+2, v.RVA+3); !hit {
				t.Errorf("%s: %q at %x leads to %x, which was missed", name, l.text, l.at, v.RVA+2)
			}
		}
		victims = victims[:0]
		for _, u := range spans {
			if u.Primary == u.Begin && len(victims) < 500 {
				victims = append(victims, Function{RVA: u.Begin, FunctionExtra: pe.FunctionExtra{Length: u.End - u.Begin}})
			}
		}
		if marks, err = landings(im, code, victims); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, v := range victims {
			functions++
			if _, hit := marks.in(v.RVA+1, v.RVA+5); hit && v.Length >= 5 && !strings.Contains(name, "libatomic") {
				refused++
			}
		}
	}
	t.Logf("%d branches, %d of them short; %d of %d functions refused", all, short, refused, functions)
	if short < 500 || refused*200 > functions {
		t.Errorf("%d short branches seen; %d of %d functions refused", short, refused, functions)
	}
}
