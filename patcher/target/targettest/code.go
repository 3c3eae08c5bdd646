package targettest

import (
	"bytes"

	"hotpatchd/patcher/target"
)

var codeCases = []testCase{
	{"a swap changes what runs, and back", swapAndBack},
	{"swap again and again", swapTorture},
	{"forked child keeps its own code", forkCode},
}

// swap writes one form of the code instead of the other under a freeze.
func (e *env) swap(p target.Process, at target.Addr, from, to []byte) {
	e.Helper()
	f := e.freeze(p)
	got := make([]byte, len(from))
	if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, from) {
		e.Errorf("before the swap: % x, %v; want % x", got, err, from)
	}
	if _, err := p.WriteAt(to, at); err != nil {
		e.Errorf("WriteAt: %v", err)
	}
	e.must("Flush", p.Flush(at, len(to)))
	if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, to) {
		e.Errorf("after the swap: % x, %v; want % x", got, err, to)
	}
	e.thaw(f)
}

// becomes waits until the victim's code returns want: threads may be between
// the call and the telling of its value.
func (e *env) becomes(v Victim, want int) {
	e.Helper()
	got := 0
	defer func() {
		if got != want {
			e.Logf("the value is %d, want %d", got, want)
		}
	}()
	e.until("the value changes", func() bool {
		var err error
		got, err = v.Value()
		e.must("Value", err)
		return got == want
	})
}

func swapAndBack(e *env) {
	v := e.start(Want{Threads: 4, Blocked: 1})
	s := able[Swapper](e, v).Swap()
	p := e.open(v)
	e.becomes(v, s.OldValue)
	e.swap(p, s.At, s.Old, s.New)
	e.becomes(v, s.NewValue)
	e.swap(p, s.At, s.New, s.Old)
	e.becomes(v, s.OldValue)
}

func swapTorture(e *env) {
	// More running threads than processors: the most effective race test there is.
	v := e.start(Want{Threads: 8})
	s := able[Swapper](e, v).Swap()
	p := e.open(v)
	for range 60 {
		e.swap(p, s.At, s.Old, s.New)
		e.swap(p, s.At, s.New, s.Old)
		if got, err := v.Value(); err != nil || got != s.OldValue && got != s.NewValue {
			e.Fatalf("value %d, %v", got, err)
		}
	}
	e.becomes(v, s.OldValue)
	e.runs(v)
}

func forkCode(e *env) {
	v := e.start(Want{})
	s := able[Swapper](e, v).Swap()
	fk := able[Forker](e, v)
	p := e.open(v)
	e.swap(p, s.At, s.Old, s.New)
	e.becomes(v, s.NewValue)
	c, err := fk.Fork()
	e.absent(err)
	e.becomes(c, s.NewValue)
	// The child keeps the new code when it is undone in the parent.
	e.swap(p, s.At, s.New, s.Old)
	e.becomes(v, s.OldValue)
	e.runs(c)
	e.becomes(c, s.NewValue)
	q := e.open(c)
	e.swap(q, s.At, s.New, s.Old)
	e.becomes(c, s.OldValue)
	e.becomes(v, s.OldValue)
}
