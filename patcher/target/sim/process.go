package sim

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"hotpatchd/patcher/target"
)

// process is one life of one program. All of it is guarded by the machine's lock.
type process struct {
	id      target.ID
	info    target.Info
	mem     memory
	modules map[string]module // by name
	threads []*thread
	frozen  *frozen // who holds it, nil if nobody does
	gone    bool
	code    uint32 // with which it ended
	signal  int    // by which it ended
	denied  bool
	change  uint64
	sites   []site
	wrong   []string // violations, at most maxViolations
	spec    Process  // as it was started, for exec
}

// module is a mapped image.
type module struct {
	base target.Addr
	span target.Span
	img  *image
}

// thread is one simulated thread; it stands where it stands until it is moved.
type thread struct {
	id          int
	pc, sp      target.Addr
	regs        []uint64
	state       string
	unstoppable bool
}

// maxViolations bounds what is remembered: the first ones tell.
const maxViolations = 32

func (p *process) violate(format string, args ...any) {
	if len(p.wrong) < maxViolations {
		p.wrong = append(p.wrong, fmt.Sprintf(format, args...))
	}
}

func (p *process) describe() target.Info {
	i := p.info
	i.ID = p.id
	i.Guards = slices.Clone(i.Guards)
	i.Change = p.change
	i.Bare = !slices.ContainsFunc(p.mem.maps, func(x *mapping) bool { return x.Prot&target.Exec != 0 })
	return i
}

// defaultExe is the native program of processes whose scene names none.
const defaultExe = "/usr/bin/pe-host"

