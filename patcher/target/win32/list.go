//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// faultChecks is how many processes that map as much as before, but took page
// faults, have their mappings compared in one List. The others come later.
const faultChecks = 32

// A process about which the system does not answer is asked about again after
// silentFirst, then after twice as long each time, up to silentLast.
const (
	silentFirst = time.Minute
	silentLast  = 30 * time.Minute
)

// What List gives to walks through memory. A usual process has some hundreds of
// regions and costs a millisecond; one that makes them by the ten thousand must
// not keep List from the others.
const (
	walkTime    = 200 * time.Millisecond // of one process
	walkRegions = 1 << 18                // of one process
	// walkTotal is the time of all in one List, which the last one may exceed by
	// silence. The processes that are left over come first in the next List.
	walkTotal = 2 * time.Second
)

// A process whose walk takes longer than that is walked again after longFirst,
// then after twice as long each time, up to longLast.
const (
	longFirst = 2 * time.Second
	longLast  = 5 * time.Minute
)

// snapshotLimit bounds the system's answer on all processes and threads, bytes:
// a million threads.
const snapshotLimit = 128 << 20

// known is what List remembers of a process from one call to the next.
type known struct {
	virtual uintptr // bytes it maps
	faults  uint32
	sum     uint64 // of the mappings that code can come from
	info    target.Info
	round   uint64        // of List, in which it was last seen
	ask     time.Time     // not walked to the end: when it is asked about again
	pause   time.Duration // before that
}

// entry is one process of a snapshot.
type entry struct {
	id      target.ID
	name    string // file name of its program
	virtual uintptr
	faults  uint32
	threads []int // only of the one that was asked for
}

var seed = maphash.MakeSeed()

// List asks the system once for all processes, and looks at one anew only if
// it maps more or less than before; of those that only took page faults at a
// few in turn. A module that went and came back at the same place between two
// calls does not show.
func (b *backend) List(ctx context.Context) ([]target.Info, error) {
	entries, err := snapshot(target.ID{})
	if err != nil {
		return nil, &target.Error{Op: "list", Note: "the system does not tell of its processes", Err: err}
	}
	b.listing.Lock()
	defer b.listing.Unlock()
	b.round++
	b.turns, b.waiting = 1+b.waiting/faultChecks, 0
	if k := slices.IndexFunc(entries, func(e entry) bool { return e.id.PID == b.leftOver }); k > 0 {
		entries = slices.Concat(entries[k:], entries[:k])
	}
	b.walked, b.leftOver = 0, 0
	list := make([]target.Info, 0, len(entries))
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if k := b.refresh(e); k != nil {
			k.round = b.round
			list = append(list, k.info)
		}
	}
	for pid, k := range b.procs {
		if k.round != b.round {
			delete(b.procs, pid)
			b.over(k.info.ID)
		}
	}
	return list, nil
}

func (b *backend) refresh(e entry) *known {
	k := b.procs[e.id.PID]
	if k != nil && k.info.ID != e.id {
		b.over(k.info.ID)
		k = nil
	}
	if k != nil && time.Now().Before(k.ask) {
		return k
	}
	if k != nil && k.ask.IsZero() && k.virtual == e.virtual && (k.faults == e.faults || !b.turn(e.id.PID)) {
		return k
	}
	left := b.walked >= walkTotal
	if left && b.leftOver == 0 {
		b.leftOver = e.id.PID
	}
	if left && k != nil {
		return k
	}
	h, err := b.kernel.process(e.id.PID, windows.PROCESS_QUERY_INFORMATION|windows.SYNCHRONIZE)
	if err != nil {
		h, err = b.kernel.process(e.id.PID, windows.PROCESS_QUERY_LIMITED_INFORMATION|windows.SYNCHRONIZE)
	}
	if err == nil {
		defer windows.CloseHandle(h)
		if start, err := started(h); err != nil || start != e.id.Start || signalled(h) {
			return nil
		}
	} else if !errors.Is(err, windows.ERROR_ACCESS_DENIED) {
		return nil // gone meanwhile
	}
	if left {
		return b.unwalked(h, e, 0)
	}
	began := time.Now()
	sum, err := sumCode(h)
	b.walked += time.Since(began)
	switch {
	case errors.Is(err, errSilent):
		return b.silent(e, k)
	case errors.Is(err, errLong):
		pause := longFirst
		if k != nil {
			pause = min(max(longFirst, 2*k.pause), longLast)
		}
		return b.unwalked(h, e, pause)
	}
	if k != nil && k.ask.IsZero() && sum == k.sum {
		k.virtual, k.faults = e.virtual, e.faults
		return k
	}
	b.changes++
	k = &known{virtual: e.virtual, faults: e.faults, sum: sum, info: b.desc.describe(h, e)}
	k.info.Change = b.changes
	b.procs[e.id.PID] = k
	return k
}

