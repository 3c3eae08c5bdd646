package repository

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// tempPrefix begins the names of files that are not complete. Whatever has it
// after a start is left over from a crash and worth nothing.
const tempPrefix = ".tmp-"

// writeFile puts b at path whole or not at all: temporary file in the same
// folder, sync, rename, sync of the folder.
func writeFile(path string, b []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = patiently(func() error { return os.Rename(f.Name(), path) })
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return syncDir(dir)
}

// syncDir makes a rename survive a power cut. Windows has no such call and
// keeps renames in its journal.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot sync %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("cannot sync %s: %w", dir, err)
	}
	return nil
}

// sweep removes what a crash left half written in dir.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", dir, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := patiently(func() error { return os.Remove(filepath.Join(dir, e.Name())) }); err != nil {
				return fmt.Errorf("cannot remove %s: %w", e.Name(), err)
			}
		}
	}
	return nil
}
