// Package guard judges from how processes end whether a release harms them. It
// is pure: who ended, when and how is told to it.
//
// The rule, in one paragraph. A process counts from the moment it was patched
// for the length of a window. If it crashes in that time at an address inside
// our own code, the release is guilty at once. Else its crashes are compared with those of the
// same program without the release, on the same device: processes not yet
// patched, and the same ones before they were. Where the program ran for at
// least MinReference without it, the release is guilty if so many crashes, or so many bad exit codes, in
// so much time patched would come by chance in fewer than one of 1/Chance
// cases. Where it did not, there is nothing to compare with, and crashes of
// MinCrashes processes are needed. Processes that somebody ended (SIGKILL,
// SIGTERM, a service that is stopped) and endings nobody could see count for nothing.
package guard

import (
	"fmt"
	"math"
	"time"
)

const (
	// Chance is how improbable as an accident what is seen must be.
	Chance = 0.001
	// MinReference is how long a program must have run without a release, all its
	// processes together, to be compared with.
	MinReference = 10 * time.Minute
	// MinCrashes is how many processes must crash where there is nothing to compare with.
	MinCrashes = 3
)

// Ending is how a process ended.
type Ending int

const (
	Unseen  Ending = iota // nobody told
	Normal                // exit code 0
	Stopped               // ended by somebody's order
	Failure               // an exit code other than 0
	Crash                 // a fault, or an abort
)

func (e Ending) String() string {
	return [...]string{"unseen", "normal", "stopped", "failure", "crash"}[e]
}

// Tally is what was seen of one program's processes, with a release or without.
type Tally struct {
	Processes int           `json:"processes"`
	Ran       time.Duration `json:"ran"` // all of them together
	Crashes   int           `json:"crashes"`
	Failures  int           `json:"failures"`
}

// Add counts one process that ran for a time. Ended is false while it runs on.
func (t *Tally) Add(ran time.Duration, ended bool, how Ending) {
	t.Processes++
	t.Ran += max(ran, 0)
	switch {
	case !ended:
	case how == Crash:
		t.Crashes++
	case how == Failure:
		t.Failures++
	}
}

// Halve makes what was seen long ago count less than what is seen now.
func (t *Tally) Halve() {
	t.Processes, t.Ran, t.Crashes, t.Failures = t.Processes/2, t.Ran/2, t.Crashes/2, t.Failures/2
}

// Case is one program and one release on this device.
type Case struct {
	Program string
	Release string
	With    Tally // within the window after each was patched
	Without Tally // before, or not patched at all
	Inside  int   // of the crashes with the release, those at an address inside our code
}

// Verdict is what a case comes to.
type Verdict struct {
	Guilty bool
	Text   string // for people: what was seen, and what it was compared with
}

// Judge decides a case by the rule of the package comment.
func Judge(c Case) Verdict {
	crashes := fmt.Sprintf("%d of %d processes of %s crashed within %s of running with it", c.With.Crashes, c.With.Processes, c.Program, short(c.With.Ran))
	switch {
	case c.With.Crashes == 0 && c.With.Failures == 0:
		return Verdict{Text: fmt.Sprintf("%d processes of %s run well with it", c.With.Processes, c.Program)}
	case c.Inside > 0:
		return Verdict{true, fmt.Sprintf("%s, %d of them inside its code", crashes, c.Inside)}
	case c.Without.Ran < MinReference:
		return Verdict{c.With.Crashes >= MinCrashes, crashes + "; there is too little to compare it with"}
	}
	without := fmt.Sprintf("without it %d crashes and %d bad exit codes in %s", c.Without.Crashes, c.Without.Failures, short(c.Without.Ran))
	if chance(c.With.Crashes, c.Without.Crashes, c.With.Ran, c.Without.Ran) < Chance {
		return Verdict{true, crashes + "; " + without}
	}
	// An exit code is a program's own word: it tells something only where it is
	// not its habit, and one alone tells nothing.
	bad, before := c.With.Crashes+c.With.Failures, c.Without.Crashes+c.Without.Failures
	if bad >= MinCrashes && chance(bad, before, c.With.Ran, c.Without.Ran) < Chance {
		return Verdict{true, fmt.Sprintf("%d of %d processes of %s ended badly within %s of running with it; %s", bad, c.With.Processes, c.Program, short(c.With.Ran), without)}
	}
	return Verdict{Text: crashes + "; " + without + ": no more than usual"}
}

// chance is how probable n or more of n+m events fall into the time a, if they
// come as often in the time b (the exact conditional test of two Poisson rates,
// Przyborowski and Wilenski 1940).
func chance(n, m int, a, b time.Duration) float64 {
	if n == 0 {
		return 1
	}
	p := float64(a) / float64(a+b)
	total, sum := n+m, 0.0
	for k := n; k <= total; k++ {
		sum += math.Exp(logChoose(total, k) + float64(k)*math.Log(p) + float64(total-k)*math.Log1p(-p))
	}
	return min(sum, 1)
}

func logChoose(n, k int) float64 {
	a, _ := math.Lgamma(float64(n + 1))
	b, _ := math.Lgamma(float64(k + 1))
	c, _ := math.Lgamma(float64(n - k + 1))
	return a - b - c
}

func short(d time.Duration) string {
	switch {
	case d >= time.Hour:
		return fmt.Sprintf("%.1f h", d.Hours())
	case d >= time.Minute:
		return fmt.Sprintf("%.1f min", d.Minutes())
	}
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
