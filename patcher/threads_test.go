package patcher

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// inBase is a word of a scene: a place in the base.
func inBase(rva uint32) string { return fmt.Sprintf("base.dll!+0x%x", rva) }

// Places where a thread may stand, return to, or hold an address of, while f
// (interior f+1), g (filler before it) and h (interior h+5) are patched, and
// whether that is in the way.
var places = []struct {
	name string
	rva  uint32
	busy string // the function named; "" if it is not in the way
	pc   string // likewise for a thread that stands there, where that differs
}{
	{"elsewhere in the image", 0x1800, "", ""},
	{"before f", 0x13ff, "", ""},
	{"at f", 0x1400, "", ""},
	{"at f+1, an instruction", 0x1401, "f", "f"},
	{"at f+2, inside an instruction", 0x1402, "", "f"}, // nobody returns there; whoever stands there is misjudged by us
	{"at f+4, inside an instruction", 0x1404, "", "f"},
	{"at f+5, behind the jump", 0x1405, "", ""},
	{"at g", 0x1500, "", ""},
	{"at g+1, inside the first instruction", 0x1501, "", "g"},
	{"at g+2, behind the jump", 0x1502, "", ""},
	{"at the first byte of filler", 0x14fb, "g", "g"},
	{"at the last byte of filler", 0x14ff, "g", "g"},
	{"before the filler", 0x14fa, "", ""},
	{"at h", 0x1600, "", ""},
	{"at h, behind the landing pad", 0x1604, "", ""},
	{"at h+5", 0x1605, "h", "h"},
	{"at h+9, behind the jump", 0x1609, "", ""},
}

// ways in which a thread gets hold of a word.
var ways = []struct {
	name string
	make func(word string) sim.Thread
	pc   bool // it stands there
}{
	{"stands", func(w string) sim.Thread { return sim.Thread{PC: w} }, true},
	{"returns", func(w string) sim.Thread { return sim.Thread{Stack: []any{1, 2, w, 3}} }, false},
	{"returns from afar", func(w string) sim.Thread {
		deep := make([]any, 4000)
		deep[3999] = w
		return sim.Thread{Stack: deep}
	}, false},
	{"will jump through a register", func(w string) sim.Thread { return sim.Thread{Regs: map[string]any{"r11": w}} }, false},
	{"handles a signal, returns", func(w string) sim.Thread {
		return sim.Thread{AltStack: &sim.Signal{Stack: []any{1, w}}}
	}, false},
	{"was interrupted there", func(w string) sim.Thread {
		return sim.Thread{PC: w, AltStack: &sim.Signal{PC: inBase(0x1800)}}
	}, false},
	{"returns behind a signal", func(w string) sim.Thread {
		return sim.Thread{Stack: []any{7, w}, AltStack: &sim.Signal{PC: inBase(0x1800)}}
	}, false},
}

// Every way in which a thread can be at every place: in the way, named, and
// nothing is touched; or not in the way, and patched.
func TestThreadsInTheWay(t *testing.T) {
	for _, way := range ways {
		for _, place := range places {
			t.Run(way.name+" "+place.name, func(t *testing.T) {
				others := sim.Thread{State: "read"}
				mine := way.make(inBase(place.rva))
				mine.ID, mine.State = 107, "nanosleep"
				w := newWorld(t, func(p *sim.Process, _ *forge) { p.Threads = []sim.Thread{others, mine, others} })
				want := place.busy
				if way.pc {
					want = place.pc
				}
				plan := w.prepare(w.patch(1, "f", "g", "h"))
				for i, v := range []string{"f", "g", "h"} { // the forged image has no names
					plan.Sites[i].Function = v
				}
				rec, err := w.x.Apply(context.Background(), w.p, plan)
				if want == "" {
					if err != nil || w.all() != "111b" {
						t.Fatalf("%v, %s", err, w.all())
					}
				} else {
					r := refusal(t, err, Busy, "thread")
					if !strings.Contains(r.Text, "107") || !strings.HasSuffix(strings.TrimSuffix(r.Text, " (nanosleep)"), want) || !strings.Contains(r.Text, "nanosleep") {
						t.Errorf("%q names neither thread 107 in nanosleep nor %s", r.Text, want)
					}
					if rec.State != Staged || rec.Attempts != 3 || w.sleeps != 2 || w.all() != "bbbb" {
						t.Errorf("%s after %d attempts and %d waits, %s", rec.State, rec.Attempts, w.sleeps, w.all())
					}
					if !slices.Equal(w.log, []State{Staging, Staged, Swapping, Staged}) {
						t.Errorf("journaled %v", w.log)
					}
				}
				w.sound()
			})
		}
	}
}

