//go:build linux && amd64

package ptrace

import "sync"

// maxExecs bounds the execs that are remembered from one List to the next.
const maxExecs = 4096

// execs is who has executed a program since the last List, as the kernel told.
// A process that did may map as much as before, and is another life all the same.
// Safe for concurrent use.
type execs struct {
	mu     sync.Mutex
	told   bool // the kernel tells
	missed bool // not of all of them
	pids   map[int]bool
}

// begin notes that all execs from now on are told.
func (e *execs) begin() { e.set(true) }

// end notes that they are not told any more.
func (e *execs) end() { e.set(false) }

func (e *execs) set(told bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.told, e.missed, e.pids = told, true, nil
}

func (e *execs) tells() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.told
}

func (e *execs) miss() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.missed, e.pids = true, nil
}

func (e *execs) add(pid int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.missed:
	case len(e.pids) == maxExecs:
		e.missed, e.pids = true, nil
	default:
		if e.pids == nil {
			e.pids = map[int]bool{}
		}
		e.pids[pid] = true
	}
}

// take gives them out and begins anew. Where untold, any process may be among them.
func (e *execs) take() (pids map[int]bool, untold bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	pids, untold = e.pids, e.missed || !e.told
	e.pids, e.missed = nil, false
	return pids, untold
}
