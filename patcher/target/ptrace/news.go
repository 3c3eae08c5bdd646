//go:build linux && amd64

package ptrace

import "sync"

// maxNews bounds the processes that are remembered from one List to the next.
const maxNews = 4096

// news is what the kernel told of processes since the last List: who was forked,
// executed a program, got new code, or ended. One that executed a program may map
// as much as before, and is another life all the same. Safe for concurrent use.
type news struct {
	mu     sync.Mutex
	told   bool // the kernel tells of all but new code
	code   bool // and of that
	missed bool // something was not told
	pids   map[int]bool
}

// heard is what one List may go by.
type heard struct {
	pids   map[int]bool
	untold bool // any other process may be among them
	code   bool // those that got new code are among them
}

// begin notes that all is told from now on, new code as well or not.
func (n *news) begin(code bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.told, n.code, n.missed, n.pids = true, code, true, nil
}

// end notes that nothing is told any more, or only nothing of new code.
func (n *news) end(onlyCode bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.told, n.code, n.missed, n.pids = n.told && onlyCode, false, true, nil
}

// miss notes that something was lost.
func (n *news) miss() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.missed, n.pids = true, nil
}

func (n *news) add(pid int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.missed || n.pids[pid]:
	case len(n.pids) == maxNews:
		n.missed, n.pids = true, nil
	default:
		if n.pids == nil {
			n.pids = map[int]bool{}
		}
		n.pids[pid] = true
	}
}

func (n *news) tells() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.told
}

// take gives out what was told and begins anew.
func (n *news) take() heard {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := heard{n.pids, n.missed || !n.told, n.code && !n.missed && n.told}
	n.pids, n.missed = nil, false
	return h
}
