//go:build !windows

package store

import (
	"fmt"
	"os"
	"syscall"
)

// secureFolder makes the folder, or takes everybody else's rights on it away.
// A folder of another user's is refused: its owner could swap the file.
func secureFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the state folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("cannot look at the state folder: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("cannot use %s as the state folder: it belongs to uid %d", dir, st.Uid)
	}
	if info.Mode().Perm() == 0o700 {
		return nil
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("cannot protect the state folder: %w", err)
	}
	return nil
}

func secureFile(path string) error {
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("cannot protect the state: %w", err)
	}
	return nil
}
