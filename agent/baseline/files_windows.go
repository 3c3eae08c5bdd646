package baseline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/windows"
)

// restartMover has Windows itself move the files while it starts: the pairs are
// kept in PendingFileRenameOperations and carried out by the session manager in
// their order, before services start (Microsoft, MoveFileExW).
type restartMover struct{}

func systemMover() Mover { return restartMover{} }

// AtRestart implements Mover.
func (restartMover) AtRestart(from, to string) error {
	f, err := windows.UTF16PtrFromString(from)
	if err != nil {
		return err
	}
	if to == "" {
		return windows.MoveFileEx(f, nil, windows.MOVEFILE_DELAY_UNTIL_REBOOT)
	}
	t, err := windows.UTF16PtrFromString(to)
	if err != nil {
		return err
	}
	return windows.MoveFileEx(f, t, windows.MOVEFILE_DELAY_UNTIL_REBOOT|windows.MOVEFILE_REPLACE_EXISTING)
}

func isFull(err error) bool {
	return errors.Is(err, windows.ERROR_DISK_FULL) || errors.Is(err, windows.ERROR_DISK_QUOTA_EXCEEDED)
}

// openRegular opens a regular file for reading; others may go on using it.
func openRegular(path string) (*os.File, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return os.Open(path)
}

// syncFolder: NTFS keeps its own journal of names; there is nothing to ask for.
func syncFolder(string) error { return nil }

// checkPlace tells whether a destination may be written: no reparse point, which
// could lead elsewhere, lies on the way to it, and it lies on a fixed disk.
func checkPlace(destination string) error {
	if err := CheckWindows(destination); err != nil {
		return refuse(CodePath, destination, "%w", err)
	}
	drive, err := windows.UTF16PtrFromString(destination[:3])
	if err != nil {
		return refuse(CodePath, destination, "%w", err)
	}
	if windows.GetDriveType(drive) != windows.DRIVE_FIXED {
		return refuse(CodePath, destination, "%s is not a fixed disk", destination[:2])
	}
	for dir := filepath.Dir(destination); len(dir) > 3; dir = filepath.Dir(dir) {
		info, err := os.Lstat(dir)
		if err != nil {
			return refuse(CodePath, destination, "%w", err)
		}
		if !info.IsDir() || reparse(info) {
			return refuse(CodeLink, destination, "%s is not a plain folder", dir)
		}
	}
	return nil
}

func reparse(info os.FileInfo) bool {
	d, ok := info.Sys().(*syscall.Win32FileAttributeData)
	return !ok || d.FileAttributes&windows.FILE_ATTRIBUTE_REPARSE_POINT != 0
}

// inspect looks at the file that is to be replaced. A file that is not there
// gives fs.ErrNotExist.
func inspect(path string) (Attributes, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Attributes{}, err
	}
	switch {
	case reparse(info):
		return Attributes{}, refuse(CodeLink, path, "it is a reparse point")
	case !info.Mode().IsRegular():
		return Attributes{}, refuse(CodeKind, path, "it is not a regular file")
	}
	n, err := names(path)
	if err != nil {
		return Attributes{}, err
	}
	if n != 1 {
		return Attributes{}, refuse(CodeLink, path, "it has %d names; the others would go on naming the old file", n)
	}
	return Attributes{}, nil
}

// names is how many names a file has on its disk, opened for its attributes only.
func names(path string) (uint32, error) {
	p, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return 0, err
	}
	h, err := windows.CreateFile(p, windows.FILE_READ_ATTRIBUTES, windows.FILE_SHARE_READ|windows.FILE_SHARE_WRITE|windows.FILE_SHARE_DELETE,
		nil, windows.OPEN_EXISTING, windows.FILE_FLAG_OPEN_REPARSE_POINT, 0)
	if err != nil {
		return 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer windows.CloseHandle(h)
	var info windows.ByHandleFileInformation
	if err := windows.GetFileInformationByHandle(h, &info); err != nil {
		return 0, fmt.Errorf("cannot tell how many names it has: %w", err)
	}
	return info.NumberOfLinks, nil
}

// newFile is how a file is made that replaces nothing: as its folder says.
func newFile(string) (Attributes, error) { return Attributes{}, nil }

// dress gives a new file the access list of the old one; "" if there is none.
func dress(f *os.File, _ Attributes, old string) error {
	if old == "" {
		return nil
	}
	d, err := windows.GetNamedSecurityInfo(old, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION)
	if err != nil {
		return fmt.Errorf("cannot read its access list: %w", err)
	}
	list, _, err := d.DACL()
	if err != nil {
		return fmt.Errorf("cannot read its access list: %w", err)
	}
	if err := windows.SetNamedSecurityInfo(f.Name(), windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION, nil, nil, list, nil); err != nil {
		return fmt.Errorf("cannot give it the access list: %w", err)
	}
	return nil
}

// keepName gives the old file a second name, which stays when the first one is
// replaced.
func keepName(path, name string) error { return os.Link(path, name) }

// replace has from take the place of to at once; it fails while to is in use.
func replace(from, to string) error { return os.Rename(from, to) }

// appear gives a new file its name, unless something has that name already.
func appear(from, to string) error {
	f, err := windows.UTF16PtrFromString(from)
	if err != nil {
		return err
	}
	t, err := windows.UTF16PtrFromString(to)
	if err != nil {
		return err
	}
	return windows.MoveFileEx(f, t, windows.MOVEFILE_WRITE_THROUGH)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
