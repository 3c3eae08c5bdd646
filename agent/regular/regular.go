// Package regular reads files that a configuration names. It waits for nobody's
// words: whoever puts a pipe in the place of a file must not stop the daemon.
package regular

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"syscall"
	"time"
)

// On Windows a program may keep everybody else from a file while it writes it:
// that is no wrong file. Who writes some kilobytes is done within a second.
const (
	errorSharingViolation = syscall.Errno(32) // Windows' system error code
	sharingPause          = 20 * time.Millisecond
	sharingTries          = 50
)

// Open opens a regular file for reading. A pipe in its place is opened without a
// writer, seen and refused. It is the opened file that is looked at, not its
// name, which may belong to another a moment later.
func Open(path string) (*os.File, os.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// Read reads a regular file of at most most bytes.
func Read(path string, most int64) ([]byte, error) {
	f, _, err := Open(path)
	for n := 1; n < sharingTries && runtime.GOOS == "windows" && errors.Is(err, errorSharingViolation); n++ {
		time.Sleep(sharingPause)
		f, _, err = Open(path)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return b, nil
}