// A thread that leaves while we wait is not in the way of the next attempt.
func TestThreadLeavesMeanwhile(t *testing.T) {
	w := newWorld(t, func(p *sim.Process, _ *forge) { p.Threads = []sim.Thread{{ID: 107, PC: inBase(0x1401)}} })
	w.slept = func() {
		if err := w.m.MoveThread(pid, 107, inBase(0x1800)); err != nil {
			t.Error(err)
		}
	}
	rec := w.apply(w.patch(1, "f"))
	if rec.Attempts != 2 || w.sleeps != 1 || w.all() != "1bbb" {
		t.Errorf("%d attempts, %d waits, %s", rec.Attempts, w.sleeps, w.all())
	}
	if want := []State{Staging, Staged, Swapping, Applied}; !slices.Equal(w.log, want) {
		t.Errorf("journaled %v, want %v", w.log, want)
	}
	w.sound()
}

// The next Apply uses the annex that waits.
func TestBusyAnnexIsUsedAgain(t *testing.T) {
	w := newWorld(t, func(p *sim.Process, _ *forge) { p.Threads = []sim.Thread{{ID: 107, PC: inBase(0x1401)}} })
	p := w.patch(1, "f", "g")
	rec, err := w.x.Apply(context.Background(), w.p, w.prepare(p))
	refusal(t, err, Busy, "thread")
	if err := w.m.MoveThread(pid, 107, inBase(0x1800)); err != nil {
		t.Fatal(err)
	}
	plan := w.prepare(p)
	if !plan.Reused || plan.Annex != rec.Annex {
		t.Errorf("the annex at %s is not used again: %v, %s", rec.Annex, plan.Reused, plan.Annex)
	}
	if _, err := w.x.Apply(context.Background(), w.p, plan); err != nil || w.all() != "11bb" {
		t.Errorf("%v, %s", err, w.all())
	}
	w.sound()
}

// The caller's end of waiting is the end of waiting.
func TestBusyUntilCancelled(t *testing.T) {
	w := newWorld(t, func(p *sim.Process, _ *forge) { p.Threads = []sim.Thread{{ID: 107, PC: inBase(0x1401)}} })
	ctx, cancel := context.WithCancel(context.Background())
	w.x.Sleep = func(ctx context.Context, _ time.Duration) error { cancel(); return ctx.Err() }
	w.x.Attempts = 1000
	rec, err := w.x.Apply(ctx, w.p, w.prepare(w.patch(1, "f")))
	if refusal(t, err, Busy, "thread"); rec.State != Staged || rec.Attempts != 1 {
		t.Errorf("%s, %d attempts", rec.State, rec.Attempts)
	}
	rec, err = w.x.Apply(ctx, w.p, w.prepare(w.patch(1, "f")))
	if refusal(t, err, Busy, "freeze"); rec.State != Staged {
		t.Errorf("with a context that is over: %s", rec.State)
	}
	w.sound()
}

// Where nothing stands inside, nothing is asked of the stacks: a site of one
// instruction, an undo, a sequence that replaces another.
func TestNoInteriorNoStackCheck(t *testing.T) {
	w := newWorld(t)
	w.apply(w.patch(1, "f", "g", "h", "r"))
	// Words that were interior before are so no more; filler that is written
	// again, with the new jump, is.
	for i, rva := range []uint32{0x1401, 0x1404, 0x1500, 0x1605} {
		if _, err := w.m.StartThread(pid, sim.Thread{ID: 110 + i, Stack: []any{inBase(rva)}}); err != nil {
			t.Fatal(err)
		}
	}
	rec := w.apply(w.patch(2, "f", "g", "h", "r"))
	if w.all() != "2222" {
		t.Fatal(w.all())
	}
	w.undo(rec)
	if w.all() != "bbbb" {
		t.Fatal(w.all())
	}
	w.sound()
}

// A thread that stands inside the bytes of a jump of ours, which none ever
// does, is not ignored.
func TestUndoUnderThread(t *testing.T) {
	w := newWorld(t)
	rec := w.apply(w.patch(1, "f"))
	if _, err := w.m.StartThread(pid, sim.Thread{ID: 107, PC: inBase(0x1402)}); err != nil {
		t.Fatal(err)
	}
	back, err := w.x.Undo(context.Background(), w.p, rec)
	refusal(t, err, Busy, "thread")
	if back.State != Applied || w.all() != "1bbb" {
		t.Errorf("%s, %s", back.State, w.all())
	}
	if err := w.m.MoveThread(pid, 107, inBase(0x1800)); err != nil {
		t.Fatal(err)
	}
	w.undo(back)
	w.sound()
}

