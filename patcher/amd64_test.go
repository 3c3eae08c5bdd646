package patcher

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/arch/x86/x86asm"
	"pgregory.net/rapid"

	"hotpatchd/pe"
)

// need skips a test without a tool, or fails it where everything is to be tested.
func need(t testing.TB, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		lack(t, "needs "+tool)
	}
}

func lack(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Every line is an instruction that was looked up by hand; len 0 is a refusal.
func TestDecodeByHand(t *testing.T) {
	for _, c := range []struct {
		code string
		want instruction
	}{
		{"90", instruction{Len: 1}},
		{"55", instruction{Len: 1}},
		{"41 57", instruction{Len: 2}},                   // push r15
		{"66 90", instruction{Len: 2}},                   // xchg ax, ax
		{"8b ff", instruction{Len: 2}},                   // mov edi, edi
		{"48 89 5c 24 08", instruction{Len: 5}},          // mov [rsp+8], rbx
		{"48 83 ec 28", instruction{Len: 4}},             // sub rsp, 40
		{"48 81 ec 00 01 00 00", instruction{Len: 7}},    // sub rsp, 256
		{"66 81 c1 34 12", instruction{Len: 5}},          // add cx, 1234h: the immediate shrinks
		{"66 48 81 c1 34 12 00 00", instruction{Len: 8}}, // add rcx, 1234h: REX.W wins over 66
		{"66 48 05 34 12 00 00", instruction{Len: 7}},
		{"66 48 c7 c0 01 00 00 00", instruction{Len: 8}},
		{"66 48 f7 c0 01 00 00 00", instruction{Len: 8}},
		{"66 48 b8 01 02 03 04 05 06 07 08", instruction{Len: 11}},
		{"b8 2a 00 00 00", instruction{Len: 5}},
		{"66 b8 2a 00", instruction{Len: 4}},
		{"48 b8 01 02 03 04 05 06 07 08", instruction{Len: 10}},
		{"41 b8 01 02 03 04", instruction{Len: 6}},
		{"b0 01", instruction{Len: 2}},
		{"c7 05 10 00 00 00 2a 00 00 00", instruction{Len: 10, HasRIP: true, Disp: 16}}, // immediate behind the displacement
		{"80 3d 10 00 00 00 01", instruction{Len: 7, HasRIP: true, Disp: 16}},
		{"48 8d 05 f9 ff ff ff", instruction{Len: 7, HasRIP: true, Disp: -7, Lea: true}},
		{"8b 04 25 10 00 00 00", instruction{Len: 7, HasAbs: true, Disp: 16}},
		{"8b 8c 82 00 20 00 00", instruction{Len: 7, HasAbs: true, Disp: 0x2000}}, // mov ecx, [rdx+rax*4+2000h]
		{"8b 80 00 20 00 00", instruction{Len: 6, HasAbs: true, Disp: 0x2000}},
		{"8b 04 24", instruction{Len: 3}},
		{"8b 44 24 08", instruction{Len: 4}},
		{"8b 45 00", instruction{Len: 3}},
		{"41 8b 05 00 00 00 00", instruction{Len: 7, HasRIP: true}}, // REX.B does not make it r13
		{"f6 c1 01", instruction{Len: 3}},                           // test cl, 1
		{"f6 c9 01", instruction{Len: 3}},                           // the same, by its other number
		{"f6 d1", instruction{Len: 2}},                              // not cl
		{"f7 c1 01 00 00 00", instruction{Len: 6}},
		{"66 f7 c1 01 00", instruction{Len: 5}},
		{"f7 d9", instruction{Len: 2}},
		{"c8 10 00 01", instruction{Len: 4}}, // enter
		{"a1 01 02 03 04 05 06 07 08", instruction{Len: 9}},
		{"67 a1 01 02 03 04", instruction{Len: 6}},
		{"a8 01", instruction{Len: 2}},
		{"a9 01 00 00 00", instruction{Len: 5}},
		{"66 a9 01 00", instruction{Len: 4}},
		{"68 01 00 00 00", instruction{Len: 5}},
		{"6a 01", instruction{Len: 2}},
		{"69 c0 01 00 00 00", instruction{Len: 6}},
		{"6b c0 01", instruction{Len: 3}},
		{"c1 e0 04", instruction{Len: 3}},
		{"d1 e0", instruction{Len: 2}},
		{"e4 60", instruction{Len: 2}},
		{"cd 21", instruction{Len: 2}},
		{"cd 29", instruction{Len: 2, Flow: flowTrap}}, // __fastfail
		{"cc", instruction{Len: 1, Flow: flowTrap}},
		{"0f 0b", instruction{Len: 2, Flow: flowTrap}},
		{"67 0f b9 40 10", instruction{Len: 5, Flow: flowTrap}}, // ud1, as clang writes traps
		{"c3", instruction{Len: 1, Flow: flowReturn}},
		{"f3 c3", instruction{Len: 2, Flow: flowReturn}},
		{"c2 08 00", instruction{Len: 3, Flow: flowReturn}},
		{"48 cf", instruction{Len: 2, Flow: flowReturn}},
		{"eb fe", instruction{Len: 2, Flow: flowJump, Rel: -2}},
		{"e9 00 01 00 00", instruction{Len: 5, Flow: flowJump, Rel: 256}},
		{"f2 e9 00 01 00 00", instruction{Len: 6, Flow: flowJump, Rel: 256}}, // bnd
		{"e8 fb ff ff ff", instruction{Len: 5, Flow: flowCall, Rel: -5}},
		{"74 02", instruction{Len: 2, Flow: flowBranch, Rel: 2}},
		{"2e 74 02", instruction{Len: 3, Flow: flowBranch, Rel: 2}}, // a hint
		{"e3 80", instruction{Len: 2, Flow: flowBranch, Rel: -128}},
		{"e2 7f", instruction{Len: 2, Flow: flowBranch, Rel: 127}},
		{"0f 84 10 00 00 00", instruction{Len: 6, Flow: flowBranch, Rel: 16}},
		{"ff e0", instruction{Len: 2, Flow: flowIndirect}},
		{"41 ff e3", instruction{Len: 3, Flow: flowIndirect}},
		{"ff 25 10 00 00 00", instruction{Len: 6, Flow: flowIndirect, HasRIP: true, Disp: 16}},
		{"48 ff 25 10 00 00 00", instruction{Len: 7, Flow: flowIndirect, HasRIP: true, Disp: 16}},
		{"ff 15 10 00 00 00", instruction{Len: 6, HasRIP: true, Disp: 16}},
		{"f3 0f 1e fa", instruction{Len: 4}},    // endbr64
		{"f3 48 0f 1e c8", instruction{Len: 5}}, // rdsspq rax
		{"f3 48 0f ae e8", instruction{Len: 5}}, // incsspq rax
		{"0f 1f 84 00 00 00 00 00", instruction{Len: 8, HasAbs: true}},
		{"66 2e 0f 1f 84 00 00 00 00 00", instruction{Len: 10, HasAbs: true}},
		{"66 66 2e 0f 1f 84 00 00 00 00 00", instruction{Len: 11, HasAbs: true}},
		{"0f 05", instruction{Len: 2}},
		{"0f a2", instruction{Len: 2}},
		{"0f 01 d0", instruction{Len: 3}}, // xgetbv
		{"0f 20 c0", instruction{Len: 3}},
		{"f3 0f b8 c1", instruction{Len: 4}},
		{"0f ba e0 05", instruction{Len: 4}},
		{"0f a4 c8 05", instruction{Len: 4}},
		{"66 0f 70 c0 1b", instruction{Len: 5}},
		{"66 0f 73 f8 04", instruction{Len: 5}},
		{"0f c2 c1 02", instruction{Len: 4}},
		{"66 0f 38 00 c1", instruction{Len: 5}},
		{"66 0f 3a 0f c1 08", instruction{Len: 6}},
		{"f2 48 0f 38 f1 c1", instruction{Len: 6}}, // crc32
		{"65 48 8b 04 25 60 00 00 00", instruction{Len: 9, HasAbs: true, Disp: 0x60}},
		{"c5 f8 77", instruction{Len: 3}}, // vzeroupper
		{"c5 f8 28 c1", instruction{Len: 4}},
		{"c5 f9 70 c0 1b", instruction{Len: 5}},
		{"c5 fc 10 05 10 00 00 00", instruction{Len: 8, HasRIP: true, Disp: 16}},
		{"c4 e2 71 00 c2", instruction{Len: 5}},
		{"c4 e3 71 0f c2 08", instruction{Len: 6}},
		{"c4 e3 7d 06 05 10 00 00 00 01", instruction{Len: 10, HasRIP: true, Disp: 16}},
		{"62 f1 7c 48 28 c1", instruction{Len: 6}},
		{"62 f1 7c 48 28 44 24 01", instruction{Len: 8}}, // compressed displacement is one byte
		{"62 f3 75 48 25 c2 ff", instruction{Len: 7}},    // vpternlogd
		{"62 f1 7f 48 7a c1", instruction{Len: 6}},       // vcvtudq2ps
		{"62 f5 7c 48 58 c1", instruction{Len: 6}},       // vaddph
		{"8f c0", instruction{Len: 2}},                   // pop rax, the long way
		{"9b", instruction{Len: 1}},
		{"66 66 66 66 66 66 66 66 66 66 66 66 66 66 90", instruction{Len: 15}},

		// Refused.
		{"", instruction{}},
		{"66", instruction{}},
		{"48", instruction{}},
		{"48 66 90", instruction{}}, // a prefix behind REX
		{"48 48 90", instruction{}},
		{"66 66 66 66 66 66 66 66 66 66 66 66 66 66 66 90", instruction{}}, // 16 bytes
		{"66 e9 00 01 00 00", instruction{}},
		{"66 e8 00 01 00 00", instruction{}},
		{"66 0f 84 00 01 00 00", instruction{}},
		{"66 eb 00", instruction{}},
		{"66 74 00", instruction{}},
		{"06", instruction{}}, {"0e", instruction{}}, {"27", instruction{}}, {"60", instruction{}}, {"82 c0 01", instruction{}},
		{"9a 00 00 00 00 00 00", instruction{}}, {"ea 00 00 00 00 00 00", instruction{}}, {"ce", instruction{}},
		{"d4 0a", instruction{}}, {"d5 00 90", instruction{}}, {"d6", instruction{}},
		{"8f e8 78 c0 c1 01", instruction{}}, // XOP
		{"8f c8", instruction{}},             // XOP
		{"c6 f8 01", instruction{}},          // xabort
		{"c7 f8 00 00 00 00", instruction{}}, // xbegin
		{"fe d0", instruction{}},             // no such
		{"ff f8", instruction{}},             // no such
		{"8d c0", instruction{}},             // lea of a register
		{"0f 04", instruction{}}, {"0f 0a", instruction{}}, {"0f 36", instruction{}}, {"0f a6 c0", instruction{}}, {"0f b8 c1", instruction{}},
		{"0f 0f c1 9e", instruction{}},       // 3DNow!
		{"0f ff c0", instruction{}},          // ud0
		{"0f 20 00", instruction{}},          // a control register and memory
		{"66 0f 78 c0 01 02", instruction{}}, // SSE4a
		{"f2 0f 78 c1 01 02", instruction{}},
		{"66 c5 f8 77", instruction{}}, {"48 c5 f8 77", instruction{}}, {"f3 c5 f8 77", instruction{}},
		{"c4 e0 71 00 c2", instruction{}}, {"c4 e4 71 00 c2", instruction{}}, {"c4 e5 71 00 c2", instruction{}}, {"c4 e7 71 00 c2", instruction{}},
		{"c5 f8 05", instruction{}}, {"c5 f8 20 c0", instruction{}}, {"c5 f8 84 00 00 00 00", instruction{}},
		{"62 f0 7c 48 28 c1", instruction{}}, {"62 f4 7c 48 28 c1", instruction{}}, {"62 f9 7c 48 28 c1", instruction{}}, {"62 f1 7c 48 77", instruction{}},
	} {
		b := unhex(t, c.code)
		got, err := decodeAMD64(b)
		if c.want.Len == 0 {
			if err == nil {
				t.Errorf("% x: read as %+v, want a refusal", b, got)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("% x: %+v, %v; want %+v", b, got, err, c.want)
			continue
		}
		// What follows does not matter, and what is missing is never guessed.
		if more, err := decodeAMD64(append(bytes.Clone(b), 0xff, 0xff, 0xff, 0xff)); err != nil || more != c.want {
			t.Errorf("% x and more: %+v, %v", b, more, err)
		}
		for n := range len(b) {
			if cut, err := decodeAMD64(b[:n]); err == nil {
				t.Errorf("% x, %d bytes of it: read as %+v", b, n, cut)
			}
		}
	}
}

// images are PE files with code of several compilers: the fixtures, and what
// the machine has.
func images(t testing.TB) []string {
	list, err := filepath.Glob("../testdata/fixtures/*/*.dll")
	if err != nil || len(list) < 10 {
		t.Fatalf("%d fixtures, %v", len(list), err)
	}
	for _, pattern := range []string{"/usr/x86_64-w64-mingw32/lib/*.dll", "/usr/lib/gcc/x86_64-w64-mingw32/*/lib*-[0-9]*.dll",
		"/usr/lib/x86_64-linux-gnu/wine/x86_64-windows/ntdll.dll", "/usr/lib/x86_64-linux-gnu/wine/x86_64-windows/kernel*.dll"} {
		more, _ := filepath.Glob(pattern)
		list = append(list, more...)
	}
	return list
}

// line is one instruction as objdump has it.
type line struct {
	at    uint64
	bytes []byte
	text  string
}

// objdump disassembles, with the raw bytes of an instruction on one line.
func objdump(t testing.TB, args ...string) []line {
	t.Helper()
	cmd := exec.Command("objdump", append([]string{"-w", "-M", "intel"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("objdump %v: %v", args, err)
	}
	var list []line
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		at, rest, ok := strings.Cut(s.Text(), ":\t")
		raw, text, _ := strings.Cut(rest, "\t")
		a, err := strconv.ParseUint(strings.TrimSpace(at), 16, 64)
		if !ok || err != nil {
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(raw, " ", ""))
		if err != nil {
			continue
		}
		list = append(list, line{a, b, strings.TrimSpace(text)})
	}
	return list
}

// odd tells lines on which objdump's length is not that of an instruction: what
// it does not know, and prefixes it splits off.
func (l line) odd() bool {
	if strings.Contains(l.text, "(bad)") || l.text == "" || l.text == ".byte" || strings.HasPrefix(l.text, ".byte") {
		return true
	}
	last := l.bytes[len(l.bytes)-1]
	word, _, _ := strings.Cut(l.text, " ")
	switch word {
	case "rex", "data16", "cs", "ds", "es", "ss", "fs", "gs", "addr32", "lock", "repz", "repnz", "rep":
		return last == 0x66 || last == 0x67 || last == 0x2e || last == 0x36 || last == 0x3e || last == 0x26 || last == 0x64 || last == 0x65 || last == 0xf0 || last == 0xf2 || last == 0xf3 || last&0xf0 == 0x40
	}
	return strings.HasPrefix(word, "rex.") && last&0xf0 == 0x40
}

// Every instruction of real images, of four compilers, against objdump. Where
// we know an instruction its length is right; nearly all are known.
func TestDecodeRealImages(t *testing.T) {
	t.Parallel()
	need(t, "objdump")
	all, refused := 0, 0
	unknown := map[string]int{}
	for _, name := range images(t) {
		im := open(t, name)
		if im.Machine != machineAMD64 {
			continue
		}
		if im.SizeOfImage > 4<<20 || os.Getenv("HOTPATCH_TEST_ALL") == "" && im.SizeOfImage > 1<<20 {
			continue
		}
		for _, l := range objdump(t, "-d", name) {
			if l.odd() {
				continue
			}
			all++
			in, err := decodeAMD64(append(bytes.Clone(l.bytes), 0x90, 0x90, 0x90, 0x90))
			if err != nil {
				refused++
				unknown[l.text]++
				continue
			}
			if in.Len != len(l.bytes) && l.bytes[0] != 0x9b { // objdump joins FWAIT to what it waits for
				t.Errorf("%s %x: % x is %q, %d bytes; read as %d", filepath.Base(name), l.at, l.bytes, l.text, len(l.bytes), in.Len)
			}
			op, args := l.mnemonic()
			if want := flowOf(op, args); in.Flow != want {
				t.Errorf("%s %x: % x is %q; flow read as %d, want %d", filepath.Base(name), l.at, l.bytes, l.text, in.Flow, want)
			}
			if to, ok := destination(args); ok && (in.Flow == flowBranch || in.Flow == flowJump || in.Flow == flowCall) {
				if have := l.at + uint64(in.Len) + uint64(int64(in.Rel)); have != to {
					t.Errorf("%s %x: %q leads to %x, read as %x", filepath.Base(name), l.at, l.text, to, have)
				}
			}
			if _, to, ok := strings.Cut(l.text, "# 0x"); ok && in.HasRIP {
				to, _, _ = strings.Cut(to, " ")
				want, _ := strconv.ParseUint(to, 16, 64)
				if have := l.at + uint64(in.Len) + uint64(int64(in.Disp)); have != want {
					t.Errorf("%s %x: %q refers to %x, read as %x", filepath.Base(name), l.at, l.text, want, have)
				}
			}
			if strings.Contains(l.text, "[rip+") != in.HasRIP {
				t.Errorf("%s %x: %q: rip-relative read as %v", filepath.Base(name), l.at, l.text, in.HasRIP)
			}
		}
	}
	t.Logf("%d instructions, %d refused", all, refused)
	if all < 10000 || refused > all/1000 {
		t.Errorf("%d instructions, %d refused: %v", all, refused, head16(unknown))
	}
}

func head16(m map[string]int) []string {
	var out []string
	for k, n := range m {
		if out = append(out, fmt.Sprintf("%s (%d)", k, n)); len(out) == 16 {
			break
		}
	}
	return out
}

// mnemonic parts a line's text; prefixes that objdump prints as words are left out.
func (l line) mnemonic() (op, args string) {
	op, args, _ = strings.Cut(l.text, " ")
	for strings.HasPrefix(op, "rex") || slices.Contains([]string{"bnd", "rep", "repz", "repnz", "notrack", "cs", "ds", "es", "ss", "fs", "gs", "lock", "data16", "addr32", "xacquire", "xrelease"}, op) {
		op, args, _ = strings.Cut(strings.TrimSpace(args), " ")
	}
	return op, strings.TrimSpace(args)
}

// flowOf is the flow of a mnemonic.
func flowOf(op, args string) flow {
	op, _, _ = strings.Cut(op, ",") // hints
	switch {
	case op == "jmp":
		if _, ok := destination(args); ok {
			return flowJump
		}
		return flowIndirect
	case op == "call":
		if _, ok := destination(args); ok {
			return flowCall
		}
		return flowNext
	case op == "ret" || op == "retf" || op == "iret" || op == "iretq" || op == "iretw":
		return flowReturn
	case op == "int3" || op == "ud2" || op == "ud1" || op == "int" && args == "0x29":
		return flowTrap
	case op[0] == 'j' || strings.HasPrefix(op, "loop"):
		return flowBranch
	}
	return flowNext
}

// destination is the address a direct branch is printed with.
func destination(args string) (uint64, bool) {
	word, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(args), "0x"), " ")
	if strings.ContainsAny(word, "[,") {
		return 0, false
	}
	n, err := strconv.ParseUint(word, 16, 64)
	return n, err == nil
}

func open(t testing.TB, name string) *pe.Image {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return im
}

// forms are instruction beginnings that cover every opcode of every map with
// several operand forms and prefixes; what is not an instruction is among them.
func forms() [][]byte {
	var out [][]byte
	modrms := [][]byte{{0xc1}, {0x01}, {0x05}, {0x44, 0x24}, {0x84, 0x65}, {0x04, 0x25}, {0x48}, {0x90}, {0xe9}, {0xd8}, {0x38}, {0x2c, 0x6d}}
	add := func(parts ...[]byte) {
		b := bytes.Join(parts, nil)
		for i := byte(1); len(b) < maxInstruction; i++ {
			b = append(b, i) // displacement and immediate
		}
		out = append(out, b[:maxInstruction])
	}
	prefixes := [][]byte{nil, {0x66}, {0x48}, {0x66, 0x48}, {0xf3}, {0xf2}, {0x67}, {0x41}, {0xf2, 0x66}, {0x2e}, {0xf0}}
	for i, p := range prefixes {
		ms := modrms
		if i > 1 {
			ms = modrms[:4]
		}
		for op := range 256 {
			for _, m := range ms {
				add(p, []byte{byte(op)}, m)
				add(p, []byte{0x0f, byte(op)}, m)
			}
			for _, m := range modrms[1:3] {
				add(p, []byte{0x0f, 0x38, byte(op)}, m)
				add(p, []byte{0x0f, 0x3a, byte(op)}, m)
			}
		}
	}
	for op := range 256 {
		for _, m := range modrms[:3] {
			for _, v := range []byte{0xf8, 0xf9, 0xfb} {
				add([]byte{0xc5, v, byte(op)}, m)
				for _, k := range []byte{1, 2, 3} {
					add([]byte{0xc4, 0xe0 | k, v, byte(op)}, m)
					add([]byte{0xc4, 0xe0 | k, v | 0x80, byte(op)}, m)
				}
			}
			for _, k := range []byte{1, 2, 3, 5, 6} {
				for _, v := range []byte{0x7c, 0xfd, 0x7e, 0x7f} {
					add([]byte{0x62, 0xf0 | k, v, 0x48, byte(op)}, m)
				}
			}
		}
	}
	return out
}

// All forms against objdump, each in a slot of its own with room to get back
// into step. What we take for an instruction, objdump reads with the same
// length, or does not know.
func TestDecodeForms(t *testing.T) {
	t.Parallel()
	need(t, "objdump")
	const slot = 32
	list := forms()
	b := bytes.Repeat([]byte{0x90}, slot*len(list))
	for i, f := range list {
		copy(b[slot*i:], f)
	}
	file := filepath.Join(t.TempDir(), "forms")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	first := map[int][]line{}
	for _, l := range objdump(t, "-D", "-b", "binary", "-m", "i386:x86-64", file) {
		first[int(l.at)/slot] = append(first[int(l.at)/slot], l)
	}
	known, agreed := 0, 0
	unknown := map[string]int{}
	for i, f := range list {
		ls := first[i]
		if len(ls) == 0 || int(ls[0].at) != slot*i {
			t.Fatalf("form %d, % x: objdump is out of step", i, f)
		}
		l := ls[0]
		in, err := decodeAMD64(f)
		if err != nil {
			if !l.odd() {
				unknown[strings.Fields(l.text)[0]]++
			}
			continue
		}
		known++
		if l.odd() {
			continue // objdump does not know it
		}
		if in.Len != len(l.bytes) && !disputed(f, l) {
			t.Errorf("% x: %q has %d bytes, read as %d", f, l.text, len(l.bytes), in.Len)
		} else {
			agreed++
		}
	}
	t.Logf("%d forms, %d known, %d agreed on; objdump alone knows %v", len(list), known, agreed, head16(unknown))
	if agreed < len(list)/4 {
		t.Errorf("%d forms, agreed on %d", len(list), agreed)
	}
}

// disputed are forms on which objdump is known to be wrong or to print what no
// processor does.
func disputed(f []byte, l line) bool {
	return f[0] == 0x9b || f[1] == 0x9b || f[2] == 0x9b // it joins FWAIT to what it waits for
}

// The decoder of golang.org/x/arch as a third opinion, on real code.
func TestDecodeSecondOpinion(t *testing.T) {
	t.Parallel()
	agreed := 0
	for _, name := range images(t) {
		im := open(t, name)
		if im.Machine != machineAMD64 || im.SizeOfImage > 1<<20 {
			continue
		}
		for _, s := range im.Sections {
			if !s.Exec() {
				continue
			}
			code := make([]byte, s.VirtualSize)
			if err := im.ReadRVA(code, s.RVA); err != nil {
				t.Fatal(err)
			}
			for i := 0; i < len(code); {
				in, err := decodeAMD64(code[i:])
				if err != nil {
					i++
					continue
				}
				if a, err := x86asm.Decode(code[i:], 64); err == nil && a.Op != 0 && a.Op != x86asm.UD1 {
					agreed++
					if a.Len != in.Len {
						t.Errorf("%s %x: % x is %v, %d bytes; read as %d", name, s.RVA+uint32(i), code[i:i+in.Len], a, a.Len, in.Len)
					}
				}
				i += in.Len
			}
		}
	}
	if agreed < 2000 {
		t.Errorf("agreed on %d instructions only", agreed)
	}
}

// sound is what holds for whatever bytes.
func sound(t interface{ Errorf(string, ...any) }, b []byte) {
	in, err := decodeAMD64(b)
	if err != nil {
		return
	}
	if in.Len < 1 || in.Len > maxInstruction || in.Len > len(b) {
		t.Errorf("% x: length %d of %d bytes", b, in.Len, len(b))
		return
	}
	if again, err := decodeAMD64(b[:in.Len:in.Len]); err != nil || again != in {
		t.Errorf("% x: %+v with what follows, %+v (%v) without", b, in, again, err)
	}
	for n := range in.Len {
		if short, err := decodeAMD64(b[:n:n]); err == nil {
			t.Errorf("% x: %d bytes, and %+v with %d of them", b, in.Len, short, n)
		}
	}
	if in.HasRIP && in.HasAbs {
		t.Errorf("% x: two displacements: %+v", b, in)
	}
}

func TestDecodeIsSound(t *testing.T) {
	for _, f := range forms() {
		sound(t, f)
	}
	rapid.Check(t, func(r *rapid.T) {
		sound(r, rapid.SliceOfN(rapid.Byte(), 0, 24).Draw(r, "bytes"))
	})
}

func FuzzDecodeAMD64(f *testing.F) {
	f.Add([]byte{0x66, 0x48, 0x81, 0xc1, 1, 2, 3, 4})
	f.Add([]byte{0x62, 0xf1, 0x7c, 0x48, 0x28, 0x44, 0x24, 1})
	f.Add([]byte{0xc4, 0xe3, 0x7d, 6, 5, 0x10, 0, 0, 0, 1})
	f.Add([]byte{0x67, 0xa1, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, b []byte) { sound(t, b) })
}
