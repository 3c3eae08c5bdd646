package repository

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// lockStale is when a lock is taken to be left over from a crash: publishing
// takes seconds.
const lockStale = 10 * time.Minute

// lock keeps two publishers from losing each other's work. It is a file,
// because repositories lie on network shares, too.
func lock(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		info, statErr := os.Stat(path)
		if statErr == nil && time.Since(info.ModTime()) < lockStale {
			return nil, fmt.Errorf("another publisher is at work: if none is, remove %s, or wait %s", path, lockStale)
		}
		if err := patiently(func() error { return os.Remove(path) }); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("cannot remove a stale lock: %w", err)
		}
		f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot lock the repository: %w", err)
	}
	f.Close()
	return func() { patiently(func() error { return os.Remove(path) }) }, nil
}
