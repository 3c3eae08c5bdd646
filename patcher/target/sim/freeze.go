package sim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/arch/x86/x86asm"

	"hotpatchd/patcher/target"
)

// frozen is a process whose threads stand; target.Frozen.
type frozen struct {
	m      *Machine
	p      *process
	since  time.Duration
	pause  time.Duration
	over   bool
	stop   func() bool // of the context's watch
	before memory      // as the threads last saw it
	writes []target.Span
	life   int
}

var (
	_ target.Frozen      = (*frozen)(nil)
	_ target.Interrupter = (*frozen)(nil)
	_ target.Pauser      = (*frozen)(nil)
)

var errThawed = errors.New("its threads run again")

// freeze stops all threads. The end of ctx lets them go. It needs the lock.
func freeze(ctx context.Context, m *Machine, p *process) *frozen {
	f := &frozen{m: m, p: p, since: m.now, before: p.mem.clone(), life: m.lives}
	p.frozen = f
	f.stop = context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		f.release(m, false)
	})
	return f
}

func (t *thread) name() string { return fmt.Sprintf("thread %d (%s)", t.id, t.state) }

func (f *frozen) fail(op string, err error) error {
	return &target.Error{Op: op, ID: f.p.id, Err: err}
}

func (f *frozen) begin(op Op) error {
	f.m.mu.Lock()
	stale := f.life != f.m.lives
	f.m.mu.Unlock()
	if stale {
		return ErrDied
	}
	if err := f.m.begin(op, f.p); err != nil {
		return err
	}
	if f.p.gone {
		f.m.mu.Unlock()
		return target.ErrGone
	}
	return nil
}

func (f *frozen) Threads() ([]target.Thread, error) {
	if err := f.begin(OpThreads); err != nil {
		return nil, f.fail("read threads of", err)
	}
	defer f.m.mu.Unlock()
	if f.over {
		return nil, f.fail("read threads of", errThawed)
	}
	list := make([]target.Thread, 0, len(f.p.threads))
	for _, t := range f.p.threads {
		x := target.Thread{ID: t.id, PC: t.pc, SP: t.sp, Regs: slices.Clone(t.regs), State: t.state}
		if s := f.p.mem.at(t.sp); s != nil {
			x.Stack = target.Span{Start: t.sp, End: s.End}
		}
		list = append(list, x)
	}
	return list, nil
}

// Thaw lets all threads go on. With a fault on it, it fails and holds on, as a
// backend that cannot let go of one thread does; the next call tries again.
func (f *frozen) Thaw() error {
	f.m.mu.Lock()
	over := f.over
	f.m.mu.Unlock()
	if over {
		return nil
	}
	switch err := f.begin(OpThaw); {
	case errors.Is(err, target.ErrGone):
		return nil // nobody is left to be held
	case err != nil:
		return f.fail("thaw", err)
	}
	defer f.m.mu.Unlock()
	f.release(f.m, false)
	return nil
}

// Pause is the simulated time between stop and release.
func (f *frozen) Pause() time.Duration {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.pause
}

// Interrupted finds simulated signal frames.
func (f *frozen) Interrupted(b []byte, at target.Addr) []target.Addr {
	var list []target.Addr
	for i := int(-at & 7); i+16 <= len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) == signalMagic {
			list = append(list, target.Addr(binary.LittleEndian.Uint64(b[i+8:])))
		}
	}
	return list
}

// note remembers a write to live code under the freeze.
func (f *frozen) note(at target.Addr, n int) {
	f.writes = append(f.writes, target.Span{Start: at, End: at + target.Addr(n)})
}

// release lets the threads go and looks what became of their code meanwhile.
// died: not by our will, so that unfinished work is no violation. It needs the lock.
func (f *frozen) release(m *Machine, died bool) {
	if f.over {
		return
	}
	f.over = true
	f.stop()
	f.pause = m.now - f.since + threadCost*time.Duration(len(f.p.threads))
	if f.p.frozen == f {
		f.p.frozen = nil
	}
	if !f.p.gone && !died {
		f.judge()
	}
	f.before = memory{}
}

