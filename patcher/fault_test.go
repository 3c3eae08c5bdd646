package patcher

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// mortal is a process as a program sees it that dies at a fault: after its
// death nothing it does counts, the journal least of all.
type mortal struct {
	target.Process
	dead *bool
}

func (m mortal) see(err error) error {
	if errors.Is(err, sim.ErrDied) {
		*m.dead = true
	}
	return err
}

func (m mortal) ReadAt(p []byte, at target.Addr) (int, error) {
	n, err := m.Process.ReadAt(p, at)
	return n, m.see(err)
}
func (m mortal) WriteAt(p []byte, at target.Addr) (int, error) {
	n, err := m.Process.WriteAt(p, at)
	return n, m.see(err)
}
func (m mortal) Flush(at target.Addr, n int) error { return m.see(m.Process.Flush(at, n)) }
func (m mortal) Regions() ([]target.Region, error) {
	r, err := m.Process.Regions()
	return r, m.see(err)
}
func (m mortal) Alloc(at target.Addr, size uint64, prot target.Prot) error {
	return m.see(m.Process.Alloc(at, size, prot))
}
func (m mortal) Free(at target.Addr, size uint64) error { return m.see(m.Process.Free(at, size)) }
func (m mortal) Freeze(ctx context.Context) (target.Frozen, error) {
	f, err := m.Process.Freeze(ctx)
	if m.see(err) != nil {
		return nil, err
	}
	return mortalFrozen{f, m}, nil
}

type mortalFrozen struct {
	target.Frozen
	m mortal
}

func (f mortalFrozen) Threads() ([]target.Thread, error) {
	t, err := f.Frozen.Threads()
	return t, f.m.see(err)
}
func (f mortalFrozen) Thaw() error { return f.m.see(f.Frozen.Thaw()) }
func (f mortalFrozen) Interrupted(b []byte, at target.Addr) []target.Addr {
	return f.Frozen.(target.Interrupter).Interrupted(b, at)
}

// task is one thing that the patcher does, and how memory is before and after it.
type task struct {
	name          string
	before, after string
	// begin brings the world to before, and gives what is then to be done.
	begin func(w *world) func() (Record, error)
	done  State // of the record, where memory is as after
}

var tasks = []task{
	{"apply", "bbbb", "1111", func(w *world) func() (Record, error) {
		p := w.patch(1, "f", "g", "h", "r")
		return func() (Record, error) { return w.bring(p) }
	}, Applied},
	{"apply again", "bbbb", "1111", func(w *world) func() (Record, error) {
		p := w.patch(1, "f", "g", "h", "r")
		w.undo(w.apply(p))
		return func() (Record, error) { return w.bring(p) }
	}, Applied},
	{"replace", "1111", "22bb", func(w *world) func() (Record, error) {
		w.apply(w.patch(1, "f", "g", "h", "r"))
		p := w.patch(2, "f", "g")
		return func() (Record, error) { return w.bring(p) }
	}, Applied},
	{"undo", "1111", "bbbb", func(w *world) func() (Record, error) {
		rec := w.apply(w.patch(1, "f", "g", "h", "r"))
		return func() (Record, error) { return w.x.Undo(context.Background(), w.p, rec) }
	}, Undone},
	{"undo a replacement", "22bb", "bbbb", func(w *world) func() (Record, error) {
		w.apply(w.patch(1, "f", "g", "h", "r"))
		rec := w.apply(w.patch(2, "f", "g"))
		return func() (Record, error) { return w.x.Undo(context.Background(), w.p, rec) }
	}, Undone},
	{"adopt", "1111", "1111", func(w *world) func() (Record, error) {
		p := w.patch(1, "f", "g", "h", "r")
		w.apply(p)
		w.durable = Record{}
		return func() (Record, error) { return w.x.Adopt(context.Background(), w.p, w.base, p) }
	}, Applied},
	{"recover", "mixed", "bbbb", func(w *world) func() (Record, error) {
		rec := w.halfway(w.patch(1, "f", "g", "h", "r"))
		return func() (Record, error) { return w.x.Recover(context.Background(), w.p, rec) }
	}, Gave},
	{"recover a replacement", "mixed", "1111", func(w *world) func() (Record, error) {
		w.apply(w.patch(1, "f", "g", "h", "r"))
		rec := w.halfway(w.patch(2, "f", "g"))
		return func() (Record, error) { return w.x.Recover(context.Background(), w.p, rec) }
	}, Gave},
	{"recover an undo", "mixed", "bbbb", func(w *world) func() (Record, error) {
		rec := w.apply(w.patch(1, "f", "g", "h", "r"))
		w.poke(rec.Sites[0].At, rec.Sites[0].Original)
		w.poke(rec.Sites[2].At, rec.Sites[2].Original)
		rec.State, w.durable.State = Undoing, Undoing
		return func() (Record, error) { return w.x.Recover(context.Background(), w.p, rec) }
	}, Undone},
}

