//go:build windows && (amd64 || arm64)

package win32

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// release lets every thread go on. It may be called at any time and by
// anybody, and again for those that could not be let go of.
func (z *frozen) release() {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.letGo()
}

// abandon gives up a freeze whose guardian has ended: if we ended too, nobody
// would let its threads go. Once something is written, what belongs to it must
// be written too before a thread goes on: then the freeze lasts, and is short.
// The caller holds mu.
func (z *frozen) abandon() {
	guarded := func(t held) bool { return t.slot != nil }
	if z.released || z.wrote || !slices.ContainsFunc(z.threads, guarded) || !z.p.b.guard.over() {
		return
	}
	z.lost = true
	z.letGo()
}

// unguarded gives up all freezes that need a guardian when there is none any more.
func (b *backend) unguarded() {
	b.mu.Lock()
	all := slices.Collect(maps.Values(b.held))
	b.mu.Unlock()
	for _, z := range all {
		z.mu.Lock()
		z.abandon()
		z.mu.Unlock()
	}
}

// letGo is release for those that hold mu.
func (z *frozen) letGo() {
	if z.released && z.failed == nil {
		return
	}
	z.released, z.failed = true, nil
	k := z.p.b.kernel
	if z.change != 0 {
		if z.changed {
			z.failed = z.unlessGone(k.change(z.change, z.p.h, false))
		}
		if z.failed == nil {
			k.close(z.change)
			z.change = 0
		}
	}
	for i := range z.threads {
		if t := &z.threads[i]; t.stopped {
			t.slot.releasing()
			if _, err := k.resume(t.h); err != nil && !k.ended(t.h) {
				z.failed = z.unlessGone(fmt.Errorf("thread %d: %w", t.tid, err))
				continue
			}
			t.stopped = false
		}
	}
	z.pause = time.Since(z.began)
}

func (z *frozen) unlessGone(err error) error {
	if err == nil || z.p.over() {
		return nil
	}
	return z.p.fail("thaw", 0, err)
}

// discard gives back what the freeze holds, once nobody works for it any more.
// A state change object that would not let go is closed: that does.
func (z *frozen) discard() {
	z.closed.Do(func() {
		<-z.working
		k, b := z.p.b.kernel, z.p.b
		for i := range z.threads {
			t := &z.threads[i]
			if t.slot != nil && !t.stopped { // else the guardian is the last who can resume it
				b.guard.disarm(k, t.slot)
			}
			k.close(t.h)
		}
		if z.change != 0 {
			k.close(z.change)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.held[z.p.id] == z {
			delete(b.held, z.p.id)
		}
	})
}

// Thaw is quiet about a freeze that had run out: writes made after that failed.
func (z *frozen) Thaw() error {
	if z.lapse != nil {
		z.lapse()
	}
	z.release()
	z.mu.Lock()
	failed := z.failed
	z.mu.Unlock()
	if failed != nil {
		return failed
	}
	z.discard()
	if z.p.frozen == z {
		z.p.frozen = nil
	}
	return nil
}

// Pause is the time from the first stop to the last release.
func (z *frozen) Pause() time.Duration {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.pause
}

// Threads are made once, from what was read when they stopped.
func (z *frozen) Threads() ([]target.Thread, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.abandon()
	if err := z.ranOut("read the threads of", 0); err != nil {
		return nil, err
	}
	if z.list != nil {
		return z.list, nil
	}
	if z.p.over() {
		return nil, z.p.refuse("read the threads of", 0, target.ErrGone, "it has ended")
	}
	states := map[target.Addr]string{}
	list := make([]target.Thread, 0, len(z.threads))
	for i := range z.threads {
		t := &z.threads[i]
		if t.gone {
			continue
		}
		state, ok := states[t.at.pc]
		if !ok {
			state = z.p.doing(t.at.pc)
			states[t.at.pc] = state
		}
		list = append(list, target.Thread{ID: t.tid, PC: t.at.pc, SP: t.at.sp, Regs: t.at.regs, Stack: t.stack, State: state})
	}
	z.list = list
	return list, nil
}

// stack reaches from a stack pointer to the end of what is committed in the
// allocation it lies in.
func (p *process) stack(sp target.Addr) target.Span {
	s := target.Span{Start: sp, End: sp}
	var base uintptr
	walk(p.h, sp&^(target.PageSize-1), maxAddr, func(i *windows.MemoryBasicInformation) bool {
		if base == 0 {
			base = i.AllocationBase
		}
		if i.State != windows.MEM_COMMIT || i.AllocationBase != base || protOf(i.Protect)&target.Read == 0 {
			return false
		}
		s.End = target.Addr(i.BaseAddress + i.RegionSize)
		return true
	})
	if s.End == sp {
		return target.Span{}
	}
	return s
}

// doing names the system service whose stub the program counter is in, behind
// the instruction that enters the kernel.
func (p *process) doing(pc target.Addr) string {
	var b [serviceCodeSize]byte
	if pc < serviceCodeSize {
		return "running"
	}
	if n, err := p.ReadAt(b[:], pc-serviceCodeSize); err != nil || n != len(b) {
		return "running"
	}
	number, ok := serviceNumber(b[:])
	if !ok {
		return "running"
	}
	if name, ok := serviceNames()[number]; ok {
		return name
	}
	return fmt.Sprintf("system service %#x", number)
}

// write writes while frozen. A freeze that ran out refuses: the caller would
// write code under threads that run.
func (z *frozen) write(b []byte, at target.Addr) (int, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.abandon()
	if err := z.ranOut("write", at); err != nil {
		return 0, err
	}
	z.wrote = true
	return z.p.write(b, at)
}

// ranOut is an error if the threads run again.
func (z *frozen) ranOut(op string, at target.Addr) error {
	if z.lost {
		return z.p.refuse(op, at, target.ErrBusy, "the freeze is over: the guardian has ended")
	}
	if z.released {
		return z.p.refuse(op, at, target.ErrBusy, "the freeze is over")
	}
	return nil
}