// judge finds threads that would go on, or return to, the inside of an
// instruction, and code that was not flushed.
func (f *frozen) judge() {
	if at, stale := f.p.mem.stale(); stale {
		f.p.violate("threads let go while the instruction cache is stale at %s", at)
	}
	inside := map[target.Addr]target.Addr{} // place to the start of its run
	for _, run := range merge(f.writes) {
		for _, at := range f.inside(run) {
			inside[at] = run.Start
		}
	}
	for _, at := range f.fresh() {
		delete(inside, at)
	}
	if len(inside) == 0 {
		return
	}
	for _, t := range f.p.threads {
		if start, ok := inside[t.pc]; ok {
			f.p.violate("%s goes on at %s, inside code rewritten from %s", t.name(), t.pc, start)
		}
		for _, sp := range f.stacks(t) {
			f.eachWord(sp, func(at, w target.Addr) {
				if start, ok := inside[w]; ok {
					f.p.violate("%s returns to %s (word at %s), inside code rewritten from %s", t.name(), w, at, start)
				}
			})
		}
	}
}

// fresh are the places where a write began behind another one, and an
// instruction of the new code with it: a jump right behind the filler before it.
func (f *frozen) fresh() []target.Addr {
	var places []target.Addr
	for _, run := range merge(f.writes) {
		is := make([]byte, run.End-run.Start)
		f.p.mem.read(is, run.Start, false)
		for i := 0; i < len(is); i += length(f.p.info.Arch, is[i:]) {
			at := run.Start + target.Addr(i)
			if slices.ContainsFunc(f.writes, func(w target.Span) bool { return w.Start == at }) {
				places = append(places, at)
			}
		}
	}
	return places
}

// inside are the places strictly inside a rewritten run where an instruction
// of the old code began, if bytes changed there.
func (f *frozen) inside(run target.Span) []target.Addr {
	n := int(run.End - run.Start)
	was, is := make([]byte, n+16), make([]byte, n)
	was = was[:n+f.before.reach(run.End, 16, false)]
	f.before.read(was, run.Start, false)
	f.p.mem.read(is, run.Start, false)
	last := -1 // last byte that differs
	for i := range is {
		if was[i] != is[i] {
			last = i
		}
	}
	var places []target.Addr
	for i := 0; i <= last; {
		if i > 0 {
			places = append(places, run.Start+target.Addr(i))
		}
		i += length(f.p.info.Arch, was[i:])
	}
	return places
}

// length is that of the instruction b begins with; 1 where there is none.
func length(arch target.Arch, b []byte) int {
	if arch == target.ARM64 {
		return 4
	}
	mode := 64
	if arch == target.X86 {
		mode = 32
	}
	in, err := x86asm.Decode(b, mode)
	if err != nil {
		return 1
	}
	return in.Len
}

// maxScan bounds how much of a stack is searched: what Linux gives a stack.
const maxScan = 8 << 20

// stacks are the spans of a thread's stack, and of the normal stack when it
// runs on its signal stack.
func (f *frozen) stacks(t *thread) []target.Span {
	var list []target.Span
	for sp, seen := t.sp, 0; seen < 4; seen++ {
		x := f.p.mem.at(sp)
		if x == nil {
			break
		}
		list = append(list, target.Span{Start: sp, End: min(x.End, sp+maxScan)})
		var next target.Addr
		f.eachWord(list[len(list)-1], func(at, w target.Addr) {
			if w == signalMagic && next == 0 {
				var b [8]byte
				f.p.mem.read(b[:], at+8, false)
				next = target.Addr(binary.LittleEndian.Uint64(b[:]))
			}
		})
		if next == 0 {
			break
		}
		sp = next
	}
	return list
}

func (f *frozen) eachWord(sp target.Span, do func(at, w target.Addr)) {
	var b [8]byte
	for at := (sp.Start + 7) &^ 7; at+8 <= sp.End; at += 8 {
		f.p.mem.read(b[:], at, false)
		do(at, target.Addr(binary.LittleEndian.Uint64(b[:])))
	}
}

// merge joins spans that touch.
func merge(list []target.Span) []target.Span {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b target.Span) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	var out []target.Span
	for _, s := range list {
		if n := len(out); n > 0 && s.Start <= out[n-1].End {
			out[n-1].End = max(out[n-1].End, s.End)
			continue
		}
		out = append(out, s)
	}
	return out
}
