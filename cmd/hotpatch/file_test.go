package main

import (
	"os"
	"path/filepath"
	"testing"
)

// A release of a repository that was carried here as a whole finds its metadata.
func TestMetadataOfACarriedRepository(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	put("stick/metadata/timestamp.json", "of the stick")
	put("metadata/timestamp.json", "of somebody else")
	put("beside/metadata/timestamp.json", "beside")
	for file, want := range map[string]string{
		"stick/targets/releases/0123.R1.hotpatch": "of the stick",
		"stick/targets/R1.hotpatch":               "of the stick",
		"beside/R1.hotpatch":                      "beside",
		"other/place/R1.hotpatch":                 "",
		"targets/a/b/R1.hotpatch":                 "",
	} {
		r, err := installRequest(put(file, "release"))
		if err != nil || string(r.File) != "release" || string(r.Metadata["timestamp.json"]) != want {
			t.Errorf("%s: %q, %v; wanted %q", file, r.Metadata, err, want)
		}
	}
}