// base is a path's last element, whichever way its slashes go.
func base(s string) string { return path.Base(strings.ReplaceAll(s, `\`, "/")) }

// Start starts a process and tells its life.
func (m *Machine) Start(s Process) (target.ID, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p, err := m.create(s, s.PID)
	if err != nil {
		return target.ID{}, err
	}
	m.procs[p.id.PID] = p
	m.started(p)
	return p.id, nil
}

// create makes a process that nobody sees yet.
func (m *Machine) create(s Process, pid int) (*process, error) {
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("cannot start process: %w", err)
	}
	if pid == 0 {
		for pid = 1000; m.procs[pid] != nil; pid++ {
		}
	} else if m.procs[pid] != nil {
		return nil, fmt.Errorf("cannot start process %d: there is one already", pid)
	}
	fail := func(err error) (*process, error) {
		return nil, fmt.Errorf("cannot start process %d: %w", pid, err)
	}
	p := &process{modules: map[string]module{}, spec: s, denied: s.Denied}
	m.epoch++
	p.id = target.ID{PID: pid, Start: m.epoch}
	p.info = target.Info{Exe: s.Exe, User: s.User, UID: s.UID, Unit: s.Unit, Arch: s.Arch}
	if s.User == "" {
		p.info.User = "root"
	}
	if s.Arch == "" {
		p.info.Arch = target.AMD64
	}
	for _, g := range s.Guards {
		p.info.Guards = append(p.info.Guards, target.Guard{Code: target.GuardCode(g.Code), Text: g.Text})
	}
	for _, r := range s.Regions {
		if err := p.mapRegion(r); err != nil {
			return fail(err)
		}
	}
	list := s.Modules
	if s.Image != "" {
		p.info.Image = m.files.path(s.Image)
		if !slices.ContainsFunc(list, func(x Module) bool { return x.File == s.Image }) {
			list = append([]Module{{File: s.Image}}, list...)
		}
	}
	if p.info.Exe == "" {
		p.info.Exe = defaultExe
	}
	p.info.Host = base(p.info.Exe)
	for _, x := range list {
		if _, err := m.load(p, x); err != nil {
			return fail(err)
		}
	}
	// Words of regions may speak of modules: they are written when all are there.
	for _, r := range s.Regions {
		at, err := p.word(r.At)
		if err == nil {
			err = p.writeWords(target.Addr(at), r.Words)
		}
		if err != nil {
			return fail(err)
		}
	}
	if s.PEB != nil {
		peb, err := p.word(s.PEB)
		if err != nil {
			return fail(err)
		}
		p.info.PEB = target.Addr(peb)
	}
	if err := m.makeThreads(p, s.Threads); err != nil {
		return fail(err)
	}
	m.changed(p)
	return p, nil
}

// changed says that mappings of p changed.
func (m *Machine) changed(p *process) {
	m.epoch++
	p.change = m.epoch
}

func (p *process) mapRegion(r Region) error {
	at, err := p.word(r.At)
	if err != nil {
		return err
	}
	if r.Size > maxRegion {
		return fmt.Errorf("region at %x: %d bytes, more than %d", at, r.Size, uint64(maxRegion))
	}
	prot, err := parseProt(r.Prot)
	if err != nil {
		return fmt.Errorf("region at %x: %w", at, err)
	}
	kinds := map[string]target.Kind{"": target.Private, "private": target.Private, "file": target.File,
		"heap": target.Heap, "stack": target.Stack, "special": target.Special}
	kind, ok := kinds[r.Kind]
	if !ok {
		return fmt.Errorf("region at %x: unknown kind %q", at, r.Kind)
	}
	x := mapping{Region: target.Region{Start: target.Addr(at), End: target.Addr(at + r.Size), Prot: prot, Shared: r.Shared, Kind: kind, Path: r.Path}}
	if err := p.mem.add(x); err != nil {
		return fmt.Errorf("region at %x: %w", at, err)
	}
	if uint64(len(r.Words))*8 > r.Size {
		return fmt.Errorf("region at %x: %d words do not fit", at, len(r.Words))
	}
	return nil
}

func parseProt(s string) (target.Prot, error) {
	if s == "" {
		return target.Read | target.Write, nil
	}
	for p := target.Prot(0); p <= target.Read|target.Write|target.Exec; p++ {
		if p.String() == s {
			return p, nil
		}
	}
	return 0, fmt.Errorf("unknown protection %q", s)
}

// gone makes a life be over; its handles answer ErrGone from now on.
func (m *Machine) exit(p *process) {
	if p.gone {
		return
	}
	m.endLife(p)
	delete(m.procs, p.id.PID)
	m.tell(target.Event{Kind: target.Exited, PID: p.id.PID, Code: p.code, Signal: p.signal})
}

func (m *Machine) endLife(p *process) {
	if p.frozen != nil {
		p.frozen.release(m, true)
	}
	p.gone = true
	p.mem, p.threads = memory{}, nil
}

// exec starts the program anew under the same pid: by its own scene, at other
// random addresses.
func (m *Machine) exec(p *process) {
	if !p.gone {
		if err := m.replace(p, p.spec); err != nil {
			p.violate("the fault cannot exec: %v", err)
		}
	}
}

func (m *Machine) replace(p *process, s Process) error {
	delete(m.procs, p.id.PID)
	next, err := m.create(s, p.id.PID)
	if err != nil {
		m.procs[p.id.PID] = p
		return err
	}
	m.endLife(p)
	m.procs[p.id.PID] = next
	m.started(next)
	return nil
}

// started tells of a new life, and of its code: not of the loop in which its
// threads stand, which stands for a program of the system's own format.
func (m *Machine) started(p *process) {
	m.tell(target.Event{Kind: target.Started, PID: p.id.PID, Told: true})
	code := func(r Region) bool { return strings.HasSuffix(r.Prot, "x") }
	if len(p.modules) > 0 || slices.ContainsFunc(p.spec.Regions, code) {
		m.tell(target.Event{Kind: target.Mapped, PID: p.id.PID})
	}
}

// Exit ends a process.
func (m *Machine) Exit(pid int) error { return m.ExitWith(pid, 0, 0) }

// ExitWith ends a process with an exit code, or by a signal.
func (m *Machine) ExitWith(pid int, code uint32, signal int) error {
	return m.with(pid, "exit", func(p *process) error {
		p.code, p.signal = code, signal
		m.exit(p)
		return nil
	})
}

// Exec replaces the program of a process, keeping its pid: a new life.
func (m *Machine) Exec(pid int, s Process) (target.ID, error) {
	var id target.ID
	err := m.with(pid, "exec", func(p *process) error {
		if err := m.replace(p, s); err != nil {
			return err
		}
		id = m.procs[pid].id
		return nil
	})
	return id, err
}

// SetGuards replaces what speaks against touching a process. A tracer among
// them makes a freeze fail with ErrDenied.
func (m *Machine) SetGuards(pid int, guards ...target.Guard) error {
	return m.with(pid, "guard", func(p *process) error {
		p.info.Guards = slices.Clone(guards)
		return nil
	})
}

// Deny lets the system refuse us the process from now on, or no longer.
func (m *Machine) Deny(pid int, denied bool) error {
	return m.with(pid, "deny", func(p *process) error {
		p.denied = denied
		return nil
	})
}

// Fork makes a child with a copy of the memory, patched code included, and of
// the first thread. A process that is frozen does not fork.
func (m *Machine) Fork(pid int) (target.ID, error) {
	var id target.ID
	err := m.with(pid, "fork", func(p *process) error {
		if p.frozen != nil {
			return fmt.Errorf("its threads are stopped")
		}
		child := 1000
		for m.procs[child] != nil {
			child++
		}
		m.epoch++
		id = target.ID{PID: child, Start: m.epoch}
		c := &process{id: id, info: p.info, mem: p.mem.clone(), modules: maps.Clone(p.modules), denied: p.denied,
			sites: slices.Clone(p.sites), spec: p.spec}
		if len(p.threads) > 0 {
			t := *p.threads[0]
			t.id, t.regs = child, slices.Clone(t.regs)
			c.threads = []*thread{&t}
		}
		m.changed(c)
		m.procs[child] = c
		m.tell(target.Event{Kind: target.Forked, PID: child, Parent: pid, Told: true})
		return nil
	})
	return id, err
}

// with runs do on a living process under the lock.
func (m *Machine) with(pid int, what string, do func(p *process) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.procs[pid]
	if p == nil {
		return fmt.Errorf("cannot %s simulated process %d: there is none", what, pid)
	}
	if err := do(p); err != nil {
		return fmt.Errorf("cannot %s simulated process %d: %w", what, pid, err)
	}
	return nil
}
