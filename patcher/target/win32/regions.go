//go:build windows && (amd64 || arm64)

package win32

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

const (
	// maxAddr is where addresses of programs end (47 bits).
	maxAddr = 1 << 47
	// maxRegions bounds what is looked at of one process: more than a program with
	// a million allocations has.
	maxRegions = 4 << 20
	// granule is the unit of reservations (SYSTEM_INFO.dwAllocationGranularity).
	granule = 64 << 10
	// sharedUserData is the page that the kernel shows to every process.
	sharedUserData = 0x7ffe0000
)

// silence is how long one question about a process's memory may go without an
// answer. The system may need a lock of the process for it, which a page fault
// on a dead network holds; or, as Wine does, a thread of the process. It takes
// microseconds, milliseconds on a loaded machine.
const silence = 5 * time.Second

// errSilent: the system did not answer. The thread of ours that asked stays
// with the question, and what it was asked for must not be looked at any more.
var errSilent = fmt.Errorf("the system has not answered within %v: %w", silence, target.ErrBusy)

// errLong: a walk met with more regions, or took longer, than it may.
var errLong = fmt.Errorf("it has more regions of memory than can be looked at: %w", target.ErrBusy)

// virtualQuery is one question; tests have it never answered.
var virtualQuery = windows.VirtualQueryEx

// walk calls f with each run of equal pages from at on, until end or f says no.
// It calls it from another goroutine, and may go on to after errSilent.
func walk(h windows.Handle, at, end target.Addr, f func(*windows.MemoryBasicInformation) bool) error {
	return walkWithin(h, at, end, maxRegions, 0, f)
}

// walkWithin is walk that ends with errLong after so many regions, or with the
// first answer after so long (0: any time).
func walkWithin(h windows.Handle, at, end target.Addr, regions int, most time.Duration, f func(*windows.MemoryBasicInformation) bool) error {
	var asked atomic.Uint64
	done := make(chan error, 1)
	go func() { done <- walkOn(h, at, end, regions, most, f, &asked) }()
	t := time.NewTimer(silence)
	defer t.Stop()
	for last := uint64(0); ; {
		select {
		case err := <-done:
			return err
		case <-t.C:
			n := asked.Load()
			if n == last {
				return errSilent
			}
			last = n
			t.Reset(silence)
		}
	}
}

func walkOn(h windows.Handle, at, end target.Addr, regions int, most time.Duration, f func(*windows.MemoryBasicInformation) bool, asked *atomic.Uint64) error {
	began := time.Now()
	for range regions {
		var i windows.MemoryBasicInformation
		asked.Add(1)
		if err := virtualQuery(h, uintptr(at), &i, unsafe.Sizeof(i)); err != nil {
			if err == windows.ERROR_INVALID_PARAMETER && at > 0 {
				return nil // beyond what programs may address
			}
			return err
		}
		next := target.Addr(i.BaseAddress) + target.Addr(i.RegionSize)
		if next <= at || !f(&i) || next >= end {
			return nil
		}
		if most > 0 && time.Since(began) > most {
			return errLong
		}
		at = next
	}
	return errLong
}

// protOf turns a page protection into what may be done; guard pages and those
// without access are neither readable nor writable.
func protOf(p uint32) target.Prot {
	if p&windows.PAGE_GUARD != 0 {
		return 0
	}
	switch p & 0xff {
	case windows.PAGE_READONLY:
		return target.Read
	case windows.PAGE_READWRITE, windows.PAGE_WRITECOPY:
		return target.Read | target.Write
	case windows.PAGE_EXECUTE:
		return target.Exec
	case windows.PAGE_EXECUTE_READ:
		return target.Read | target.Exec
	case windows.PAGE_EXECUTE_READWRITE, windows.PAGE_EXECUTE_WRITECOPY:
		return target.Read | target.Write | target.Exec
	}
	return 0
}

