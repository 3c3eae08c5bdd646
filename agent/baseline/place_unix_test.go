//go:build !windows

package baseline

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// noSpace is what this system says of a full disk.
const noSpace = syscall.ENOSPC

// What may not be replaced is refused by name before anything is written.
func TestRefusedPlaces(t *testing.T) {
	dll := func(d *disk) string { return d.path("lib/app.dll") }
	for name, c := range map[string]struct {
		make func(*disk) error
		code Code
	}{
		"relative":  {func(*disk) error { return nil }, CodePath},
		"not clean": {func(*disk) error { return nil }, CodePath},
		"kernel's":  {func(*disk) error { return nil }, CodePath},
		"no folder": {func(d *disk) error { return os.RemoveAll(d.path("lib")) }, CodePath},
		"symbolic link": {func(d *disk) error {
			return swapFor(dll(d), func(p string) error { return os.Symlink("../bin/app.exe", p) })
		}, CodeLink},
		"fifo":          {func(d *disk) error { return swapFor(dll(d), func(p string) error { return syscall.Mkfifo(p, 0o600) }) }, CodeKind},
		"folder":        {func(d *disk) error { return swapFor(dll(d), func(p string) error { return os.Mkdir(p, 0o755) }) }, CodeKind},
		"setuid":        {func(d *disk) error { return os.Chmod(dll(d), 0o755|os.ModeSetuid) }, CodeKind},
		"second name":   {func(d *disk) error { return os.Link(dll(d), d.path("lib/b.dll")) }, CodeLink},
		"others write":  {func(d *disk) error { return os.Chmod(d.path("lib"), 0o777) }, CodeOwner},
		"sticky folder": {func(d *disk) error { return os.Chmod(d.path("lib"), 0o777|os.ModeSticky) }, CodeOwner},
		"above":         {func(d *disk) error { return os.Chmod(d.root, 0o775) }, CodeOwner},
		"other content": {func(d *disk) error { return os.WriteFile(dll(d), []byte("x"), 0o755) }, CodeContent},
		"nothing there": {func(d *disk) error { return os.Remove(dll(d)) }, CodeContent},
		"is there":      {func(d *disk) error { return os.WriteFile(d.path("lib/extra.dll"), []byte("x"), 0o644) }, CodeContent},
		"wrong hash":    {func(*disk) error { return nil }, CodeContent},
		"stranger's":    {func(d *disk) error { return os.Chown(d.path("lib"), 12345, 0) }, CodeOwner},
		"stranger's way": {func(d *disk) error {
			if err := os.Rename(d.path("lib"), d.path("real")); err != nil {
				return err
			}
			return errors.Join(os.Symlink("real", d.path("lib")), os.Lchown(d.path("lib"), 12345, 0))
		}, CodeOwner},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			if err := c.make(d); errors.Is(err, syscall.EPERM) {
				t.Skip("needs root")
			} else if err != nil {
				t.Fatal(err)
			}
			s := d.set()
			switch name {
			case "relative":
				s.Files[1].Destination = "lib/app.dll"
			case "not clean":
				s.Files[1].Destination = d.path("bin") + "/../lib/app.dll"
			case "kernel's":
				s.Files[1].Destination = "/proc/self/comm"
			case "wrong hash":
				s.Files[1].Content = []byte("not what was signed")
			}
			before := ""
			if name != "fifo" { // it would be waited for
				before = d.state()
			}
			_, err := d.x.Stage(s, "boot-1", noon)
			var r *Refusal
			if !errors.As(err, &r) || r.Code != c.code {
				t.Fatalf("%v, want code %s", err, c.code)
			}
			if d.phase() != "" {
				t.Errorf("phase %s", d.phase())
			}
			if name != "fifo" {
				d.is(before)
			}
			if name != "no folder" {
				d.tidy()
			}
		})
	}
}

// A link that root made is followed: /lib is one on most systems.
func TestOwnLinkOnTheWay(t *testing.T) {
	d := newDisk(t)
	if err := errors.Join(os.Rename(d.path("lib"), d.path("real")), os.Symlink("real", d.path("lib"))); err != nil {
		t.Fatal(err)
	}
	d.stage()
	d.activate()
}

func swapFor(path string, make func(string) error) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return make(path)
}

