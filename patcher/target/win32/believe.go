//go:build windows && (amd64 || arm64)

package win32

import (
	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// looks bounds how often a thread is asked anew that stands where no thread can be.
const looks = 4

// believe reads the registers, which the system answers of a thread that
// stands. They are believed if they can be true: the program counter in code,
// the stack pointer in memory. A thread elsewhere is between two worlds (a
// debugger's or an emulator's entry): it goes on a little and is asked again.
func (z *frozen) believe(i int) error {
	for look := 1; ; look++ {
		z.mu.Lock()
		t := z.threads[i]
		z.current = t.tid
		z.mu.Unlock()
		if t.gone {
			return nil
		}
		err := z.p.b.kernel.registers(t.h, &t.at) // may take long: not under the lock
		if err == nil {
			t.stack = z.p.stack(t.at.sp)
		}
		z.mu.Lock()
		switch {
		case z.released:
			err = z.tooLate()
		case err != nil && z.p.b.kernel.ended(t.h):
			z.threads[i].gone = true
			err = nil
		case err != nil:
			err = z.cannot(&t, "read the registers of", err)
		case t.stack.End == 0 || !z.inCode(t.at.pc):
			if look < looks {
				err = z.nudge(i)
				z.mu.Unlock()
				if err != nil {
					return err
				}
				continue
			}
			err = z.p.refuse("freeze", 0, target.ErrBusy, "thread %d stands at %s with its stack pointer at %s, where no thread can be", t.tid, t.at.pc, t.at.sp)
		default:
			z.threads[i].at, z.threads[i].stack = t.at, t.stack
		}
		z.mu.Unlock()
		return err
	}
}

// nudge lets one thread go on for a moment. A state change holds all alike.
func (z *frozen) nudge(i int) error {
	t := &z.threads[i]
	if z.change != 0 {
		return nil
	}
	t.slot.releasing()
	if _, err := z.p.b.kernel.resume(t.h); err != nil {
		return z.cannot(t, "resume", err)
	}
	t.stopped = false
	windows.SleepEx(0, false)
	before, err := z.p.b.kernel.suspend(t.h)
	if err != nil {
		if z.p.b.kernel.ended(t.h) {
			t.gone = true
			return nil
		}
		return z.cannot(t, "suspend", err)
	}
	t.slot.suspended(before)
	t.stopped = true
	return nil
}

// inCode tells whether an address is in executable memory.
func (z *frozen) inCode(pc target.Addr) bool {
	for _, s := range z.code {
		if s.Contains(pc) {
			return true
		}
	}
	found := false
	walk(z.p.h, pc&^(target.PageSize-1), pc+1, func(i *windows.MemoryBasicInformation) bool {
		if found = i.State == windows.MEM_COMMIT && protOf(i.Protect)&target.Exec != 0; found {
			z.code = append(z.code, target.Span{Start: target.Addr(i.BaseAddress), End: target.Addr(i.BaseAddress + i.RegionSize)})
		}
		return false
	})
	return found
}

// standing makes sure that a process remains to be held, and under a state
// change that no thread began after it.
func (z *frozen) standing() error {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.abandon()
	if z.released {
		return z.tooLate()
	}
	alive := 0
	for i := range z.threads {
		t := &z.threads[i]
		if t.gone || z.p.b.kernel.ended(t.h) {
			t.gone = true
			continue
		}
		alive++
		if z.change == 0 {
			continue
		}
		if n, err := z.p.b.kernel.count(t.h); err == nil && n == 0 {
			return z.p.refuse("freeze", 0, target.ErrBusy, "thread %d started meanwhile", t.tid)
		}
	}
	if alive == 0 || z.p.over() {
		return z.p.refuse("freeze", 0, target.ErrGone, "no thread is left")
	}
	return nil
}