// bring prepares and applies.
func (w *world) bring(p *Patch) (Record, error) {
	plan, err := Prepare(w.p, w.base, p)
	if err != nil {
		return Record{}, err
	}
	return w.x.Apply(context.Background(), w.p, plan)
}

func (w *world) poke(at target.Addr, b []byte) {
	w.t.Helper()
	if err := w.m.Poke(pid, at, b); err != nil {
		w.t.Fatal(err)
	}
}

// halfway leaves a swap as our death between two writes would.
func (w *world) halfway(p *Patch) Record {
	w.t.Helper()
	before := w.m.Count(sim.OpWrite)
	plan := w.prepare(p)
	w.m.FailAt(len(plan.parts)+len(forward(&plan.Record).writes)-1, sim.Fault{Op: sim.OpWrite, Do: sim.Die, Bytes: 0})
	dead := false
	journal := w.x.Journal
	w.x.Journal = func(r Record) error {
		if dead {
			return nil
		}
		return journal(r)
	}
	_, err := w.x.Apply(context.Background(), mortal{w.p, &dead}, plan)
	if !errors.Is(err, sim.ErrDied) && !strings.Contains(fmt.Sprint(err), sim.ErrDied.Error()) {
		w.t.Fatalf("death did not come after %d writes: %v", w.m.Count(sim.OpWrite)-before, err)
	}
	w.x.Journal = journal
	w.m.ClearFaults()
	w.m.Revive()
	w.open()
	if w.durable.State != Swapping {
		w.t.Fatalf("died in state %s", w.durable.State)
	}
	if m, err := standing(w.p, w.durable); err != nil || m.new || m.prev {
		w.t.Fatalf("not halfway: %+v, %v", m, err)
	}
	return w.durable
}

// is tells whether memory is as said; "mixed" is anything.
func (w *world) is(want string) bool { return want == "mixed" || w.all() == want }

// effects strike each operation in turn.
var effects = []sim.Fault{
	{Do: sim.Fail},
	{Do: sim.Fail, Times: 2},
	{Do: sim.Busy},
	{Do: sim.Taken},
	{Do: sim.Deny},
	{Do: sim.DenyRest},
	{Do: sim.Exit},
	{Do: sim.Exec},
	{Do: sim.Die},
	{Do: sim.Unload, Module: "base.dll"},
	{Do: sim.Fail, Op: sim.OpThaw, Times: -1},
	{Do: sim.Short, Op: sim.OpRead, Bytes: 1},
	{Do: sim.Short, Op: sim.OpWrite, Bytes: 1},
	{Do: sim.Torn, Op: sim.OpWrite, Bytes: 1},
	{Do: sim.Torn, Op: sim.OpWrite, Bytes: 4, Times: 2},
	{Do: sim.LieRead, Op: sim.OpRead},
	{Do: sim.LieWrite, Op: sim.OpWrite},
	{Do: sim.Die, Op: sim.OpWrite, Bytes: 1},
	{Do: sim.Die, Op: sim.OpWrite, Bytes: 3},
	{Do: sim.Fail, Op: sim.OpWrite, Times: -1},
	{Do: sim.Fail, Op: sim.OpFlush, Times: -1},
}

func describe(f sim.Fault) string {
	s := string(f.Do)
	if f.Op != "" {
		s += " " + string(f.Op)
	}
	if f.Bytes > 0 {
		s += fmt.Sprintf(" after %d bytes", f.Bytes)
	}
	switch f.Times {
	case 0:
	case -1:
		s += " for ever"
	default:
		s += fmt.Sprintf(" %d times", f.Times)
	}
	return s
}

