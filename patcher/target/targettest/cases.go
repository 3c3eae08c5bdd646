package targettest

import (
	"context"
	"errors"
	"slices"
	"time"

	"hotpatchd/patcher/target"
)

// cases in the order they run: what is simple first, since a backend that
// cannot list or read fails everything after it.
func cases() []testCase {
	return slices.Concat(listCases, memoryCases, freezeCases, codeCases, lifeCases)
}

// pageSize as an Addr calculates with.
const pageSize = target.PageSize

// info is what the backend lists of the victim.
func (e *env) info(v Victim) target.Info {
	e.Helper()
	i, ok := e.listed(v.PID())
	if !ok {
		e.Fatalf("List does not tell of process %d", v.PID())
	}
	return i
}

func (e *env) listed(pid int) (target.Info, bool) {
	e.Helper()
	list, err := e.Backend.List(context.Background())
	if err != nil {
		e.Fatalf("List: %v", err)
	}
	i := slices.IndexFunc(list, func(i target.Info) bool { return i.PID == pid })
	if i < 0 {
		return target.Info{}, false
	}
	return list[i], true
}

func (e *env) open(v Victim) target.Process {
	e.Helper()
	p, err := e.Backend.Open(context.Background(), e.info(v).ID)
	if err != nil {
		e.Fatalf("Open: %v", err)
	}
	e.Cleanup(func() { p.Close() })
	return p
}

// freeze freezes, or fails. A busy answer is taken for a loaded machine, as
// the patcher takes it, and tried again for a while.
func (e *env) freeze(p target.Process) target.Frozen {
	e.Helper()
	var f target.Frozen
	e.until("Freeze", func() bool {
		// The context outlives the helper and every wait: its end would thaw.
		ctx, cancel := context.WithTimeout(context.Background(), 10*e.patience())
		e.Cleanup(cancel)
		var err error
		if f, err = p.Freeze(ctx); err == nil {
			return true
		}
		if !errors.Is(err, target.ErrBusy) {
			e.Fatalf("Freeze: %v", err)
		}
		return false
	})
	return f
}

func (e *env) thaw(f target.Frozen) {
	e.Helper()
	if err := f.Thaw(); err != nil {
		e.Fatalf("Thaw: %v", err)
	}
}

// must fails the case for an error.
func (e *env) must(op string, err error) {
	e.Helper()
	if err != nil {
		e.Fatalf("%s: %v", op, err)
	}
}

// wantErr checks the kind of an error.
func (e *env) wantErr(op string, err error, kinds ...error) {
	e.Helper()
	if !slices.ContainsFunc(kinds, func(k error) bool { return errors.Is(err, k) }) {
		e.Errorf("%s: got error %v, want %v", op, err, kinds)
	}
}

// regions lists a process's regions, or fails.
func (e *env) regions(p target.Process) []target.Region {
	e.Helper()
	list, err := p.Regions()
	e.must("Regions", err)
	return list
}

// region is the one that holds a.
func region(list []target.Region, a target.Addr) (target.Region, bool) {
	i := slices.IndexFunc(list, func(r target.Region) bool { return a >= r.Start && a < r.End })
	if i < 0 {
		return target.Region{}, false
	}
	return list[i], true
}

// gap finds n free bytes as the planner would: in a hole between two mappings,
// near the victim's code, with margin bytes free on both sides.
func (e *env) gap(p target.Process, near target.Addr, n uint64) target.Addr {
	e.Helper()
	const grain, margin = 64 << 10, 64 << 10
	need := target.Addr(n) + 2*margin + 2*grain
	best, found := target.Addr(0), false
	last := target.Addr(grain)
	for _, r := range append(e.regions(p), target.Region{Start: 0x7fff_0000_0000}) {
		if r.Start > last && r.Start-last >= need {
			low := (last + margin + grain - 1) &^ (grain - 1)
			high := (r.Start - target.Addr(n) - margin) &^ (grain - 1)
			for _, at := range []target.Addr{low, high} {
				if !found || apart(at, near) < apart(best, near) {
					best, found = at, true
				}
			}
		}
		last = max(last, r.End)
	}
	if !found {
		e.Fatalf("no gap of %d bytes in %d regions", n, len(e.regions(p)))
	}
	return best
}

func apart(a, b target.Addr) target.Addr { return max(a, b) - min(a, b) }

// standstill fails if the victim runs: it asks twice, doing something meanwhile.
func (e *env) standstill(v Victim, p target.Process) {
	e.Helper()
	before, err := v.Calls()
	e.must("Calls", err)
	at, _ := v.Code()
	var b [16]byte
	for range 50 {
		if _, err := p.ReadAt(b[:], at); err != nil {
			e.Fatalf("ReadAt while frozen: %v", err)
		}
		time.Sleep(time.Millisecond) // time in which a running victim would be seen to run
	}
	after, err := v.Calls()
	e.must("Calls", err)
	if after != before {
		e.Errorf("the victim made %d calls while it was frozen", after-before)
	}
}

// runs waits until the victim has made further calls.
func (e *env) runs(v Victim) {
	e.Helper()
	before, err := v.Calls()
	e.must("Calls", err)
	e.until("the victim runs", func() bool {
		now, err := v.Calls()
		e.must("Calls", err)
		return now > before
	})
}

// until waits for a condition, at most Patience.
func (e *env) until(what string, ok func() bool) {
	e.Helper()
	for end := time.Now().Add(e.patience()); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			e.Fatalf("waited %v in vain: %s", e.patience(), what)
		}
	}
}

func (e *env) patience() time.Duration {
	if e.Patience > 0 {
		return e.Patience
	}
	return Patience
}
