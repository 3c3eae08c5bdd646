package sim

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"hotpatchd/patcher/target"
)

// Machine is a simulated machine. It is safe for concurrent use.
type Machine struct {
	mu     sync.Mutex
	files  files
	images map[string]*image // parsed PE files, by file name
	rand   *rand.Rand
	procs  map[int]*process
	faults []*Fault
	ops    map[Op]int
	total  int
	now    time.Duration
	epoch  uint64 // distinguishes lives and states of mappings
	inode  uint64
	nodes  map[string]uint64
	dead   bool // we are dead, see Die
	lives  int  // of ours: handles of an earlier one stay dead

	watchers map[*watcher]bool
	deaf     bool // watchers are told nothing
	hideCode bool // and no event tells of code
}

var (
	_ target.Backend = (*Machine)(nil)
	_ target.Watcher = (*Machine)(nil)
	_ target.Prober  = (*Machine)(nil)
)

// New makes a machine from a scene. The files it names are read from fsys,
// which may be nil if it names none.
func New(s *Scene, fsys fs.FS) (*Machine, error) {
	return newMachine(s, tree{fsys})
}

func newMachine(s *Scene, f files) (*Machine, error) {
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("cannot make a simulated machine: %w", err)
	}
	m := &Machine{
		files:  f,
		images: map[string]*image{},
		rand:   rand.New(rand.NewPCG(s.Seed, 0x68706174636864)),
		procs:  map[int]*process{},
		ops:    map[Op]int{},
		epoch:  1,
		nodes:  map[string]uint64{},

		watchers: map[*watcher]bool{},
	}
	for _, p := range s.Processes {
		if _, err := m.Start(p); err != nil {
			return nil, err
		}
	}
	for _, x := range s.Faults {
		m.FailAt(max(x.At, 1), x)
	}
	return m, nil
}

// Name is "sim".
func (m *Machine) Name() string { return "sim" }

// FreezeMethod says that nothing real is stopped.
func (m *Machine) FreezeMethod() string { return "simulated" }

// List tells of every process, in order of pid.
func (m *Machine) List(ctx context.Context) ([]target.Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	if err := m.begin(OpList, nil); err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	defer m.mu.Unlock()
	list := make([]target.Info, 0, len(m.procs))
	for _, pid := range slices.Sorted(maps.Keys(m.procs)) {
		list = append(list, m.procs[pid].describe())
	}
	return list, nil
}

// Open takes hold of one life.
func (m *Machine) Open(ctx context.Context, id target.ID) (target.Process, error) {
	fail := func(err error) (target.Process, error) {
		return nil, &target.Error{Op: "open", ID: id, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	m.mu.Lock()
	p := m.procs[id.PID]
	m.mu.Unlock()
	if p == nil || p.id != id {
		p = nil
	}
	if err := m.begin(OpOpen, p); err != nil {
		return fail(err)
	}
	defer m.mu.Unlock()
	switch {
	case p == nil || p.gone:
		return fail(target.ErrGone)
	case p.denied:
		return fail(target.ErrDenied)
	}
	return &handle{m: m, p: p, info: p.describe(), life: m.lives}, nil
}

// watchBehind is how many events a watcher may be behind: those above are lost.
const watchBehind = 1024

// watcher is somebody who watches.
type watcher struct {
	events chan target.Event
	lost   bool // some, of which he was not told yet
}

// Watch tells of starts of programs, forks and exits, not when they happened.
func (m *Machine) Watch(ctx context.Context) (<-chan target.Event, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot watch processes: %w", err)
	}
	w := &watcher{events: make(chan target.Event, watchBehind)}
	m.mu.Lock()
	m.watchers[w] = true
	m.mu.Unlock()
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.watchers, w)
		close(w.events)
	})
	return w.events, nil
}

// Deafen keeps events from those who watch from now on, or no longer: they are
// lost, and nobody is told. Processes start and end all the same.
func (m *Machine) Deafen(deaf bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.deaf = deaf
}

// HideCode keeps the machine from telling of new code, as systems do that only
// tell of starts, or no longer.
func (m *Machine) HideCode(hide bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hideCode = hide
}

// Tell sends an event, whether or not it happened.
func (m *Machine) Tell(e target.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.send(e)
}

