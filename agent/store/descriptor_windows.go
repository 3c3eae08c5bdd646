package store

import (
	"fmt"
	"os"

	"golang.org/x/sys/windows"
)

// secureFolder makes the folder, or takes everybody else's rights on it away.
// A folder of another user's is refused: its owner could swap the file, and
// anyone may make folders in ProgramData.
func secureFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	self, err := ownSID()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	sd, err := windows.GetNamedSecurityInfo(dir, windows.SE_FILE_OBJECT, windows.OWNER_SECURITY_INFORMATION)
	if err != nil {
		return fmt.Errorf("cannot look at the state folder: %w", err)
	}
	owner, _, err := sd.Owner()
	if err != nil {
		return fmt.Errorf("cannot look at the state folder: %w", err)
	}
	if !owner.IsWellKnown(windows.WinLocalSystemSid) && !owner.IsWellKnown(windows.WinBuiltinAdministratorsSid) && !owner.Equals(self) {
		return fmt.Errorf("cannot use %s as the state folder: it belongs to %s", dir, owner)
	}
	return protect(dir, "OICI", self)
}

func secureFile(path string) error {
	self, err := ownSID()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	return protect(path, "", self)
}

// protect gives full control to SYSTEM, Administrators and the daemon's own
// user, to be inherited as flags say, and takes over nothing from the folder above.
func protect(path, flags string, self *windows.SID) error {
	sddl := fmt.Sprintf("D:P(A;%[1]s;FA;;;SY)(A;%[1]s;FA;;;BA)(A;%[1]s;FA;;;%[2]s)", flags, self)
	sd, err := windows.SecurityDescriptorFromString(sddl)
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", path, err)
	}
	dacl, _, err := sd.DACL()
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", path, err)
	}
	err = windows.SetNamedSecurityInfo(path, windows.SE_FILE_OBJECT,
		windows.DACL_SECURITY_INFORMATION|windows.PROTECTED_DACL_SECURITY_INFORMATION, nil, nil, dacl, nil)
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", path, err)
	}
	return nil
}

func ownSID() (*windows.SID, error) {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return nil, err
	}
	return user.User.Sid.Copy()
}
