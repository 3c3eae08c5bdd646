//go:build linux && amd64

package ptrace

import (
	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// userEnd is where addresses of programs end on amd64 with four-level paging.
const userEnd = 1 << 47

// span checks what a caller wants mapped, protected or unmapped.
func (p *process) span(op string, at target.Addr, size uint64) error {
	if at%target.PageSize != 0 || size%target.PageSize != 0 || size == 0 || at == 0 || size > userEnd || uint64(at) > userEnd-size {
		return p.refuse(op, at, target.ErrUnsupported, "%d bytes at %s are not whole pages of its address space", size, at)
	}
	return nil
}

func (p *process) prot(op string, at target.Addr, prot target.Prot) (uint64, error) {
	if prot&target.Write != 0 && prot&target.Exec != 0 {
		return 0, p.refuse(op, at, target.ErrDenied, "write and execute never go together")
	}
	var v uint64
	if prot&target.Read != 0 {
		v |= unix.PROT_READ
	}
	if prot&target.Write != 0 {
		v |= unix.PROT_WRITE
	}
	if prot&target.Exec != 0 {
		v |= unix.PROT_EXEC
	}
	return v, nil
}

// Alloc has one thread of the process call mmap. The pages have their final
// protection at once, so that rules against a later change do not matter.
func (p *process) Alloc(at target.Addr, size uint64, prot target.Prot) error {
	if err := p.span("alloc", at, size); err != nil {
		return err
	}
	bits, err := p.prot("alloc", at, prot)
	if err != nil {
		return err
	}
	regions, err := p.Regions()
	if err != nil {
		return err
	}
	for i := range regions {
		if r := &regions[i]; r.Start < at+target.Addr(size) && at < r.End {
			return p.refuse("alloc", at, target.ErrTaken, "%s-%s is mapped", r.Start, r.End)
		}
	}
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED_NOREPLACE
	result, err := p.call("alloc", at, unix.SYS_MMAP, uint64(at), size, bits, flags, ^uint64(0), 0)
	switch {
	case err != nil:
		return err
	case result == int64(at):
		return nil
	case result > 0:
		// A kernel before 4.17 takes the address for a wish.
		p.call("free", target.Addr(result), unix.SYS_MUNMAP, uint64(result), size)
		return p.refuse("alloc", at, target.ErrTaken, "the system gave %x", result)
	case unix.Errno(-result) == unix.EEXIST:
		return p.fail("alloc", at, target.ErrTaken)
	}
	return p.fail("alloc", at, unix.Errno(-result))
}

// Protect has one thread of the process call mprotect.
func (p *process) Protect(at target.Addr, size uint64, prot target.Prot) error {
	if err := p.span("protect", at, size); err != nil {
		return err
	}
	bits, err := p.prot("protect", at, prot)
	if err != nil {
		return err
	}
	result, err := p.call("protect", at, unix.SYS_MPROTECT, uint64(at), size, bits)
	if err == nil && result != 0 {
		err = p.fail("protect", at, unix.Errno(-result))
	}
	return err
}

// Free has one thread of the process call munmap.
func (p *process) Free(at target.Addr, size uint64) error {
	if err := p.span("free", at, size); err != nil {
		return err
	}
	result, err := p.call("free", at, unix.SYS_MUNMAP, uint64(at), size)
	if err == nil && result != 0 {
		err = p.fail("free", at, unix.Errno(-result))
	}
	return err
}
