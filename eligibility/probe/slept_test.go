package probe

import (
	"testing"
	"time"
)

// What is slept grows while the machine sleeps only. A machine may sleep during
// this test, though not five times.
func TestSlept(t *testing.T) {
	for try := range 5 {
		was := Slept()
		time.Sleep(300 * time.Millisecond)
		grown := Slept() - was
		if was >= 0 && grown > -100*time.Millisecond && grown < 100*time.Millisecond {
			return
		}
		t.Logf("try %d: slept %s, and %s more in 0.3 s", try, was, grown)
	}
	t.Error("it sleeps while it is awake")
}
