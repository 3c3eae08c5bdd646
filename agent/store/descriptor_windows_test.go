package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/windows"

	"hotpatchd/agent/private"
)

// TestProtection: nobody but SYSTEM, Administrators and the daemon's own user
// is let in, and nothing comes down from the folder above. Wine keeps a mapping
// to Unix modes of what it is given, so that the words are held against the
// wanted ones; that Windows enforces them is not proved.
func TestProtection(t *testing.T) {
	user, err := windows.StringToSid("S-1-5-21-1-2-3-1001")
	if err != nil {
		t.Fatal(err)
	}
	system, err := windows.CreateWellKnownSid(windows.WinLocalSystemSid)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ got, want string }{
		{protection("OICI", user), "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;S-1-5-21-1-2-3-1001)"},
		{protection("", system), "D:P(A;;FA;;;SY)(A;;FA;;;BA)"},
	} {
		sd, err := windows.SecurityDescriptorFromString(tc.got)
		if err != nil || tc.got != tc.want {
			t.Errorf("%s, want %s: %v", tc.got, tc.want, err)
			continue
		}
		control, _, err := sd.Control()
		if err != nil || control&windows.SE_DACL_PROTECTED == 0 {
			t.Errorf("%s is not protected: %v", tc.got, err)
		}
	}
}

// TestFoldersAreMadeProtected: also those above that are missing.
func TestFoldersAreMadeProtected(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "hotpatchd", "state")
	for range 2 { // the second time they are there
		if err := secureFolder(dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		sd, err := windows.GetNamedSecurityInfo(d, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION|windows.OWNER_SECURITY_INFORMATION)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(d, sd)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		file:                            "is not a folder",
		filepath.Join(file, "state"):    "cannot",
		`\\?\Q:\none\hotpatchd\state`:   "cannot",
		filepath.Dir(file) + "\\a\x00b": "cannot",
	} {
		if err := secureFolder(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", dir, err, want)
		}
	}
}

// TestFileLock: what is locked here is what bolt locks.
func TestFileLock(t *testing.T) {
	path := filled(t)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	release, err := lockFile(f)
	if err != nil {
		t.Fatal(err)
	}
	if _, damage, err := Open(path); !errors.Is(err, ErrInUse) || damage != nil {
		t.Errorf("while it is locked: %v, damage %v", err, damage)
	}
	release()
	s := mustOpen(t, path)
	if _, err := lockFile(f); err == nil {
		t.Error("bolt's lock is another one")
	}
	s.Close()
}

// TestMoveFile replaces what is there, and says what is in the way.
func TestMoveFile(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	for path, text := range map[string]string{from: "new", to: "old"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(to)
	if err != nil {
		t.Fatal(err)
	}
	if err := moveFile(from, to); err == nil || !strings.Contains(err.Error(), to) {
		t.Errorf("over a file that is open: %v", err)
	}
	f.Close()
	if err := moveFile(from, to); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(to); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestStateIsNoLink: a link to a folder, as every user of Wine has one, is not
// taken for the state folder, nor for the one above it.
func TestStateIsNoLink(t *testing.T) {
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(home, "Documents")
	if err := private.CheckOwner(link); !errors.Is(err, private.ErrLink) {
		t.Skipf("needs a link to a folder, %s: %v", link, err)
	}
	if err := secureFolder(link); !errors.Is(err, private.ErrLink) {
		t.Errorf("the folder: %v", err)
	}
	above := filepath.Join(link, "hotpatchd-test")
	if err := os.Mkdir(above, 0o700); err != nil {
		t.Skip("needs a folder below it: ", err)
	}
	defer os.Remove(above)
	if err := secureFolder(above); !errors.Is(err, private.ErrLink) {
		t.Errorf("the folder above: %v", err)
	}
}
