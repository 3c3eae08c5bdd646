package patcher

import (
	"encoding/binary"
	"errors"
	"slices"

	"hotpatchd/patcher/target"
)

const (
	// redZone below the stack pointer may hold live words of a leaf function of
	// the host (System V ABI, 128 bytes).
	redZone = 128
	// largeStack is where it pays to ask which pages exist, bytes.
	largeStack = 1 << 20
	// maxStacks bounds what is read under one freeze, bytes. Deeper stacks cannot
	// be shown to be free of return addresses in bounded time: busy.
	maxStacks = 64 << 20
)

// checkThreads refuses the swap while any thread stands in, or will return to,
// a place that is about to become the middle of an instruction.
func checkThreads(p target.Process, f target.Frozen, c change, regions []target.Region) error {
	threads, err := f.Threads()
	if err != nil {
		return err
	}
	s := newInteriorSet(c)
	if len(s.at) == 0 && len(s.strict) == 0 {
		return nil
	}
	for _, t := range threads {
		if name, hit := s.pc(t.PC); hit {
			return busy(t.PC, "thread %d is in the first bytes of %s%s", t.ID, name, doing(t))
		}
		for _, r := range t.Regs { // about to be jumped to
			if s.has(target.Addr(r)) {
				return busy(target.Addr(r), "thread %d holds an address in the first bytes of %s%s", t.ID, s.name(target.Addr(r)), doing(t))
			}
		}
	}
	if len(s.at) == 0 {
		return nil // no interior: no return address can point there
	}
	var spans []stackSpan
	for _, t := range threads {
		if t.Stack.End <= t.Stack.Start {
			return busy(t.SP, "thread %d has its stack pointer outside any memory%s", t.ID, doing(t))
		}
		spans = append(spans, stackFrom(t.SP, t.Stack.End, t))
	}
	return s.scan(p, f, spans, regions)
}

func doing(t target.Thread) string {
	if t.State == "" {
		return ""
	}
	return " (" + t.State + ")"
}

// stackSpan is a run of stack memory.
type stackSpan struct {
	target.Span
	sp     target.Addr   // Start and the red zone
	thread target.Thread // the lowest on it
	odd    bool          // a stack pointer in it is no multiple of 8: so may be the words
}

func stackFrom(sp, end target.Addr, t target.Thread) stackSpan {
	return stackSpan{target.Span{Start: sp - min(sp, redZone), End: end}, sp, t, sp%8 != 0}
}

// interiorSet answers whether an address is one where nothing may be.
type interiorSet struct {
	at     []target.Addr // sorted
	low    target.Addr
	high   target.Addr
	strict []write // also no pc strictly inside the bytes written
	c      change
}

func newInteriorSet(c change) *interiorSet {
	s := &interiorSet{at: slices.Clone(c.interior), strict: c.writes, c: c}
	slices.Sort(s.at)
	if len(s.at) > 0 {
		s.low, s.high = s.at[0], s.at[len(s.at)-1]
	}
	return s
}

func (s *interiorSet) has(a target.Addr) bool {
	if a < s.low || a > s.high || len(s.at) == 0 {
		return false
	}
	_, ok := slices.BinarySearch(s.at, a)
	return ok
}

// pc is stricter than a stack word: no program counter strictly inside any
// written bytes, whatever the decoder says of boundaries.
func (s *interiorSet) pc(a target.Addr) (string, bool) {
	for _, w := range s.strict {
		if a > w.at && a < w.at+target.Addr(len(w.to)) {
			return w.name, true
		}
	}
	if s.has(a) {
		return s.name(a), true
	}
	return "", false
}

func (s *interiorSet) name(a target.Addr) string {
	for _, w := range s.c.writes {
		if a >= w.at && a < w.at+target.Addr(len(w.to)) {
			return w.name
		}
	}
	return a.String()
}

