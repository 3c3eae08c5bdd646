//go:build windows && (amd64 || arm64)

package win32

import (
	"errors"
	"maps"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// reservations are the sizes of what we reserved in one life, by the address
// the system keeps each under.
type reservations map[uintptr]uint64

// hold tells whether pages are in a reservation of ours, and not in one that
// somebody made at its address after it was given back without us.
func (r reservations) hold(i *windows.MemoryBasicInformation) bool {
	size, ok := r[i.AllocationBase]
	return ok && i.AllocationProtect == windows.PAGE_NOACCESS && uint64(i.BaseAddress-i.AllocationBase+i.RegionSize) <= size
}

func (r reservations) clone() reservations { return maps.Clone(r) }

// span checks what a caller wants mapped, protected or unmapped, and has the
// right to do so.
func (p *process) span(op string, at target.Addr, size uint64) error {
	if at%target.PageSize != 0 || size%target.PageSize != 0 || size == 0 || at < granule || size > maxAddr || uint64(at) > maxAddr-granule-size {
		return p.refuse(op, at, target.ErrUnsupported, "%d bytes at %s are not whole pages of its address space", size, at)
	}
	if p.over() {
		return p.refuse(op, at, target.ErrGone, "it has ended")
	}
	if p.frozen != nil {
		return p.refuse(op, at, target.ErrBusy, "it is frozen")
	}
	return p.grant(op, rightsWrite)
}

func (p *process) prot(op string, at target.Addr, prot target.Prot) (uint32, error) {
	switch prot {
	case 0:
		return windows.PAGE_NOACCESS, nil
	case target.Read:
		return windows.PAGE_READONLY, nil
	case target.Write, target.Read | target.Write:
		return windows.PAGE_READWRITE, nil
	case target.Exec:
		return windows.PAGE_EXECUTE, nil
	case target.Read | target.Exec:
		return windows.PAGE_EXECUTE_READ, nil
	}
	return 0, p.refuse(op, at, target.ErrDenied, "write and execute never go together")
}

// part is a run of pages within one allocation.
type part struct {
	at   target.Addr
	size uint64
}

// Alloc commits the pages, in what we reserved before or in reservations of
// whole granules made now. They have their final protection at once.
func (p *process) Alloc(at target.Addr, size uint64, prot target.Prot) error {
	if err := p.span("alloc", at, size); err != nil {
		return err
	}
	bits, err := p.prot("alloc", at, prot)
	if err != nil {
		return err
	}
	fresh, parts, err := p.room(at, size)
	if err != nil {
		return err
	}
	var made []part
	undo := func(kind error) error {
		for _, m := range made {
			p.decommit(m.at, m.size)
		}
		for _, f := range fresh {
			p.giveBack(uintptr(f.at))
		}
		return p.fail("alloc", at, kind)
	}
	for n, f := range fresh {
		if err := reserve(p.h, f.at, f.size); err != nil {
			fresh = fresh[:n]
			return undo(takenOr(err))
		}
		p.own(uintptr(f.at), f.size)
	}
	for _, c := range parts {
		if _, err := win(virtualAllocEx, uintptr(p.h), uintptr(c.at), uintptr(c.size), windows.MEM_COMMIT, uintptr(bits)); err != nil {
			return undo(err)
		}
		made = append(made, c)
	}
	return nil
}

// takenOr is the kind of a refused reservation: somebody was faster, or the
// system keeps the place for itself.
func takenOr(err error) error {
	if errors.Is(err, windows.ERROR_INVALID_ADDRESS) || err == windows.STATUS_CONFLICTING_ADDRESSES {
		return target.ErrTaken
	}
	return err
}

// room finds what must be reserved for a span, and the parts of it by the
// reservations they lie in. Nothing is changed yet.
func (p *process) room(at target.Addr, size uint64) (fresh, parts []part, err error) {
	end := at + target.Addr(size)
	low, high := at&^(granule-1), (end+granule-1)&^(granule-1)
	p.b.mu.Lock()
	ours := p.b.reserved[p.id].clone()
	p.b.mu.Unlock()
	var taken error
	err = walk(p.h, low, high, func(i *windows.MemoryBasicInformation) bool {
		from, to := max(target.Addr(i.BaseAddress), low), min(target.Addr(i.BaseAddress+i.RegionSize), high)
		switch {
		case i.State == memFree:
			if from%granule != 0 || to%granule != 0 {
				// The rest of somebody's last granule cannot be reserved.
				from, to = max(from, at), min(to, end)
				if from < to {
					taken = p.refuse("alloc", at, target.ErrTaken, "%s shares its 64 KiB with another allocation", from)
				}
				return taken == nil
			}
			fresh = append(fresh, part{from, uint64(to - from)})
		case i.State == windows.MEM_RESERVE && ours.hold(i):
		default:
			if from < end && at < to {
				taken = p.refuse("alloc", at, target.ErrTaken, "%s-%s is mapped", from, to)
			}
			return taken == nil
		}
		if from, to = max(from, at), min(to, end); from < to {
			parts = append(parts, part{from, uint64(to - from)})
		}
		return true
	})
	if taken != nil {
		return nil, nil, taken
	}
	if err != nil {
		return nil, nil, p.fail("alloc", at, err)
	}
	return fresh, parts, nil
}

// reserve keeps whole granules for us, exactly there.
func reserve(h windows.Handle, at target.Addr, size uint64) error {
	if virtualAlloc2.Find() == nil {
		_, err := win(virtualAlloc2, uintptr(h), uintptr(at), uintptr(size), windows.MEM_RESERVE, windows.PAGE_NOACCESS, 0, 0)
		return err
	}
	_, err := win(virtualAllocEx, uintptr(h), uintptr(at), uintptr(size), windows.MEM_RESERVE, windows.PAGE_NOACCESS)
	return err
}

func (p *process) own(base uintptr, size uint64) {
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	if p.b.reserved[p.id] == nil {
		p.b.reserved[p.id] = reservations{}
	}
	p.b.reserved[p.id][base] = size
}

// decommit gives pages back and keeps their addresses.
func (p *process) decommit(at target.Addr, size uint64) error {
	_, err := win(virtualFreeEx, uintptr(p.h), uintptr(at), uintptr(size), windows.MEM_DECOMMIT)
	return err
}

// giveBack ends a reservation if no page of it is in use.
func (p *process) giveBack(base uintptr) error {
	used := false
	err := walk(p.h, target.Addr(base), maxAddr, func(i *windows.MemoryBasicInformation) bool {
		if i.AllocationBase != base {
			return false
		}
		used = used || i.State == windows.MEM_COMMIT
		return !used
	})
	if err != nil || used {
		return err
	}
	if _, err := win(virtualFreeEx, uintptr(p.h), base, 0, windows.MEM_RELEASE); err != nil {
		return err
	}
	p.b.mu.Lock()
	defer p.b.mu.Unlock()
	delete(p.b.reserved[p.id], base)
	return nil
}

// committed lists the parts of a span by allocation, or says where it is not
// committed private memory.
func (p *process) committed(op string, at target.Addr, size uint64) (parts []part, bases []uintptr, err error) {
	end := at + target.Addr(size)
	var wrong error
	err = walk(p.h, at, end, func(i *windows.MemoryBasicInformation) bool {
		from, to := max(target.Addr(i.BaseAddress), at), min(target.Addr(i.BaseAddress+i.RegionSize), end)
		if i.State != windows.MEM_COMMIT || i.Type != memPrivate {
			wrong = p.refuse(op, from, target.ErrUnsupported, "no private memory is mapped there")
			return false
		}
		if n := len(bases); n > 0 && bases[n-1] == i.AllocationBase {
			parts[n-1].size += uint64(to - from)
		} else {
			parts, bases = append(parts, part{from, uint64(to - from)}), append(bases, i.AllocationBase)
		}
		return true
	})
	if wrong != nil {
		return nil, nil, wrong
	}
	if err != nil {
		return nil, nil, p.fail(op, at, err)
	}
	return parts, bases, nil
}

func (p *process) Protect(at target.Addr, size uint64, prot target.Prot) error {
	if err := p.span("protect", at, size); err != nil {
		return err
	}
	bits, err := p.prot("protect", at, prot)
	if err != nil {
		return err
	}
	parts, _, err := p.committed("protect", at, size)
	if err != nil {
		return err
	}
	for _, c := range parts {
		var old uint32
		if err := windows.VirtualProtectEx(p.h, uintptr(c.at), uintptr(c.size), bits, &old); err != nil {
			return p.fail("protect", c.at, err)
		}
	}
	return nil
}

func (p *process) Free(at target.Addr, size uint64) error {
	if err := p.span("free", at, size); err != nil {
		return err
	}
	parts, bases, err := p.committed("free", at, size)
	if err != nil {
		return err
	}
	for n, c := range parts {
		if err := p.decommit(c.at, c.size); err != nil {
			return p.fail("free", c.at, err)
		}
		if err := p.giveBack(bases[n]); err != nil {
			return p.fail("free", c.at, err)
		}
	}
	return nil
}
