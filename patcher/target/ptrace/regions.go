//go:build linux && amd64

package ptrace

import (
	"errors"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// Regions reads the maps file of the address space that was opened.
func (p *process) Regions() ([]target.Region, error) {
	const op = "list regions of"
	if err := p.admit(op); err != nil {
		return nil, err
	}
	b, err := p.readMaps(op)
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, p.fail(op, 0, target.ErrGone)
	}
	p.buf = b
	var far []farSpan
	var on []device
	r, ok := parseMaps(b, make([]target.Region, 0, 1+len(b)/90), func(r *target.Region, d device) {
		if d.far() {
			far = append(far, farSpan{Span: target.Span{Start: r.Start, End: r.End}, path: r.Path, shared: r.Shared})
			on = append(on, d)
		}
	})
	if !ok {
		return nil, p.refuse(op, 0, target.ErrUnsupported, "line %d of its maps file is not understood", len(r)+1)
	}
	if far, err = p.onFar(far, on); err != nil {
		return nil, err
	}
	p.far, p.mapped = far, true
	return r, nil
}

// mapsLimit bounds the maps file: 65530 mappings, as many as a process may have
// by default, with paths of 200 bytes.
const mapsLimit = 16 << 20

// readMaps reads from the start. The file belongs to the address space but
// looks it up by the thread it was opened on: if that one has ended, through
// another one that lives.
func (p *process) readMaps(op string) ([]byte, error) {
	b, err := p.readMapsFile(op)
	if err != nil || len(b) > 0 {
		return b, err
	}
	now, err := p.b.late.readLife(p.dir, p.life.id.PID, p.mem)
	if errors.Is(err, target.ErrBusy) {
		return nil, p.fail(op, 0, err)
	}
	if err != nil || now.id != p.life.id {
		return nil, p.fail(op, 0, target.ErrGone)
	}
	p.life.sub = now.sub
	fd, err := p.open("maps", unix.O_RDONLY)
	if err != nil {
		return nil, p.fail(op, 0, err)
	}
	// Opened first, checked after: it may be that of a program that came between.
	if err := p.still(op); err != nil {
		unix.Close(fd)
		return nil, err
	}
	unix.Close(p.maps)
	p.maps = fd
	return p.readMapsFile(op)
}

// readMapsFile is empty if there is nothing to be read through that thread.
func (p *process) readMapsFile(op string) ([]byte, error) {
	fd, b := p.maps, p.buf
	p.buf = nil
	if fd < 0 {
		return nil, nil
	}
	late := p.within(op, func() {
		if _, err := unix.Seek(fd, 0, 0); err == nil {
			b, _ = readAll(fd, b, mapsLimit)
		} else {
			b = nil
		}
	})
	if late != nil {
		return nil, late
	}
	return b, nil
}
