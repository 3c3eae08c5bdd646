package sim

import (
	"context"
	"errors"

	"hotpatchd/patcher/target"
)

// handle is one opened life; target.Process.
type handle struct {
	m      *Machine
	p      *process
	info   target.Info
	life   int // of ours, in which it was opened
	closed bool
	held   *frozen // last Freeze
}

var _ target.Process = (*handle)(nil)

var (
	errClosed = errors.New("the handle is closed")
	errFrozen = errors.New("its threads are stopped: not while frozen")
)

func (h *handle) Info() target.Info { return h.info }

func (h *handle) fail(op string, at target.Addr, err error) error {
	return &target.Error{Op: op, ID: h.p.id, At: at, Err: err}
}

// begin starts an operation and, with a nil error, holds the machine's lock.
func (h *handle) begin(op Op) (*Fault, error) {
	h.m.mu.Lock()
	stale := h.life != h.m.lives
	closed := h.closed
	h.m.mu.Unlock()
	switch {
	case stale:
		return nil, ErrDied
	case closed:
		return nil, errClosed
	}
	f, err := h.m.beginBytes(op, h.p)
	if err != nil {
		return nil, err
	}
	switch {
	case h.p.gone:
		err = target.ErrGone
	case h.p.denied:
		err = target.ErrDenied
	default:
		return f, nil
	}
	h.m.mu.Unlock()
	return nil, err
}

func (h *handle) ReadAt(p []byte, at target.Addr) (int, error) {
	f, err := h.begin(OpRead)
	if err != nil {
		return 0, h.fail("read", at, err)
	}
	defer h.m.mu.Unlock()
	n := h.p.mem.reach(at, len(p), false)
	if f != nil && f.Do == Short {
		n = min(n, f.Bytes)
		h.p.mem.read(p[:n], at, false)
		return n, h.fail("read", at+target.Addr(n), ErrFault)
	}
	h.p.mem.read(p[:n], at, false)
	if f != nil && f.Do == LieRead {
		for i := range p[:n] {
			p[i] = ^p[i]
		}
	}
	if n < len(p) {
		return n, h.fail("read", at+target.Addr(n), errUnmapped)
	}
	return n, nil
}

func (h *handle) WriteAt(p []byte, at target.Addr) (int, error) {
	f, err := h.begin(OpWrite)
	if err != nil {
		return 0, h.fail("write", at, err)
	}
	defer h.m.mu.Unlock()
	n := h.p.mem.reach(at, len(p), true)
	if f != nil {
		switch f.Do {
		case LieWrite:
			return len(p), nil
		case Short, Torn, Die:
			n = min(n, f.Bytes)
			h.write(p[:n], at)
			switch f.Do {
			case Torn:
				return 0, h.fail("write", at, ErrFault)
			case Die:
				h.m.die()
				return 0, h.fail("write", at, ErrDied)
			}
			return n, h.fail("write", at+target.Addr(n), ErrFault)
		}
	}
	h.write(p[:n], at)
	if n < len(p) {
		return n, h.fail("write", at+target.Addr(n), errUnmapped)
	}
	return n, nil
}

// write changes memory and remembers what must not be done to live code.
func (h *handle) write(b []byte, at target.Addr) {
	eachPage(at, len(b), func(a target.Addr, from, to int) bool {
		x := h.p.mem.at(a)
		if x.Prot&target.Exec == 0 || x.ours {
			return true
		}
		if h.p.frozen == nil {
			h.p.violate("%d bytes of live code written at %s while threads run", to-from, a)
			return true
		}
		h.p.frozen.note(a, to-from)
		return true
	})
	h.p.mem.write(b, at)
}

func (h *handle) Flush(at target.Addr, n int) error {
	f, err := h.begin(OpFlush)
	if err != nil {
		return h.fail("flush", at, err)
	}
	defer h.m.mu.Unlock()
	if f != nil && f.Do == LieWrite {
		return nil
	}
	if n < 0 || h.p.mem.reach(at, n, false) < n {
		return h.fail("flush", at, errUnmapped)
	}
	h.p.mem.flush(at, n)
	return nil
}