// tell needs the lock.
func (m *Machine) tell(e target.Event) {
	if m.hideCode {
		if e.Told = false; e.Kind == target.Mapped {
			return
		}
	}
	if !m.deaf {
		m.send(e)
	}
}

func (m *Machine) send(e target.Event) {
	for w := range m.watchers {
		if w.lost {
			select {
			case w.events <- target.Event{Kind: target.Lost}:
				w.lost = false
			default:
				continue
			}
		}
		select {
		case w.events <- e:
		default:
			w.lost = true
		}
	}
}

// ListOf tells of some processes. It counts as one list.
func (m *Machine) ListOf(ctx context.Context, pids []int) ([]target.Info, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	if err := m.begin(OpList, nil); err != nil {
		return nil, fmt.Errorf("cannot list processes: %w", err)
	}
	defer m.mu.Unlock()
	var list []target.Info
	for _, pid := range pids {
		if p := m.procs[pid]; p != nil {
			list = append(list, p.describe())
		}
	}
	return list, nil
}

// Probe always says yes: a simulated machine allows everything its scene does not refuse.
func (m *Machine) Probe(ctx context.Context) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("a simulated machine of %d processes: nothing real is touched", len(m.procs)), ctx.Err()
}

// begin counts an operation, does what a fault says, and, with a nil error,
// holds the lock; p is nil where there is no process. Faults that concern
// bytes are left for the operation itself: beginBytes.
func (m *Machine) begin(op Op, p *process) error {
	_, err := m.beginBytes(op, p)
	return err
}

// beginBytes is begin for reads, writes and flushes: short, torn and lying
// faults and our own death in the middle of a write are handed over.
func (m *Machine) beginBytes(op Op, p *process) (*Fault, error) {
	pid := 0
	if p != nil {
		pid = p.id.PID
	}
	m.mu.Lock()
	if m.dead {
		m.mu.Unlock()
		return nil, ErrDied
	}
	f := m.step(op, pid)
	if f == nil {
		return nil, nil
	}
	switch f.Do {
	case Short, Torn, LieRead, LieWrite, Die:
		if ofBytes[op][f.Do] {
			return f, nil
		}
	case Hook:
		m.mu.Unlock()
		f.Then()
		m.mu.Lock()
		if m.dead {
			m.mu.Unlock()
			return nil, ErrDied
		}
		return nil, nil
	}
	if err := m.strike(f, p); err != nil {
		m.mu.Unlock()
		return nil, err
	}
	return nil, nil
}

// ofBytes are the effects that the operation itself carries out; elsewhere they
// are plain failures, and a death before it.
var ofBytes = map[Op]map[Effect]bool{
	OpRead:  {Short: true, LieRead: true},
	OpWrite: {Short: true, Torn: true, LieWrite: true, Die: true},
	OpFlush: {LieWrite: true},
}

// Ops counts the operations asked of this machine so far, those that failed too.
func (m *Machine) Ops() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total
}

// Count counts the operations of one kind so far.
func (m *Machine) Count(op Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if op == OpAny {
		return m.total
	}
	return m.ops[op]
}

// Now is the simulated time since the machine was made: what its operations cost.
func (m *Machine) Now() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// cost is what an operation costs in simulated time: the order of magnitude of
// the Linux backend on a quiet machine. Threads cost besides, at the freeze.
func cost(op Op) time.Duration {
	switch op {
	case OpList:
		return 500 * time.Microsecond
	case OpRegions:
		return 100 * time.Microsecond
	case OpAlloc, OpProtect, OpFree:
		return 1500 * time.Microsecond
	case OpFreeze:
		return 30 * time.Microsecond
	}
	return 2 * time.Microsecond
}

// threadCost is what stopping one thread adds to a freeze.
const threadCost = 20 * time.Microsecond

// Die simulates our own death, which may be in the middle of anything: every
// process is let go as the kernel would let it go, and every operation fails
// with ErrDied and does nothing until Revive.
func (m *Machine) Die() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.die()
}

func (m *Machine) die() {
	m.dead = true
	for _, p := range m.procs {
		if p.frozen != nil {
			p.frozen.release(m, true)
		}
	}
}

// Revive is a new start of ours after Die. Handles from before stay dead.
func (m *Machine) Revive() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = false
	m.lives++
}

// readAtMost reads a file of at most limit bytes.
func readAtMost(f io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return b, err
}