// silent notes a process about whose memory the system does not answer: it is
// listed with that reason, and asked about again later and later, since each
// question may cost a thread of ours and the wait for it.
func (b *backend) silent(e entry, was *known) *known {
	k := &known{virtual: e.virtual, faults: e.faults, info: target.Info{ID: e.id, UID: -1, Host: e.name, Image: e.name, Arch: nativeArch}}
	if was != nil {
		*k = *was
	}
	k.pause = min(max(silentFirst, 2*k.pause), silentLast)
	k.ask = time.Now().Add(k.pause)
	text := "the system does not answer about the memory of " + e.name
	k.info.Guards = append(slices.DeleteFunc(slices.Clone(k.info.Guards), func(g target.Guard) bool { return g.Text == text }),
		target.Guard{Code: target.GuardKernel, Text: text})
	b.changes++
	k.info.Change = b.changes
	b.procs[e.id.PID] = k
	return k
}

// unwalked notes a process whose memory was not walked through to the end. It may
// have changed each time, which nobody can tell before the pause is over.
func (b *backend) unwalked(h windows.Handle, e entry, pause time.Duration) *known {
	b.changes++
	k := &known{virtual: e.virtual, faults: e.faults, info: b.desc.describe(h, e), ask: time.Now().Add(pause), pause: pause}
	k.info.Change = b.changes
	b.procs[e.id.PID] = k
	return k
}

// turn tells whether a process that took page faults is looked at this time.
func (b *backend) turn(pid int) bool {
	b.waiting++
	return (uint64(pid)/4+b.round)%uint64(b.turns) == 0
}

// started is the creation time of a process, in units of 100 ns since 1601.
func started(h windows.Handle) (uint64, error) {
	var created, exited, kernel, user windows.Filetime
	if err := windows.GetProcessTimes(h, &created, &exited, &kernel, &user); err != nil {
		return 0, err
	}
	return uint64(created.HighDateTime)<<32 | uint64(created.LowDateTime), nil
}

// sumCode digests the mappings that code can come from, images and executable
// memory; 0 if we may not ask. errLong if it takes more than its share.
func sumCode(h windows.Handle) (uint64, error) {
	var m maphash.Hash
	m.SetSeed(seed)
	found := false
	err := walkWithin(h, 0, maxAddr, walkRegions, walkTime, func(i *windows.MemoryBasicInformation) bool {
		found = true
		if i.State == windows.MEM_COMMIT && (i.Type == memImage || protOf(i.Protect)&target.Exec != 0) {
			var b [24]byte
			binary.LittleEndian.PutUint64(b[:], uint64(i.BaseAddress))
			binary.LittleEndian.PutUint64(b[8:], uint64(i.RegionSize))
			binary.LittleEndian.PutUint64(b[16:], uint64(i.AllocationBase))
			m.Write(b[:])
		}
		return true
	})
	if err != nil || !found {
		return 0, err
	}
	return m.Sum64(), nil
}

// find is the entry of one life, with its threads.
func find(id target.ID) (entry, error) {
	entries, err := snapshot(id)
	for _, e := range entries {
		if e.id == id {
			return e, nil
		}
	}
	if err == nil {
		err = target.ErrGone
	}
	return entry{}, err
}

// snapshot asks for all processes that have threads and an address space of
// their own: not the idle process (0) nor the system (4). One is told of with
// its threads.
func snapshot(whole target.ID) ([]entry, error) {
	buf := make([]byte, 512<<10)
	var need uint32
	for {
		err := windows.NtQuerySystemInformation(windows.SystemProcessInformation, unsafe.Pointer(&buf[0]), uint32(len(buf)), &need)
		if err == nil {
			break
		}
		if err != windows.STATUS_INFO_LENGTH_MISMATCH && err != windows.STATUS_BUFFER_TOO_SMALL || len(buf) >= snapshotLimit {
			return nil, err
		}
		buf = make([]byte, min(snapshotLimit, max(2*len(buf), int(need)+64<<10)))
	}
	var list []entry
	const fixed = unsafe.Sizeof(windows.SYSTEM_PROCESS_INFORMATION{})
	for at := uintptr(0); at+fixed <= uintptr(len(buf)); {
		var p windows.SYSTEM_PROCESS_INFORMATION // a copy: entries are not always aligned
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&p)), fixed), buf[at:])
		if p.UniqueProcessID != 0 && p.UniqueProcessID != 4 && p.NumberOfThreads != 0 {
			e := entry{
				id:   target.ID{PID: int(p.UniqueProcessID), Start: uint64(p.CreateTime)},
				name: p.ImageName.String(), virtual: p.VirtualSize, faults: p.PageFaultCount,
			}
			if e.id == whole {
				e.threads = threadsOf(buf[at+fixed:], int(p.NumberOfThreads))
			}
			list = append(list, e)
		}
		if p.NextEntryOffset == 0 {
			break
		}
		at += uintptr(p.NextEntryOffset)
	}
	return list, nil
}

// threadsOf reads the ids out of an array of SYSTEM_THREAD_INFORMATION.
func threadsOf(b []byte, n int) []int {
	const size, idAt = 0x50, 0x30 // ClientId.UniqueThread
	list := make([]int, 0, min(n, len(b)/size))
	for i := 0; i < n && (i+1)*size <= len(b); i++ {
		list = append(list, int(binary.LittleEndian.Uint64(b[i*size+idAt:])))
	}
	return list
}

// forget makes the next List look anew at a process that turned out to be in
// another life than List said.
func (b *backend) forget(pid int) {
	b.listing.Lock()
	defer b.listing.Unlock()
	delete(b.procs, pid)
}

// over forgets what was kept of a life.
func (b *backend) over(id target.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.reserved, id)
}