// Operation 1, 2, 3, … of everything the patcher does goes wrong, in every way.
func TestFaultSweep(t *testing.T) {
	t.Parallel()
	for _, task := range tasks {
		for _, fault := range effects {
			t.Run(task.name+"/"+describe(fault), func(t *testing.T) {
				t.Parallel()
				k := 1
				step := 3 // of some hundred operations; each one where everything is tested
				if testing.Short() {
					step = 7
				}
				if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
					step = 1
				}
				for ; strike(t, task, fault, k); k += step {
				}
				if k < 2 && fault.Op == "" {
					t.Error("nothing was struck")
				}
			})
		}
	}
}

// strike lets the fault strike the k-th operation; false if there are not so many.
func strike(t *testing.T, task task, fault sim.Fault, k int) bool {
	t.Helper()
	w := newWorld(t)
	do := task.begin(w)
	if !w.is(task.before) {
		t.Fatalf("before: %s", w.all())
	}
	dead, ops := false, 0
	w.p = mortal{w.p, &dead}
	journal := w.x.Journal
	w.x.Journal = func(r Record) error {
		if dead {
			return nil
		}
		return journal(r)
	}
	count := func() int {
		if fault.Op == "" {
			return w.m.Ops()
		}
		return w.m.Count(fault.Op)
	}
	ops = count()
	w.m.FailAt(k, fault)
	rec, err := do()
	struck := count()-ops >= k
	for end := time.Now().Add(10 * time.Second); w.m.Stopped(pid) && time.Now().Before(end); time.Sleep(time.Millisecond) {
		// The end of a context releases them, in its own time.
	}
	stopped := w.m.Stopped(pid)
	w.m.ClearFaults()
	w.x.Journal = journal
	at := fmt.Sprintf("%s, %s at %d: %s, %v", task.name, describe(fault), k, rec.State, err)
	if stopped {
		t.Fatalf("%s: threads are held", at)
	}
	switch fault.Do {
	case sim.Die:
		w.m.Revive()
		w.open()
		rec, err = w.x.Recover(context.Background(), w.p, w.durable)
		at += fmt.Sprintf("; recovered to %s, %v", rec.State, err)
		if w.durable.State == "" {
			rec.State = "" // nothing had begun
		} else if err != nil {
			t.Fatal(at)
		}
	case sim.DenyRest:
		if err := w.m.Deny(pid, false); err != nil {
			t.Fatal(err)
		}
		w.open()
		if rec.State == TornUp {
			// Nothing could be written or flushed any more: this is the tear that cannot be helped.
			if rec, err = w.x.Recover(context.Background(), w.p, rec); err != nil || w.all() != task.before && w.all() != task.after && w.all() != "1111" {
				t.Errorf("%s; recovered to %s, %v: %s", at, rec.State, err, w.all())
			}
			return struck
		}
		if rec.Live() || rec.State == Staged { // what the caller does next
			rec, err = w.x.Recover(context.Background(), w.p, rec)
			at += fmt.Sprintf("; recovered to %s, %v", rec.State, err)
		}
	case sim.Exit, sim.Exec:
		if struck && !errors.Is(err, target.ErrGone) && err != nil {
			t.Errorf("%s: want ErrGone", at)
		}
		if struck && err != nil && rec.State != "" && rec.State != Lost && rec.State != w.durable.State {
			t.Errorf("%s: want lost", at)
		}
		if fault.Do == sim.Exec {
			w.sound() // the new life is untouched
		}
		return struck
	case sim.Unload:
		if struck && err == nil {
			// It went after all was done.
			return struck
		}
		if struck && rec.State != "" && rec.State != Lost && rec.State != Staged && rec.State != Gave && !(task.name != "apply" && rec.State == w.durable.State) {
			t.Errorf("%s: want lost", at)
		}
		if rec.State == TornUp {
			t.Errorf("%s: an image that is gone is not torn", at)
		}
		return struck
	}
	if rec.State == TornUp {
		r := refusal(t, err, Torn, "torn")
		if fault.Times != -1 || r.Remedy != RestartProcess {
			t.Errorf("%s: torn by a fault that passes", at)
		}
		// The writes work again: what was torn can be recovered, or is named.
		if rec, err = w.x.Recover(context.Background(), w.p, rec); err == nil && !w.is(task.before) && !w.is(task.after) && !w.is("1111") {
			t.Errorf("%s; recovered to %s: %s", at, rec.State, w.all())
		}
		return struck
	}
	w.sound()
	if err == nil && struck && rec.State != task.done && fault.Do != sim.Die && fault.Do != sim.DenyRest {
		t.Errorf("%s: no error, and not done", at)
	}
	have := w.all()
	if task.before == "mixed" {
		if err == nil && have != task.after {
			t.Errorf("%s: %s", at, have)
		}
	} else if have != task.before && have != task.after {
		t.Fatalf("%s: %s, neither %s nor %s", at, have, task.before, task.after)
	}
	w.agrees(at, task, rec, have)
	// What the journal holds leads to the same, whatever it was told last.
	if w.durable.State != "" {
		again, err := w.x.Recover(context.Background(), w.p, w.durable)
		if err != nil {
			t.Fatalf("%s; recover the journal's %s: %v", at, w.durable.State, err)
		}
		at += fmt.Sprintf("; the journal's record recovered to %s", again.State)
		w.sound()
		have = w.all()
		w.agrees(at, task, again, have)
	}
	if have != task.after && have != task.before {
		t.Fatalf("%s: %s", at, have)
	}
	// And once more, with nothing in the way.
	if slices.Contains([]string{"apply", "apply again", "replace"}, task.name) && have == task.before {
		seq := uint32(1)
		names := []string{"f", "g", "h", "r"}
		if task.name == "replace" {
			seq, names = 2, names[:2]
		}
		if _, err := w.bring(w.patch(seq, names...)); err != nil || !w.is(task.after) {
			t.Errorf("%s; once more: %v, %s", at, err, w.all())
		}
		w.sound()
	}
	return struck
}

