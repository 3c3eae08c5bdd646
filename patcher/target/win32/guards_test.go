//go:build windows

package win32

import (
	"context"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// told is a process of which everything is told that a Windows could tell.
type told struct {
	isCritical, isDebugged bool
	kind                   byte
	protectionKnown        bool
	policies               map[uintptr]uint32
	machine, native        uint16
}

func (f told) critical() bool           { return f.isCritical }
func (f told) debugged() bool           { return f.isDebugged }
func (f told) protection() (byte, bool) { return f.kind, f.protectionKnown }
func (f told) mitigation(policy uintptr) (uint32, bool) {
	flags, ok := f.policies[policy]
	return flags, ok
}
func (f told) machines() (uint16, uint16) { return f.machine, f.native }

// TestGuards proves what is made of the facts. Where Wine has none of these
// protections, that Windows states them so is not proved here.
func TestGuards(t *testing.T) {
	plain := told{machine: machineAMD64, native: machineAMD64}
	for _, c := range []struct {
		name string
		host string
		f    func(f *told)
		want []target.GuardCode
		text string
	}{
		{"a process like any other", "app.exe", func(*told) {}, nil, ""},
		{"nothing is known", "app.exe", func(f *told) { f.policies = nil }, nil, ""},
		{"policies are off", "app.exe", func(f *told) {
			f.protectionKnown, f.policies = true, map[uintptr]uint32{dynamicCodePolicy: 0, signaturePolicy: 0}
		}, nil, ""},
		{"code may be downgraded by others", "app.exe", func(f *told) { f.policies = map[uintptr]uint32{dynamicCodePolicy: 1 << 2} }, nil, ""},
		{"arbitrary code guard", "app.exe", func(f *told) { f.policies = map[uintptr]uint32{dynamicCodePolicy: 1} }, []target.GuardCode{target.GuardDynamicCode}, "arbitrary code guard"},
		{"code integrity guard, Microsoft", "app.exe", func(f *told) { f.policies = map[uintptr]uint32{signaturePolicy: 1} }, []target.GuardCode{target.GuardSigned}, "code integrity guard"},
		{"code integrity guard, store", "app.exe", func(f *told) { f.policies = map[uintptr]uint32{signaturePolicy: 2} }, []target.GuardCode{target.GuardSigned}, ""},
		{"light protection", "app.exe", func(f *told) { f.kind, f.protectionKnown = 1, true }, []target.GuardCode{target.GuardProtected, target.GuardSystem}, "protect"},
		{"full protection", "app.exe", func(f *told) { f.kind, f.protectionKnown = 2, true }, []target.GuardCode{target.GuardProtected, target.GuardSystem}, "protect"},
		{"a debugger", "app.exe", func(f *told) { f.isDebugged = true }, []target.GuardCode{target.GuardTracer}, "debugger"},
		{"32 bits", "app.exe", func(f *told) { f.machine = machineI386 }, []target.GuardCode{target.Guard32Bit}, "32-bit"},
		{"32 bits on arm64", "app.exe", func(f *told) { f.machine, f.native = machineARMNT, machineARM64 }, []target.GuardCode{target.Guard32Bit}, ""},
		{"amd64 on arm64", "app.exe", func(f *told) { f.native = machineARM64 }, []target.GuardCode{target.GuardEmulated}, "amd64 code on an arm64 machine"},
		{"lsass", "LSASS.exe", func(*told) {}, []target.GuardCode{target.GuardSystem}, "LSASS.exe"},
		{"defender, protected", "MsMpEng.exe", func(f *told) { f.kind, f.protectionKnown = 1, true }, []target.GuardCode{target.GuardProtected, target.GuardSystem}, ""},
		{"critical", "svchost.exe", func(f *told) { f.isCritical = true }, []target.GuardCode{target.GuardSystem}, "critical"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := plain
			c.f(&f)
			d := describer{self: 1}
			got := d.guards(f, target.Info{ID: target.ID{PID: 8}, Host: c.host})
			var codes []target.GuardCode
			for _, g := range got {
				codes = append(codes, g.Code)
				if !strings.Contains(g.Text, c.text) {
					t.Errorf("%q does not say %q", g.Text, c.text)
				}
			}
			if len(codes) != len(c.want) {
				t.Fatalf("guards %v, want %v", codes, c.want)
			}
			for i := range codes {
				if codes[i] != c.want[i] {
					t.Errorf("guards %v, want %v", codes, c.want)
				}
			}
		})
	}
}

