//go:build !windows

package private

import (
	"os"
	"testing"
)

func onlyOwner(t *testing.T, path string) {
	t.Helper()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("%s: %v, %v", path, info.Mode(), err)
	}
}
