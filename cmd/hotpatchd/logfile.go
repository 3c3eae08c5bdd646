package main

import (
	"fmt"
	"os"
	"sync"
)

// maxLog bounds a log file, in bytes; one older file of the same size is kept.
const maxLog = 8 << 20

// logFile is a log that never takes more than twice its limit on disk. Where a
// supervisor collects standard error it is not needed; a Windows service has no
// standard error.
type logFile struct {
	mu    sync.Mutex
	path  string
	limit int64
	f     *os.File // nil after a failure; the next write tries anew
	size  int64
}

func openLog(path string, limit int64) (*logFile, error) {
	l := &logFile{path: path, limit: limit}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("cannot write the log: %w", err)
	}
	return l, nil
}

func (l *logFile) open() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, info.Size()
	return nil
}

// Write writes one record whole; a file that would grow over the limit is put
// aside first. It is closed before it is renamed: Windows insists.
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil && l.size > 0 && l.size+int64(len(b)) > l.limit {
		l.f.Close()
		l.f = nil
		if err := os.Rename(l.path, l.path+".1"); err != nil {
			// Somebody holds it open. Losing old lines is better than filling the disk.
			if err := os.Truncate(l.path, 0); err != nil {
				return 0, err
			}
		}
	}
	if l.f == nil {
		if err := l.open(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	return n, err
}

func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}
