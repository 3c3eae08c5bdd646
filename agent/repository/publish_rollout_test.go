package repository

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// as is a pointer to a value.
func as[T any](v T) *T { return &v }

// set changes the rollout of ACME-1, a day later each time.
func (f *fixture) set(c RolloutChange) RolloutResult {
	f.t.Helper()
	f.now = f.now.Add(time.Hour)
	res, err := SetRollout(f.dir, f.keys, "ACME-1", c, f.options())
	if err != nil {
		f.t.Fatal(err)
	}
	return res
}

// What is signed is what a client of its own reads, and nothing else of the release changes.
func TestSetRollout(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	c := f.client("")
	first := mustRefresh(t, c)
	later := start.Add(72 * time.Hour)
	for i, step := range []struct {
		change  RolloutChange
		want    Rollout
		says    string // all changes
		warning string
	}{
		{RolloutChange{Percent: as(5)}, Rollout{Percent: 5}, "5 percent of devices, was 100", "devices that have it keep it"},
		{RolloutChange{Percent: as(50)}, Rollout{Percent: 50}, "50 percent of devices, was 5", ""},
		{RolloutChange{NotBefore: &later}, Rollout{Percent: 50, NotBefore: &later}, "not before 13 Nov 2026 12:00 UTC", "devices that have it keep it"},
		{RolloutChange{Halt: as(true), Reason: as("crashes")}, Rollout{Percent: 50, NotBefore: &later, Halt: true, Reason: "crashes"},
			"halted, where it is in force it stays: crashes", "devices that have it keep it: --halt --undo takes it out"},
		{RolloutChange{Percent: as(60)}, Rollout{Percent: 60, NotBefore: &later, Halt: true, Reason: "crashes"}, "60 percent of devices, was 50", "it is halted: no device takes it"},
		{RolloutChange{Halt: as(true), Undo: as(true), Reason: as("crashes")}, Rollout{Percent: 60, NotBefore: &later, Halt: true, Undo: true, Reason: "crashes"}, "undone where it is", ""},
		{RolloutChange{Halt: as(false)}, Rollout{Percent: 60, NotBefore: &later}, "not halted any more", ""},
		{RolloutChange{NotBefore: &time.Time{}, Percent: as(100)}, Rollout{Percent: 100}, "100 percent of devices, was 60; at once, was not before 13 Nov 2026 12:00 UTC", ""},
	} {
		res := f.set(step.change)
		if !reflect.DeepEqual(res.After, step.want) || !res.Changed || strings.Join(res.Changes, "; ") != step.says ||
			!strings.HasPrefix(strings.Join(res.Warnings, "; "), step.warning) || (step.warning == "") != (len(res.Warnings) == 0) {
			t.Errorf("step %d: %+v", i, res)
		}
		cat := mustRefresh(t, c)
		if !reflect.DeepEqual(cat.Offers[0].Rollout, step.want) {
			t.Errorf("step %d: a device reads %+v", i, cat.Offers[0].Rollout)
		}
		if n := first.Floors.Targets + int64(i) + 1; cat.Floors.Targets != n || cat.Floors.Snapshot != n || cat.Floors.Timestamp != n {
			t.Errorf("step %d: versions %+v, want %d", i, cat.Floors, n)
		}
		want := first.Offers[0]
		want.Rollout = step.want
		if !reflect.DeepEqual(cat.Offers[0], want) || !reflect.DeepEqual(cat.Offers[1], first.Offers[1]) {
			t.Errorf("step %d: more than the rollout changed: %+v", i, cat.Offers)
		}
		// The same again is not signed again.
		before := f.save()
		if res := f.set(step.change); res.Changed || len(res.Changes) != 0 {
			t.Errorf("step %d again: %+v", i, res)
		}
		if fmt.Sprint(f.save()) != fmt.Sprint(before) {
			t.Errorf("step %d again: the repository changed", i)
		}
	}
	if r, err := Verify(f.dir, f.now); err != nil || r.Problems() != 0 || r.Releases[0].Rollout.Percent != 100 || !r.Releases[0].Published.Equal(start) {
		t.Errorf("%+v %v", r, err)
	}
}

func TestSetRolloutRefuses(t *testing.T) {
	f := newFixture(t)
	before := f.save()
	for name, c := range map[string]struct {
		id     string
		change RolloutChange
		want   string
	}{
		"unknown":          {"ACME-9", RolloutChange{Percent: as(5)}, "no such release: \"ACME-9\" is not published"},
		"too much":         {"ACME-1", RolloutChange{Percent: as(101)}, "101 percent is not between 0 and 100"},
		"too little":       {"ACME-1", RolloutChange{Percent: as(-1)}, "-1 percent is not between 0 and 100"},
		"undo alone":       {"ACME-1", RolloutChange{Undo: as(true)}, "undo needs a halt"},
		"undo and no halt": {"ACME-1", RolloutChange{Undo: as(true), Halt: as(false)}, "undo needs a halt"},
		"no reason":        {"ACME-1", RolloutChange{Halt: as(true)}, "a halt needs a reason"},
		"a reason alone":   {"ACME-1", RolloutChange{Reason: as("x")}, "a reason needs a halt"},
		"a long reason":    {"ACME-1", RolloutChange{Halt: as(true), Reason: as(strings.Repeat("x", maxReason+1))}, "at most 500 are shown"},
	} {
		if _, err := SetRollout(f.dir, f.keys, c.id, c.change, f.options()); err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, ErrUnknownRelease) != (name == "unknown") {
			t.Errorf("%s: %v", name, err)
		}
	}
	without := Keys{metadata.SNAPSHOT: f.keys[metadata.SNAPSHOT], metadata.TIMESTAMP: f.keys[metadata.TIMESTAMP]}
	if _, err := SetRollout(f.dir, without, "ACME-1", RolloutChange{Percent: as(5)}, f.options()); err == nil || !strings.Contains(err.Error(), "targets.json needs 1 signatures") {
		t.Errorf("without the key: %v", err)
	}
	if fmt.Sprint(f.save()) != fmt.Sprint(before) {
		t.Error("a refused change changed the repository")
	}
	f.write(".publishing", nil)
	if _, err := SetRollout(f.dir, f.keys, "ACME-1", RolloutChange{Percent: as(5)}, f.options()); err == nil || !strings.Contains(err.Error(), "another publisher is at work") {
		t.Errorf("two publishers: %v", err)
	}
	if _, err := SetRollout(t.TempDir(), f.keys, "ACME-1", RolloutChange{Percent: as(5)}, f.options()); err == nil || !strings.Contains(err.Error(), "is not a repository") {
		t.Errorf("no repository: %v", err)
	}
}

// A release for few devices is for few from its first moment.
func TestPublishForFew(t *testing.T) {
	f := newFixture(t)
	opts := f.options()
	opts.Rollout = &Rollout{Percent: 10, NotBefore: as(start.Add(time.Hour))}
	if _, err := Publish(f.dir, f.keys, [][]byte{container(t, "ACME-2", 2, 100)}, opts); err != nil {
		t.Fatal(err)
	}
	if o := mustRefresh(t, f.client("")).Offers; !reflect.DeepEqual(o[1].Rollout, *opts.Rollout) || o[0].Rollout.Percent != 100 {
		t.Errorf("%+v", o)
	}
	opts.Rollout = &Rollout{Percent: 200}
	if _, err := Publish(f.dir, f.keys, [][]byte{container(t, "ACME-3", 3, 100)}, opts); err == nil {
		t.Error("published for 200 percent")
	}
}
