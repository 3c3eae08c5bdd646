//go:build windows && (amd64 || arm64)

package win32

import (
	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

func (p *process) ReadAt(b []byte, at target.Addr) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if p.over() {
		return 0, p.refuse("read", at, target.ErrGone, "it has ended")
	}
	if !addressable(at, len(b)) {
		return 0, p.unmapped("read", at)
	}
	var n uintptr
	return p.piecewise("read", at, len(b), func(i *windows.MemoryBasicInformation, from, to int) error {
		if protOf(i.Protect)&target.Read == 0 {
			return p.unmapped("read", at+target.Addr(from))
		}
		return windows.ReadProcessMemory(p.h, uintptr(at)+uintptr(from), &b[from], uintptr(to-from), &n)
	})
}

func (p *process) WriteAt(b []byte, at target.Addr) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if p.over() {
		return 0, p.refuse("write", at, target.ErrGone, "it has ended")
	}
	if err := p.grant("write", rightsWrite); err != nil {
		return 0, err
	}
	if z := p.frozen; z != nil {
		return z.write(b, at)
	}
	return p.write(b, at)
}

// write goes by runs of equal pages: what is not committed is never touched.
func (p *process) write(b []byte, at target.Addr) (int, error) {
	if !addressable(at, len(b)) {
		return 0, p.unmapped("write", at)
	}
	return p.piecewise("write", at, len(b), func(i *windows.MemoryBasicInformation, from, to int) error {
		return p.writePiece(i, b[from:to], at+target.Addr(from))
	})
}

// writePiece writes within pages of one protection, and leaves that as it was.
// Of code the system lifts it itself for the time of a write, as debuggers rely
// on; where it does not, we do.
func (p *process) writePiece(i *windows.MemoryBasicInformation, b []byte, at target.Addr) error {
	put := func() error {
		var n uintptr
		return windows.WriteProcessMemory(p.h, uintptr(at), &b[0], uintptr(len(b)), &n)
	}
	prot := protOf(i.Protect)
	if prot&target.Write != 0 {
		return put()
	}
	if i.Protect&windows.PAGE_GUARD != 0 {
		return p.refuse("write", at, target.ErrUnsupported, "a guard page")
	}
	exec := prot&target.Exec != 0
	if exec && put() == nil {
		return nil
	}
	writable := uint32(windows.PAGE_READWRITE)
	switch {
	case i.Type == memImage && exec:
		writable = windows.PAGE_EXECUTE_WRITECOPY
	case i.Type == memImage:
		writable = windows.PAGE_WRITECOPY
	case exec:
		writable = windows.PAGE_EXECUTE_READWRITE
	}
	var old uint32
	if err := windows.VirtualProtectEx(p.h, uintptr(at), uintptr(len(b)), writable, &old); err != nil {
		return err
	}
	err := put()
	if back := windows.VirtualProtectEx(p.h, uintptr(at), uintptr(len(b)), i.Protect, &old); err == nil {
		err = back
	}
	return err
}

// piecewise does something with each run of equal pages under n bytes at at, as
// far as they are mapped.
func (p *process) piecewise(op string, at target.Addr, n int, do func(i *windows.MemoryBasicInformation, from, to int) error) (done int, err error) {
	end := at + target.Addr(n)
	var failure error
	err = walk(p.h, at, end, func(i *windows.MemoryBasicInformation) bool {
		here := at + target.Addr(done)
		if i.State != windows.MEM_COMMIT {
			failure = p.unmapped(op, here)
			return false
		}
		to := int(min(target.Addr(i.BaseAddress+i.RegionSize), end) - at)
		if failure = do(i, done, to); failure != nil {
			return false
		}
		done = to
		return true
	})
	if failure == nil {
		failure = err
	}
	if failure == nil && done < n {
		failure = p.unmapped(op, at+target.Addr(done))
	}
	if failure == nil {
		return done, nil
	}
	if p.over() {
		failure = &target.Error{Op: op, ID: p.id, At: at, Err: target.ErrGone}
	}
	return done, p.fail(op, at+target.Addr(done), failure)
}

// unmapped is ErrGone of a process that is over.
func (p *process) unmapped(op string, at target.Addr) error {
	return p.fail(op, at, windows.ERROR_INVALID_ADDRESS)
}

func addressable(at target.Addr, n int) bool {
	return at != 0 && at < maxAddr && target.Addr(n) <= maxAddr-at
}

// Flush makes every processor forget what it has fetched there.
func (p *process) Flush(at target.Addr, n int) error {
	if err := p.grant("flush", rightsWrite); err != nil {
		return err
	}
	if _, err := win(flushInstructionCache, uintptr(p.h), uintptr(at), uintptr(n)); err != nil {
		return p.fail("flush", at, err)
	}
	return nil
}
