package repository

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// openRegular opens a file for reading and waits for nobody's words: a pipe in
// its place is opened without a writer, seen and refused. It is the opened file
// that is looked at, not its name, which may belong to another a moment later.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	var f *os.File
	err := patiently(func() (err error) {
		f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", path)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// maxPEM bounds a file of certificates, in bytes: the bundle of all public
// authorities has a quarter of that.
const maxPEM = 1 << 20

// readPEM reads a file of certificates or keys that the configuration names.
func readPEM(path string) ([]byte, error) {
	f, _, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err == nil && len(b) > maxPEM {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxPEM)
	}
	return b, err
}
