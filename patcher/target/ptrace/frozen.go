//go:build linux && amd64

package ptrace

import (
	"bytes"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// Threads are made once, from what was read when they stopped.
func (z *frozen) Threads() ([]target.Thread, error) {
	z.mu.Lock()
	err := z.ranOut("read the threads of", 0)
	z.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if z.list != nil {
		return z.list, nil
	}
	list := make([]target.Thread, 0, len(z.threads))
	regs := make([]uint64, 0, 16*len(z.threads))
	for i := range z.threads {
		t := &z.threads[i]
		if t.state != stopped {
			continue
		}
		r := &t.regs
		regs = append(regs, r.Rax, r.Rcx, r.Rdx, r.Rbx, r.Rsp, r.Rbp, r.Rsi, r.Rdi, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15)
		list = append(list, target.Thread{
			ID: t.tid, PC: target.Addr(r.Rip), SP: target.Addr(r.Rsp),
			Regs: regs[len(regs)-16 : len(regs) : len(regs)], Stack: z.stack(target.Addr(r.Rsp)), State: doing(r),
		})
	}
	z.list = list
	return list, nil
}

// stack reads the mappings again if one was made since they were read.
func (z *frozen) stack(sp target.Addr) target.Span {
	r := regionAt(z.regions, sp)
	if r == nil {
		if now, err := z.p.Regions(); err == nil {
			z.regions = now
			r = regionAt(now, sp)
		}
	}
	if r == nil {
		return target.Span{}
	}
	return target.Span{Start: sp, End: r.End}
}

// doing names the system call a thread waits in.
func doing(r *unix.PtraceRegs) string {
	if int64(r.Orig_rax) < 0 {
		return "running"
	}
	return syscallName(int(r.Orig_rax))
}

// write writes while frozen. A freeze that ran out refuses: the caller would
// write code under threads that run.
func (z *frozen) write(b []byte, at target.Addr) (n int, err error) {
	z.mu.Lock()
	if err = z.ranOut("write", at); err == nil {
		n, err = z.p.writeMem(b, at)
	}
	if err != nil || n == len(b) {
		z.mu.Unlock()
		return n, err
	}
	// Through the tracing thread, which lets nobody go before it has done so.
	var poked struct {
		n   int
		err error
	}
	own := bytes.Clone(b)
	z.work = func() { poked.n, poked.err = z.poke(own, at) }
	z.wake.signal()
	z.mu.Unlock()
	if !z.told.within(lookLimit) {
		return 0, z.p.lateness("write", z.p.b.late.leave(z.p.life.lifetime(), "write", lookLimit, z.done))
	}
	return poked.n, poked.err
}

// ranOut is an error if the threads run again.
func (z *frozen) ranOut(op string, at target.Addr) error {
	if z.released || z.over {
		return z.p.refuse(op, at, target.ErrBusy, "the freeze is over")
	}
	return nil
}

// Thaw is quiet about a freeze that had run out: writes made after that failed.
func (z *frozen) Thaw() error {
	z.end(false)
	if z.left {
		return z.p.admit("thaw")
	}
	select {
	case <-z.done:
	case <-time.After(endLimit):
		return z.leave("thaw", endLimit)
	}
	if z.p.frozen == z {
		z.p.frozen = nil
		z.close()
	}
	return z.ended(nil)
}

// leave leaves the tracing thread behind, which has something to wait for that
// may not end. What it holds it lets go of when it comes back, or with our end.
func (z *frozen) leave(op string, waited time.Duration) error {
	z.p.b.calm(z.caller)
	z.left = true
	if z.p.frozen == z {
		z.p.frozen = nil
	}
	go func() {
		<-z.done
		z.wake.close()
		z.told.close()
	}()
	return z.p.lateness(op, z.p.b.late.leave(z.p.life.lifetime(), op, waited, z.done))
}

// Pause is the time from the first seize to the last detach.
func (z *frozen) Pause() time.Duration {
	select {
	case <-z.done:
		return z.pause
	default:
		return 0
	}
}

func syscallName(nr int) string {
	if name, ok := syscallNames[nr]; ok {
		return name
	}
	return "system call " + strconv.Itoa(nr)
}