// fake is a Frozen for threads a simulated machine does not make.
type fake struct {
	target.Frozen
	threads     []target.Thread
	interrupted map[target.Addr][]target.Addr // by start of the span read
}

func (f *fake) Threads() ([]target.Thread, error) { return f.threads, nil }
func (f *fake) Interrupted(b []byte, at target.Addr) (list []target.Addr) {
	for start, sp := range f.interrupted {
		if start >= at && start < at+target.Addr(len(b)) {
			list = append(list, sp...)
		}
	}
	return list
}

// space is memory in pieces.
type space struct {
	target.Process
	pieces map[target.Addr][]byte
	fail   map[target.Addr]int // the next reads that begin there
	read   int
}

func (s *space) ReadAt(p []byte, at target.Addr) (int, error) {
	s.read += len(p)
	if s.fail[at] > 0 {
		s.fail[at]--
		return 0, errors.New("not this time")
	}
	for start, b := range s.pieces {
		if at >= start && at < start+target.Addr(len(b)) {
			if n := copy(p, b[at-start:]); n == len(p) {
				return n, nil
			}
		}
	}
	return 0, &target.Error{Op: "read", At: at, Err: errors.New("unmapped")}
}

func (s *space) regions() []target.Region {
	var list []target.Region
	for start, b := range s.pieces {
		list = append(list, target.Region{Start: start, End: start + target.Addr(len(b)), Prot: target.Read | target.Write})
	}
	sortBy(list, func(r target.Region) target.Addr { return r.Start })
	return list
}

func (s *space) put(at target.Addr, word uint64) {
	for start, b := range s.pieces {
		if at >= start && at < start+target.Addr(len(b)) {
			lay(b, int(at-start), word)
			return
		}
	}
	panic("no such place")
}

