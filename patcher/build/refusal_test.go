package build

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// TestRefusals has one row for each reason that concerns the whole of a fix or a base.
func TestRefusals(t *testing.T) {
	app, fix := fixture(t, "mingw/app.dll"), fixture(t, "mingw/fix-ref-1.dll")
	hybrid := func(name string) []byte {
		e := editOf(t, fixture(t, name))
		lc, err := parse(t, e.b).LoadConfig()
		if err != nil || lc == nil {
			t.Fatalf("%s has no load configuration (%v)", name, err)
		}
		return e.word32(e.at(lc.RVA)+0xc8, 0x1000).b // CHPEMetadataPointer
	}
	demo := editOf(t, fixture(t, "demo/demo.dll"))
	for _, c := range []struct {
		name          string
		o             Options
		code          Code
		image, symbol string
		at            uint32 // 0: none expected
	}{
		{"sequence 0", Options{Base: app, Fix: fix}, CodeSequence, "", "", 0},
		{"not PE", Options{Base: app, Fix: []byte("MZ, but no more"), Sequence: 1}, CodeFormat, "fix", "", 0},
		{"empty", Options{Sequence: 1}, CodeFormat, "base", "", 0},
		{"32-bit", Options{Base: app, Fix: editOf(t, fix).word16(demo.optional(), 0x10b).b, Sequence: 1}, Code32Bit, "fix", "", 0},
		{"machine", Options{Base: app, Fix: fixture(t, "arm64/fix-import-1.dll"), Sequence: 1}, CodeMachine, "fix", "", 0},
		{"hybrid base", Options{Base: hybrid("arm64/app.dll"), Fix: fixture(t, "arm64/fix-import-1.dll"), Sequence: 1}, CodeHybrid, "base", "", 1},
		{"managed", Options{Base: editOf(t, app).directory(directoryCLR, 0x1000, 72).b, Fix: fix, Sequence: 1}, CodeManaged, "base", "", 0x1000},
		{"no DLL", Options{Base: app, Fix: editOf(t, fix).word16(demo.coff()+18, 0x22).b, Sequence: 1}, CodeKind, "fix", "", 0},
		{"already one", Options{Base: app, Fix: fixture(t, "mingw/app-ref-1.dll"), Sequence: 1}, CodeKind, "fix", "", 1},
		{"TLS", Options{Base: app, Fix: fixture(t, "bad/tls.dll"), Sequence: 1}, CodeTLS, "fix", "", 1},
		{"entry point", Options{Base: app, Fix: app, Sequence: 1}, CodeEntryPoint, "fix", "", symbol(t, app, "DllMain")},
		{"constructors", Options{Base: app, Fix: constructors(t, fix), Sequence: 1}, CodeEntryPoint, "fix", "", 1},
		{"runtime fixup", Options{Base: app, Fix: fixture(t, "bad/runtime.dll"), Sequence: 1}, CodeRuntimeFixup, "fix", "", 1},
		{"runtime fixup, stripped", Options{Base: app, Fix: editOf(t, fixture(t, "bad/runtime.dll")).stripped().b, Sequence: 1}, CodeRuntimeFixup, "fix", "", 1},
		{"changed exports", Options{Base: app, Fix: fixture(t, "bad/export.dll"), Sequence: 1}, CodeExports, "fix", "brand_new", 1},
		{"writable data", Options{Base: app, Fix: fixture(t, "bad/writable.dll"), Sequence: 1}, CodeWritable, "fix", "answer_base", 1},
		{"no symbol", Options{Base: app, Fix: fixture(t, "bad/missing.dll"), Sequence: 1}, CodeSymbol, "base", "no_such_thing", 0},
		{"nothing", Options{Base: app, Fix: editOf(t, fix).directory(0, 0, 0).b, Sequence: 1}, CodeNothing, "fix", "", 0},
		{"too short", Options{Base: fixture(t, "entries/entries.dll"), Fix: fixture(t, "entries/fix-short.dll"), Sequence: 1}, CodeShort, "base", "entry_d_short", 1},
		{"too short, clang", Options{Base: fixture(t, "entries-clang/entries.dll"), Fix: fixture(t, "entries/fix-short.dll"), Sequence: 1}, CodeShort, "base", "entry_d_short", 1},
		{"jump into entry", Options{Base: fixture(t, "entries/entries.dll"), Fix: fixture(t, "entries/fix-loop.dll"), Sequence: 1}, CodeJump, "base", "entry_d_loop",
			symbol(t, fixture(t, "entries/entries.dll"), "entry_d_loop") + 4},
		{"unknown instruction", Options{Base: fixture(t, "entries/entries.dll"), Fix: fixture(t, "entries/fix-unknown.dll"), Sequence: 1}, CodeInstruction, "base", "entry_d_unknown", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Image(c.o)
			r := wantRefusal(t, err, c.code, c.image, c.symbol)
			if c.at > 1 && r.At != c.at || c.at == 1 && r.At == 0 {
				t.Errorf("at %x, want %x (1: any)", r.At, c.at)
			}
			if r.Text == "" {
				t.Error("no sentence")
			}
		})
	}
}

