package build

import (
	"bytes"
	"strings"
	"testing"
)

const (
	relying = "callers/callers.dll" // gcc -O2 -fipa-ra
	apart   = "callers/apart.dll"   // -fno-ipa-ra
	changes = "callers/fix.dll"
)

func callersImage(t *testing.T, base string, functions ...Replacement) (*Result, error) {
	t.Helper()
	return Image(Options{Base: fixture(t, base), Fix: fixture(t, changes), Sequence: 1, Functions: functions})
}

// TestCallerRelies: the fix is refused for a base whose callers keep values in
// registers across the call, and says which caller, which register and what to do.
func TestCallerRelies(t *testing.T) {
	base := fixture(t, relying)
	_, err := callersImage(t, relying, Replacement{Name: "leaf"})
	r := wantRefusal(t, err, CodeCaller, "base", "leaf")
	reads := symbol(t, base, "reads")
	if r.At != reads+4 { // behind its sub rsp
		t.Errorf("at %x, want %x", r.At, reads+4)
	}
	for _, want := range []string{"reads calls it", "expects r8 to be left alone", "-fno-ipa-ra", "no_caller_saved_registers", "--function reads"} {
		if !strings.Contains(r.Error(), want) {
			t.Errorf("%q is not in: %v", want, r)
		}
	}
	_, err = callersImage(t, relying, Replacement{Name: "put"})
	if r := wantRefusal(t, err, CodeCaller, "base", "put"); !strings.Contains(r.Text, "rax") {
		t.Error(r)
	}
	for name, c := range map[string]struct {
		base      string
		functions []Replacement
	}{
		"base built with -fno-ipa-ra":          {apart, []Replacement{{Name: "leaf"}, {Name: "put"}}},
		"the new function restores registers":  {relying, []Replacement{{Name: "leaf", NewName: "leaf_quiet"}}},
		"the new function changes no register": {relying, []Replacement{{Name: "leaf", NewName: "leaf_small"}}},
	} {
		if r, err := callersImage(t, c.base, c.functions...); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(strings.Join(r.Warnings, " "), "alone") {
			t.Errorf("%s: %q", name, r.Warnings)
		}
	}
}

// TestCallersFollowed finds each kind of caller in the fixture, and none in
// the twin that was compiled without -fipa-ra.
func TestCallersFollowed(t *testing.T) {
	for caller, c := range map[string]struct{ callee, register string }{
		"reads":        {"leaf", "r8"},
		"reads_far":    {"through", "r9"}, // a caller's caller
		"reads_into":   {"into", "r9"},    // into ends in leaf
		"reads_branch": {"leaf", "rdx"},
		"passes":       {"leaf", "r8"}, // as the parameter of another function
		"returns":      {"put", "rax"}, // as the result
		"floats":       {"leaf", "xmm2"},
		"plain":        {"leaf", ""},
	} {
		for _, name := range []string{relying, apart} {
			want := c.register
			if name == apart {
				want = ""
			}
			b := fixture(t, name)
			tr, err := newTracer(loadBase(t, b), nil)
			if err != nil {
				t.Fatal(err)
			}
			found := false
			home := symbol(t, b, caller)
			for _, s := range tr.callSites()[symbol(t, b, c.callee)] {
				if !s.call || tr.home(s.at) != home {
					continue
				}
				found = true
				got := ""
				if lost, _ := tr.readAfter(s.at, home, regsVolatile&^tr.clobbers(symbol(t, b, c.callee)).writes); lost != 0 {
					got = lost.name()
				}
				if got != want {
					t.Errorf("%s: %s relies on %q, want %q", name, caller, got, want)
				}
			}
			if !found {
				t.Errorf("%s: no call of %s in %s", name, c.callee, caller)
			}
		}
	}
}

