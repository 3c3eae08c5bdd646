//go:build linux && amd64

package ptrace

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
	"hotpatchd/patcher/target/targettest"
)

func TestSuite(t *testing.T) {
	targettest.Run(t, targettest.Setup{
		Backend: newBackend(t),
		Start:   startVictim,
		Lacks: map[string]string{
			"open what the system refuses": "who runs this test may be root, to whom nothing is refused; TestOrdinaryUser is about it",
		},
	})
}

func newBackend(t testing.TB) *backend {
	t.Helper()
	b, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return b.(*backend)
}

func startVictim(t testing.TB, w targettest.Want) (targettest.Victim, error) {
	o := demo(t, hosttest.Options{Spin: max(1, w.Threads), Block: w.Blocked, Churn: count(w.Churn), AltStack: w.AltStack})
	o.Allow = []int{42, 43}
	h, err := hosttest.Launch(t, o)
	if err != nil {
		return nil, err
	}
	if w.Unstoppable {
		if _, err := h.Ask("vfork"); err != nil {
			return nil, err
		}
	}
	h.Runs()
	return &victim{Host: h, t: t}, nil
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// victim is a PE host in the suite's terms.
type victim struct {
	*hosttest.Host
	t      testing.TB
	execed bool
	module string
}

func (v *victim) PID() int                           { return v.Host.PID }
func (v *victim) Arch() target.Arch                  { return target.AMD64 }
func (v *victim) Code() (target.Addr, int)           { return target.Addr(v.Entry()), 16 }
func (v *victim) Calls() (uint64, error)             { return v.Stats().Calls, nil }
func (v *victim) Value() (int, error)                { return v.Stats().Value, nil }
func (v *victim) Threads() int                       { return v.Stats().Threads }
func (v *victim) Alive() bool                        { return !v.execed && v.Host.Alive() }
func (v *victim) Scratch() target.Addr               { return target.Addr(v.Host.Scratch()) }
func (v *victim) Trace() (release func(), err error) { return hosttest.Tracer(v.t, v.PID()) }

func (v *victim) Wrong() (int, string) {
	s := v.Stats()
	return int(s.Wrong + s.Faults), s.Example
}

func (v *victim) Normal() (int, target.Addr) {
	tid, sp, _ := v.SignalStack()
	return tid, target.Addr(sp)
}

func (v *victim) Exec() (target.Addr, error) {
	v.Host.Exec()
	v.execed = true
	return hosttest.Probe, nil
}

func (v *victim) Fork() (targettest.Victim, error) {
	return &victim{Host: v.Host.Fork(), t: v.t}, nil
}

func (v *victim) Map() (target.Span, error) {
	answer, err := v.Ask("load " + hosttest.Fixture(v.t, "mingw/app.dll"))
	if err != nil {
		return target.Span{}, err
	}
	var base, size target.Addr
	if _, err := fmt.Sscanf(answer, "load %x %x", &base, &size); err != nil {
		return target.Span{}, err
	}
	v.module = strconv.FormatUint(uint64(base), 16)
	return target.Span{Start: base, End: base + size}, nil
}

func (v *victim) Unmap() error {
	_, err := v.Ask("unload " + v.module)
	return err
}

// Swap changes the number in mov $42,%eax.
func (v *victim) Swap() targettest.Swap {
	at, n := v.Code()
	f, err := os.Open("/proc/" + strconv.Itoa(v.PID()) + "/mem")
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, int64(at)); err != nil {
		v.t.Fatal(err)
	}
	i := bytes.Index(b, []byte{0xb8, 42, 0, 0, 0})
	if i < 0 {
		v.t.Fatalf("no mov $42,%%eax in % x", b)
	}
	return targettest.Swap{At: at + target.Addr(i) + 1, Old: []byte{42}, New: []byte{43}, OldValue: 42, NewValue: 43}
}
