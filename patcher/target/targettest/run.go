package targettest

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"
)

// Run holds the backend against everything a target.Backend promises, one
// subtest a case, and prints at the end what was left out and why.
func Run(t *testing.T, s Setup) {
	t.Helper()
	var sum summary
	known := map[string]bool{}
	for _, c := range cases() {
		known[c.name] = true
		t.Run(c.name, func(t *testing.T) {
			if why, ok := s.Lacks[c.name]; ok {
				sum.add(c.name, why)
				t.Skip("left out: " + why)
			}
			c.run(&env{T: t, Setup: s, name: c.name, sum: &sum})
		})
	}
	for name := range s.Lacks {
		if !known[name] {
			t.Errorf("Setup.Lacks names %q, which is no case", name)
		}
	}
	t.Logf("targettest, backend %s: %d cases, %d left out%s", s.Backend.Name(), len(known), len(sum.out), sum.String())
}

type testCase struct {
	name string
	run  func(e *env)
}

type summary struct {
	mu  sync.Mutex
	out []string
}

func (s *summary) add(name, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = append(s.out, name+": "+why)
}

func (s *summary) String() string {
	if len(s.out) == 0 {
		return ""
	}
	sort.Strings(s.out)
	return "\n\t" + strings.Join(s.out, "\n\t")
}

// env is one case's test, with the means the cases share.
type env struct {
	*testing.T
	Setup
	name string
	sum  *summary
}

// leaveOut ends the case as skipped, or as failed where everything must run.
func (e *env) leaveOut(format string, args ...any) {
	e.Helper()
	why := fmt.Sprintf(format, args...)
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		e.Fatalf("left out, and HOTPATCH_TEST_ALL=1 allows none that Setup.Lacks does not declare: %s", why)
	}
	e.sum.add(e.name, why)
	e.Skip("left out: " + why)
}

// start starts a victim and checks at the end of the case that it found
// nothing wrong with its own calls.
func (e *env) start(w Want) Victim {
	e.Helper()
	v, err := e.Start(e.T, w)
	if errors.Is(err, ErrAbsent) {
		e.leaveOut("%v", err)
	}
	if err != nil {
		e.Fatalf("cannot start a victim: %v", err)
	}
	e.check(v)
	return v
}

func (e *env) check(v Victim) {
	c, ok := v.(Checker)
	if !ok {
		return
	}
	e.Cleanup(func() {
		if n, example := c.Wrong(); n != 0 {
			e.Errorf("the victim found %d of its own calls wrong, for one: %s", n, example)
		}
	})
}

// able asks a victim for an ability; the case is left out if it has it not.
func able[T any](e *env, v Victim) T {
	e.Helper()
	a, ok := v.(T)
	if !ok {
		e.leaveOut("the victim is no %s", strings.TrimPrefix(fmt.Sprintf("%T", (*T)(nil)), "*targettest."))
	}
	return a
}

// absent leaves the case out for an error that wraps ErrAbsent, and fails for any other.
func (e *env) absent(err error) {
	e.Helper()
	if errors.Is(err, ErrAbsent) {
		e.leaveOut("%v", err)
	}
	if err != nil {
		e.Fatal(err)
	}
}
