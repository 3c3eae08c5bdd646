package targettest

import (
	"errors"
	"testing"
	"time"

	"hotpatchd/patcher/target"
)

// ErrAbsent is what Start and a victim's abilities wrap when the machine lacks
// what they need ("needs a C compiler: …"): the case is left out with that reason.
var ErrAbsent = errors.New("needs")

// Patience bounds every wait for a condition: generous, because test machines
// share two processors with others, and never reached where all is well.
const Patience = 30 * time.Second

// Want is what a case needs of the victim it starts. Zero values ask for nothing.
type Want struct {
	Threads  int  // threads that call the code all the time; at least one is always there
	Blocked  int  // further threads that wait in a system call
	Churn    bool // threads that start and end all the time, besides
	AltStack bool // one thread that stands on its alternate signal stack, besides
	// Unstoppable asks for a thread that no Freeze can stop within its limit (a
	// thread that waits for its vfork child). Victim.Exit must end it all the same.
	Unstoppable bool
	// Denied asks for a victim the system refuses us (of another user, without rights).
	Denied bool
}

// Setup is what a backend brings.
type Setup struct {
	Backend target.Backend
	// Start starts a victim that runs its code already when Start returns. It
	// ends it at the end of the test (t.Cleanup), whatever became of it. An
	// error that wraps ErrAbsent leaves the case out; any other is a failure.
	Start func(t testing.TB, w Want) (Victim, error)
	// Patience overrides the bound of every wait; 0 is Patience. It is for
	// suites that are expected to fail.
	Patience time.Duration
	// Lacks declares cases that this backend leaves out by its nature: name of
	// the case to reason ("simulated threads have no vfork").
	Lacks map[string]string
}

// Victim is a running process whose code may be changed. Its methods are asked
// from the test's goroutine only and answer within Patience.
type Victim interface {
	// PID is the number under which the backend lists it.
	PID() int
	// Arch is the architecture of the code it runs.
	Arch() target.Arch
	// Code is where it runs all the time: n executable, not writable bytes, n
	// at least 16, the function that Value and Swap speak of.
	Code() (at target.Addr, n int)
	// Calls is how often the code was run so far. It must answer while the
	// victim is frozen too: read it from shared memory or from outside.
	Calls() (uint64, error)
	// Value is what the code returned when it was last called. It must answer
	// while the victim is frozen too.
	Value() (int, error)
	// Threads is how many threads it has now; with churn, at least how many.
	Threads() int
	// Alive tells whether the program that Start started is still running.
	Alive() bool
	// Kill begins to end it and returns at once: while it is frozen it may have
	// to be thawed before its end is complete.
	Kill()
	// Exit ends it and returns when it is gone for every observer (reaped). It
	// is not called while the victim is frozen, and may be called again.
	Exit()
}

// Swap is a change of code: write New at At instead of Old, and Value becomes
// NewValue. It is harmless at any instant: no instruction starts strictly
// inside the bytes that differ.
type Swap struct {
	At                 target.Addr
	Old, New           []byte
	OldValue, NewValue int
}

// Swapper is a victim whose code can be changed.
type Swapper interface{ Swap() Swap }

// Execer is a victim that can replace its program by another under the same
// pid. The new program has writable memory at probe, holding 16 bytes of 0x5a
// that nothing changes, and probe was writable memory of the old one too; 0 if
// that cannot be arranged. Exec returns when the new program runs; Alive is
// then false (that program is over) and Exit ends the new one.
type Execer interface {
	Exec() (probe target.Addr, err error)
}

// Forker is a victim that can fork. The child runs the same code with its own
// memory.
type Forker interface {
	Fork() (Victim, error)
}

// Mapper is a victim that maps and unmaps a module (a file, in part executable).
type Mapper interface {
	Map() (target.Span, error)
	Unmap() error
}

// Traceable is a victim to which another tracer can be attached. The tracer is
// gone when release returns.
type Traceable interface {
	Trace() (release func(), err error)
}

// Writable is a victim that tells of 64 bytes of its own memory, readable and
// writable, that nobody uses.
type Writable interface {
	Scratch() target.Addr
}

// Interruptible is a victim started with Want.AltStack: Normal is the thread
// that stands on its signal stack and the stack pointer it had on its normal
// stack when the signal came.
type Interruptible interface {
	Normal() (thread int, sp target.Addr)
}

// Checker is a victim that checks its own calls (results of read, length of a
// sleep, values that are neither old nor new): how many were wrong, with one
// example. Every case asks at its end.
type Checker interface {
	Wrong() (n int, example string)
}
