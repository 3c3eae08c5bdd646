package patcher

import (
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

// unwindTable is the .pdata of a hotpatch image, to be made known in the
// process before its functions run: an exception that passes a frame without
// unwind data does not end the program, it goes on somewhere.
type unwindTable struct {
	add   target.Addr // RtlAddFunctionTable in the process
	rva   uint32      // of the table in the hotpatch image
	count int
}

// unwindTable finds what registering takes; nil if there is nothing to register
// or nobody who could.
func (b *binder) unwindTable(patch *Patch) (*unwindTable, error) {
	if _, ok := b.p.(target.Unwinder); !ok {
		return nil, nil
	}
	rva, n, err := patch.image.UnwindTable()
	if err != nil || n == 0 {
		return nil, err
	}
	const name = "RtlAddFunctionTable"
	what := "the unwind table of the hotpatch image: ntdll.dll!" + name
	m, err := b.module("ntdll.dll", what)
	if err != nil {
		return nil, err
	}
	add, err := b.export(m, name, 0, what, 0)
	if err != nil {
		return nil, err
	}
	return &unwindTable{target.Addr(add), rva, n}, nil
}

// register makes the table known, once for the life of the annex. It stays as
// long as the annex does, that is for the life of the process: a thread, or a
// pointer that a new function gave away, may lead there after an undo, too, and
// an exception there still needs the table.
func (x *Plan) register(p target.Process) error {
	u := x.unwind
	if u == nil {
		return nil
	}
	mark := x.Annex + annexUnwind
	have, err := read(p, mark, 1)
	if err != nil {
		return err
	}
	if have[0] != 0 {
		return nil // by the one who filled it
	}
	image := x.Annex + target.Addr(x.headRoom())
	if err := p.(target.Unwinder).Register(u.add, image+target.Addr(u.rva), u.count, image); err != nil {
		return err
	}
	if _, err := p.WriteAt([]byte{1}, mark); err != nil {
		return err
	}
	return nil
}

// asUnregistered gives the failure of a registration the shape callers expect.
func asUnregistered(image string, err error) error {
	if errors.Is(err, target.ErrGone) {
		return err
	}
	return &Refusal{Reason: Failed, Code: "unwind", Remedy: Wait, Err: err, Detail: err.Error(),
		Text: fmt.Sprintf("the unwind table of the fix for %s could not be registered in the process", image)}
}
