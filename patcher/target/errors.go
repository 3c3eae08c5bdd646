package target

import (
	"errors"
	"fmt"
)

// The kinds of failure a caller can tell apart. Backends wrap them in Error.
var (
	ErrGone        = errors.New("the process is over")
	ErrDenied      = errors.New("the system refuses access")
	ErrTaken       = errors.New("that address is taken")
	ErrBusy        = errors.New("a thread is in the way")
	ErrUnsupported = errors.New("not supported here")
)

// Error says what failed, in which life, and where.
type Error struct {
	Op   string // "read", "write", "alloc", "freeze", …
	ID   ID
	At   Addr   // 0 if the operation has no address
	Note string // one sentence more, for people; may be empty
	Err  error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("cannot %s process %d", e.Op, e.ID.PID)
	if e.At != 0 {
		s += fmt.Sprintf(" at %s", e.At)
	}
	if e.Note != "" {
		s += ": " + e.Note
	}
	return s + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }
