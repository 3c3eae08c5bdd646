//go:build linux && amd64

package ptrace

import (
	"hash/maphash"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// backend implements target.Backend. Its lock covers everything below it.
type backend struct {
	news news
	elfs elfs

	mu      sync.Mutex
	proc    procDir
	procs   map[int]*known
	desc    describer
	changes uint64 // last Change given out
	round   uint64
	heard   heard // what this round may go by
	kept    int   // files of processes that are open
	mayKeep int
	turns   int // of so many processes with page faults one is looked at in a round
	waiting int // how many there were
	seed    maphash.Seed
	dirbuf  []byte
	mapbuf  []byte
	pids    []int
	gadgets *gadgetCache
	nice    int // ours
	late    *patience
	cgroups string
}

// known is what List remembers of a process from one call to the next.
type known struct {
	stat   stat
	size   pages  // when that was read, or before
	sum    uint64 // of the mappings that code can come from
	info   target.Info
	kernel bool // a kernel thread: no info
	late   bool // a look at its memory did not come back
	file   int  // its stat or, if it is brief, its statm file (a kernel thread's comm), -1 if it is not kept open
	brief  bool
	round  uint64 // of List, in which it was last seen
	calm   int    // grows while its mappings stay the same
	passes int    // calls of ListOf that pass over it meanwhile
}

// New makes the backend of this machine. It holds one descriptor of /proc.
func New() (target.Backend, error) {
	fd, err := openDir(unix.AT_FDCWD, "/proc")
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/proc", Err: err}
	}
	priority, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		priority = 20
	}
	late := newPatience()
	return &backend{
		cgroups: cgroupRoot(),
		nice:    20 - priority, // the system call answers 40..1
		proc:    fd,
		procs:   map[int]*known{},
		late:    late,
		desc:    describer{late: late, users: map[int]string{}, self: os.Getpid(), rights: readRights(), buf: make([]byte, 0, 4096)},
		turns:   1,
		mayKeep: mayKeep(),
		seed:    maphash.MakeSeed(),
		dirbuf:  make([]byte, 64<<10),
		gadgets: newGadgetCache(),
	}, nil
}

func (b *backend) Name() string { return "ptrace" }

func mayKeep() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0
	}
	return int(min(maxKept, r.Cur/4))
}
