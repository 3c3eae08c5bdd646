package private

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/windows"
)

// onlyOwner reads the descriptor back. Wine makes it up from the file's mode,
// which it made of the descriptor: that Windows keeps the rest of what it is
// given, the protection against the folder above, TestDescriptor holds to the words.
func onlyOwner(t *testing.T, path string) {
	t.Helper()
	sd, err := windows.GetNamedSecurityInfo(path, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION|windows.OWNER_SECURITY_INFORMATION)
	if err != nil {
		t.Fatal(err)
	}
	owner, _, err := sd.Owner()
	if err != nil {
		t.Fatal(err)
	}
	dacl, _, err := sd.DACL()
	if err != nil || dacl == nil || dacl.AceCount == 0 {
		t.Fatalf("%s: %v, %v", path, sd, err)
	}
	for i := range uint32(dacl.AceCount) {
		var ace *windows.ACCESS_ALLOWED_ACE
		if err := windows.GetAce(dacl, i, &ace); err != nil {
			t.Fatal(err)
		}
		sid := (*windows.SID)(unsafe.Pointer(&ace.SidStart))
		if ace.Header.AceType == windows.ACCESS_ALLOWED_ACE_TYPE && ace.Mask != 0 && !sid.Equals(owner) &&
			!sid.IsWellKnown(windows.WinLocalSystemSid) && !sid.IsWellKnown(windows.WinBuiltinAdministratorsSid) {
			t.Errorf("%s lets %s in: %s", path, sid, sd)
		}
	}
}

// Devices, pipes and streams of other files are no new files.
func TestCreateOnDisk(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"NUL", `\\.\NUL`, file + ":stream", file + "::$DATA", filepath.Join(dir, "a:b")} {
		if f, err := Create(path); err == nil {
			f.Close()
			t.Errorf("%s is a new file", path)
		} else {
			t.Log(err)
		}
	}
	pipe := fmt.Sprintf(`\\.\pipe\hotpatchd-private-%d`, os.Getpid())
	name, err := windows.UTF16PtrFromString(pipe)
	if err != nil {
		t.Fatal(err)
	}
	h, err := windows.CreateNamedPipe(name, windows.PIPE_ACCESS_DUPLEX, 0, 1, 512, 512, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer windows.CloseHandle(h)
	if f, err := Create(pipe); err == nil {
		f.Close()
		t.Error("a pipe is a new file")
	} else {
		t.Log(err)
	}
	f, err := Create(`\\?\` + filepath.Join(dir, "long"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// TestDescriptor: what is asked for takes over nothing from the folder above.
func TestDescriptor(t *testing.T) {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		t.Fatal(err)
	}
	for flags, inherit := range map[string]string{"": "", "OICI": "OICI"} {
		_, sa, err := protected("x", flags)
		if err != nil {
			t.Fatal(err)
		}
		if control, _, err := sa.SecurityDescriptor.Control(); err != nil || control&windows.SE_DACL_PROTECTED == 0 {
			t.Errorf("not protected: %s, %v", sa.SecurityDescriptor, err)
		}
		dacl, _, err := sa.SecurityDescriptor.DACL()
		if err != nil || dacl.AceCount != 3 {
			t.Fatalf("%s, %v", sa.SecurityDescriptor, err)
		}
		var ace *windows.ACCESS_ALLOWED_ACE
		if err := windows.GetAce(dacl, 2, &ace); err != nil {
			t.Fatal(err)
		}
		if sid := (*windows.SID)(unsafe.Pointer(&ace.SidStart)); !sid.Equals(user.User.Sid) || (ace.Header.AceFlags != 0) != (inherit != "") {
			t.Errorf("%s", sa.SecurityDescriptor)
		}
	}
}