// scan reads the stacks, each mapping once, and follows signal frames to the
// stacks they interrupted.
func (s *interiorSet) scan(p target.Process, f target.Frozen, spans []stackSpan, regions []target.Region) error {
	inter, _ := f.(target.Interrupter)
	total := 0
	var done []stackSpan
	for len(spans) > 0 {
		spans = merge(spans)
		var more []stackSpan
		for _, span := range spans {
			runs, err := touched(p, span, regions)
			if err != nil {
				return err
			}
			for _, run := range runs {
				n := int(run.End - run.Start)
				if total += min(n, maxStacks+1); total > maxStacks {
					return busy(span.thread.SP, "the stacks are too deep to check: more than %d MiB, thread %d", maxStacks>>20, span.thread.ID)
				}
				b, err := readStack(p, span, &run)
				if err != nil {
					return err
				}
				if err := s.words(b, run.Start, span); err != nil {
					return err
				}
				if inter == nil {
					continue
				}
				below, err := interruptedStacks(inter, b, run, span, regions)
				if err != nil {
					return err
				}
				more = append(more, below...)
			}
		}
		done = append(done, spans...) // a frame may lead back to a stack that was read
		spans = remaining(more, done)
	}
	return nil
}

// touched are the parts of a stack that need to be read: all of it, but where
// it lies in a large mapping, as the stacks of a program that keeps them in its
// heap do, only pages that exist.
func touched(p target.Process, span stackSpan, regions []target.Region) ([]target.Span, error) {
	all := []target.Span{span.Span}
	m, ok := p.(target.Sparse)
	if !ok || span.End-span.Start < largeStack {
		return all, nil
	}
	if r, ok := regionAt(regions, span.sp); !ok || r.Inode != 0 || r.Shared {
		return all, nil
	}
	return m.Touched(span.Span)
}

// readStack reads one run. Only the red zone may be unreadable, where it lies
// on the page before: a stack may begin at the start of its mapping.
func readStack(p target.Process, span stackSpan, run *target.Span) ([]byte, error) {
	b := make([]byte, run.End-run.Start)
	_, err := p.ReadAt(b, run.Start)
	skip := alignUp(run.Start, target.PageSize) - run.Start
	if err == nil || errors.Is(err, target.ErrGone) || run.Start != span.Start || run.Start+skip > span.sp || skip >= target.Addr(len(b)) {
		return b, err
	}
	b = b[skip:]
	run.Start += skip
	_, err = p.ReadAt(b, run.Start)
	return b, err
}

// interruptedStacks follows signal frames to the stacks below them.
func interruptedStacks(inter target.Interrupter, b []byte, run target.Span, span stackSpan, regions []target.Region) ([]stackSpan, error) {
	var more []stackSpan
	for _, sp := range inter.Interrupted(b, run.Start) {
		r, ok := regionAt(regions, sp)
		if !ok {
			return nil, busy(sp, "thread %d is in a signal handler whose stack cannot be found", span.thread.ID)
		}
		if sp >= span.Start && sp < span.End {
			continue // same stack, read already
		}
		more = append(more, stackFrom(sp, r.End, span.thread))
	}
	return more, nil
}

// words looks at every aligned 8-byte word, at every 8 bytes where a stack
// pointer is not aligned.
func (s *interiorSet) words(b []byte, start target.Addr, span stackSpan) error {
	i, step := int(-uint64(start)&7), 8
	if span.odd {
		i, step = 0, 1
	}
	low, high := uint64(s.low), uint64(s.high)
	for ; i+8 <= len(b); i += step {
		w := binary.LittleEndian.Uint64(b[i:])
		if w < low || w > high || !s.has(target.Addr(w)) {
			continue
		}
		return busy(start+target.Addr(i), "a frame of thread %d%s returns into the first bytes of %s", span.thread.ID, doing(span.thread), s.name(target.Addr(w)))
	}
	return nil
}

// merge joins overlapping spans: threads of a Go program share one mapping, and
// each stack seems to reach to its end. The pieces between are told by thread.
func merge(spans []stackSpan) []stackSpan {
	sortBy(spans, func(s stackSpan) target.Addr { return s.Start })
	var out []stackSpan
	for i, s := range spans {
		if i+1 < len(spans) && spans[i+1].Start < s.End {
			next := &spans[i+1]
			next.End = max(next.End, s.End)
			s.End = min(s.End, alignUp(next.Start, 8)+8) // no word lies in neither
		}
		if s.End > s.Start {
			out = append(out, s)
		}
	}
	return out
}

// remaining drops what was read already: spans that begin in one of done. Both
// reach to the end of their mapping.
func remaining(more, done []stackSpan) []stackSpan {
	return slices.DeleteFunc(more, func(m stackSpan) bool {
		return slices.ContainsFunc(done, func(d stackSpan) bool { return m.Start >= d.Start && m.Start < d.End })
	})
}
