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
	}
	if len(s.at) == 0 {
		return nil // no interior: no return address can point there
	}
	var spans []stackSpan
	for _, t := range threads {
		if t.Stack.End <= t.Stack.Start {
			return busy(t.SP, "thread %d has its stack pointer outside any memory%s", t.ID, doing(t))
		}
		spans = append(spans, stackSpan{target.Span{Start: t.Stack.Start - redZone, End: t.Stack.End}, t})
	}
	return s.scan(p, f, spans, regions)
}

func doing(t target.Thread) string {
	if t.State == "" {
		return ""
	}
	return " (" + t.State + ")"
}

type stackSpan struct {
	target.Span
	thread target.Thread
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
				b, err := readStack(p, &run)
				if err != nil {
					return err
				}
				run := stackSpan{run, span.thread}
				if err := s.words(b, run); err != nil {
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
		spans = remaining(more, spans)
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
	if r, ok := regionAt(regions, span.thread.SP); !ok || r.Inode != 0 || r.Shared {
		return all, nil
	}
	return m.Touched(span.Span)
}

// readStack reads one run; the red zone may reach below the mapping.
func readStack(p target.Process, run *target.Span) ([]byte, error) {
	b := make([]byte, run.End-run.Start)
	_, err := p.ReadAt(b, run.Start)
	if err == nil || errors.Is(err, target.ErrGone) || len(b) <= redZone {
		return b, err
	}
	b = b[redZone:]
	run.Start += redZone
	_, err = p.ReadAt(b, run.Start)
	return b, err
}

// interruptedStacks follows signal frames to the stacks below them.
func interruptedStacks(inter target.Interrupter, b []byte, run, span stackSpan, regions []target.Region) ([]stackSpan, error) {
	var more []stackSpan
	for _, sp := range inter.Interrupted(b, run.Start) {
		r, ok := regionAt(regions, sp)
		if !ok {
			return nil, busy(sp, "thread %d is in a signal handler whose stack cannot be found", span.thread.ID)
		}
		if sp >= span.Start && sp < span.End {
			continue // same stack, read already
		}
		more = append(more, stackSpan{target.Span{Start: sp - redZone, End: r.End}, span.thread})
	}
	return more, nil
}

// words looks at every aligned 8-byte word.
func (s *interiorSet) words(b []byte, span stackSpan) error {
	skip := int(-uint64(span.Start) & 7)
	low, high := uint64(s.low), uint64(s.high)
	for i := skip; i+8 <= len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		if w < low || w > high || !s.has(target.Addr(w)) {
			continue
		}
		at := span.Start + target.Addr(i)
		return busy(at, "a frame of thread %d%s returns into the first bytes of %s", span.thread.ID, doing(span.thread), s.name(target.Addr(w)))
	}
	return nil
}

// merge joins overlapping spans: threads of a Go program share one mapping.
func merge(spans []stackSpan) []stackSpan {
	sortBy(spans, func(s stackSpan) target.Addr { return s.Start })
	out := spans[:1]
	for _, s := range spans[1:] {
		last := &out[len(out)-1]
		if s.Start <= last.End {
			last.End = max(last.End, s.End)
			continue
		}
		out = append(out, s)
	}
	return out
}

// remaining drops spans that were read already.
func remaining(more, done []stackSpan) []stackSpan {
	return slices.DeleteFunc(more, func(m stackSpan) bool {
		return slices.ContainsFunc(done, func(d stackSpan) bool { return m.Start >= d.Start && m.End <= d.End })
	})
}
