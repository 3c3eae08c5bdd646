//go:build linux && amd64

package ptrace

import "sync"

// maxKnownELFs bounds the files that are remembered to be ELF files; a machine
// has some thousands of them in use.
const maxKnownELFs = 1 << 14

// inode names a file, as /proc/PID/maps and the kernel's records of mappings do.
type inode struct {
	dev device
	ino uint64
}

// elfs are files that were seen to be ELF files. One that is another file by now
// is a hint that is wrong, and only hints come of it. Safe for concurrent use.
type elfs struct {
	mu    sync.RWMutex
	known map[inode]bool
}

func (e *elfs) add(files ...inode) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.known == nil || len(e.known)+len(files) > maxKnownELFs {
		e.known = map[inode]bool{}
	}
	for _, f := range files {
		e.known[f] = true
	}
}

func (e *elfs) has(f inode) bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.known[f]
}