// constructors puts a pointer into GNU ld's empty constructor list.
func constructors(t *testing.T, fix []byte) []byte {
	e := editOf(t, fix)
	at := e.at(symbol(t, fix, "__CTOR_LIST__"))
	return e.word32(at+8, 0x80001010).word32(at+12, 1).b
}

// TestLengthContradiction moves the end of an unwind record over the next
// function, then before its own symbol's start: neither is believed.
func TestLengthContradiction(t *testing.T) {
	app, fix := fixture(t, "mingw/app.dll"), fixture(t, "mingw/fix-throw-1.dll")
	vuln := symbol(t, app, "vuln")
	for name, change := range map[string]func(e edit, record int){
		"over the next": func(e edit, record int) { e.word32(record+4, vuln+0x60) },
		"begins before": func(e edit, record int) { e.word32(record, vuln-4) },
	} {
		t.Run(name, func(t *testing.T) {
			e := editOf(t, app)
			change(e, e.pdata(vuln))
			_, err := Image(Options{Base: e.b, Fix: fix, Sequence: 1})
			wantRefusal(t, err, CodeLength, "base", "vuln")
		})
	}
}

// TestSymbolSize writes a size into doubled's auxiliary symbol record, as some
// compilers do: the right one changes nothing, another contradicts .pdata.
func TestSymbolSize(t *testing.T) {
	app := fixture(t, "mingw/app.dll")
	const length = 4 // lea, ret
	for size, refused := range map[uint32]bool{0: false, length: false, length - 1: true, length + 1: true} {
		e := editOf(t, app)
		at := e.symbolRecord("doubled")
		if e.b[at+17] == 0 {
			t.Fatal("doubled's symbol has no auxiliary record")
		}
		e.word32(at+18+4, size)
		f := loadBase(t, e.b)
		s, err := f.lookup("doubled")
		if err != nil || s.Size != size {
			t.Fatalf("symbol %+v, want size %d (%v)", s, size, err)
		}
		got, err := f.extentOf(s)
		if refused {
			wantRefusal(t, err, CodeLength, "base", "doubled")
		} else if err != nil || got.End-got.Begin != length {
			t.Errorf("size %d: %+v (%v)", size, got, err)
		}
	}
}

// TestEntryBytes changes code so that an entry cannot be rewritten.
func TestEntryBytes(t *testing.T) {
	entries, demo := fixture(t, "entries/entries.dll"), fixture(t, "demo/demo.dll")
	fix := editOf(t, fixture(t, "entries/fix-entries.dll")).b
	entry := symbol(t, entries, "entry_c")
	image := func(base, fix []byte, names ...string) error {
		var list []Replacement
		for _, n := range names {
			list = append(list, Replacement{Name: n})
		}
		_, err := Image(Options{Base: base, Fix: fix, Sequence: 1, Functions: list})
		return err
	}
	if err := image(entries, fix, "entry_c"); err != nil {
		t.Fatal(err)
	}
	t.Run("ends early", func(t *testing.T) {
		e := editOf(t, entries)
		copy(e.b[e.at(entry):], []byte{0x90, 0xc3})
		wantRefusal(t, image(e.b, fix, "entry_c"), CodeShort, "base", "entry_c")
	})
	t.Run("far jump from elsewhere", func(t *testing.T) {
		e := editOf(t, entries)
		from := symbol(t, entries, "wedge_c") + 2 // its long NOP
		e.b[e.at(from)] = 0xe9
		e.word32(e.at(from)+1, entry+1-(from+5))
		if r := wantRefusal(t, image(e.b, fix, "entry_c"), CodeJump, "base", "entry_c"); r.At != entry+1 {
			t.Errorf("at %x, want %x", r.At, entry+1)
		}
	})
	t.Run("pointer", func(t *testing.T) {
		e := editOf(t, demo)
		answer, pointer := symbol(t, demo, "answer"), symbol(t, demo, "demo_entry")
		e.word32(e.at(pointer), u32(e.b[e.at(pointer):])+1)
		if r := wantRefusal(t, image(e.b, fixture(t, "demo/demo-fix.dll")), CodeJump, "base", "answer"); r.At != answer+1 {
			t.Errorf("at %x, want %x", r.At, answer+1)
		}
	})
	t.Run("arm64, too short", func(t *testing.T) {
		b := fixture(t, "demo-arm64/demo.dll")
		f := loadBase(t, b)
		s, err := f.lookup("answer")
		if err != nil {
			t.Fatal(err)
		}
		e, err := f.extentOf(s)
		if err != nil {
			t.Fatal(err)
		}
		e.End = e.Begin + 2
		wantRefusal(t, f.checkEntry("answer", e), CodeShort, "base", "answer")
	})
}

