//go:build !windows

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// secureFolder makes the folder for the daemon's user only. One that is there
// already keeps its rights (it may be anything a configuration names), but is
// refused if others could swap the file in it.
func secureFolder(dir string) error {
	switch info, err := os.Stat(dir); {
	case err == nil && !info.IsDir():
		return fmt.Errorf("cannot make the state folder: %s is not a folder", dir)
	case errors.Is(err, fs.ErrNotExist):
		if link, err := os.Readlink(dir); err == nil {
			return fmt.Errorf("cannot make the state folder: %s is a symbolic link to %s, which is not there", dir, link)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("cannot look at the state folder: %w", err)
	}
	if err := checkOwner("the state folder", dir, info); err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("cannot use %s as the state folder: others may write to it (mode %v)", dir, info.Mode().Perm())
	}
	return nil
}

// secureFile takes everybody else's rights on the file away.
func secureFile(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("cannot look at the state: %w", err)
	}
	if err := checkOwner("the state", path, info); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("cannot protect the state: %w", err)
	}
	return nil
}

func checkOwner(what, path string, info os.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("cannot use %s as %s: it belongs to uid %d", path, what, st.Uid)
	}
	return nil
}

// lockFile takes the lock that bolt takes, for bolt: on the same descriptor it
// is had already. An error means that another process has it.
func lockFile(f *os.File) (release func(), err error) {
	return func() {}, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

// unlockFile gives back the lock that bolt took, which a mapping of the file
// would keep after the descriptor is closed.
func unlockFile(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_UN) }

// moveFile puts a file in the place of another, now and after a power cut.
func moveFile(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
