package agent

import (
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target"
)

// Windows tells owners by security identifiers, Linux by numbers; callers of
// the control pipe have the same numbers.
func TestOwnersHaveNumbers(t *testing.T) {
	const sid = "S-1-5-21-1-2-3-1001"
	got := withOwners([]target.Info{{UID: -1, SID: sid}, {UID: 1000}, {UID: -1}})
	if got[0].UID != control.SIDNumber(sid) || got[1].UID != 1000 || got[2].UID != -1 {
		t.Errorf("%+v", got)
	}
}
