package sim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// blank makes a machine with process 100, whose only code is 64 KiB at codeAt,
// written by the test.
func blank(t *testing.T, arch target.Arch) *sim.Machine {
	t.Helper()
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 100, Arch: arch, Regions: []sim.Region{
		{At: codeAt, Size: 0x10000, Prot: "r-x"}, {At: scratchAt + 0x10000, Size: 4096}}}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func words(list ...uint32) (b []byte) {
	for _, w := range list {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

func TestExecutes(t *testing.T) {
	slot := binary.LittleEndian.AppendUint64(nil, uint64(codeAt+0x800))
	for _, c := range []struct {
		name string
		arch target.Arch
		code map[target.Addr][]byte
		want target.Addr // offset
		says string
	}{
		{"plain code", target.AMD64, map[target.Addr][]byte{0: oldCode}, 0, ""},
		{"short jump back", target.AMD64, map[target.Addr][]byte{0x100: {0xeb, 0xf9}, 0xfb: {0xe9, 0x00, 0x01, 0, 0}}, 0x200, ""},
		{"near jump", target.AMD64, map[target.Addr][]byte{0: {0xe9, 0xfb, 0x0f, 0, 0}}, 0x1000, ""},
		{"jump through a slot", target.AMD64, map[target.Addr][]byte{0: {0xff, 0x25, 0xfa, 0, 0, 0}, 0x100: slot}, 0x800, ""},
		{"jump behind endbr64", target.AMD64, map[target.Addr][]byte{0: {0xf3, 0x0f, 0x1e, 0xfa, 0xe9, 0xf7, 0x0f, 0, 0}}, 0x1000, ""},
		{"endbr64 alone", target.AMD64, map[target.Addr][]byte{0: {0xf3, 0x0f, 0x1e, 0xfa, 0xc3}}, 0, ""},
		{"jump to itself", target.AMD64, map[target.Addr][]byte{0: {0xeb, 0xfe}}, 0, "more than"},
		{"jump out of all", target.AMD64, map[target.Addr][]byte{0: {0xe9, 0, 0, 0, 0x40}}, 0, "nothing executable"},
		{"jump to data", target.AMD64, map[target.Addr][]byte{0: {0xe9, 0xfb, 0xff, 0x01, 0}}, 0, "nothing executable"},
		{"slot that is not mapped", target.AMD64, map[target.Addr][]byte{0: {0xff, 0x25, 0, 0, 0, 0x40}}, 0, "not mapped"},
		{"jump cut by the end of memory", target.AMD64, map[target.Addr][]byte{0: {0xe9, 0xf9, 0xff, 0, 0}, 0xfffe: {0xe9, 0}}, 0, "nothing executable"},
		{"B forward", target.ARM64, map[target.Addr][]byte{0: words(0x14000400)}, 0x1000, ""},
		{"B back", target.ARM64, map[target.Addr][]byte{0: words(0x14000400), 0x1000: words(0x17fffe00)}, 0x800, ""},
		{"slot by x16", target.ARM64, map[target.Addr][]byte{0: words(0x58000050, 0xd61f0200), 8: slot}, 0x800, ""},
		{"slot by x17", target.ARM64, map[target.Addr][]byte{0: words(0x58000091, 0xd61f0220), 16: slot}, 0x800, ""},
		{"loads x16, jumps to x17", target.ARM64, map[target.Addr][]byte{0: words(0x58000050, 0xd61f0220)}, 0, ""},
		{"B behind bti c", target.ARM64, map[target.Addr][]byte{0: words(0xd503245f, 0x14000400)}, 0x1004, ""},
		{"ret", target.ARM64, map[target.Addr][]byte{0: words(0xd65f03c0)}, 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := blank(t, c.arch)
			start := target.Addr(0)
			if _, ok := c.code[0]; !ok {
				start = 0x100
			}
			for at, b := range c.code {
				if err := m.Poke(100, codeAt+at, b); err != nil {
					t.Fatal(err)
				}
			}
			got, err := m.Executes(100, codeAt+start)
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s, %v; want an error that says %q", got, err, c.says)
				}
				return
			}
			if err != nil || got != codeAt+c.want {
				t.Errorf("%s, %v; want %s", got, err, codeAt+c.want)
			}
		})
	}
}

// TestInstructionCache: what was written is data until it was flushed, byte by byte.
func TestInstructionCache(t *testing.T) {
	m, p := one(t)
	fetch := func() []byte {
		b, err := m.Fetch(100, codeAt, 6)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	f, err := p.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(newCode, codeAt); err != nil {
		t.Fatal(err)
	}
	if b, _ := m.Peek(100, codeAt, 6); !bytes.Equal(b, newCode) {
		t.Errorf("memory is % x", b)
	}
	if !bytes.Equal(fetch(), oldCode) {
		t.Errorf("executes % x before the flush", fetch())
	}
	if err := p.Flush(codeAt, 1); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fetch(), oldCode) {
		t.Errorf("executes % x after a flush of another byte", fetch())
	}
	if err := p.Flush(codeAt+1, 1); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fetch(), newCode) {
		t.Errorf("executes % x after the flush", fetch())
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := m.Invariant(100); err != nil {
		t.Error(err)
	}
	// New memory holds zeros until what was written to it is flushed.
	if err := p.Alloc(codeAt+0x40000, 4096, target.Read|target.Write); err != nil {
		t.Fatal(err)
	}
	p.WriteAt(newCode, codeAt+0x40000)
	if _, err := m.Fetch(100, codeAt+0x40000, 6); err == nil {
		t.Error("memory that is not executable is fetched")
	}
	if err := p.Protect(codeAt+0x40000, 4096, target.Read|target.Exec); err != nil {
		t.Fatal(err)
	}
	if b, err := m.Fetch(100, codeAt+0x40000, 6); err != nil || !bytes.Equal(b, make([]byte, 6)) {
		t.Errorf("executes % x, %v before the flush", b, err)
	}
	p.Flush(codeAt+0x40000, 6)
	if b, err := m.Fetch(100, codeAt+0x40000, 6); err != nil || !bytes.Equal(b, newCode) {
		t.Errorf("executes % x, %v after the flush", b, err)
	}
}
