//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// ListOf asks the system for each of some processes. Only for those that keep us
// out it asks for all, once: a snapshot names them all the same.
func (b *backend) ListOf(ctx context.Context, pids []int) ([]target.Info, error) {
	var entries []entry
	var closed []int
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		e, err := b.entryOf(pid)
		switch {
		case err == nil:
			entries = append(entries, e)
		case errors.Is(err, windows.ERROR_ACCESS_DENIED):
			closed = append(closed, pid)
		}
	}
	if len(closed) > 0 {
		all, err := snapshot(target.ID{})
		if err != nil {
			return nil, &target.Error{Op: "list", Note: "the system does not tell of its processes", Err: err}
		}
		for _, e := range all {
			if slices.Contains(closed, e.id.PID) {
				entries = append(entries, e)
			}
		}
	}
	b.listing.Lock()
	defer b.listing.Unlock()
	// Neither the turns nor the time of List are touched: these are looked at now.
	turns, waiting, walked, left := b.turns, b.waiting, b.walked, b.leftOver
	defer func() { b.turns, b.waiting, b.walked, b.leftOver = turns, waiting, walked, left }()
	b.turns, b.walked = 1, 0
	list := make([]target.Info, 0, len(entries))
	for _, e := range entries {
		if k := b.refresh(e); k != nil {
			k.round = b.round
			list = append(list, k.info)
		}
	}
	return list, nil
}

// vmCounters is VM_COUNTERS (class 3 of NtQueryInformationProcess).
type vmCounters struct {
	peakVirtual, virtual uintptr
	faults               uint32
	_                    [8]uintptr
}

const processVMCounters = 3

// entryOf is what a snapshot would say of one process.
func (b *backend) entryOf(pid int) (entry, error) {
	if pid <= 4 { // the idle process and the system, which no snapshot of ours has
		return entry{}, target.ErrGone
	}
	h, err := b.kernel.process(pid, windows.PROCESS_QUERY_LIMITED_INFORMATION|windows.SYNCHRONIZE)
	if err != nil {
		return entry{}, err
	}
	defer windows.CloseHandle(h)
	start, err := started(h)
	if err != nil {
		return entry{}, err
	}
	if signalled(h) {
		return entry{}, target.ErrGone
	}
	var vm vmCounters
	if err := windows.NtQueryInformationProcess(h, processVMCounters, unsafe.Pointer(&vm), uint32(unsafe.Sizeof(vm)), nil); err != nil {
		return entry{}, err
	}
	e := entry{id: target.ID{PID: pid, Start: start}, virtual: vm.virtual, faults: vm.faults}
	if path := imagePath(h); path != "" {
		e.name = filepath.Base(path)
	}
	return e, nil
}
