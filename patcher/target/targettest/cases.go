package targettest

import (
	"context"
	"errors"
	"testing"
	"time"

	"hotpatchd/patcher/target"
)

// cases in the order they run: what is simple first, since a backend that
// cannot list or read fails everything after it.
func cases() []testCase {
	return []testCase{
		{"list finds the victim", listFinds},
	}
}

// id looks a pid up in the backend's list.
func (e *env) id(v Victim) target.ID {
	e.Helper()
	return e.info(v).ID
}

func (e *env) info(v Victim) target.Info {
	e.Helper()
	list, err := e.Backend.List(context.Background())
	if err != nil {
		e.Fatalf("List: %v", err)
	}
	for _, i := range list {
		if i.PID == v.PID() {
			return i
		}
	}
	e.Fatalf("List does not tell of process %d (of %d)", v.PID(), len(list))
	return target.Info{}
}

func (e *env) open(v Victim) target.Process {
	e.Helper()
	p, err := e.Backend.Open(context.Background(), e.id(v))
	if err != nil {
		e.Fatalf("Open: %v", err)
	}
	e.Cleanup(func() { p.Close() })
	return p
}

func listFinds(e *env) {
	v := e.start(Want{})
	i := e.info(v)
	if i.Arch != v.Arch() {
		e.Errorf("arch %q, want %q", i.Arch, v.Arch())
	}
	if i.User == "" {
		e.Error("no owner")
	}
	if i.Start == 0 {
		e.Error("the life has no start")
	}
}

// until waits for a condition, at most Patience.
func (e *env) until(what string, ok func() bool) {
	e.Helper()
	until(e.T, what, ok)
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain: %s", Patience, what)
		}
	}
}

// wantErr checks the kind of an error.
func (e *env) wantErr(op string, err, kind error) {
	e.Helper()
	if !errors.Is(err, kind) {
		e.Errorf("%s: got error %v, want %v", op, err, kind)
	}
}
