//go:build !windows

package baseline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// systemMover: on Unix the daemon replaces the files itself.
func systemMover() Mover { return nil }

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// openRegular opens a regular file for reading, following no link.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// syncFolder makes what was created, renamed or removed in a folder durable.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// checkPlace tells whether a destination may be written: only root, or who we
// are, can change what lies on the way to it.
func checkPlace(destination string) error {
	if err := CheckUnix(destination); err != nil {
		return refuse(CodePath, destination, "%w", err)
	}
	parent := filepath.Dir(destination)
	real, err := filepath.EvalSymlinks(parent)
	if err != nil {
		return refuse(CodePath, destination, "its folder: %w", err)
	}
	if f := inForbidden(real); f != "" {
		return refuse(CodePath, destination, "no destination may lie in %s", f)
	}
	// Both ways: who may turn a link on the first may lead us to another second.
	for _, way := range []string{parent, real} {
		for dir := way; ; dir = filepath.Dir(dir) {
			info, err := os.Lstat(dir)
			if err != nil {
				return refuse(CodePath, destination, "%w", err)
			}
			if err := checkFolder(dir, info, dir == real); err != nil {
				return refuse(CodeOwner, destination, "%w", err)
			}
			if dir == "/" {
				break
			}
		}
	}
	return nil
}

// checkFolder: a folder or link on the way belongs to root or us, and others may
// not write to it. One with the sticky bit, as /tmp, may be passed through:
// only its owner can move what belongs to him; the destination's own may not be one.
func checkFolder(dir string, info os.FileInfo, last bool) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("cannot tell who owns %s", dir)
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d, who could lead us elsewhere", dir, st.Uid)
	}
	if info.Mode()&os.ModeSymlink != 0 {
		return nil // its mode means nothing; its owner and its folder do
	}
	if info.Mode().Perm()&0o022 != 0 && (last || info.Mode()&os.ModeSticky == 0) {
		return fmt.Errorf("%s may be written by others than its owner (mode %v)", dir, info.Mode().Perm())
	}
	return nil
}

// inspect looks at the file that is to be replaced. A file that is not there
// gives fs.ErrNotExist.
func inspect(path string) (Attributes, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return Attributes{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case info.Mode()&os.ModeSymlink != 0:
		return Attributes{}, refuse(CodeLink, path, "it is a symbolic link")
	case !info.Mode().IsRegular():
		return Attributes{}, refuse(CodeKind, path, "it is not a regular file")
	case !ok:
		return Attributes{}, refuse(CodeAttributes, path, "cannot tell who owns it")
	case info.Mode()&(os.ModeSetuid|os.ModeSetgid|os.ModeSticky) != 0:
		return Attributes{}, refuse(CodeKind, path, "it runs with rights of its own (mode %v)", info.Mode())
	case st.Nlink != 1:
		return Attributes{}, refuse(CodeLink, path, "it has %d names; the others would go on naming the old file", st.Nlink)
	}
	if parent, err := os.Lstat(filepath.Dir(path)); err != nil {
		return Attributes{}, err
	} else if p, ok := parent.Sys().(*syscall.Stat_t); ok && parent.IsDir() && p.Dev != st.Dev {
		return Attributes{}, refuse(CodeLink, path, "something is mounted on it")
	}
	return Attributes{UID: int(st.Uid), GID: int(st.Gid), Mode: uint32(info.Mode().Perm())}, nil
}

// newFile is how a file is made that replaces nothing: its folder's owner, readable by all.
func newFile(destination string) (Attributes, error) {
	info, err := os.Stat(filepath.Dir(destination))
	if err != nil {
		return Attributes{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return Attributes{}, fmt.Errorf("cannot tell who owns the folder")
	}
	return Attributes{UID: int(st.Uid), GID: int(st.Gid), Mode: 0o644}, nil
}

// dress gives a new file the attributes of the old one, which lies at old; "" if
// there is none.
func dress(f *os.File, a Attributes, old string) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) != a.UID || int(st.Gid) != a.GID {
		if err := f.Chown(a.UID, a.GID); err != nil {
			return fmt.Errorf("cannot give it to %d:%d: %w", a.UID, a.GID, err)
		}
	}
	if err := f.Chmod(os.FileMode(a.Mode)); err != nil {
		return err
	}
	if old == "" {
		return nil
	}
	return copyXattrs(f, old)
}

// keepName gives the old file a second name, which stays when the first one is
// replaced.
func keepName(path, name string) error { return os.Link(path, name) }

// replace has from take the place of to at once.
func replace(from, to string) error { return os.Rename(from, to) }

// appear gives a new file its name, unless something has that name already.
func appear(from, to string) error {
	if err := os.Link(from, to); err != nil {
		return err
	}
	return os.Remove(from)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