// TestKeptOut: a process that cannot even be asked what it is leaves a gap in
// what we see, unless it is one that is never touched anyway.
func TestKeptOut(t *testing.T) {
	d := describer{privileged: true}
	for name, want := range map[string]int{"app.exe": 1, "Secure System": 2, "MemCompression": 2, "csrss.exe": 2} {
		i := d.describe(0, entry{id: target.ID{PID: 8}, name: name})
		if len(i.Guards) != want || i.Guards[0].Code != target.GuardProtected || want > 1 && i.Guards[1].Code != target.GuardSystem {
			t.Errorf("%s: guards %v", name, i.Guards)
		}
	}
}

// TestOurselves: we are listed, guarded, and never frozen.
func TestOurselves(t *testing.T) {
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if g := p.Info().Guards; len(g) != 1 || g[0].Code != target.GuardSelf {
		t.Errorf("guards %v", g)
	}
	_, err = p.Freeze(context.Background())
	wantError(t, "Freeze", err, target.ErrDenied, "ourselves")
}

// TestInfo: what is told of a process like any other.
func TestInfo(t *testing.T) {
	h := winhosttest.Start(t, winhosttest.Options{Spin: 1})
	b := newTestBackend(t)
	p, err := b.Open(context.Background(), idOf(t, h.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	i := p.Info()
	if !strings.EqualFold(i.Image, winhosttest.Build(t)) || !strings.HasPrefix(i.Host, "winhost-") || i.PEB == 0 || i.UID != -1 || !strings.HasPrefix(i.SID, "S-1-5-") {
		t.Errorf("%+v", i)
	}
	// The loader's list hangs on the PEB: its pointer is at 0x18 on 64 bits.
	var ldr [8]byte
	if _, err := p.ReadAt(ldr[:], i.PEB+0x18); err != nil || ldr == [8]byte{} {
		t.Errorf("no loader list at the PEB %s: % x, %v", i.PEB, ldr, err)
	}
	// The image as the planner finds it: a file from its start, and code behind it.
	regions, err := p.Regions()
	if err != nil {
		t.Fatal(err)
	}
	start, code, stacks := false, false, 0
	for _, r := range regions {
		if strings.EqualFold(r.Path, i.Image) && r.Kind == target.File && !r.Shared {
			start = start || r.Offset == 0 && r.Prot == target.Read
			code = code || r.Offset > 0 && r.Start <= target.Addr(h.Entry()) && target.Addr(h.Entry()) < r.End
		}
		if r.Kind == target.Stack {
			stacks++
		}
	}
	if !start || !code {
		t.Errorf("the image is not told of as such: start %v, code %v, in %+v", start, code, regions)
	}
	if stacks == 0 {
		t.Error("no stack is told of as such")
	}
}

func TestDosPath(t *testing.T) {
	d := drives{letters: []string{"C:", "D:"}, devices: []string{`\Device\HarddiskVolume3\`, `\Device\HarddiskVolume31\`}, asked: true}
	for _, c := range [][2]string{
		{`\Device\HarddiskVolume3\Windows\a.dll`, `C:\Windows\a.dll`},
		{`\Device\HarddiskVolume31\b.dll`, `D:\b.dll`},
		{`\Device\HarddiskVolume4\b.dll`, `\Device\HarddiskVolume4\b.dll`},
		{`\??\Z:\c.dll`, `Z:\c.dll`},
		{`\Device\Mup\server\share\d.dll`, `\\server\share\d.dll`},
		{``, ``},
	} {
		if got := d.dosPath(c[0]); got != c[1] {
			t.Errorf("%s is %s, want %s", c[0], got, c[1])
		}
	}
}

// TestMissingFunction: an export that this Windows has not is an answer.
func TestMissingFunction(t *testing.T) {
	gone := windows.NewLazySystemDLL("ntdll.dll").NewProc("NtNoSuchFunctionHere")
	if err := nt(gone, 1, 2, 3); err != statusNotImplemented {
		t.Errorf("nt: %v", err)
	}
	if _, err := win(gone, 1); err != statusNotImplemented {
		t.Errorf("win: %v", err)
	}
}
