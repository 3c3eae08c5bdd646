package pehost

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
)

// maxValues is how many different values one thread tells apart; further ones
// are wrong in any case.
const maxValues = 16

// tally is what one thread counts. One thread writes, others read: a value's
// count is raised from zero only after the value is set.
type tally struct {
	last   atomic.Int64
	wrong  atomic.Uint64
	values [maxValues]atomic.Int64
	counts [maxValues]atomic.Uint64
}

// add counts one result.
func (t *tally) add(v int32, allow []int64) {
	t.last.Store(int64(v))
	if len(allow) > 0 && !slices.Contains(allow, int64(v)) {
		t.wrong.Add(1)
	}
	for i := range t.values {
		if t.counts[i].Load() == 0 {
			t.values[i].Store(int64(v))
		} else if t.values[i].Load() != int64(v) {
			continue
		}
		t.counts[i].Add(1)
		return
	}
	t.wrong.Add(1)
}

// stats is the line that sums several tallies up.
func stats(list []*tally) string {
	var calls, wrong uint64
	by := map[int64]uint64{}
	for _, t := range list {
		wrong += t.wrong.Load()
		for i := range t.counts {
			if n := t.counts[i].Load(); n > 0 {
				by[t.values[i].Load()] += n
				calls += n
			}
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "stats %d %d", calls, wrong)
	values := make([]int64, 0, len(by))
	for v := range by {
		values = append(values, v)
	}
	slices.Sort(values)
	for _, v := range values {
		fmt.Fprintf(&b, " %d=%d", v, by[v])
	}
	return b.String()
}
