package agent

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/guard"
	"hotpatchd/patcher/target"
)

func at(minutes float64) time.Time { return noon.Add(time.Duration(minutes * float64(time.Minute))) }

func nobody(target.ID) bool { return false }

// The parts of a life: without, with, stood, with the next.
func TestVigilParts(t *testing.T) {
	v := newVigil()
	v.window = 10 * time.Minute
	id := target.ID{PID: 7, Start: 1}
	v.living(id, "", "app", nil, at(0))
	v.living(id, "", "app", map[string]time.Time{"R1": at(5)}, at(5))
	v.living(id, "", "app", map[string]time.Time{"R2": at(25)}, at(25))
	v.end(7, guard.Crash, "ended by signal 11", false, at(26))
	hurt := v.turn(nobody, at(27))
	if fmt.Sprint(hurt) != "[{ app R2}]" {
		t.Fatalf("hurt %v", hurt)
	}
	for _, want := range []struct {
		release string
		tally   guard.Tally
	}{
		{"R1", guard.Tally{Processes: 1, Ran: 10 * time.Minute}},
		{"R2", guard.Tally{Processes: 1, Ran: time.Minute, Crashes: 1}},
	} {
		c := v.caseOf(caseKey{"", "app", want.release}, at(30))
		if c.With != want.tally {
			t.Errorf("%s: %+v, want %+v", want.release, c.With, want.tally)
		}
		if c.Without.Ran != 15*time.Minute || c.Without.Crashes != 0 {
			t.Errorf("without: %+v", c.Without)
		}
	}
	if len(v.lives)+len(v.byPID) != 0 {
		t.Error("it is not over")
	}
}

// What ends after the window, or after the release was taken out, is not held
// against the release; nor is an end that somebody ordered, or nobody saw.
func TestVigilInnocent(t *testing.T) {
	for name, play := range map[string]func(v *vigil, id target.ID){
		"after the window": func(v *vigil, id target.ID) {
			v.living(id, "", "app", map[string]time.Time{"R": at(0)}, at(0))
			v.end(id.PID, guard.Crash, "", false, at(11))
		},
		"after it was taken out": func(v *vigil, id target.ID) {
			v.living(id, "", "app", map[string]time.Time{"R": at(0)}, at(0))
			v.living(id, "", "app", nil, at(1))
			v.end(id.PID, guard.Crash, "", false, at(2))
		},
		"by order": func(v *vigil, id target.ID) {
			v.living(id, "", "app", map[string]time.Time{"R": at(0)}, at(0))
			v.end(id.PID, guard.Stopped, "", false, at(1))
		},
		"unseen": func(v *vigil, id target.ID) {
			v.living(id, "", "app", map[string]time.Time{"R": at(0)}, at(0))
		},
		"another life of the number": func(v *vigil, id target.ID) {
			v.living(id, "", "app", map[string]time.Time{"R": at(0)}, at(0))
			v.living(target.ID{PID: id.PID, Start: 2}, "", "other", nil, at(1))
			v.end(id.PID, guard.Crash, "", false, at(2))
		},
	} {
		v := newVigil()
		v.window = 10 * time.Minute
		play(v, target.ID{PID: 7, Start: 1})
		v.turn(nobody, at(20))
		if !v.waits() && name == "unseen" {
			t.Errorf("%s: it does not wait for word", name)
		}
		if hurt := v.turn(nobody, at(20).Add(unseenAfter)); len(hurt) != 0 {
			t.Errorf("%s: %v", name, hurt)
		}
		if len(v.lives) != 0 || v.waits() {
			t.Errorf("%s: it is not over", name)
		}
		if c := v.caseOf(caseKey{"", "app", "R"}, at(30)); c.With.Crashes != 0 {
			t.Errorf("%s: %+v", name, c.With)
		}
	}
}

// The main thread of a process may end before the others: it lives.
func TestVigilMainThreadEnds(t *testing.T) {
	v := newVigil()
	v.window = 10 * time.Minute
	v.living(target.ID{PID: 7}, "", "app", map[string]time.Time{"R": at(0)}, at(0))
	v.end(7, guard.Crash, "", false, at(1))
	if hurt := v.turn(func(target.ID) bool { return true }, at(2)); len(hurt) != 0 || len(v.lives) != 1 {
		t.Errorf("%v, %d lives", hurt, len(v.lives))
	}
}

// No time is lost or counted twice, whatever comes and goes.
func TestVigilTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := newVigil()
		v.window = time.Duration(rapid.IntRange(1, 30).Draw(t, "window")) * time.Minute
		id, now, release := target.ID{PID: 7}, 0, ""
		began := map[string]time.Time{}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "change") {
				release = rapid.SampledFrom([]string{"", "A", "B", "C"}).Draw(t, "release")
				if release != "" && began[release].IsZero() {
					began[release] = at(float64(now))
				}
			}
			runs := map[string]time.Time{}
			if release != "" {
				runs[release] = began[release]
			}
			v.living(id, "", "app", runs, at(float64(now)))
			now += rapid.IntRange(0, 20).Draw(t, "minutes")
		}
		sum := time.Duration(0)
		parts := v.parts(v.lives[id], at(float64(now)))
		for i, p := range parts {
			sum += p.ran
			if p.ran < 0 || p.last != (i == len(parts)-1) || p.release != "" && p.ran > v.window {
				t.Fatalf("%+v", parts)
			}
		}
		if sum != time.Duration(now)*time.Minute {
			t.Fatalf("%v of %d minutes: %+v", sum, now, parts)
		}
	})
}

// Of too many cases those go that say least, of whoever has the most: nobody drives
// out what is known of others.
func TestVigilForgets(t *testing.T) {
	v := newVigil()
	v.window = 10 * time.Minute
	pid, runs := 0, map[string]time.Time{"R": at(0)}
	life := func(owner, program string, how guard.Ending, minutes float64) {
		pid++
		v.living(target.ID{PID: pid, Start: 1}, owner, program, runs, at(0))
		v.end(pid, how, "", true, at(minutes))
	}
	life("", "short", guard.Crash, 0.1)
	life("", "calm", guard.Normal, 0.1)
	life("mallory", "short", guard.Crash, 0.1)
	for n := range 2 * maxPrograms {
		life("mallory", fmt.Sprint("app ", n), guard.Normal, 1+float64(n)/1000)
	}
	v.turn(nobody, at(20))
	if len(v.with) != maxPrograms || len(v.inside) != 2 || len(v.signs) != 2 {
		t.Errorf("%d cases, %d inside, %d signs", len(v.with), len(v.inside), len(v.signs))
	}
	for key, want := range map[caseKey]bool{
		{"", "calm", "R"}:                                     true,
		{"", "short", "R"}:                                    true,
		{"mallory", "short", "R"}:                             true,
		{"mallory", "app 0", "R"}:                             false,
		{"mallory", fmt.Sprint("app ", maxPrograms+2), "R"}:   false,
		{"mallory", fmt.Sprint("app ", maxPrograms+3), "R"}:   true,
		{"mallory", fmt.Sprint("app ", 2*maxPrograms-1), "R"}: true,
	} {
		if v.with[key] != nil != want {
			t.Errorf("%v is kept: %v", key, !want)
		}
	}
}
