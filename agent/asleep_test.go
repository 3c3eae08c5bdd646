package agent

import (
	"testing"
	"time"

	"hotpatchd/agent/guard"
	"hotpatchd/patcher/target"
)

// A night in which nobody ran is neither time with a release nor time without.
func TestVigilSleeps(t *testing.T) {
	const night = 8 * time.Hour
	v := newVigil()
	v.window = 10 * time.Minute
	id := target.ID{PID: 7, Start: 1}
	at := func(min int) time.Time { return noon.Add(time.Duration(min) * time.Minute) }
	v.living(id, "", "srv", nil, at(0))
	v.living(id, "", "srv", map[string]time.Time{"R1": at(5)}, at(6))
	v.sleep(func(t time.Time) time.Time { return t.Add(night) })
	key := caseKey{"", "srv", "R1"}
	c := v.caseOf(key, at(8).Add(night))
	if c.With.Ran != 3*time.Minute || c.Without.Ran != 5*time.Minute {
		t.Errorf("ran %s with it, %s without", c.With.Ran, c.Without.Ran)
	}
	v.end(7, guard.Crash, "crashed", false, at(8).Add(night))
	v.sleep(func(t time.Time) time.Time { return t.Add(night) })
	if hurt := v.turn(func(target.ID) bool { return false }, at(9).Add(2*night)); len(hurt) != 1 || v.with[key].Ran != 3*time.Minute {
		t.Errorf("ended before it slept again: %v, %+v", hurt, v.with[key])
	}
}
