package sim

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
)

// files is where the PE files of a scene come from.
type files interface {
	open(name string) (io.ReadCloser, error)
	// path is what the regions of a process say of the file.
	path(name string) string
}

// folder reads files relative to a folder of this computer. Their paths are
// real, so that a process can be compared with what lies on disk.
type folder string

func (f folder) open(name string) (io.ReadCloser, error) { return os.Open(f.path(name)) }

func (f folder) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(string(f), filepath.FromSlash(name))
}

// tree reads files of a file system; their paths are those of a machine that
// has this file system at its root.
type tree struct{ fs.FS }

func (t tree) open(name string) (io.ReadCloser, error) {
	if t.FS == nil {
		return nil, errors.New("this machine was made without files")
	}
	return t.FS.Open(path.Clean(name))
}

func (t tree) path(name string) string { return path.Join("/", name) }
