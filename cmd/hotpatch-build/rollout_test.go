package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"hotpatchd/agent/repository"
)

// TestRolloutCommand: each word does what it says, the same again is done
// already, and a wrong one changes nothing.
func TestRolloutCommand(t *testing.T) {
	dir := author(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	must(t, "release", "--manifest", in("release.toml"), "-o", in("DEMO-1.hotpatch"))
	must(t, "keys", "--dir", in("keys"))
	signing := []string{"--repo", in("repo"), "--keys", in("keys")}
	must(t, append([]string{"publish", "--percent", "5", in("DEMO-1.hotpatch")}, signing...)...)
	verified := func() string { return must(t, "repo", "verify", "--repo", in("repo")) }
	if text := verified(); !strings.Contains(text, "for 5 % of devices") {
		t.Error(text)
	}
	for _, c := range []struct{ args, says, warns, listed string }{
		{"--percent 50", "DEMO-1: 50 percent of devices, was 5\nDEMO-1 is now for 50 % of devices\n", "", "for 50 % of devices"},
		{"--percent 50", "DEMO-1: already so, nothing was signed\nDEMO-1 is now for 50 % of devices\n", "", "for 50 % of devices"},
		{"--percent 20", "20 percent of devices, was 50", "warning: devices that have it keep it", "for 20 % of devices"},
		{"--not-before 2099-01-02", "not before 2 Jan 2099 00:00 UTC", "warning: devices that have it keep it", "not before 2099-01-02T00:00:00Z"},
		{"--not-before none --percent 100", "at once, was not before", "", "for all devices"},
		{"--not-before 2001-01-02T03:04:05+02:00", "not before 2 Jan 2001 01:04 UTC", "warning: that time is past", "not before 2001-01-02T01:04:05Z"},
		{"--halt --reason crashes", "halted, where it is in force it stays: crashes", "warning: devices that have it keep it: --halt --undo", "HALTED: crashes"},
		{"--halt --undo --reason crashes", "undone where it is", "", "HALTED and undone: crashes"},
		{"--halt --reason crashes", "already so", "", "HALTED and undone: crashes"},
		{"--halt=false", "not halted any more", "", "for all devices, not before"},
	} {
		code, out, errs := command(append(append([]string{"rollout", "DEMO-1"}, strings.Fields(c.args)...), signing...)...)
		if code != 0 || !strings.Contains(out, c.says) || !strings.HasPrefix(errs, c.warns) || (errs == "") != (c.warns == "") {
			t.Errorf("%s: exit %d\n%s%s", c.args, code, out, errs)
		}
		if text := verified(); !strings.Contains(text, c.listed) {
			t.Errorf("%s: %s", c.args, text)
		}
	}
	before := verified()
	for _, c := range []struct {
		id, args string
		code     int
		want     string
	}{
		{"DEMO-9", "--percent 5", 1, `no such release: "DEMO-9" is not published`},
		{"DEMO-1", "", 2, "needs something to change"},
		{"DEMO-1", "--percent 101", 2, "--percent 101 is not between 0 and 100"},
		{"DEMO-1", "--percent -1", 2, "--percent -1 is not between 0 and 100"},
		{"DEMO-1", "--percent few", 2, "invalid argument"},
		{"DEMO-1", "--undo --reason x", 2, "--undo needs --halt"},
		{"DEMO-1", "--halt=false --undo", 2, "--undo needs --halt"},
		{"DEMO-1", "--halt", 2, "--halt needs --reason"},
		{"DEMO-1", "--percent 5 --reason x", 2, "--reason needs --halt"},
		{"DEMO-1", "--not-before tomorrow", 2, "is not a time like 2026-12-08T18:00:00Z"},
		{"DEMO-1 DEMO-2", "--percent 5", 2, "accepts 1 arg"},
	} {
		args := append(append([]string{"rollout"}, strings.Fields(c.id+" "+c.args)...), signing...)
		if code, out, errs := command(args...); code != c.code || out != "" || !strings.Contains(errs, c.want) || !strings.Contains(errs, "hint: ") {
			t.Errorf("%s %s: exit %d, %s%s", c.id, c.args, code, out, errs)
		}
	}
	if code, _, errs := command("rollout", "DEMO-1", "--percent", "5", "--repo", in("repo"), "--keys", in("none")); code != 1 || !strings.Contains(errs, "targets.pem") {
		t.Errorf("no keys: exit %d, %s", code, errs)
	}
	if after := verified(); after != before {
		t.Errorf("a refused command changed the repository: %s", after)
	}
	if code, _, errs := command(append([]string{"publish", "--percent", "3", in("DEMO-1.hotpatch")}, signing...)...); code != 0 || !strings.Contains(errs, "the rollout of DEMO-1 stays as it was") {
		t.Errorf("published again: exit %d, %s", code, errs)
	}
	var doc struct {
		head
		repository.RolloutResult
	}
	text := must(t, append([]string{"rollout", "DEMO-1", "--percent", "7", "--not-before", "none", "--json"}, signing...)...)
	if again := must(t, append([]string{"rollout", "DEMO-1", "--percent", "7", "--json"}, signing...)...); strings.Contains(again, `"warnings": null`) {
		t.Errorf("no warnings are an empty list: %s", again)
	}
	documentOf(t, text)
	if err := json.Unmarshal([]byte(text), &doc); err != nil || doc.Format != "hotpatch-rollout/1" || doc.ID != "DEMO-1" || !doc.Changed || doc.After.Percent != 7 ||
		doc.Before.Percent != 100 || len(doc.Changes) != 2 || len(doc.Warnings) != 1 {
		t.Errorf("%v %s", err, text)
	}
}
