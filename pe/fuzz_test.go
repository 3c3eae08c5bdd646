package pe

import (
	"bytes"
	"reflect"
	"testing"
)

// fuzzLimit keeps inputs small enough for many runs a second.
const fuzzLimit = 64 << 10

// FuzzParse: no input may panic or cost out of proportion, and what is a right
// image answers the same once it is laid out somewhere else.
func FuzzParse(f *testing.F) {
	f.Add(sample().bytes())
	f.Add(withTable(table4()))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > fuzzLimit {
			return
		}
		attack(t, "file", false, b)
		im, err := Parse(bytes.NewReader(b), int64(len(b)))
		if err != nil || im.SizeOfImage > 1<<20 {
			return
		}
		id, err := im.Identity()
		if err != nil {
			return
		}
		p, err := im.Place(0x7ff6_0000_0000)
		if err != nil {
			return
		}
		m, err := ParseMapped(bytes.NewReader(p.Bytes), p.Base)
		if err != nil {
			return // a relocation may have changed the headers
		}
		m.SetPreferredBase(im.ImageBase)
		got, err := m.Identity()
		if err != nil {
			return // a relocation may have changed its directory
		}
		if relocs, _ := im.Relocs(); len(relocsIn(relocs, 0, im.SizeOfHeaders)) > 0 || id.RSDS != got.RSDS {
			return // debug records may lie under a relocation
		}
		if again, err := m.Relocs(); err != nil || !reflect.DeepEqual(again, im.relocs) {
			return
		}
		if got != id {
			t.Errorf("identity %+v in memory, %+v in the file", got, id)
		}
	})
}

// FuzzParseMapped: memory is more hostile than a file, it may say anything anywhere.
func FuzzParseMapped(f *testing.F) {
	for _, b := range [][]byte{sample().bytes(), withTable(table4())} {
		im, _ := Parse(bytes.NewReader(b), int64(len(b)))
		p, _ := im.Place(0x7ff6_0000_0000)
		f.Add(p.Bytes)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) <= fuzzLimit {
			attack(t, "memory", true, b)
		}
	})
}

// FuzzHotPatch: what the decoder accepts, the second reader reads alike; what a
// spec can say survives being written again.
func FuzzHotPatch(f *testing.F) {
	f.Add(table4())
	spec := HotPatchSpec{Sequence: 1, Machine: MachineAMD64, Functions: []FunctionSpec{
		{Place: 0x1010, Target: 0x1100, Extra: FunctionExtra{Length: 3, Ranges: []FunctionRange{{RVA: 0x1200, Length: 9}}}}},
		Inverse: []HotPatchRecord{{Type: HotPatchAbsolute, Place: 0x4100, Target: 0x5000}}}
	table, err := spec.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(table)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 0x1100-tableAt {
			return
		}
		file := withTable(b)
		attack(t, "table", false, file)
		h, err := parse(t, file).HotPatch()
		if err != nil {
			return
		}
		spec := HotPatchSpec{Sequence: h.SequenceNumber, MinSequence: h.MinSequenceNumber, Machine: MachineAMD64,
			BaseTimeDateStamp: h.Bases[0].OriginalTimeDateStamp, BaseCheckSum: h.Bases[0].OriginalCheckSum}
		ours := true
		for _, r := range h.Bases[0].Records {
			if r.Type != HotPatchFunction || r.Inverse {
				spec.Inverse = append(spec.Inverse, r)
				continue
			}
			x, err := h.Function(r)
			ours = ours && err == nil
			spec.Functions = append(spec.Functions, FunctionSpec{r.Place, r.Target, x})
		}
		if !ours {
			return
		}
		first := firstTable(t, h)
		if second, err := secondTable(file); err != nil || !reflect.DeepEqual(first, second) {
			t.Fatalf("the readers differ: %v\n%q\n%q", err, first, second)
		}
		out, err := AddHotPatch(sample().bytes(), spec)
		if err != nil {
			return
		}
		again := sameTable(t, out)
		for i, r := range again.Bases[0].Records {
			if i < len(spec.Inverse) && (r.Type != spec.Inverse[i].Type || r.Place != spec.Inverse[i].Place || r.Target != spec.Inverse[i].Target) {
				t.Fatalf("record %+v, was %+v", r, spec.Inverse[i])
			}
		}
	})
}