// The stacks themselves: what is read of them, and what is not.
func TestStacks(t *testing.T) {
	const hit, site = 0x7001, 0x7000 // an interior address, and its site
	const low, high = 0x10000, 0x900000
	thread := func(id int, sp target.Addr, end target.Addr) target.Thread {
		return target.Thread{ID: id, PC: 0x5000, SP: sp, Stack: target.Span{Start: sp, End: end}, State: "read"}
	}
	for _, c := range []struct {
		name    string
		threads []target.Thread
		words   map[target.Addr]uint64
		frames  map[target.Addr][]target.Addr
		fail    map[target.Addr]int
		busy    string // "" is not in the way; else what the refusal says
	}{
		{"nothing", []target.Thread{thread(1, low+0x800, low+0x4000)}, nil, nil, nil, ""},
		{"a word", []target.Thread{thread(1, low+0x800, low+0x4000)}, map[target.Addr]uint64{low + 0x3ff8: hit}, nil, nil, "thread 1"},
		{"a word at the stack pointer", []target.Thread{thread(1, low+0x800, low+0x4000)}, map[target.Addr]uint64{low + 0x800: hit}, nil, nil, "thread 1"},
		{"a word in the red zone", []target.Thread{thread(1, low+0x800, low+0x4000)}, map[target.Addr]uint64{low + 0x780: hit}, nil, nil, "thread 1"},
		{"a word below the red zone", []target.Thread{thread(1, low+0x800, low+0x4000)}, map[target.Addr]uint64{low + 0x778: hit}, nil, nil, ""},
		{"not a word", []target.Thread{thread(1, low+0x800, low+0x4000)}, map[target.Addr]uint64{low + 0xa04: hit}, nil, nil, ""},
		{"a word of an odd stack", []target.Thread{thread(1, low+0x804, low+0x4000)}, map[target.Addr]uint64{low + 0xa04: hit}, nil, nil, "thread 1"},
		{"of the odd one of two", []target.Thread{thread(1, low+0x804, low+0x4000), thread(2, low+0x1000, low+0x4000)}, map[target.Addr]uint64{low + 0xa04: hit}, nil, nil, "thread 1"},
		{"where two stacks meet", []target.Thread{thread(1, low+0x800, low+0x4000), thread(2, low+0x1003, low+0x4000)}, map[target.Addr]uint64{low + 0x1003 - 128 - 3 - 4 + 4: hit}, nil, nil, "thread"},
		{"the stack of the second", []target.Thread{thread(1, low+0x800, low+0x4000), thread(2, low+0x2000, low+0x4000)}, map[target.Addr]uint64{low + 0x2008: hit}, nil, nil, "thread 2"},
		{"of the first, below the second", []target.Thread{thread(1, low+0x800, low+0x4000), thread(2, low+0x2000, low+0x4000)}, map[target.Addr]uint64{low + 0x1f00: hit}, nil, nil, "thread 1"},
		{"a stack at the start of its mapping", []target.Thread{thread(1, low, low+0x4000)}, map[target.Addr]uint64{low + 8: hit}, nil, nil, "thread 1"},
		{"nearly at the start", []target.Thread{thread(1, low+0x40, low+0x4000)}, map[target.Addr]uint64{low + 8: hit}, nil, nil, "thread 1"},
		{"a stack at its end", []target.Thread{thread(1, low+0x4000-8, low+0x4000)}, map[target.Addr]uint64{low + 0x3ff8: hit}, nil, nil, "thread 1"},
		{"a read that fails once", []target.Thread{thread(1, low+0x800, low+0x4000)}, nil, nil, map[target.Addr]int{low + 0x780: 1}, "error"},
		{"nowhere", []target.Thread{{ID: 1, SP: 0x40}}, nil, nil, nil, "outside any memory"},
		{"behind a frame", []target.Thread{thread(1, high+0x800, high+0x1000)}, map[target.Addr]uint64{low + 0x2000: hit}, map[target.Addr][]target.Addr{high + 0x900: {low + 0x1800}}, nil, "thread 1"},
		{"below a frame", []target.Thread{thread(1, high+0x800, high+0x1000)}, map[target.Addr]uint64{low + 0x1700: hit}, map[target.Addr][]target.Addr{high + 0x900: {low + 0x1800}}, nil, ""},
		{"behind two frames", []target.Thread{thread(1, high+0x800, high+0x1000)}, map[target.Addr]uint64{0x80008: hit}, map[target.Addr][]target.Addr{high + 0x900: {low + 0x1800}, low + 0x1900: {0x80000}}, nil, "thread 1"},
		{"frames in a circle", []target.Thread{thread(1, high+0x800, high+0x1000)}, nil, map[target.Addr][]target.Addr{high + 0x900: {low + 0x1800}, low + 0x1900: {high + 0x880}}, nil, ""},
		{"a frame to nowhere", []target.Thread{thread(1, high+0x800, high+0x1000)}, nil, map[target.Addr][]target.Addr{high + 0x900: {0x40}}, nil, "cannot be found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &space{fail: c.fail, pieces: map[target.Addr][]byte{low: make([]byte, 0x4000), 0x80000: make([]byte, 0x1000), high: make([]byte, 0x1000)}}
			for at, v := range c.words {
				s.put(at, v)
			}
			ch := change{writes: []write{{site, make([]byte, 5), make([]byte, 5), "victim"}}, interior: []target.Addr{hit}}
			err := checkThreads(s, &fake{threads: c.threads, interrupted: c.frames}, ch, s.regions())
			switch {
			case c.busy == "error":
				if err == nil || errors.Is(err, target.ErrBusy) {
					t.Errorf("%v, want an error that is not about threads", err)
				}
			case c.busy == "":
				if err != nil {
					t.Error(err)
				}
			default:
				if r := refusal(t, err, Busy, "thread"); !strings.Contains(r.Text, c.busy) {
					t.Errorf("%q, want %q", r.Text, c.busy)
				}
			}
			if s.read > 1<<20 {
				t.Errorf("%d bytes read", s.read)
			}
		})
	}
}

// What is too deep to be read while everybody stands is busy, not skipped.
func TestDeepStack(t *testing.T) {
	const low = 0x100000
	s := &space{pieces: map[target.Addr][]byte{low: make([]byte, maxStacks+2*target.PageSize)}}
	end := target.Addr(low + maxStacks + 2*target.PageSize)
	deep := target.Thread{ID: 1, SP: low + 0x800, Stack: target.Span{Start: low + 0x800, End: end}}
	ch := change{interior: []target.Addr{0x7001}}
	err := checkThreads(s, &fake{threads: []target.Thread{deep}}, ch, s.regions())
	if r := refusal(t, err, Busy, "thread"); !strings.Contains(r.Text, "too deep") {
		t.Error(r)
	}
	if s.read > maxStacks {
		t.Errorf("%d bytes read", s.read)
	}
	deep.Stack.Start = low + 4*target.PageSize
	deep.SP = deep.Stack.Start
	if err := checkThreads(s, &fake{threads: []target.Thread{deep}}, ch, s.regions()); err != nil {
		t.Errorf("as deep as allowed: %v", err)
	}
}
