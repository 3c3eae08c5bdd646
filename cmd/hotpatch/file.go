package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"hotpatchd/agent/control"
)

// installRequest reads the file that an argument names, and the metadata
// beside it; or takes the argument for an id. The daemon never opens a file
// for a caller: what this user may not read does not reach it. An export has
// its metadata in itself.
func installRequest(arg string) (control.InstallRequest, error) {
	if !strings.HasSuffix(arg, ".hotpatch") && !strings.HasSuffix(arg, ".export") && !strings.ContainsAny(arg, `/\`) {
		return control.InstallRequest{ID: arg}, nil
	}
	b, err := readBounded(arg, control.MaxRelease)
	if err != nil {
		return control.InstallRequest{}, err
	}
	if len(b) == 0 {
		return control.InstallRequest{}, fmt.Errorf("%s is empty", arg)
	}
	if isExport(b) {
		return control.InstallRequest{File: b}, nil
	}
	for _, dir := range metadataFolders(arg) {
		metadata, err := readMetadata(dir)
		if err != nil || metadata != nil {
			return control.InstallRequest{File: b, Metadata: metadata}, err
		}
	}
	return control.InstallRequest{File: b}, nil
}

// metadataFolders are the places where the metadata of a file may lie: beside
// it, and in a repository that was carried here as a whole, where the file is
// DIR/targets/releases/HASH.ID.hotpatch and the metadata DIR/metadata.
func metadataFolders(file string) []string {
	dirs := []string{filepath.Join(filepath.Dir(file), "metadata")}
	whole, err := filepath.Abs(file)
	if err != nil {
		return dirs
	}
	const depth = 2 // of a release below targets/
	for i, dir := 0, filepath.Dir(whole); i < depth; i, dir = i+1, filepath.Dir(dir) {
		if filepath.Base(dir) == "targets" {
			return append(dirs, filepath.Join(filepath.Dir(dir), "metadata"))
		}
	}
	return dirs
}

// isExport tells an export, a zip file that begins with the entry export.json,
// from a release. The daemon judges; this only spares it what lies beside.
func isExport(b []byte) bool {
	const nameAt = 30 // in a zip file's first record (PKWARE APPNOTE 4.3.7)
	return len(b) > nameAt && bytes.HasPrefix(b, []byte("PK\x03\x04")) && bytes.HasPrefix(b[nameAt:], []byte("export.json"))
}

// readMetadata reads the JSON files of a folder; none if there is no folder.
func readMetadata(dir string) (map[string][]byte, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, plainFileError("read", err)
	}
	out := map[string][]byte{}
	sum := 0
	for _, e := range entries {
		name := e.Name()
		if !e.Type().IsRegular() || !strings.HasSuffix(name, ".json") || strings.HasPrefix(name, ".") {
			continue
		}
		b, err := readBounded(filepath.Join(dir, name), control.MaxMetadata)
		if err != nil {
			return nil, err
		}
		if sum += len(b); sum > control.MaxMetadataSum {
			return nil, fmt.Errorf("the files in %s have more than %d bytes together", dir, control.MaxMetadataSum)
		}
		out[name] = b
	}
	return out, nil
}

// readBounded reads a regular file of at most limit bytes. It does not wait for
// the other end of a pipe.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, plainFileError("read", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, plainFileError("read", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), limit)
	}
	b := make([]byte, 0, info.Size()+1)
	for r := io.LimitReader(f, limit+1); ; {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if int64(len(b)) > limit {
			return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
		}
		if errors.Is(err, io.EOF) {
			return b, nil
		}
		if err != nil {
			return nil, plainFileError("read", err)
		}
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

// plainFileError says what failed on which file, without the name of the system call.
func plainFileError(doing string, err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		e := &control.Error{Code: control.CodeInternal, Text: fmt.Sprintf("cannot %s %s: %v", doing, p.Path, p.Err)}
		if errors.Is(err, fs.ErrExist) {
			e.Hint = "name a file that does not exist yet"
		}
		return e
	}
	return fmt.Errorf("cannot %s: %w", doing, err)
}
