package agent

import (
	"context"
	"errors"
	"slices"
	"testing"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/sim"
)

// Two checks that end together may come to the loop in the other order: what the
// older one found, or failed with, is over.
func TestOlderCheckComesLater(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1})
	publish := func(id string, sequence uint32, file string) {
		must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: id, Product: "app", Sequence: sequence}, image{file}))
	}
	publish("R1", 1, "mingw/app-ref-1.dll")
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	check := func() {
		_, err := r.life.client.Check(context.Background())
		must(t, err)
	}
	check()
	var n uint64
	var old *repository.Catalog
	var floors repository.Floors
	r.inLoop(func(a *Agent) {
		var err error
		old, err = a.client.Cached()
		must(t, err)
		n, floors = a.tookCheck, a.client.Floors()
	})
	publish("R2", 2, "mingw/app-ref-2.dll")
	check()
	r.inLoop(func(a *Agent) {
		a.takeCheck(n, old, floors, nil)
		if !slices.ContainsFunc(a.offers, func(o repository.Offer) bool { return o.ID == "R2" }) {
			t.Errorf("an older check takes R2 away: %v", a.offers)
		}
		a.takeCheck(n, nil, floors, errors.New("away"))
		if a.repoErr != nil {
			t.Errorf("an older failure counts: %v", a.repoErr)
		}
	})
}