// TestCallerOfCaller: with leaf's direct callers gone, those that reach it
// through another function remain.
func TestCallerOfCaller(t *testing.T) {
	for via, other := range map[string]string{"through": "reads_into", "into": "reads_far"} {
		e := editOf(t, fixture(t, relying))
		for _, direct := range []string{"reads", "reads_branch", "passes", "floats", "plain", other} {
			at := e.at(symbol(t, e.b, direct))
			e.b[at+bytes.IndexByte(e.b[at:], 0xe8)] = 0xb8 // MOV EAX, as long as CALL
		}
		_, err := Image(Options{Base: e.b, Fix: fixture(t, changes), Sequence: 1, Functions: []Replacement{{Name: "leaf"}}})
		if r := wantRefusal(t, err, CodeCaller, "base", "leaf"); !strings.Contains(r.Text, "through "+via) || !strings.Contains(r.Text, "r9") {
			t.Errorf("%s: %v", via, r)
		}
	}
}

// TestCallerReplaced: a caller that is replaced, too, is no reason to refuse,
// but calls of the old one may be under way.
func TestCallerReplaced(t *testing.T) {
	_, err := callersImage(t, relying, Replacement{Name: "leaf"}, Replacement{Name: "reads"})
	if r := wantRefusal(t, err, CodeCaller, "base", "leaf"); !strings.Contains(r.Text, "reads_branch calls it") {
		t.Error(r)
	}
	c := callers{t: must(newTracer(loadBase(t, fixture(t, relying)), nil)), functions: []Function{{Name: "reads"}}}
	reads := symbol(t, fixture(t, relying), "reads")
	c.functions[0].Place, c.functions[0].Extra.Length = reads, 0x19
	leaf := symbol(t, fixture(t, relying), "leaf")
	if err := c.checkSite(Function{Name: "leaf", NewName: "leaf"}, leaf, reads+4, reads, regsVolatile); err != nil {
		t.Fatal(err)
	}
	if len(c.warnings) != 1 || !strings.Contains(c.warnings[0], "the old reads expects") {
		t.Errorf("%q", c.warnings)
	}
}

// TestCallerNeverReturns: behind a call that does not come back lies other code.
func TestCallerNeverReturns(t *testing.T) {
	e := editOf(t, fixture(t, relying))
	leaf := symbol(t, e.b, "leaf")
	ret := e.at(leaf) + bytes.IndexByte(e.b[e.at(leaf):], 0xc3)
	e.b[ret] = 0xcc
	if _, err := Image(Options{Base: e.b, Fix: fixture(t, changes), Sequence: 1, Functions: []Replacement{{Name: "leaf"}}}); err != nil {
		t.Error(err)
	}
}

// TestNameAt: a mark the linker sets at the first function is not its name.
func TestNameAt(t *testing.T) {
	b := fixture(t, relying)
	leaf := symbol(t, b, "leaf")
	if symbol(t, b, "___crt_xc_end__") != leaf {
		t.Fatal("no mark at leaf")
	}
	if name := loadBase(t, b).nameAt(leaf); name != "leaf" {
		t.Errorf("it is called %s", name)
	}
}

