package private

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/windows"
)

// Create makes a new file for writing. One that is there already, a link too, is
// an error and stays as it is (fs.ErrExist). So is a name of a device, a pipe, or
// a stream of a file ("file:stream"): none of them is new, or protected by us.
func Create(path string) (*os.File, error) {
	if strings.Contains(path[len(filepath.VolumeName(path)):], ":") {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("a colon is for the drive only")}
	}
	name, sa, err := protected(path, "")
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	// Protected from the first moment on: what is taken back later may have been opened before.
	// Anonymous: whoever serves a pipe of that name does not learn to act as us.
	h, err := windows.CreateFile(name, windows.GENERIC_WRITE, windows.FILE_SHARE_READ, sa, windows.CREATE_NEW,
		windows.FILE_ATTRIBUTE_NORMAL|windows.SECURITY_SQOS_PRESENT|windows.SECURITY_ANONYMOUS, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if kind, err := windows.GetFileType(h); kind != windows.FILE_TYPE_DISK {
		windows.CloseHandle(h)
		if err == nil {
			err = fmt.Errorf("is not a file on a disk (type %d)", kind)
		}
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(h), path), nil
}

// MakeFolder makes a folder and those above it that are missing. One that is
// there already keeps its rights.
func MakeFolder(dir string) error {
	switch info, err := os.Stat(dir); {
	case err == nil && !info.IsDir():
		return &fs.PathError{Op: "mkdir", Path: dir, Err: windows.ERROR_DIRECTORY}
	case err == nil:
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	name, sa, err := protected(dir, "OICI") // to be inherited by files and folders
	if err == nil {
		err = windows.CreateDirectory(name, sa)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return &fs.PathError{Op: "mkdir", Path: dir, Err: err}
	}
	return nil
}

// protected is a path as the system wants it, and full control of what is made
// there for SYSTEM, Administrators and our own user, to be inherited as flags say.
func protected(path, flags string) (*uint16, *windows.SecurityAttributes, error) {
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return nil, nil, err
	}
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return nil, nil, fmt.Errorf("cannot tell who we are: %w", err)
	}
	sd, err := windows.SecurityDescriptorFromString(fmt.Sprintf("D:P(A;%[1]s;FA;;;SY)(A;%[1]s;FA;;;BA)(A;%[1]s;FA;;;%[2]s)", flags, user.User.Sid))
	if err != nil {
		return nil, nil, err
	}
	sa := &windows.SecurityAttributes{SecurityDescriptor: sd}
	sa.Length = uint32(unsafe.Sizeof(*sa))
	return name, sa, nil
}
