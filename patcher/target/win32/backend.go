//go:build windows && (amd64 || arm64)

package win32

import (
	"os"
	"sync"
	"time"

	"hotpatchd/patcher/target"
)

// backend implements target.Backend.
type backend struct {
	kernel kernel
	method method
	guard  guardian
	limit  time.Duration // of a call made in a process
	follow follower

	listing sync.Mutex // covers the next ones; held for long, so never wanted while threads stand
	procs   map[int]*known
	desc    describer
	changes uint64 // last Change given out
	round   uint64
	turns   int // of so many processes with page faults one is looked at in a round
	waiting int // how many there were

	walked   time.Duration // of walks in this round
	leftOver int           // pid of the first process that a round had no time for, 0: none

	mu       sync.Mutex // covers the next ones; held for moments
	reserved map[target.ID]reservations
	held     map[target.ID]*frozen
}

// New makes the backend of this machine.
func New() (target.Backend, error) { return newBackend(system{}), nil }

func newBackend(k kernel) *backend {
	b := &backend{
		kernel:   k,
		limit:    callLimit,
		procs:    map[int]*known{},
		desc:     describer{self: os.Getpid(), users: map[string]string{}},
		turns:    1,
		reserved: map[target.ID]reservations{},
		held:     map[target.ID]*frozen{},
	}
	b.desc.privileged = enableDebugPrivilege() == nil
	b.method = chooseMethod(k)
	b.guard.lost = b.unguarded
	b.follow.kernel = k
	return b
}

func (b *backend) Name() string { return "win32" }
