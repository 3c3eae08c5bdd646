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
