//go:build !windows

package private

import "os"

// Create makes a new file for writing. One that is there already, a link too, is
// an error and stays as it is (fs.ErrExist).
func Create(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// MakeFolder makes a folder and those above it that are missing. One that is
// there already keeps its rights.
func MakeFolder(dir string) error { return os.MkdirAll(dir, 0o700) }
