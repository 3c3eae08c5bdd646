//go:build linux && amd64

package hosttest

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func start(t *testing.T, o Options) *Host {
	t.Helper()
	if o.DLL == "" {
		o.DLL, o.Call, o.Allow = Unnamed(t, "demo/demo.dll"), "answer", []int{42}
	}
	return Start(t, o)
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func TestWorkers(t *testing.T) {
	for _, static := range []bool{false, true} {
		h := start(t, Options{Spin: 1, FP: 1, Sleep: 4, Block: 3, Churn: 1, AltStack: true, Static: static})
		until(t, "every kind of thread works", func() bool {
			s := h.Stats()
			return s.Calls > 0 && s.Sleeps > 8 && s.Reads > 6 && s.FP > 0
		})
		if tid, sp, pc := h.SignalStack(); tid == 0 || sp == 0 || pc < h.Base {
			t.Errorf("signal stack: thread %d, %x, %x", tid, sp, pc)
		}
		if n := h.Stats().Threads; n != 2+1+1+4+4+1+1 {
			t.Errorf("%d threads", n)
		}
		h.Healthy()
		h.Exit()
		if h.Alive() {
			t.Error("alive after Exit")
		}
	}
}

// A value that is not allowed must be counted, or nothing that uses the host proves anything.
func TestWrongValueIsCounted(t *testing.T) {
	h := start(t, Options{DLL: Unnamed(t, "demo/demo.dll"), Call: "answer", Allow: []int{41}, Spin: 1})
	until(t, "a wrong value", func() bool { return h.Stats().Wrong > 0 })
	if s := h.Stats(); !strings.Contains(s.Example, "got 42, want 41") {
		t.Errorf("example %q", s.Example)
	}
}

func TestLives(t *testing.T) {
	h := start(t, Options{Spin: 1, Sleep: 1})
	if h.Value() != 42 {
		t.Errorf("value %d", h.Value())
	}
	c := h.Fork()
	c.Runs()
	g := c.Fork()
	g.Runs()
	if c.Value() != 42 || g.Value() != 42 {
		t.Error("a child answers wrongly")
	}
	if g.PID == c.PID || c.PID == h.PID || c.Base != h.Base {
		t.Errorf("pids %d %d %d, bases %x %x", h.PID, c.PID, g.PID, h.Base, c.Base)
	}
	c.Exit()
	if c.Alive() {
		t.Error("the child is alive after Exit")
	}
	g.Runs() // without its parent
	g.Exit()
	if g.Alive() {
		t.Error("the grandchild is alive after Exit")
	}
	before := h.Base
	h.Exec()
	h.Runs()
	if h.Base == before {
		t.Error("the new life has the same base")
	}
	h.Do("stop-leader")
	h.Runs()
	h.Exec()
	h.Runs()
	h.Healthy()
}

func TestImages(t *testing.T) {
	for _, how := range []string{"file", "anon"} {
		h := start(t, Options{Spin: 1, Map: how})
		other := h.Do("load " + Fixture(t, "mingw/app.dll"))
		base, _, _ := strings.Cut(strings.TrimPrefix(other, "load "), " ")
		h.Do("unload " + base)
		h.Do(fmt.Sprintf("load %s %s", Fixture(t, "mingw/app.dll"), base))
		h.Do("hook answer")
		if v := h.Value(); v != 7777 {
			t.Errorf("hooked value %d", v)
		}
		h.Do("reload")
		if v := h.Value(); v != 42 {
			t.Errorf("reloaded value %d", v)
		}
		h.Do("unload")
		h.Do("reload " + Fixture(t, "demo/demo-fix.dll"))
		if v := h.Value(); v != 43 {
			t.Errorf("value of the other image %d", v)
		}
		if _, err := h.Ask("no such command"); err == nil {
			t.Error("an unknown command is answered")
		}
	}
}

func TestSharers(t *testing.T) {
	h := start(t, Options{Spin: 1})
	for _, how := range []string{"vfork", "clone-vm"} {
		h.Do(how)
		h.Runs()
		h.Do("unshare")
	}
	h.Do("dispatch")
	h.Do("mdwe")
	h.Do("seccomp")
	h.Runs()
	h.Healthy()
}
