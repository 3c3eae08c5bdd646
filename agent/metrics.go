package agent

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// Metrics is the Prometheus text exposition of the published snapshot: state
// words are the contract's, spelled the same.
func (a *Agent) Metrics(context.Context) ([]byte, error) {
	s := a.shown.Load()
	var b bytes.Buffer
	gauge := func(name, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s gauge\n", name, help, name) }
	gauge("hotpatchd_state", "1 for the state the device is in.")
	for _, st := range control.States {
		fmt.Fprintf(&b, "hotpatchd_state{state=%q} %d\n", st, one(st == s.status.State))
	}
	gauge("hotpatchd_eligible", "1 if the device is eligible.")
	fmt.Fprintf(&b, "hotpatchd_eligible %d\n", one(s.status.Eligible))
	gauge("hotpatchd_images", "Images in running processes that a release names, by state.")
	for _, st := range control.ImageStates {
		fmt.Fprintf(&b, "hotpatchd_images{state=%q} %d\n", st, s.status.Coverage.Count(st))
	}
	gauge("hotpatchd_processes", "Processes that have loaded such an image.")
	fmt.Fprintf(&b, "hotpatchd_processes %d\n", s.status.Coverage.Processes)
	gauge("hotpatchd_release_sequence", "Sequence of the release in force.")
	for _, r := range s.status.Releases {
		fmt.Fprintf(&b, "hotpatchd_release_sequence{product=%q,release=%q} %d\n", label(r.Product), label(r.ID), r.Sequence)
	}
	l := s.status.Latency
	for _, x := range []struct {
		name, help string
		q          control.Quantiles
	}{
		{"hotpatchd_start_to_patched_seconds", "Longest that an image of a program that started may have been in memory before it was patched.", l.Quantiles},
		{"hotpatchd_late_load_to_patched_seconds", "The same of images that were loaded later.", l.Late},
	} {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s summary\n", x.name, x.help, x.name)
		if x.q.Count > 0 {
			fmt.Fprintf(&b, "%s{quantile=\"0.5\"} %g\n%s{quantile=\"0.99\"} %g\n", x.name, x.q.P50MS/1000, x.name, x.q.P99MS/1000)
		}
		fmt.Fprintf(&b, "%s_sum %g\n%s_count %d\n", x.name, x.q.SumMS/1000, x.name, x.q.Count)
	}
	if !s.status.Repository.LastCheck.IsZero() {
		gauge("hotpatchd_repository_last_check_seconds", "When the repository was last checked with success.")
		fmt.Fprintf(&b, "hotpatchd_repository_last_check_seconds %d\n", s.status.Repository.LastCheck.Unix())
	}
	if !s.status.Repository.Expires.IsZero() {
		gauge("hotpatchd_repository_expires_seconds", "When the repository's metadata ends.")
		fmt.Fprintf(&b, "hotpatchd_repository_expires_seconds %d\n", s.status.Repository.Expires.Unix())
	}
	return b.Bytes(), nil
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// label escapes what a label's value may not hold; ids hold nothing of the kind.
func label(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == '"' || r == '\\' {
			return '_'
		}
		return r
	}, s)
}

func sortProcesses(p []control.PlannedProcess) {
	slices.SortFunc(p, func(x, y control.PlannedProcess) int { return cmp.Compare(x.PID, y.PID) })
}
