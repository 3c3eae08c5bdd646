package build

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func importLibrary(t *testing.T, base string) []byte {
	t.Helper()
	lib, n, ambiguous, err := ImportLibrary(ImportLibraryOptions{Base: fixture(t, base)})
	if err != nil || len(ambiguous) != 0 || n == 0 {
		t.Fatalf("%s: %d names, ambiguous %v: %v", base, n, ambiguous, err)
	}
	return lib
}

// member is one file of an archive, by its offset.
type member struct {
	name string
	data []byte
}

// readArchive is a reader of its own: what it finds the writer did not tell it.
func readArchive(t *testing.T, b []byte) (members map[uint32]member, index map[string]uint32) {
	t.Helper()
	if !bytes.HasPrefix(b, []byte("!<arch>\n")) {
		t.Fatal("no archive")
	}
	members, index = map[uint32]member{}, map[string]uint32{}
	for at, n := 8, 0; at < len(b); n++ {
		h := b[at : at+60]
		size, err := strconv.Atoi(strings.TrimSpace(string(h[48:58])))
		if err != nil || string(h[58:]) != "`\n" {
			t.Fatalf("member header at %x: %q", at, h)
		}
		m := member{strings.TrimSpace(string(h[:16])), b[at+60 : at+60+size]}
		if n == 0 {
			count := binary.BigEndian.Uint32(m.data)
			names := bytes.Split(m.data[4+4*count:], []byte{0})
			for i := range count {
				index[string(names[i])] = binary.BigEndian.Uint32(m.data[4+4*i:])
			}
		}
		members[uint32(at)] = m
		at += 60 + size + size%2
	}
	return members, index
}

func TestImportLibrary(t *testing.T) {
	for base, machine := range map[string]uint16{"mingw/app.dll": machineAMD64, "clang/app.dll": machineAMD64, "arm64/app.dll": machineARM64} {
		t.Run(base, func(t *testing.T) {
			lib := importLibrary(t, base)
			if !bytes.Equal(lib, importLibrary(t, base)) {
				t.Error("the same input made other bytes")
			}
			members, index := readArchive(t, lib)
			for name, data := range map[string]bool{"vuln": false, "helper": false, "doubled": false, "answer_base": true, "calls": true, "callback": true} {
				m, ok := members[index["__imp_"+name]]
				if !ok {
					t.Errorf("the index has no __imp_%s", name)
					continue
				}
				kind := uint16(importCode | importByName)
				if data {
					kind = importData | importByName
				}
				want := []byte{0, 0, 0xff, 0xff, 0, 0, byte(machine), byte(machine >> 8)}
				if !bytes.HasPrefix(m.data, want) || binary.LittleEndian.Uint16(m.data[18:]) != kind || string(m.data[20:]) != name+"\x00app.dll\x00" {
					t.Errorf("%s: member %q", name, m.data)
				}
				if at, ok := index[name]; ok == data || !data && at != index["__imp_"+name] {
					t.Errorf("%s: plain name in the index: %v", name, ok)
				}
			}
			for _, never := range []string{"Sleep", "DllMain", ".text", "__ImageBase", "__data_start__", "parted.cold.nothing"} {
				if _, ok := index[never]; ok {
					t.Errorf("%s is no symbol to import", never)
				}
			}
		})
	}
}

// TestImportLibraryLinks lets both linkers use the library for names that are
// not exported, and looks at the imports of what they made.
func TestImportLibraryLinks(t *testing.T) {
	gcc, clang, lld := need(t, "x86_64-w64-mingw32-gcc"), need(t, "clang-22"), need(t, "lld-link-22")
	dir := t.TempDir()
	source := "__declspec(dllimport) extern int answer_base; int helper(int);\n" +
		"__declspec(dllexport) int vuln(int x) { return helper(x) + answer_base; }\n"
	if err := os.WriteFile(filepath.Join(dir, "fix.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		t.Helper()
		c := exec.Command(name, args...)
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	for _, long := range []string{"app.dll", "a-name-longer-than-sixteen.dll"} {
		lib, _, _, err := ImportLibrary(ImportLibraryOptions{Base: fixture(t, "mingw/app.dll"), BaseName: long})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "app.lib"), lib, 0o644); err != nil {
			t.Fatal(err)
		}
		run(gcc, "-O2", "-shared", "-nostdlib", "-Wl,--entry,0x180000000", "-Wl,--image-base,0x180000000", "-o", "gnu.dll", "fix.c", "app.lib")
		run(clang, "--target=x86_64-pc-windows-msvc", "-O2", "-c", "fix.c", "-o", "fix.obj")
		run(lld, "/dll", "/noentry", "/nodefaultlib", "/out:lld.dll", "fix.obj", "app.lib")
		for _, made := range []string{"gnu.dll", "lld.dll"} {
			b, err := os.ReadFile(filepath.Join(dir, made))
			if err != nil {
				t.Fatal(err)
			}
			imports, err := parse(t, b).Imports()
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]bool{}
			iat := parse(t, b).Directories[12] // IMAGE_DIRECTORY_ENTRY_IAT
			for _, i := range imports {
				if i.Slot < iat.RVA || i.Slot+8 > iat.RVA+iat.Size {
					t.Errorf("%s: slot %x of %s is not in the import address table at %x, %d bytes", made, i.Slot, i.Name, iat.RVA, iat.Size)
				}
				got[fmt.Sprintf("%s!%s", i.DLL, i.Name)] = true
			}
			if len(got) != 2 || !got[long+"!helper"] || !got[long+"!answer_base"] {
				t.Errorf("%s imports %v", made, got)
			}
		}
	}
}

func TestImportLibraryRefuses(t *testing.T) {
	bare := editOf(t, fixture(t, "mingw/app.dll")).stripped().directory(0, 0, 0).b
	_, _, _, err := ImportLibrary(ImportLibraryOptions{Base: bare, BaseName: "app.dll"})
	wantRefusal(t, err, CodeSymbol, "base", "")
	_, _, _, err = ImportLibrary(ImportLibraryOptions{Base: []byte("?")})
	wantRefusal(t, err, CodeFormat, "base", "")
}