// agrees checks a record's word on memory.
func (w *world) agrees(at string, task task, rec Record, have string) {
	w.t.Helper()
	want := ""
	switch rec.State {
	case Applied:
		want = task.after
		if task.done != Applied || task.name == "replace" && rec.Sequence == 1 {
			want = task.before
		}
	case Undone:
		want = "bbbb"
	case Gave, Staged:
		want = task.before
		if task.done == Undone && rec.State == Gave { // torn, and then mended
			want = "bbbb"
			if rec.Previous != nil {
				want = "1111"
			}
		}
		if task.before == "mixed" {
			want = task.after
		}
	case Lost:
		if !strings.Contains(at, string(sim.LieRead)) { // what a lie makes us let go of can be adopted again
			w.t.Errorf("%s: lost, and it is there", at)
		}
		return
	default:
		return // the journal has not come so far
	}
	if have != want && want != "mixed" {
		w.t.Errorf("%s: the record says %s, and memory is %s", at, rec.State, have)
	}
}

// The journal fails at its first, second, third call.
func TestJournalFails(t *testing.T) {
	for _, task := range tasks {
		t.Run(task.name, func(t *testing.T) {
			for k := 1; ; k++ {
				w := newWorld(t)
				do := task.begin(w)
				w.log, w.refuse = nil, k
				rec, err := do()
				if len(w.log) < k {
					if err != nil {
						t.Errorf("with a journal that works: %v", err)
					}
					return
				}
				at := fmt.Sprintf("%s, call %d of the journal: %s, %v", task.name, k, rec.State, err)
				if err == nil || !strings.Contains(err.Error(), "disk full") {
					t.Errorf("%s: not told", at)
				}
				w.sound()
				have := w.all()
				w.agrees(at, task, rec, have)
				// Before an effect, nothing of it has happened.
				next := w.log[k-1]
				if (next == Swapping || next == Undoing || next == Staging) && !w.is(task.before) {
					t.Errorf("%s: an effect without a journal: %s", at, have)
				}
				if w.durable.State == "" {
					continue
				}
				if rec, err = w.x.Recover(context.Background(), w.p, w.durable); err != nil {
					t.Errorf("%s; recover: %v", at, err)
				}
				w.agrees(at+"; recovered", task, rec, w.all())
			}
		})
	}
}
