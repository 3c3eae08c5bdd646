package agent

import (
	"fmt"
	"testing"
	"time"

	"hotpatchd/agent/report"
	"hotpatchd/eligibility/probe"
)

// Devices that start in one moment and know something already come one after
// the other, and each keeps its own time after that; a device that knows nothing asks at once.
func TestPollsAreSpread(t *testing.T) {
	now := time.Date(2026, 11, 10, 18, 0, 0, 0, time.UTC)
	const devices, every = 500, 5 * time.Minute
	var first, next [10]int
	for i := range devices {
		a := &Agent{o: Options{Config: DefaultConfig()}, device: probe.Device{ID: fmt.Sprint("device ", i)}}
		if p := a.pollsOf(); p.first != 0 {
			t.Fatalf("a device that knows nothing waits %s", p.first)
		}
		a.verified = true
		p := a.pollsOf()
		if p.every != every || p.first < 0 || p.first >= report.Spread(every) {
			t.Fatalf("%+v", p)
		}
		first[p.first*10/report.Spread(every)]++
		wait := p.next(now.Add(p.first))
		next[now.Add(p.first+wait).Sub(now.Truncate(every))%every*10/every]++
		if again := p.next(now.Add(p.first + wait)); again != every {
			t.Fatalf("the check after that is %s later", again)
		}
	}
	for n := range 10 {
		if first[n] > devices/5 || next[n] > devices/5 {
			t.Errorf("first checks by tenth %v, later ones %v", first, next)
			break
		}
	}
	for range 100 {
		if d := afterFailure(time.Second); d < time.Second/2 || d > time.Second {
			t.Errorf("%s", d)
		}
	}
}
