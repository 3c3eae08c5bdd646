package build

import (
	"testing"

	"hotpatchd/pe"
)

// TestFlowAgreesWithUnwindRecords follows the code of every function that has
// an unwind record, without looking at it: both must tell the same end.
func TestFlowAgreesWithUnwindRecords(t *testing.T) {
	for _, name := range []string{"mingw/app.dll", "other/app.dll", "plain/app.dll", "clang/app.dll", "arm64/app.dll", "many/many.dll", "demo/demo.dll", "entries/entries.dll"} {
		f := loadBase(t, fixture(t, name))
		compared := 0
		for _, u := range f.spans {
			if u.Primary != u.Begin {
				continue
			}
			end, err := f.endByFlow(pe.Symbol{Name: f.nameAt(u.Begin), RVA: u.Begin}, f.after(u.Begin))
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if end != u.End {
				t.Errorf("%s: %s at %x: flow ends at %x, the unwind record at %x", name, f.nameAt(u.Begin), u.Begin, end, u.End)
			}
			compared++
		}
		if compared == 0 && name != "demo/demo.dll" {
			t.Errorf("%s: nothing to compare", name)
		}
	}
}

// TestFlowStopsAtHiddenCode: without symbols nothing names what follows a leaf
// function; its end is still its own.
func TestFlowStopsAtHiddenCode(t *testing.T) {
	f := loadBase(t, editOf(t, fixture(t, "entries/entries.dll")).stripped().b)
	for name, want := range map[string]uint32{
		"entry_b":      8,  // mov, add, ret; filler and the unnamed wedge_c follow
		"entry_d_loop": 12, // a branch back does not end it
	} {
		s, err := f.lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		e, err := f.extentOf(s)
		if err != nil || e.End-e.Begin != want {
			t.Errorf("%s: %d bytes, want %d (%v)", name, e.End-e.Begin, want, err)
		}
	}
}

func TestStepARM64(t *testing.T) {
	for _, c := range []struct {
		word uint32
		want step
	}{
		{0x14000002, step{length: 4, ends: true, branches: true, distance: 4}},  // b .+8
		{0x17ffffff, step{length: 4, ends: true, branches: true, distance: -8}}, // b .-4
		{0x54000040, step{length: 4, branches: true, distance: 4}},              // b.eq .+8
		{0x35000060, step{length: 4, branches: true, distance: 8}},              // cbnz w0, .+12
		{0x37000080, step{length: 4, branches: true, distance: 12}},             // tbnz w0, #0, .+16
		{0xd65f03c0, step{length: 4, ends: true}},                               // ret
		{0xd65f0bff, step{length: 4, ends: true}},                               // retaa
		{0xd61f0200, step{length: 4, ends: true, indirect: true}},               // br x16
		{0x94000002, step{length: 4}},                                           // bl .+8
		{0xd63f0100, step{length: 4}},                                           // blr x8
		{0xd503201f, step{length: 4, filler: true}},                             // nop
		{0xd43e0000, step{length: 4, ends: true, filler: true}},                 // brk #0xf000
		{0x8b000020, step{length: 4}},                                           // add
	} {
		b := []byte{byte(c.word), byte(c.word >> 8), byte(c.word >> 16), byte(c.word >> 24)}
		if got, ok := stepARM64(b); !ok || got != c.want {
			t.Errorf("%08x: %+v, want %+v", c.word, got, c.want)
		}
	}
	if _, ok := stepARM64([]byte{0xc0, 0x03, 0x5f}); ok {
		t.Error("three bytes are no instruction")
	}
}
