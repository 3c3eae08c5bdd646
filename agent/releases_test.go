package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

// Releases that came as files are kept each for itself, whatever their ids are
// to a file system: two that differ in case only, and names of devices of Windows.
func TestKeptReleases(t *testing.T) {
	a := &Agent{o: Options{Config: &Config{StateDir: t.TempDir()}}}
	ids := []string{"ACME-1", "acme-1", "Acme-1", "CON", "NUL.1", "aux", "COM1", "trailing."}
	offer := func(id string) repository.Offer {
		sum := sha256.Sum256([]byte("the release " + id))
		return repository.Offer{ID: id, SHA256: hex.EncodeToString(sum[:])}
	}
	for _, id := range ids {
		if !release.ValidID(id) {
			t.Errorf("%s is no id", id)
		}
		if err := a.keepLocal([]byte("the release " + id)); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range ids {
		if b, err := a.bytesOf(context.Background(), offer(id)); err != nil || string(b) != "the release "+id {
			t.Errorf("%s: %q, %v", id, b, err)
		}
	}
	files, err := os.ReadDir(filepath.Join(a.o.Config.StateDir, "releases"))
	if err != nil || len(files) != len(ids) {
		t.Errorf("%d files, %v", len(files), err)
	}
	for _, f := range files {
		if !regexp.MustCompile(`^[0-9a-f]{64}\.hotpatch$`).MatchString(f.Name()) || !filepath.IsLocal(f.Name()) {
			t.Errorf("%s is no safe name on every system", f.Name())
		}
	}
}
