//go:build linux && amd64

package ptrace

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// backend implements target.Backend. Its lock covers everything in it.
type backend struct {
	mu      sync.Mutex
	proc    procDir
	procs   map[int]*known
	desc    describer
	changes uint64 // last Change given out
	round   uint64
	dirbuf  []byte
	pids    []int
	gadgets *gadgetCache
}

// known is what List remembers of a process from one call to the next.
type known struct {
	stat  stat
	info  target.Info
	round uint64 // of List, in which it was last seen
}

// New makes the backend of this machine. It holds one descriptor of /proc.
func New() (target.Backend, error) {
	fd, err := openDir(unix.AT_FDCWD, "/proc")
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/proc", Err: err}
	}
	return &backend{
		proc:    fd,
		procs:   map[int]*known{},
		desc:    describer{users: map[int]string{}, self: os.Getpid(), buf: make([]byte, 0, 4096)},
		dirbuf:  make([]byte, 64<<10),
		gadgets: newGadgetCache(),
	}, nil
}

func (b *backend) Name() string { return "ptrace" }
