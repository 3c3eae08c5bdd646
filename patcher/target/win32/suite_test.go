//go:build windows

package win32

import (
	"fmt"
	"strconv"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/targettest"
	"hotpatchd/patcher/target/win32/winhosttest"
)

func TestSuite(t *testing.T) {
	targettest.Run(t, targettest.Setup{
		Backend:  newTestBackend(t),
		Start:    startVictim,
		Patience: winhosttest.Patience,
		Lacks:    lacks,
	})
}

var lacks = map[string]string{
	"open what the system refuses":    "who runs this test may be an administrator, to whom little is refused; see the tests of rights",
	"the watch tells":                 "starts are told where an ETW session of ours runs, which Wine has not",
	"a thread on its signal stack":    "Windows has no signals",
	"a thread that cannot be stopped": "no program can keep its threads from being suspended; see the tests with a kernel of their own",
	"exec is another life":            "Windows has no exec",
	"fork is another life":            "Windows has no fork",
	"forked child keeps its own code": "Windows has no fork",
}

func init() {
	if !winhosttest.Wine() {
		delete(lacks, "the watch tells")
	}
}

func newTestBackend(t testing.TB) *backend {
	t.Helper()
	b, err := New()
	if err != nil {
		t.Fatal(err)
	}
	return b.(*backend)
}

func startVictim(t testing.TB, w targettest.Want) (targettest.Victim, error) {
	churn := 0
	if w.Churn {
		churn = 1
	}
	h, err := winhosttest.Launch(t, winhosttest.Options{Spin: max(1, w.Threads), Block: w.Blocked, Sleep: min(1, w.Blocked), Churn: churn})
	if err != nil {
		return nil, err
	}
	h.Runs()
	return &victim{Host: h, t: t}, nil
}

// victim is a host in the suite's terms.
type victim struct {
	*winhosttest.Host
	t      testing.TB
	module string
}

func (v *victim) PID() int                           { return v.Host.PID }
func (v *victim) Arch() target.Arch                  { return target.AMD64 }
func (v *victim) Code() (target.Addr, int)           { return target.Addr(v.Entry()), 16 }
func (v *victim) Calls() (uint64, error)             { return v.Stats().Calls, nil }
func (v *victim) Value() (int, error)                { return v.Stats().Value, nil }
func (v *victim) Scratch() target.Addr               { return target.Addr(v.Host.Scratch()) }
func (v *victim) Trace() (release func(), err error) { return winhosttest.Debugger(v.t, v.PID()) }

func (v *victim) Wrong() (int, string) {
	s := v.Stats()
	return int(s.Wrong + s.Faults), s.Example
}

func (v *victim) Map() (target.Span, error) {
	answer, err := v.Ask("load " + module(v.t))
	if err != nil {
		return target.Span{}, err
	}
	var base, size target.Addr
	if _, err := fmt.Sscanf(answer, "%x %x", &base, &size); err != nil {
		return target.Span{}, err
	}
	v.module = strconv.FormatUint(uint64(base), 16)
	return target.Span{Start: base, End: base + size}, nil
}

func (v *victim) Unmap() error {
	_, err := v.Ask("unload " + v.module)
	return err
}

func module(t testing.TB) string {
	return winhosttest.Root(t) + `\testdata\fixtures\mingw\app.dll`
}

// Swap changes the number in mov $42,%eax.
func (v *victim) Swap() targettest.Swap {
	at, _ := v.Code()
	return targettest.Swap{At: at + 1, Old: []byte{42}, New: []byte{43}, OldValue: 42, NewValue: 43}
}