func (h *handle) Regions() ([]target.Region, error) {
	if _, err := h.begin(OpRegions); err != nil {
		return nil, h.fail("list regions of", 0, err)
	}
	defer h.m.mu.Unlock()
	list := make([]target.Region, len(h.p.mem.maps))
	for i, x := range h.p.mem.maps {
		list[i] = x.Region
	}
	return list, nil
}

// mapping begins an operation that changes mappings.
func (h *handle) mapping(op Op) error {
	if _, err := h.begin(op); err != nil {
		return err
	}
	if h.p.frozen != nil {
		h.p.violate("%s while frozen", op)
		h.m.mu.Unlock()
		return errFrozen
	}
	return nil
}

func (h *handle) Alloc(at target.Addr, size uint64, prot target.Prot) error {
	if err := h.mapping(OpAlloc); err != nil {
		return h.fail("alloc", at, err)
	}
	defer h.m.mu.Unlock()
	sp, err := spanOf(at, size)
	if err != nil {
		return h.fail("alloc", at, err)
	}
	x := mapping{Region: target.Region{Start: sp.Start, End: sp.End, Prot: prot}, ours: true}
	if err := h.p.mem.add(x); err != nil {
		return h.fail("alloc", at, err)
	}
	h.m.changed(h.p)
	return nil
}

func (h *handle) Protect(at target.Addr, size uint64, prot target.Prot) error {
	if err := h.mapping(OpProtect); err != nil {
		return h.fail("protect", at, err)
	}
	defer h.m.mu.Unlock()
	sp, err := spanOf(at, size)
	if err != nil {
		return h.fail("protect", at, err)
	}
	if prot&target.Write != 0 && prot&target.Exec != 0 {
		return h.fail("protect", at, errWX)
	}
	list := h.p.mem.covered(sp)
	if list == nil {
		return h.fail("protect", at, errUnmapped)
	}
	for _, x := range list {
		x.Prot = prot
	}
	h.m.changed(h.p)
	return nil
}

func (h *handle) Free(at target.Addr, size uint64) error {
	if err := h.mapping(OpFree); err != nil {
		return h.fail("free", at, err)
	}
	defer h.m.mu.Unlock()
	sp, err := spanOf(at, size)
	if err != nil {
		return h.fail("free", at, err)
	}
	list := h.p.mem.covered(sp)
	if list == nil {
		return h.fail("free", at, errUnmapped)
	}
	for _, x := range list {
		if !x.ours {
			return h.fail("free", at, errForeign)
		}
	}
	h.p.reachable(sp)
	h.p.mem.remove(sp)
	h.m.changed(h.p)
	return nil
}

// Close is counted, and a fault on it makes it fail, but it always lets go.
func (h *handle) Close() error {
	h.m.mu.Lock()
	if h.closed {
		h.m.mu.Unlock()
		return nil
	}
	h.closed = true
	if h.held != nil {
		h.held.release(h.m, false)
	}
	h.m.mu.Unlock()
	if _, err := h.m.beginBytes(OpClose, h.p); err != nil {
		return h.fail("close", 0, err)
	}
	h.m.mu.Unlock()
	return nil
}

func (h *handle) Freeze(ctx context.Context) (target.Frozen, error) {
	fail := func(note string, err error) (target.Frozen, error) {
		return nil, &target.Error{Op: "freeze", ID: h.p.id, Note: note, Err: err}
	}
	if _, err := h.begin(OpFreeze); err != nil {
		return fail("", err)
	}
	defer h.m.mu.Unlock()
	if h.p.frozen != nil {
		return fail("it is held already", target.ErrBusy)
	}
	for _, g := range h.p.info.Guards {
		if g.Code == target.GuardTracer {
			return fail(g.Text, target.ErrDenied)
		}
	}
	for _, t := range h.p.threads {
		h.m.now += threadCost
		if t.unstoppable {
			return fail(t.name()+" does not stop", target.ErrBusy)
		}
	}
	if err := ctx.Err(); err != nil {
		note := err.Error()
		if len(h.p.threads) > 0 {
			note = h.p.threads[0].name() + " was not stopped in time"
		}
		return fail(note, target.ErrBusy)
	}
	h.held = freeze(ctx, h.m, h.p)
	return h.held, nil
}