// TestCloneWarning: who replaces a piece the compiler made is warned.
func TestCloneWarning(t *testing.T) {
	f := loadBase(t, fixture(t, relying))
	for name, want := range map[string]bool{"leaf": false, "leaf.isra.0": true, "leaf.constprop.0": true, "leaf.cold": false} {
		w := strings.Join(warnings(f, f, []Function{{Name: name}}, new(reach)), " ")
		if strings.Contains(w, "is a piece of leaf") != want {
			t.Errorf("%s: %q", name, w)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestEffect: what single instructions read and set.
func TestEffect(t *testing.T) {
	const r8, r9, xmm1, xmm2 = regs(1 << 8), regs(1 << 9), regXMM0 << 1, regXMM0 << 2
	for _, c := range []struct {
		name          string
		code          []byte
		reads, writes regs
	}{
		{"mov eax, ecx", []byte{0x89, 0xc8}, regRCX, regRAX},
		{"mov [rcx], edx", []byte{0x89, 0x11}, regRCX | regRDX, 0},
		{"xor ecx, ecx", []byte{0x31, 0xc9}, 0, regRCX | regFlags},
		{"xor ecx, edx", []byte{0x31, 0xd1}, regRCX | regRDX, regRCX | regFlags},
		{"sbb ecx, ecx", []byte{0x19, 0xc9}, regFlags, regRCX | regFlags},
		{"or ecx, -1", []byte{0x83, 0xc9, 0xff}, 0, regRCX | regFlags},
		{"or ecx, 1", []byte{0x83, 0xc9, 0x01}, regRCX, regRCX | regFlags},
		{"lea eax, [r8+r9*2]", []byte{0x43, 0x8d, 0x04, 0x48}, r8 | r9, regRAX},
		{"shl edx, cl", []byte{0xd3, 0xe2}, regRCX | regRDX, regRDX | regFlags},
		{"imul eax, ecx, 9", []byte{0x6b, 0xc1, 0x09}, regRCX, regRAX | regFlags},
		{"imul eax, ecx", []byte{0x0f, 0xaf, 0xc1}, regRAX | regRCX, regRAX | regFlags},
		{"mul ecx", []byte{0xf7, 0xe1}, regRAX | regRCX, regRAX | regRDX | regFlags},
		{"idiv ecx", []byte{0xf7, 0xf9}, regRAX | regRCX | regRDX, regRAX | regRDX | regFlags},
		{"cdq", []byte{0x99}, regRAX, regRDX},
		{"sete cl", []byte{0x0f, 0x94, 0xc1}, regFlags, regRCX},
		{"cmove ecx, edx", []byte{0x0f, 0x44, 0xca}, regFlags | regRCX | regRDX, regRCX},
		{"jne", []byte{0x75, 0x00}, regFlags, 0},
		{"test ch, 1", []byte{0xf6, 0xc5, 0x01}, regRCX, regFlags},
		{"push rcx", []byte{0x51}, 0, 0},
		{"pop rcx", []byte{0x59}, 0, regRCX},
		{"xchg ax, ax", []byte{0x66, 0x90}, 0, 0},
		{"xchg ecx, edx", []byte{0x87, 0xd1}, regRCX | regRDX, regRCX | regRDX},
		{"rep stosb", []byte{0xf3, 0xaa}, regRAX | regRCX, regRCX},
		{"movsq", []byte{0x48, 0xa5}, 0, 0},
		{"addsd xmm1, xmm2", []byte{0xf2, 0x0f, 0x58, 0xca}, xmm1 | xmm2, xmm1},
		{"movaps xmm1, xmm2", []byte{0x0f, 0x28, 0xca}, xmm2, xmm1},
		{"pxor xmm1, xmm1", []byte{0x66, 0x0f, 0xef, 0xc9}, 0, xmm1},
		{"cvtsi2sd xmm1, ecx", []byte{0xf2, 0x0f, 0x2a, 0xc9}, regRCX, xmm1},
		{"pshufd xmm1, xmm2, 0", []byte{0x66, 0x0f, 0x70, 0xca, 0}, xmm2, xmm1},
		{"nop [rcx]", []byte{0x0f, 0x1f, 0x01}, 0, 0},
		{"cmpxchg [r8], ecx", []byte{0x41, 0x0f, 0xb1, 0x08}, r8 | regRAX | regRCX, regRAX | regFlags},
	} {
		in, err := decode(c.code)
		if err != nil || in.Len != len(c.code) {
			t.Fatalf("%s: %v %v", c.name, in, err)
		}
		reads, writes, ok := behaviours{}.effect(in)
		if !ok || reads != c.reads || writes != c.writes {
			t.Errorf("%s (%v): reads %x, writes %x, %v; want %x, %x", c.name, in, reads, writes, ok, c.reads, c.writes)
		}
	}
	if in, err := decode([]byte{0x0f, 0xa2}); err != nil {
		t.Fatal(err)
	} else if _, _, ok := (behaviours{}).effect(in); ok {
		t.Error("CPUID is known")
	}
}