// Regions lists what is committed or reserved. Of an image, Offset is the
// distance from its start in memory.
func (p *process) Regions() ([]target.Region, error) {
	if p.over() {
		return nil, p.refuse("list regions of", 0, target.ErrGone, "it has ended")
	}
	var list []target.Region
	var path string
	var named uintptr // allocation that path belongs to
	first := 0        // region of this allocation
	p.b.mu.Lock()
	ours := p.b.reserved[p.id].clone()
	p.b.mu.Unlock()
	var d drives
	stale := ours.clone()
	err := walk(p.h, 0, maxAddr, func(i *windows.MemoryBasicInformation) bool {
		delete(stale, i.AllocationBase)
		if i.State == memFree || i.State == windows.MEM_RESERVE && ours.hold(i) {
			return true
		}
		r := target.Region{Start: target.Addr(i.BaseAddress), End: target.Addr(i.BaseAddress + i.RegionSize)}
		if i.State == windows.MEM_COMMIT {
			r.Prot = protOf(i.Protect)
		}
		if i.AllocationBase != named {
			named, path, first = i.AllocationBase, "", len(list)
			if i.Type == memImage || i.Type == memMapped {
				path = d.dosPath(mappedFile(p.h, i.AllocationBase))
			}
		}
		switch {
		case i.Type == memImage, i.Type == memMapped && path != "":
			r.Kind, r.Path, r.Offset = target.File, path, uint64(i.BaseAddress-i.AllocationBase)
			r.Shared = i.Type == memMapped && i.Protect&(windows.PAGE_WRITECOPY|windows.PAGE_EXECUTE_WRITECOPY) == 0
		case i.Type == memMapped:
			r.Shared = true
		case i.Protect&windows.PAGE_GUARD != 0:
			for k := first; k < len(list); k++ {
				list[k].Kind = target.Stack
			}
			r.Kind = target.Stack
		case len(list) > first && list[first].Kind == target.Stack:
			r.Kind = target.Stack
		case i.BaseAddress>>16 == sharedUserData>>16:
			r.Kind = target.Special
		}
		list = append(list, r)
		return true
	})
	if err == nil && len(list) == 0 {
		err = target.ErrGone
	}
	if err != nil {
		return nil, p.fail("list regions of", 0, err)
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	for base := range stale {
		delete(p.b.reserved[p.id], base)
	}
	return list, nil
}

// memoryMappedFilenameInformation is the class of NtQueryVirtualMemory that
// GetMappedFileName asks for.
const memoryMappedFilenameInformation = 2

// maxPath is the longest path of the system in UTF-16 units.
const maxPath = 32 << 10

// mappedFile is the kernel's path of what is mapped, "" if it is no file.
func mappedFile(h windows.Handle, base uintptr) string {
	for size := 1 << 10; size <= 2*maxPath+64; size *= 8 {
		buf := make([]uint64, size/8) // the answer begins with a structure of pointers
		var need uintptr
		err := nt(ntQueryVirtualMemory, uintptr(h), base, memoryMappedFilenameInformation, uintptr(unsafe.Pointer(&buf[0])), uintptr(size), uintptr(unsafe.Pointer(&need)))
		if err == nil {
			return (*windows.NTUnicodeString)(unsafe.Pointer(&buf[0])).String()
		}
		if err != windows.STATUS_BUFFER_OVERFLOW && err != windows.STATUS_INFO_LENGTH_MISMATCH && err != windows.STATUS_BUFFER_TOO_SMALL {
			break
		}
	}
	return ""
}

// drives are the devices behind drive letters, asked for when first needed.
type drives struct {
	letters []string // "C:"
	devices []string // "\Device\HarddiskVolume3\"
	asked   bool
}

// dosPath spells a path of the kernel as Windows programs do, as far as a drive
// letter stands for its device.
func (d *drives) dosPath(name string) string {
	if rest, ok := strings.CutPrefix(name, `\??\`); ok {
		return rest
	}
	if rest, ok := strings.CutPrefix(name, `\Device\Mup\`); ok {
		return `\\` + rest
	}
	if !strings.HasPrefix(name, `\Device\`) {
		return name
	}
	d.ask()
	for n, device := range d.devices {
		if rest, ok := strings.CutPrefix(name, device); ok {
			return d.letters[n] + `\` + rest
		}
	}
	return name
}

func (d *drives) ask() {
	if d.asked {
		return
	}
	d.asked = true
	present, err := windows.GetLogicalDrives()
	if err != nil {
		return
	}
	for n := range 26 {
		letter := []uint16{'A' + uint16(n), ':', 0}
		var device [windows.MAX_PATH]uint16
		if present>>n&1 == 0 {
			continue
		}
		if _, err := windows.QueryDosDevice(&letter[0], &device[0], uint32(len(device))); err != nil {
			continue
		}
		d.letters = append(d.letters, windows.UTF16ToString(letter))
		d.devices = append(d.devices, windows.UTF16ToString(device[:])+`\`)
	}
}