// Extended attributes are taken over; those that tell of the content are refused.
func TestAttributesKept(t *testing.T) {
	d := newDisk(t)
	if err := syscall.Setxattr(d.path("lib/app.dll"), "user.label", []byte("theirs"), 0); err != nil {
		t.Skip("needs extended attributes:", err)
	}
	if err := os.Chown(d.path("lib/app.dll"), 12345, 54321); err != nil {
		t.Skip("needs root:", err)
	}
	d.stage()
	d.activate()
	b := make([]byte, 64)
	n, err := syscall.Getxattr(d.path("lib/app.dll"), "user.label", b)
	if err != nil || string(b[:n]) != "theirs" {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	info, err := os.Stat(d.path("lib/app.dll"))
	if st, ok := info.Sys().(*syscall.Stat_t); err != nil || !ok || st.Uid != 12345 || st.Gid != 54321 {
		t.Errorf("%+v, %v", st, err)
	}

	d = newDisk(t)
	// cap_net_raw in the file format of capabilities(7), version 2.
	caps := []byte{0x01, 0, 0, 0x02, 0, 0x20, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if err := syscall.Setxattr(d.path("lib/app.dll"), "security.capability", caps, 0); err != nil {
		t.Skip("needs CAP_SETFCAP:", err)
	}
	_, err = d.x.Stage(d.set(), "boot-1", noon)
	var r *Refusal
	if !errors.As(err, &r) || r.Code != CodeAttributes || !strings.Contains(err.Error(), "capabilities") {
		t.Error(err)
	}
	d.tidy()
}

// Two products do not take turns on one file.
func TestOneFileOneProduct(t *testing.T) {
	d := newDisk(t)
	d.stage()
	s := d.set()
	s.Product, s.Release = "other", "OTHER-B1"
	_, err := d.x.Stage(s, "boot-1", noon)
	var r *Refusal
	if !errors.As(err, &r) || r.Code != CodeClaimed {
		t.Error(err)
	}
}

// One place spelled in two ways is one place, whether a file is there or not: for
// two products, and within one set.
func TestOnePlaceTwoSpellings(t *testing.T) {
	for name, code := range map[string]Code{"other": CodeClaimed, "acme": CodePath} {
		d := newDisk(t)
		if err := os.Symlink("lib", d.path("way")); err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{1, 2} {
			s := d.set()
			again := s.Files[i]
			again.Destination = d.path("way/" + filepath.Base(again.Destination))
			if name == "acme" {
				s.Files = append(s.Files, again)
			} else {
				if d.phase() == "" {
					d.stage()
				}
				s = Set{Product: name, Release: "OTHER-B1", Files: []File{again}}
			}
			_, err := d.x.Stage(s, "boot-1", noon)
			var r *Refusal
			if !errors.As(err, &r) || r.Code != code {
				t.Errorf("%s: %v, want code %s", again.Destination, err, code)
			}
		}
	}
}

// A damaged journal is set aside and said; nothing is guessed from it.
func TestDamagedJournal(t *testing.T) {
	d := newDisk(t)
	d.stage()
	path := filepath.Join(d.path("journals"), journalName("acme"))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	x, damaged, err := Open(d.path("journals"))
	if err != nil || len(damaged) != 1 || len(x.Records()) != 0 {
		t.Fatalf("%v, %v, %v", damaged, x.Records(), err)
	}
	d.is("old")
}

// moves is a system that moves files while it starts, as Windows does.
type moves struct {
	list [][2]string
	fail int // the call of this number fails, 0: none
	n    int
}

func (m *moves) AtRestart(from, to string) error {
	if m.n++; m.n == m.fail {
		return errors.New("no room in the list")
	}
	m.list = append(m.list, [2]string{from, to})
	return nil
}

// restart carries out the first so many moves; what is not there is passed over.
func (m *moves) restart(most int) {
	for _, p := range m.list[:min(most, len(m.list))] {
		if p[1] == "" {
			os.Remove(p[0])
		} else {
			os.Rename(p[0], p[1])
		}
	}
	m.list = nil
}

// With a system that moves the files itself: all of them, none of them, or, after
// a cut in the middle, some: then the rest follows.
func TestSystemMovesFiles(t *testing.T) {
	for moved := range 4 {
		d := newDisk(t)
		m := &moves{}
		d.x.mover = m
		d.stage()
		m.restart(moved)
		r, err := d.x.Activate("acme", "boot-2", noon)
		if moved == 0 {
			if !errors.Is(err, ErrNotMoved) || r.Phase != Staged || len(m.list) != 3 {
				t.Fatalf("%+v, %v, %v", r, err, m.list)
			}
			m.restart(3)
			r, err = d.x.Activate("acme", "boot-3", noon)
		}
		if err != nil || r.Phase != Active {
			t.Fatalf("%d moved: %+v, %v", moved, r, err)
		}
		d.is("new")
		if _, err := d.x.Leave("acme", r.Boot, noon); err != nil {
			t.Fatal(err)
		}
		m.restart(3)
		d.is("old")
		if _, err := d.x.Activate("acme", "boot-4", noon); err != nil {
			t.Fatal(err)
		}
		d.is("old")
		d.tidy()
	}
}

// Taken back before the restart, or cut off while the system was being asked:
// its moves find nothing to move.
func TestSystemMovesNothingTakenBack(t *testing.T) {
	d := newDisk(t)
	m := &moves{}
	d.x.mover = m
	d.stage()
	if err := d.x.Unstage("acme", noon); err != nil {
		t.Fatal(err)
	}
	m.restart(3)
	d.is("old")
	d.tidy()

	d = newDisk(t)
	m = &moves{fail: 2}
	d.x.mover = m
	if _, err := d.x.Stage(d.set(), "boot-1", noon); err == nil {
		t.Fatal("staged")
	}
	m.restart(3)
	d.is("old")
	d.tidy()

	for asked := range 12 { // in the middle of asking; the system restarts with what it knows
		d = newDisk(t)
		m = &moves{}
		d.x.mover = m
		at := 0
		if !dies(d, 1000, func() {
			d.x.fault = func(step string) error {
				if strings.HasPrefix(step, "schedule") {
					if at++; at > asked/4 {
						panic(died{})
					}
				}
				return nil
			}
			d.x.Stage(d.set(), "boot-1", noon)
		}) {
			continue
		}
		m.restart(3)
		d.reopen()
		d.x.mover = m
		for _, r := range d.x.Recover(noon) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
		if s := d.state(); s != "old" && s != "new" {
			t.Fatalf("died after %d: %s", asked/4, s)
		}
	}
}

// What destinations may be spelled like.
func TestSpelling(t *testing.T) {
	for _, s := range []string{"/opt/acme/app.dll", "/a"} {
		if err := CheckUnix(s); err != nil {
			t.Error(err)
		}
	}
	for _, s := range []string{"", "/", "opt/x", "/opt//x", "/opt/../x", "/opt/x/", "/opt/x\n", "/opt/.1.hotpatch-new", "/" + strings.Repeat("x", 2000)} {
		if CheckUnix(s) == nil {
			t.Errorf("%q is taken", s)
		}
	}
	for _, s := range []string{`C:\Program Files\Acme\app.dll`, `d:\a.b\console.dll`} {
		if err := CheckWindows(s); err != nil {
			t.Error(err)
		}
	}
	for _, s := range []string{"", `C:\`, `C:app.dll`, `\\server\share\x`, `C:/x/y`, `C:\x\..\y`, `C:\x\\y`, `C:\x\con`, `C:\x\NUL.dll`, `C:\x\com1.txt`, `C:\x\a.dll:s`, `C:\x.\a`, `C:\x\a `, `\\?\C:\x`, `C:\x\a*`, `C:\x\b.hotpatch-old`,
		`C:\x\clock$`, `C:\$MFT`, `c:\$mft\x`, `C:\$Extend\$Quota`} {
		if CheckWindows(s) == nil {
			t.Errorf("%q is taken", s)
		}
	}
}

// The same trouble reads the same each time, also where it names a file of ours: their names are random.
func TestSameTroubleSameWords(t *testing.T) {
	d := newDisk(t)
	said := map[string]bool{}
	for range 3 {
		d.x.fault = func(step string) error {
			if strings.HasPrefix(step, "keep ") {
				names, _ := filepath.Glob(d.path("*/.*" + newSuffix))
				for _, name := range names {
					if err := os.Mkdir(strings.TrimSuffix(name, newSuffix)+oldSuffix, 0o700); err != nil {
						t.Fatal(err)
					}
				}
			}
			return nil
		}
		_, err := d.x.Stage(d.set(), "boot-1", noon)
		var r *Refusal
		if !errors.As(err, &r) || r.Code != CodeIO || !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
		said[err.Error()] = true
		d.x.fault = nil
		d.tidy()
	}
	if len(said) != 1 {
		t.Errorf("%d texts: %v", len(said), said)
	}
}
