package private

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// What is made is for its owner only, a file in a folder that others may read, too;
// what is there already is neither opened nor changed.
func TestPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "above", "keys")
	for range 2 { // the second time it is there
		if err := MakeFolder(dir); err != nil {
			t.Fatal(err)
		}
	}
	onlyOwner(t, dir)
	open := t.TempDir()
	for _, file := range []string{filepath.Join(dir, "a"), filepath.Join(open, "b")} {
		f, err := Create(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("secret"); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		onlyOwner(t, file)
		if f, err := Create(file); !errors.Is(err, fs.ErrExist) {
			t.Errorf("again: %v, %v", f, err)
		}
		if b, err := os.ReadFile(file); err != nil || string(b) != "secret" {
			t.Errorf("%s holds %q, %v", file, b, err)
		}
		if err := MakeFolder(file); err == nil {
			t.Error("a file is taken for a folder")
		}
	}
	if _, err := Create(filepath.Join(open, "none", "c")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in no folder: %v", err)
	}
	if _, err := Create("a\x00b"); err == nil {
		t.Error("a name with a zero byte is one")
	}
}
