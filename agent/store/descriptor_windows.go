package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/windows"
)

// secureFolder makes the folder for SYSTEM, Administrators and the daemon's
// user only. One that is there already keeps its rights (it may be anything a
// configuration names), but is refused if it belongs to somebody else: anyone
// may make folders in ProgramData.
func secureFolder(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	err := os.Mkdir(dir, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	self, sidErr := ownSID()
	if sidErr != nil {
		return fmt.Errorf("cannot tell who we are: %w", sidErr)
	}
	if err != nil {
		return checkOwner("the state folder", dir, self)
	}
	return protect(dir, "OICI", self)
}

// secureFile takes everybody else's rights on the file away.
func secureFile(path string) error {
	self, err := ownSID()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	if err := checkOwner("the state", path, self); err != nil {
		return err
	}
	return protect(path, "", self)
}

func checkOwner(what, path string, self *windows.SID) error {
	sd, err := windows.GetNamedSecurityInfo(path, windows.SE_FILE_OBJECT, windows.OWNER_SECURITY_INFORMATION)
	if err != nil {
		return fmt.Errorf("cannot look at %s: %w", what, err)
	}
	owner, _, err := sd.Owner()
	if err != nil {
		return fmt.Errorf("cannot look at %s: %w", what, err)
	}
	if !owner.IsWellKnown(windows.WinLocalSystemSid) && !owner.IsWellKnown(windows.WinBuiltinAdministratorsSid) && !owner.Equals(self) {
		return fmt.Errorf("cannot use %s as %s: it belongs to %s", path, what, owner)
	}
	return nil
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
