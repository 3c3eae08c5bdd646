package patcher

import (
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf16"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// environed is a process with an environment block and a map of API sets in
// memory that the simulation does not know.
type environed struct {
	target.Process
	m []byte
}

const (
	testPEB    = target.Addr(0x7ffd0000000)
	testApiSet = testPEB + 0x10000
)

func (e environed) Info() target.Info {
	i := e.Process.Info()
	i.PEB = testPEB
	return i
}

func (e environed) ReadAt(b []byte, at target.Addr) (int, error) {
	switch {
	case at == testPEB+0x68:
		return copy(b, binary.LittleEndian.AppendUint64(nil, uint64(testApiSet))), nil
	case at >= testApiSet && at-testApiSet < target.Addr(len(e.m)):
		return copy(b, e.m[at-testApiSet:]), nil
	}
	return e.Process.ReadAt(b, at)
}

// apiSetBytes writes an API_SET_NAMESPACE from pairs of a set and its values,
// "host" or "importer=host".
func apiSetBytes(sets [][]string) []byte {
	u := func(b []byte, at, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
	b := make([]byte, 28+24*len(sets))
	name := func(s string) (at, n uint32) {
		at = uint32(len(b))
		for _, c := range utf16.Encode([]rune(s)) {
			b = binary.LittleEndian.AppendUint16(b, c)
		}
		return at, uint32(len(b)) - at
	}
	for i, set := range sets {
		e := uint32(28 + 24*i)
		at, n := name(set[0])
		u(b, e+4, at)
		u(b, e+8, n)
		u(b, e+12, 2*uint32(strings.LastIndexByte(set[0], '-')))
		values := uint32(len(b))
		u(b, e+16, values)
		u(b, e+20, uint32(len(set)-1))
		b = append(b, make([]byte, 20*(len(set)-1))...)
		for k, v := range set[1:] {
			who, host, ok := strings.Cut(v, "=")
			if !ok {
				who, host = "", v
			}
			at, n := name(who)
			u(b, values+20*uint32(k)+4, at)
			u(b, values+20*uint32(k)+8, n)
			at, n = name(host)
			u(b, values+20*uint32(k)+12, at)
			u(b, values+20*uint32(k)+16, n)
		}
	}
	u(b, 0, 6)
	u(b, 4, uint32(len(b)))
	u(b, 12, uint32(len(sets)))
	u(b, 16, 28)
	return b
}

// Names of API sets mean what the map of the process says.
func TestBindApiSets(t *testing.T) {
	sets := apiSetBytes([][]string{
		{"api-ms-win-core-x-l1-1-2", "kernelbase.dll"},
		{"api-ms-win-core-y-l1-1-0", "kernel32.dll", "kernel32.dll=kernelbase.dll"},
		{"api-ms-win-dep-l1-1-0", "dep.dll"},
		{"api-ms-win-loose-l1-1-0", "loose.dll"},
		{"api-ms-win-empty-l1-1-0"},
	})
	for _, c := range []struct{ dll, name, to string }{
		{"api-ms-win-core-x-l1-1-0.dll", "KB", "kernelbase.dll+4"}, // another minor version
		{"API-MS-Win-Core-X-L1-1-0.DLL", "KB", "kernelbase.dll+4"},
		{"api-ms-win-core-y-l1-1-0.dll", "K", "kernel32.dll+0"},
		{"api-ms-win-dep-l1-1-0.dll", "B", "dep.dll+2"}, // which the base imports

		{"dep.dll", "ToSet", "exports no such symbol"}, // forwarded to set x, which has no X
		{"api-ms-win-core-x-l1-2-0.dll", "KB", "no module of this system stands for api-ms-win-core-x-l1-2-0.dll"},
		{"api-ms-win-empty-l1-1-0.dll", "KB", "no module of this system stands for"},
		{"api-ms-win-loose-l1-1-0.dll", "L", "could be unloaded before base.dll"},
	} {
		w := bindWorld(t)
		patch := release{sequence: 1, names: []string{"f"}, change: func(f *forge, _ *pe.HotPatchSpec) {
			f.imports = []pe.Import{{DLL: c.dll, Name: c.name}}
		}}.patch(t, w.file)
		check := func(p target.Process, want string) {
			t.Helper()
			plan, err := Prepare(p, w.base, patch)
			if module, offset, ok := strings.Cut(want, "+"); ok && err == nil {
				if got := target.Addr(plan.Binds[0].Value) - w.module(module) - forgeText; got.String() != offset {
					t.Errorf("%s!%s: bound to %x, want %s", c.dll, c.name, plan.Binds[0].Value, want)
				}
			} else if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s!%s: %v, want %s", c.dll, c.name, err, want)
			}
		}
		check(environed{w.p, sets}, c.to)
		if c.dll != "dep.dll" {
			check(w.p, "which this backend does not give")
		}
		check(environed{w.p, nil}, "cannot read")
	}
}

// Whatever stands in the map, reading it ends and stays inside.
func TestApiSetMapHostile(t *testing.T) {
	good := apiSetBytes([][]string{{"api-ms-win-core-x-l1-1-2", "kernelbase.dll", "other.dll=kernel32.dll"}})
	for at := range len(good) {
		for _, v := range []byte{0, 1, 0x7f, 0xff} {
			b := append([]byte(nil), good...)
			b[at] = v
			m := &apiSetMap{b}
			m.host("api-ms-win-core-x-l1-1-0.dll", "other.dll")
			(&apiSetMap{b[:at]}).host("api-ms-win-core-x-l1-1-0.dll", "other.dll")
		}
	}
	m := &apiSetMap{good}
	if h := m.host("api-ms-win-core-x-l1-1-0", "OTHER.dll"); h != "kernel32.dll" {
		t.Errorf("for other.dll: %q", h)
	}
	if h := m.host("api-ms-win-core-x-l1-1-0", "base.dll"); h != "kernelbase.dll" {
		t.Errorf("for base.dll: %q", h)
	}
	w := bindWorld(t)
	for what, b := range map[string][]byte{"version 2": {2, 0, 0, 0, 28, 0, 0, 0}, "small": {6, 0, 0, 0, 27, 0, 0, 0}, "large": {6, 0, 0, 0, 0, 0, 0, 0x10}} {
		if _, err := readApiSetMap(environed{w.p, b}); err == nil || !strings.Contains(err.Error(), "known is version 6") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