// loadBase reads a base as Image does.
func loadBase(t *testing.T, b []byte) *file {
	t.Helper()
	f, err := load("base", b, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestPointerToCopy: an initialised pointer of the fix to its own copy of a
// variable is a use of it, even where no code names it.
func TestPointerToCopy(t *testing.T) {
	fix := fixture(t, "clang/fix-marked-1.dll")
	e := editOf(t, fix)
	im := parse(t, fix)
	relocs, err := im.Relocs()
	if err != nil {
		t.Fatal(err)
	}
	// __ref_calls points at calls, which is what the device will change; let the
	// record of that relocation belong to another variable.
	ref := symbol(t, fix, "__ref_calls")
	for _, r := range relocs {
		if r.RVA == ref {
			at := e.symbolRecord("__ref_calls")
			copy(e.b[u32(e.b[e.coff()+8:])+18*u32(e.b[e.coff()+12:])+u32(e.b[at+4:]):], "__own_calls")
			_, err := Image(Options{Base: fixture(t, "clang/app.dll"), Fix: e.b, Sequence: 1, Functions: []Replacement{{"vuln", ""}}})
			wantRefusal(t, err, CodeWritable, "fix", "calls")
			return
		}
	}
	t.Fatal("__ref_calls is not relocated")
}

// TestAmbiguous renames a local symbol so that two bear one name.
func TestAmbiguous(t *testing.T) {
	app := editOf(t, fixture(t, "mingw/app.dll"))
	table := int(u32(app.b[app.coff()+8:]))
	renamed := false
	for at := table; at+18 <= len(app.b); at += 18 {
		if bytes.Equal(app.b[at:at+8], []byte("doubled\x00")) {
			copy(app.b[at:], "helper\x00\x00")
			renamed = true
		}
	}
	if !renamed {
		t.Fatal("doubled is not in the symbol table")
	}
	_, err := Image(Options{Base: app.b, Fix: fixture(t, "mingw/fix-ref-1.dll"), Sequence: 1})
	wantRefusal(t, err, CodeAmbiguous, "base", "helper")
}

// TestHostileInput: whatever is changed in either image, Image answers with a
// refusal or a result whose table lies inside, and never panics.
func TestHostileInput(t *testing.T) {
	base, fix := fixture(t, "mingw/app.dll"), fixture(t, "mingw/fix-import-2.dll")
	rapid.Check(t, func(rt *rapid.T) {
		o := Options{Base: bytes.Clone(base), Fix: bytes.Clone(fix), Sequence: 2}
		for range rapid.IntRange(1, 4).Draw(rt, "changes") {
			b := o.Base
			if rapid.Bool().Draw(rt, "fix") {
				b = o.Fix
			}
			at := rapid.IntRange(0, len(b)-1).Draw(rt, "at")
			b[at] = rapid.Byte().Draw(rt, "byte")
		}
		r, err := Image(o)
		if err != nil {
			return
		}
		for _, f := range r.Functions {
			if f.Place+f.Extra.Length > r.Base.SizeOfImage {
				rt.Fatalf("%s ends outside the base", f.Name)
			}
		}
	})
}
