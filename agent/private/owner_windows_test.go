package private

import (
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
