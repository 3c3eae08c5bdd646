package agent

import (
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// three is a view of three processes that R1 would fix, the last of them the system's.
func three(r1 repository.Offer) View {
	v := quiet()
	v.wants(r1)
	v.Procs = nil
	for pid, uid := range map[int]int{30: 1000, 20: 1001, 40: 0} {
		v.Procs = append(v.Procs, Proc{Info: target.Info{ID: target.ID{PID: pid}, UID: uid}, Images: []ImageView{{Name: "app.dll", Identity: build(1)}}})
	}
	v.Trial = Trial{Length: time.Minute, Since: map[string]time.Time{}}
	return v
}

func TestCanaryFirst(t *testing.T) {
	r1 := offer("R1", 1, fixing(1))
	live := func(v *View, pid int, release string) {
		for i := range v.Procs {
			if v.Procs[i].Info.ID.PID == pid {
				v.Procs[i].Images[0].Records = map[string]patcher.Record{"app": {Product: "app", Release: release, Sequence: 9, State: patcher.Applied}}
			}
		}
	}
	for name, tc := range map[string]struct {
		change func(*View)
		want   []int // pids that are patched now
	}{
		"the system's first":     {func(v *View) {}, []int{40}},
		"no canary":              {func(v *View) { v.Trial.Length = 0 }, []int{20, 30, 40}},
		"a trial under way":      {func(v *View) { v.Trial.Since["R1"] = noon.Add(-59 * time.Second); live(v, 20, "R1") }, nil},
		"its canary has gone":    {func(v *View) { v.Trial.Since["R1"] = noon.Add(-59 * time.Second) }, []int{40}},
		"a trial over":           {func(v *View) { v.Trial.Since["R1"] = noon.Add(-time.Minute); live(v, 20, "R1") }, []int{30, 40}},
		"an operator's order":    {func(v *View) { v.Forced = "app" }, []int{20, 30, 40}},
		"an operator's word":     {func(v *View) { v.Chosen = map[string]bool{"R1": true} }, []int{20, 30, 40}},
		"the order of something": {func(v *View) { v.Forced = "other" }, []int{40}},
		"the way back": {func(v *View) {
			live(v, 20, "R2")
			live(v, 30, "R2")
			v.Word = func(id string) (reason, bool) { return because("held", "held"), id == "R2" }
		}, []int{20, 30, 40}},
	} {
		t.Run(name, func(t *testing.T) {
			v := three(r1)
			tc.change(&v)
			patched := map[int]bool{}
			for _, in := range decide(v) {
				switch {
				case in.Kind == DoApply:
					patched[in.Proc.Info.ID.PID] = true
				case in.Reason.Code == "canary" && in.State != control.PendingImage:
					t.Errorf("%+v", in)
				case in.Reason.Code == "canary" && !v.Trial.Since["R1"].IsZero() && !in.Again.Equal(v.Trial.Since["R1"].Add(time.Minute)):
					t.Errorf("it looks again at %v", in.Again)
				}
			}
			if len(patched) != len(tc.want) {
				t.Fatalf("patched %v, want %v", patched, tc.want)
			}
			for _, pid := range tc.want {
				if !patched[pid] {
					t.Errorf("patched %v, want %v", patched, tc.want)
				}
			}
		})
	}
}
