package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/agent/private"
)

// secureFolder makes the folder for SYSTEM, Administrators and the daemon's
// user only. One that is there already keeps its rights (it may be anything a
// configuration names), but is refused if it belongs to somebody else, or is a
// link: anyone may make folders, and links to folders, in ProgramData.
func secureFolder(dir string) error {
	self, err := ownSID()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	if err := makeFolder(dir, self); err != nil {
		return err
	}
	// Who owns the folder above may put another one in the place of ours.
	if above := filepath.Dir(dir); above != filepath.Dir(above) {
		return checkOwner("the folder above the state", above)
	}
	return nil
}

// makeFolder makes a folder, and those above it that are missing, with their
// protection from the first moment on.
func makeFolder(dir string, self *windows.SID) error {
	info, err := os.Lstat(dir)
	switch {
	case err == nil && !info.IsDir():
		return fmt.Errorf("cannot make the state folder: %s is not a folder", dir)
	case err == nil:
		return checkOwner("the state folder", dir)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot look at the state folder: %w", err)
	}
	if above := filepath.Dir(dir); above != dir {
		if _, err := os.Stat(above); errors.Is(err, fs.ErrNotExist) {
			if err := makeFolder(above, self); err != nil {
				return err
			}
		}
	}
	sd, err := windows.SecurityDescriptorFromString(protection("OICI", self))
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", dir, err)
	}
	name, err := windows.UTF16PtrFromString(dir)
	if err != nil {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	sa := &windows.SecurityAttributes{SecurityDescriptor: sd}
	sa.Length = uint32(unsafe.Sizeof(*sa))
	if err := windows.CreateDirectory(name, sa); err != nil && !errors.Is(err, windows.ERROR_ALREADY_EXISTS) {
		return fmt.Errorf("cannot make the state folder: %w", &fs.PathError{Op: "mkdir", Path: dir, Err: err})
	}
	// Somebody may have been faster.
	return checkOwner("the state folder", dir)
}

// secureFile takes everybody else's rights on the file away.
func secureFile(path string) error {
	self, err := ownSID()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	if err := private.Protect(path, protection("", self)); err != nil {
		return fmt.Errorf("cannot use %s as the state: %w", path, err)
	}
	return nil
}

func checkOwner(what, path string) error {
	if err := private.CheckOwner(path); err != nil {
		return fmt.Errorf("cannot use %s as %s: %w", path, what, err)
	}
	return nil
}

// protection is full control for SYSTEM, Administrators and the daemon's own
// user, to be inherited as flags say, and nothing from the folder above.
func protection(flags string, self *windows.SID) string {
	if self.IsWellKnown(windows.WinLocalSystemSid) {
		return fmt.Sprintf("D:P(A;%[1]s;FA;;;SY)(A;%[1]s;FA;;;BA)", flags)
	}
	return fmt.Sprintf("D:P(A;%[1]s;FA;;;SY)(A;%[1]s;FA;;;BA)(A;%[1]s;FA;;;%[2]s)", flags, self)
}

func ownSID() (*windows.SID, error) {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return nil, err
	}
	return user.User.Sid.Copy()
}

// lockFile takes the lock that bolt takes (LockFileEx on the last byte that a
// file can have) until release: bolt's own call would find it taken. An error
// means that another process has it.
func lockFile(f *os.File) (release func(), err error) {
	h := windows.Handle(f.Fd())
	at := func() *windows.Overlapped { return &windows.Overlapped{Offset: ^uint32(0), OffsetHigh: ^uint32(0)} }
	if err := windows.LockFileEx(h, windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, at()); err != nil {
		return nil, err
	}
	return func() { windows.UnlockFileEx(h, 0, 1, 0, at()) }, nil
}

// unlockFile gives back the lock that bolt took, which a mapping of the file
// would keep after the handle is closed.
func unlockFile(f *os.File) error {
	return windows.UnlockFileEx(windows.Handle(f.Fd()), 0, 1, 0, &windows.Overlapped{Offset: ^uint32(0), OffsetHigh: ^uint32(0)})
}

// moveFile puts a file, which nobody has open, in the place of another, now and
// after a power cut.
func moveFile(from, to string) error {
	f, err := windows.UTF16PtrFromString(from)
	if err != nil {
		return err
	}
	t, err := windows.UTF16PtrFromString(to)
	if err != nil {
		return err
	}
	if err := windows.MoveFileEx(f, t, windows.MOVEFILE_REPLACE_EXISTING|windows.MOVEFILE_WRITE_THROUGH); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}
