package sim

import (
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
)

// Op is a kind of operation; faults are placed and counts are kept by it.
type Op string

// The operations of target.Backend, target.Process and target.Frozen.
const (
	OpAny     Op = "" // any of them; "any" in a scene
	OpList    Op = "list"
	OpOpen    Op = "open"
	OpRead    Op = "read"
	OpWrite   Op = "write"
	OpFlush   Op = "flush"
	OpRegions Op = "regions"
	OpAlloc   Op = "alloc"
	OpProtect Op = "protect"
	OpFree    Op = "free"
	OpFreeze  Op = "freeze"
	OpThreads Op = "threads"
	OpThaw    Op = "thaw"
	OpClose   Op = "close"
)

func (o Op) known() bool {
	switch o {
	case OpAny, "any", OpList, OpOpen, OpRead, OpWrite, OpFlush, OpRegions, OpAlloc, OpProtect,
		OpFree, OpFreeze, OpThreads, OpThaw, OpClose:
		return true
	}
	return false
}

// Effect is what a fault does.
type Effect string

// The effects. Unless said otherwise the operation itself then has no effect
// and fails; "before" means the operation goes on in the world as changed.
// Effects on bytes make operations that carry none fail with ErrFault.
const (
	Fail     Effect = "fail"      // the operation fails with ErrFault (a thaw that fails holds on)
	Deny     Effect = "deny"      // ErrDenied
	DenyRest Effect = "deny-rest" // ErrDenied, and from now on for everything in this process
	Busy     Effect = "busy"      // ErrBusy; a freeze has stopped nothing
	Taken    Effect = "taken"     // ErrTaken; somebody mapped the place before
	Short    Effect = "short"     // a read or write transfers Bytes bytes, says so, and fails
	Torn     Effect = "torn"      // a write writes Bytes bytes, says 0, and fails
	LieWrite Effect = "lie-write" // a write or flush does nothing and reports success
	LieRead  Effect = "lie-read"  // a read succeeds and returns every byte inverted
	Exit     Effect = "exit"      // the process ends before: ErrGone
	Exec     Effect = "exec"      // the process replaces its program before: ErrGone
	Unload   Effect = "unload"    // the process unmaps Module before; the operation goes on
	Enter    Effect = "enter"     // thread Thread (0: the first) moves to PC before; the operation goes on
	Hook     Effect = "hook"      // Then runs before; the operation goes on (set in Go only)
	Die      Effect = "die"       // we die here: a write has written Bytes bytes, all is released, see Machine.Die
)

func (e Effect) known() bool {
	switch e {
	case Fail, Deny, DenyRest, Busy, Taken, Short, Torn, LieWrite, LieRead, Exit, Exec, Unload, Enter, Hook, Die:
		return true
	}
	return false
}

// Fault strikes at the At-th operation (from 1, counted from when the fault
// was set) that matches Op and PID.
type Fault struct {
	At     int    `toml:"at"`     // default 1
	Op     Op     `toml:"op"`     // default: any
	PID    int    `toml:"pid"`    // 0: any; then effects on a process strike the one the operation is on
	Do     Effect `toml:"do"`     // required
	Times  int    `toml:"times"`  // how many matching operations in a row; 0 is 1, -1 is for ever
	Bytes  int    `toml:"bytes"`  // short, torn, die
	Thread int    `toml:"thread"` // enter
	PC     any    `toml:"pc"`     // enter
	Module string `toml:"module"` // unload

	// Then is what a hook runs, outside the machine's lock: it may use the
	// machine's methods, and operate on it as the patcher would.
	Then func() `toml:"-"`

	seen int // matching operations so far
}

// ErrFault is the error of operations that a fault makes fail.
var ErrFault = errors.New("input/output error (simulated)")

// ErrDied is the error of every operation after Die: a dead program does
// nothing. It is no kind of target error on purpose.
var ErrDied = errors.New("we are dead (simulated)")

func (f Fault) validate() error {
	switch {
	case !f.Op.known():
		return fmt.Errorf("unknown op %q", f.Op)
	case !f.Do.known():
		return fmt.Errorf("unknown effect %q", f.Do)
	case f.At < 0 || f.Times < -1 || f.Bytes < 0:
		return fmt.Errorf("at, times or bytes is negative")
	case f.Do == Unload && f.Module == "":
		return fmt.Errorf("unload needs a module")
	case f.Do == Hook && f.Then == nil:
		return fmt.Errorf("a hook needs a function")
	case f.Do == Enter && f.PC == nil:
		return fmt.Errorf("enter needs a pc")
	}
	return nil
}

// FailAt sets a fault that strikes at the n-th (from 1) operation from now
// that matches it. It panics on a fault that means nothing.
func (m *Machine) FailAt(n int, f Fault) {
	f.At, f.seen = n, 0
	if err := f.validate(); err != nil {
		panic("sim: " + err.Error())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = append(m.faults, &f)
}

// ClearFaults takes all faults back, those of the scene too.
func (m *Machine) ClearFaults() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = nil
}

// step counts one operation and finds the fault that strikes it, nil if none
// does. The first fault set wins; all count. p is nil where there is no process.
func (m *Machine) step(op Op, pid int) *Fault {
	m.total++
	m.ops[op]++
	m.now += cost(op)
	var hit *Fault
	for _, f := range m.faults {
		if f.Op != OpAny && f.Op != "any" && f.Op != op || f.PID != 0 && f.PID != pid {
			continue
		}
		f.seen++
		at, times := max(f.At, 1), f.Times
		if times == 0 {
			times = 1
		}
		if f.seen < at || times > 0 && f.seen >= at+times {
			continue
		}
		if hit == nil {
			hit = f
		}
	}
	return hit
}

// strike does to the machine what the fault does before the operation. It
// returns the error with which the operation ends, nil if it goes on.
func (m *Machine) strike(f *Fault, p *process) error {
	switch f.Do {
	case Fail, Short, Torn, LieRead, LieWrite:
		return ErrFault
	case Deny:
		return target.ErrDenied
	case DenyRest:
		if p != nil {
			p.denied = true
		}
		return target.ErrDenied
	case Busy:
		return target.ErrBusy
	case Taken:
		return target.ErrTaken
	case Exit:
		if p != nil {
			m.exit(p)
		}
		return target.ErrGone
	case Exec:
		if p != nil {
			m.exec(p)
		}
		return target.ErrGone
	case Unload:
		if p != nil && !p.gone {
			if err := m.unload(p, f.Module); err != nil {
				p.violate("the fault cannot unload %s: %v", f.Module, err)
			}
		}
	case Enter:
		if p != nil && !p.gone {
			pc, err := p.word(f.PC)
			if err == nil {
				err = p.move(f.Thread, target.Addr(pc))
			}
			if err != nil {
				p.violate("the fault cannot move thread %d: %v", f.Thread, err)
			}
		}
	case Die:
		m.die()
		return ErrDied
	}
	return nil
}
