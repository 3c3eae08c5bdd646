package guard

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestJudge(t *testing.T) {
	min, hour := time.Minute, time.Hour
	for name, tc := range map[string]struct {
		c      Case
		guilty bool
		text   string
	}{
		"nothing happened": {Case{With: Tally{Processes: 3, Ran: hour}}, false, "run well"},
		"one crash inside our code": {Case{With: Tally{Processes: 1, Ran: time.Second, Crashes: 1}, Inside: 1}, true,
			"1 of 1 processes of app.exe crashed within 1.0 s of running with it, 1 of them inside its code"},
		"the canary dies where none ever died": {Case{With: Tally{Processes: 1, Ran: min, Crashes: 1}, Without: Tally{Processes: 4, Ran: 48 * hour}}, true,
			"without it 0 crashes and 0 bad exit codes in 48.0 h"},
		"it dies as often as always":          {Case{With: Tally{Processes: 3, Ran: 3 * min, Crashes: 3}, Without: Tally{Processes: 60, Ran: hour, Crashes: 60}}, false, "no more than usual"},
		"it dies much more often":             {Case{With: Tally{Processes: 9, Ran: 3 * min, Crashes: 9}, Without: Tally{Processes: 6, Ran: hour, Crashes: 6}}, true, ""},
		"nothing to compare with, two":        {Case{With: Tally{Processes: 2, Ran: min, Crashes: 2}, Without: Tally{Processes: 1, Ran: min}}, false, "too little to compare"},
		"nothing to compare with, three":      {Case{With: Tally{Processes: 3, Ran: min, Crashes: 3}}, true, "too little to compare"},
		"exit codes, nothing to compare with": {Case{With: Tally{Processes: 9, Ran: min, Failures: 9}}, false, ""},
		"exit codes are its habit":            {Case{With: Tally{Processes: 9, Ran: 9 * min, Failures: 9}, Without: Tally{Processes: 60, Ran: hour, Failures: 60}}, false, "no more than usual"},
		"exit codes are new":                  {Case{With: Tally{Processes: 9, Ran: 9 * min, Failures: 9}, Without: Tally{Processes: 60, Ran: 10 * hour, Failures: 1}}, true, "ended badly"},
		"two exit codes tell nothing":         {Case{With: Tally{Processes: 2, Ran: time.Second, Failures: 2}, Without: Tally{Processes: 60, Ran: 100 * hour}}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tc.c.Program = "app.exe"
			v := Judge(tc.c)
			if v.Guilty != tc.guilty || !strings.Contains(v.Text, tc.text) {
				t.Errorf("guilty %v: %s", v.Guilty, v.Text)
			}
		})
	}
}

// A program that crashes as often with a release as without must hardly ever be
// held against it, whatever its habit.
func TestInnocent(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	poisson := func(mean float64) (n int) {
		for p := rng.Float64(); p > math.Exp(-mean); n++ {
			p *= rng.Float64()
		}
		return n
	}
	for _, mean := range []float64{0.01, 0.3, 3, 30} { // crashes an hour
		wrong := 0
		const cases = 20000
		for range cases {
			c := Case{With: Tally{Ran: time.Hour, Crashes: poisson(mean)}, Without: Tally{Ran: 5 * time.Hour, Crashes: poisson(5 * mean)}}
			if Judge(c).Guilty {
				wrong++
			}
		}
		if share := float64(wrong) / cases; share > 1.5*Chance {
			t.Errorf("%g crashes an hour: held against it in %.4f of cases", mean, share)
		}
	}
}

func TestChance(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, m := rapid.IntRange(0, 300).Draw(t, "n"), rapid.IntRange(0, 300).Draw(t, "m")
		a := time.Duration(rapid.Int64Range(1, 1e15).Draw(t, "a"))
		b := time.Duration(rapid.Int64Range(1, 1e15).Draw(t, "b"))
		p := chance(n, m, a, b)
		if math.IsNaN(p) || p < 0 || p > 1 {
			t.Fatalf("%v", p)
		}
		const dust = 1e-9
		if more := chance(n+1, m, a, b); more > p+dust {
			t.Errorf("more crashes are likelier: %v, then %v", p, more)
		}
		if more := chance(n, m+1, a, b); n > 0 && more < p-dust {
			t.Errorf("more crashes without it make those with it less likely: %v, then %v", p, more)
		}
	})
	// One crash in a tenth of all time: one in ten.
	if p := chance(1, 0, time.Minute, 9*time.Minute); math.Abs(p-0.1) > 1e-9 {
		t.Errorf("%v", p)
	}
	// 2 of 2 in half of the time: a quarter.
	if p := chance(2, 0, time.Minute, time.Minute); math.Abs(p-0.25) > 1e-9 {
		t.Errorf("%v", p)
	}
}

func TestEnding(t *testing.T) {
	for _, tc := range []struct {
		signal, code int
		want         Ending
	}{{0, 0, Normal}, {0, 1, Failure}, {11, 0, Crash}, {6, 0, Crash}, {9, 0, Stopped}, {15, 0, Stopped}, {3, 0, Stopped}, {31, 0, Crash}} {
		if got := OfSignal(tc.signal, tc.code); got != tc.want {
			t.Errorf("signal %d, code %d: %s, want %s", tc.signal, tc.code, got, tc.want)
		}
	}
	for code, want := range map[uint32]Ending{0: Normal, 1: Stopped, 2: Failure, 3: Crash, 0xC0000005: Crash, 0xC000013A: Stopped, 0xC0000409: Crash, 0x80000003: Crash, 0xE06D7363: Crash, 0x40010004: Failure} {
		if got := OfStatus(code); got != want {
			t.Errorf("status %#x: %s, want %s", code, got, want)
		}
	}
}
