package agent

import (
	"bytes"
	"io/fs"
	"time"
)

// fileMap serves the files of a metadata folder as they came over the socket:
// by name, flat, in memory.
type fileMap map[string][]byte

func (m fileMap) Open(name string) (fs.File, error) {
	b, ok := m[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &memoryFile{name: name, size: int64(len(b)), Reader: bytes.NewReader(b)}, nil
}

// memoryFile is one of them; it is its own FileInfo.
type memoryFile struct {
	*bytes.Reader
	name string
	size int64
}

func (f *memoryFile) Stat() (fs.FileInfo, error) { return fileInfo{f.name, f.size}, nil }
func (f *memoryFile) Close() error               { return nil }

type fileInfo struct {
	name string
	size int64
}

func (i fileInfo) Name() string     { return i.name }
func (i fileInfo) Size() int64      { return i.size }
func (fileInfo) Mode() fs.FileMode  { return 0o444 }
func (fileInfo) ModTime() time.Time { return time.Time{} }
func (fileInfo) IsDir() bool        { return false }
func (fileInfo) Sys() any           { return nil }
