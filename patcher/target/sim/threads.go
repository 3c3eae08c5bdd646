package sim

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"hotpatchd/patcher/target"
)

// stackSize is that of the stacks made for threads whose scene names none.
const stackSize = 64 << 10

// idle is where threads stand that the scene puts nowhere: one page of code
// that is of no module, as the C library's is.
const idlePath = "/usr/lib/libsim.so"

// word is a number of a scene: an integer, "0x…", or "module!+0x…".
func (p *process) word(v any) (uint64, error) {
	switch v := v.(type) {
	case nil:
		return 0, nil
	case int64:
		return uint64(v), nil
	case int:
		return uint64(v), nil
	case uint64:
		return v, nil
	case target.Addr:
		return uint64(v), nil
	case string:
		name, off, ok := strings.Cut(v, "!+")
		if !ok {
			n, err := strconv.ParseUint(v, 0, 64)
			if err != nil {
				return 0, fmt.Errorf("%q is neither a number nor module!+offset", v)
			}
			return n, nil
		}
		mod, ok := p.modules[name]
		if !ok {
			return 0, fmt.Errorf("%q: there is no module %q", v, name)
		}
		n, err := strconv.ParseUint(off, 0, 32)
		if err != nil {
			return 0, fmt.Errorf("%q: %q is no offset", v, off)
		}
		return uint64(mod.base) + n, nil
	}
	return 0, fmt.Errorf("%v (%T) is neither a number nor text", v, v)
}

