//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// Rights by what they are for. Those of looking are asked for at Open, the
// others when they are first needed.
const (
	rightsLook   = windows.PROCESS_QUERY_INFORMATION | windows.PROCESS_VM_READ | windows.SYNCHRONIZE
	rightsWrite  = windows.PROCESS_VM_OPERATION | windows.PROCESS_VM_WRITE
	rightsStop   = windows.PROCESS_SUSPEND_RESUME
	rightsThread = windows.PROCESS_CREATE_THREAD
)

// process implements target.Process.
type process struct {
	b      *backend
	id     target.ID
	info   target.Info
	h      windows.Handle // 0 when closed
	rights uint32
	frozen *frozen
	single bool // the system refuses it a state change: its threads are suspended one by one
}

func (b *backend) Open(ctx context.Context, id target.ID) (target.Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := &process{b: b, id: id}
	if err := p.open(); err != nil {
		b.forget(id.PID)
		return nil, err
	}
	return p, nil
}

func (p *process) open() error {
	err := p.grant("open", rightsLook)
	if err != nil {
		return err
	}
	start, err := started(p.h)
	if err == nil && (start != p.id.Start || signalled(p.h)) {
		err = target.ErrGone
	}
	if err == nil {
		err = p.describe()
	}
	if err != nil {
		err = p.fail("open", 0, err)
		p.release()
		return err
	}
	return nil
}

// describe reads anew what List would say.
func (p *process) describe() error {
	e, err := find(p.id)
	if err != nil {
		return err
	}
	p.b.listing.Lock()
	defer p.b.listing.Unlock()
	p.info = p.b.desc.describe(p.h, e)
	if k := p.b.procs[e.id.PID]; k != nil && k.info.ID == e.id {
		p.info.Change = k.info.Change
	}
	return nil
}

// grant opens the process with more rights. The handle we have keeps its pid
// from being given to another.
func (p *process) grant(op string, rights uint32) error {
	if p.h == 0 && p.rights != 0 {
		return p.refuse(op, 0, target.ErrGone, "this handle was closed")
	}
	if p.rights&rights == rights {
		return nil
	}
	h, err := p.b.kernel.process(p.id.PID, p.rights|rights)
	if err != nil {
		if p.h == 0 && errors.Is(err, windows.ERROR_INVALID_PARAMETER) {
			err = target.ErrGone // no process has this pid
		}
		return p.fail(op, 0, err)
	}
	p.release()
	p.h, p.rights = h, p.rights|rights
	return nil
}

func (p *process) release() {
	if p.h != 0 {
		windows.CloseHandle(p.h)
		p.h = 0
	}
}

func (p *process) Info() target.Info { return p.info }

func (p *process) Close() error {
	var err error
	if z := p.frozen; z != nil {
		if err = z.Thaw(); err != nil {
			err = z.Thaw() // for the last time
		}
	}
	p.release()
	return err
}

// over tells whether the process has ended, or was let go of.
func (p *process) over() bool { return p.h == 0 || signalled(p.h) }

// failed gives an error of the system its kind.
func failed(op string, id target.ID, at target.Addr, err error) error {
	var known *target.Error
	if errors.As(err, &known) {
		return err
	}
	e := &target.Error{Op: op, ID: id, At: at, Err: err}
	switch {
	case errors.Is(err, windows.ERROR_ACCESS_DENIED), err == windows.STATUS_ACCESS_DENIED, err == windows.STATUS_PRIVILEGE_NOT_HELD:
		e.Note, e.Err = err.Error(), target.ErrDenied
	case err == statusProcessIsTerminating:
		e.Err = target.ErrGone
	case err == statusNotImplemented:
		e.Note, e.Err = "this Windows has not the function for it", target.ErrUnsupported
	}
	return e
}

// fail says what went wrong; of a process that is over nothing else.
func (p *process) fail(op string, at target.Addr, err error) error {
	if p.h != 0 && p.over() {
		err = target.ErrGone
	}
	return failed(op, p.id, at, err)
}

// refuse is an error with a sentence.
func (p *process) refuse(op string, at target.Addr, kind error, format string, args ...any) error {
	return &target.Error{Op: op, ID: p.id, At: at, Note: fmt.Sprintf(format, args...), Err: kind}
}