func (p *process) writeWords(at target.Addr, words []any) error {
	b := make([]byte, 0, 8*len(words))
	for _, w := range words {
		n, err := p.word(w)
		if err != nil {
			return err
		}
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	if p.mem.reach(at, len(b), true) < len(b) {
		return fmt.Errorf("%d words at %s: %w", len(words), at, errUnmapped)
	}
	p.mem.write(b, at)
	p.mem.flush(at, len(b))
	return nil
}

func (m *Machine) makeThreads(p *process, specs []Thread) error {
	if len(specs) == 0 {
		specs = []Thread{{State: "futex"}}
	}
	for i, s := range specs {
		if s.ID == 0 {
			s.ID = p.id.PID + i
		}
		if slices.ContainsFunc(p.threads, func(t *thread) bool { return t.id == s.ID }) {
			return fmt.Errorf("thread %d is there twice", s.ID)
		}
		if err := m.makeThread(p, s); err != nil {
			return fmt.Errorf("thread %d: %w", s.ID, err)
		}
	}
	return nil
}

func (m *Machine) makeThread(p *process, s Thread) error {
	t := &thread{id: s.ID, state: s.State, unstoppable: s.Unstoppable}
	if t.state == "" {
		t.state = "running"
	}
	pc, err := p.word(s.PC)
	if err != nil {
		return err
	}
	if s.PC == nil {
		idle, err := m.idle(p)
		if err != nil {
			return err
		}
		pc = uint64(idle)
	}
	t.pc = target.Addr(pc)
	if t.sp, err = m.makeStack(p, s.SP, s.Stack, len(p.threads) == 0); err != nil {
		return err
	}
	if s.AltStack != nil {
		if err := m.interrupt(p, t, *s.AltStack); err != nil {
			return fmt.Errorf("altstack: %w", err)
		}
	}
	if err := p.setRegs(t, s.Regs); err != nil {
		return err
	}
	p.threads = append(p.threads, t)
	return nil
}

// makeStack gives a thread its stack and tells its stack pointer: the words lie
// from there upwards.
func (m *Machine) makeStack(p *process, sp any, words []any, main bool) (target.Addr, error) {
	at, err := p.word(sp)
	if err != nil {
		return 0, err
	}
	if sp == nil || p.mem.at(target.Addr(at)) == nil {
		size := uint64(stackSize)
		for size < 8*uint64(len(words))+2*pageSize {
			size += pageSize
		}
		r := target.Region{Prot: target.Read | target.Write}
		if main {
			r.Kind, r.Path = target.Stack, "[stack]"
		}
		if sp == nil {
			r.Start, err = m.place(p, size, stackArea)
			if err != nil {
				return 0, err
			}
			at = uint64(r.Start) + size - pageSize - 8*uint64(len(words))
			at &^= 15
		} else {
			// Around the stack pointer that the scene names: below it for what the thread calls.
			r.Start = target.Addr(at)&^(pageSize-1) - pageSize
		}
		r.End = r.Start + target.Addr(size)
		if err := p.mem.add(mapping{Region: r}); err != nil {
			return 0, fmt.Errorf("stack at %s: %w", r.Start, err)
		}
	}
	return target.Addr(at), p.writeWords(target.Addr(at), words)
}

// signalMagic begins the simulated signal frame: then follow the stack pointer
// and the pc the signal interrupted, 8 bytes each.
const signalMagic = 0x454d_4152_4647_4953 // "SIGFRAME"

// interrupt lets a thread handle a signal on an alternate stack: the frame
// leads back to where it stood.
func (m *Machine) interrupt(p *process, t *thread, s Signal) error {
	words := append(slices.Clone(s.Stack), uint64(signalMagic), uint64(t.sp), uint64(t.pc))
	sp, err := m.makeStack(p, nil, words, false)
	if err != nil {
		return err
	}
	pc, err := p.word(s.PC)
	if err != nil {
		return err
	}
	if s.PC == nil {
		pc = uint64(t.pc)
	}
	t.pc, t.sp = target.Addr(pc), sp
	return nil
}

var amd64Regs = []string{"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"}

func (p *process) setRegs(t *thread, regs map[string]any) error {
	n := len(amd64Regs)
	if p.info.Arch == target.ARM64 {
		n = 31
	}
	t.regs = make([]uint64, n)
	for name, v := range regs {
		i := slices.Index(amd64Regs, name)
		if p.info.Arch == target.ARM64 {
			i = -1
			if x, ok := strings.CutPrefix(name, "x"); ok {
				if k, err := strconv.Atoi(x); err == nil && k >= 0 && k < n {
					i = k
				}
			}
		}
		if i < 0 || name == "rsp" {
			return fmt.Errorf("there is no register %q to set", name)
		}
		w, err := p.word(v)
		if err != nil {
			return err
		}
		t.regs[i] = w
	}
	if p.info.Arch != target.ARM64 {
		t.regs[4] = uint64(t.sp)
	}
	return nil
}

// idle is the page of code outside every module, mapped when first needed.
func (m *Machine) idle(p *process) (target.Addr, error) {
	for _, x := range p.mem.maps {
		if x.Path == idlePath {
			return x.Start + 0x40, nil
		}
	}
	at, err := m.place(p, pageSize, stackArea)
	if err != nil {
		return 0, err
	}
	r := target.Region{Start: at, End: at + pageSize, Prot: target.Read | target.Exec, Kind: target.File, Path: idlePath, Inode: m.node(idlePath)}
	return at + 0x40, p.mem.add(mapping{Region: r})
}

// The areas in which things are placed pseudo-randomly: modules where Windows
// and a 64-bit Wine have them, stacks and the like well away from them.
var (
	moduleArea = target.Span{Start: 0x7000_0000_0000, End: 0x7fff_0000_0000}
	stackArea  = target.Span{Start: 0x5000_0000_0000, End: 0x5fff_0000_0000}
)

// placeTries bounds the search for a free place; the areas are far larger than
// anything a scene maps, unless it does so on purpose.
const placeTries = 64

func (m *Machine) place(p *process, size uint64, area target.Span) (target.Addr, error) {
	const grain = 64 << 10
	room := uint64(area.End - area.Start)
	if size > room {
		return 0, fmt.Errorf("%d bytes: %w", size, errOutside)
	}
	for range placeTries {
		at := area.Start + target.Addr(m.rand.Uint64N((room-size)/grain+1)*grain)
		if p.mem.free(target.Span{Start: at, End: at + target.Addr((size+pageSize-1)&^(pageSize-1))}) {
			return at, nil
		}
	}
	return 0, fmt.Errorf("no room for %d bytes: %w", size, target.ErrTaken)
}

// node is the inode of a path: the same for the same path, from 1.
func (m *Machine) node(path string) uint64 {
	if m.nodes[path] == 0 {
		m.nodes[path] = uint64(len(m.nodes)) + 1
	}
	return m.nodes[path]
}

// move sets a thread's pc; id 0 is the first thread.
func (p *process) move(id int, pc target.Addr) error {
	for _, t := range p.threads {
		if t.id == id || id == 0 {
			t.pc = pc
			return nil
		}
	}
	return fmt.Errorf("there is no thread %d", id)
}

// MoveThread lets a thread (0: the first) go on to pc, a word of a scene. A
// frozen thread does not move.
func (m *Machine) MoveThread(pid, id int, pc any) error {
	return m.with(pid, "move a thread of", func(p *process) error {
		if p.frozen != nil {
			return fmt.Errorf("its threads are stopped")
		}
		at, err := p.word(pc)
		if err != nil {
			return err
		}
		return p.move(id, target.Addr(at))
	})
}

// StartThread starts one more thread and tells its id.
func (m *Machine) StartThread(pid int, s Thread) (int, error) {
	err := m.with(pid, "start a thread in", func(p *process) error {
		if p.frozen != nil {
			return fmt.Errorf("its threads are stopped")
		}
		if len(p.threads) >= maxPerProcess {
			return fmt.Errorf("it has %d threads", len(p.threads))
		}
		top := p.id.PID
		for _, t := range p.threads {
			top = max(top, t.id)
			if t.id == s.ID {
				return fmt.Errorf("thread %d is there already", s.ID)
			}
		}
		if s.ID == 0 {
			if top == math.MaxInt32 {
				return fmt.Errorf("no thread id is left")
			}
			s.ID = top + 1
		}
		return m.makeThread(p, s)
	})
	return s.ID, err
}

// EndThread ends a thread. Its stack stays mapped.
func (m *Machine) EndThread(pid, id int) error {
	return m.with(pid, "end a thread of", func(p *process) error {
		n := len(p.threads)
		if p.frozen == nil {
			p.threads = slices.DeleteFunc(p.threads, func(t *thread) bool { return t.id == id })
		}
		if len(p.threads) == n {
			return fmt.Errorf("thread %d is stopped or not there", id)
		}
		return nil
	})
}
