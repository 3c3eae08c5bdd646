package agent

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// offer is a release of product "app" for everybody.
func offer(id string, sequence uint32, change ...func(*repository.Offer)) repository.Offer {
	o := repository.Offer{ID: id, Product: "app", Kind: release.KindHotpatch, Sequence: sequence, SHA256: id, Rollout: repository.Rollout{Percent: 100}}
	for _, f := range change {
		f(&o)
	}
	return o
}

// noWishes is the device of somebody who said nothing.
func noWishes() wishes {
	return wishes{Mode: Automatic, Installed: map[string]bool{}, InForce: map[string]string{}, Floors: map[string]uint32{},
		Broken: map[string]reason{}, Hold: func(string) (reason, bool) { return reason{}, false }}
}

func holds(ids ...string) func(string) (reason, bool) {
	return func(id string) (reason, bool) {
		return because("held", "held"), slices.Contains(ids, id)
	}
}

func TestChoose(t *testing.T) {
	halt := func(undo bool) func(*repository.Offer) {
		return func(o *repository.Offer) { o.Rollout.Halt, o.Rollout.Undo = true, undo }
	}
	later := noon.Add(time.Hour)
	published := func(ago time.Duration) func(*repository.Offer) {
		return func(o *repository.Offer) { o.Published = noon.Add(-ago) }
	}
	for _, c := range []struct {
		name   string
		offers []repository.Offer
		change func(*wishes)
		stale  bool
		want   string // id, "" for none
		why    string // code of why the highest is not wanted
		held   string // id of the one that a hold alone keeps out
	}{
		{"the highest", []repository.Offer{offer("R1", 1), offer("R2", 2)}, nil, false, "R2", "", ""},
		{"a held one", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Hold = holds("R2") }, false, "R1", "held", "R2"},
		{"all held", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Hold = holds("R1", "R2") }, false, "", "held", "R2"},
		{"halted, not here yet", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(false))}, nil, false, "R1", "halted", ""},
		{"halted, in force", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(false))},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Begun = map[string]bool{"R2": true} }, false, "R2", "", ""},
		{"halted, in force and in no process yet", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(false))},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2 }, false, "R1", "halted", ""},
		{"halted, installed and in no process yet", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(false))},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Installed["R2"] = true }, false, "R2", "", ""},
		{"manual now, in force", []repository.Offer{offer("R1", 1)},
			func(w *wishes) { w.Mode = Manual; w.InForce["app"] = "R1"; w.Begun = map[string]bool{"R1": true} }, false, "R1", "", ""},
		{"manual now, in force and in no process yet", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Mode = Manual; w.InForce["app"] = "R1" }, false, "", "manual", ""},
		{"halted with undo, in force", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(true))},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2 }, false, "R1", "halted", ""},
		{"manual", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Mode = Manual }, false, "", "manual", ""},
		{"manual, installed", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Mode = Manual; w.Installed["R1"] = true }, false, "R1", "manual", ""},
		{"off its ring", []repository.Offer{offer("R1", 1, func(o *repository.Offer) { o.Rollout.Percent = 50 })}, nil, false, "", "ring", ""},
		{"off its ring, installed", []repository.Offer{offer("R1", 1, func(o *repository.Offer) { o.Rollout.Percent = 0 })},
			func(w *wishes) { w.Installed["R1"] = true }, false, "R1", "", ""},
		{"not yet", []repository.Offer{offer("R1", 1, func(o *repository.Offer) { o.Rollout.NotBefore = &later })}, nil, false, "", "not-before", ""},
		{"approved", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Mode = Approved; w.Approve = []string{"R1"} }, false, "R1", "not-approved", ""},
		{"a cumulative one approved, one below it not", []repository.Offer{offer("R1", 1), offer("R2", 2), offer("R3", 3)},
			func(w *wishes) { w.Mode = Approved; w.Approve = []string{"R3"} }, false, "R3", "", ""},
		{"an approval is no exception to a deferral", []repository.Offer{offer("R1", 1, published(time.Hour))},
			func(w *wishes) { w.Mode, w.Approve, w.Defer = Approved, []string{"R1"}, 2*time.Hour }, false, "", "deferred", ""},
		{"approved no more, in force", []repository.Offer{offer("R1", 1)},
			func(w *wishes) { w.Mode = Approved; w.InForce["app"] = "R1"; w.Begun = map[string]bool{"R1": true} }, false, "R1", "", ""},
		{"approved no more, in force and in no process yet", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Mode = Approved; w.InForce["app"] = "R1" }, false, "", "not-approved", ""},
		{"not approved, installed", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Mode = Approved; w.Installed["R1"] = true }, false, "R1", "", ""},
		{"approved, and held", []repository.Offer{offer("R1", 1)},
			func(w *wishes) { w.Mode = Approved; w.Approve = []string{"R1"}; w.Hold = holds("R1") }, false, "", "held", "R1"},
		{"approved, and halted", []repository.Offer{offer("R1", 1, halt(false))}, func(w *wishes) { w.Mode = Approved; w.Approve = []string{"R1"} }, false, "", "halted", ""},
		{"installed, and halted", []repository.Offer{offer("R1", 1, halt(false))}, func(w *wishes) { w.Installed["R1"] = true }, false, "", "halted", ""},
		{"deferred", []repository.Offer{offer("R1", 1, published(30*time.Hour)), offer("R2", 2, published(23*time.Hour))},
			func(w *wishes) { w.Defer = 24 * time.Hour }, false, "R1", "deferred", ""},
		{"deferred, installed", []repository.Offer{offer("R1", 1, published(time.Hour))}, func(w *wishes) { w.Defer = 24 * time.Hour; w.Installed["R1"] = true }, false, "R1", "", ""},
		{"deferred, in force", []repository.Offer{offer("R1", 1, published(time.Hour))}, func(w *wishes) { w.Defer = 24 * time.Hour; w.InForce["app"] = "R1" }, false, "R1", "", ""},
		{"deferral is over at its very end", []repository.Offer{offer("R1", 1, published(24*time.Hour))}, func(w *wishes) { w.Defer = 24 * time.Hour }, false, "R1", "", ""},
		{"the rollout comes before dates that would promise too much", []repository.Offer{offer("R1", 1, published(time.Hour), func(o *repository.Offer) { o.Rollout.Percent = 50 })},
			func(w *wishes) { w.Defer = 24 * time.Hour }, false, "", "ring", ""},
		{"back too often", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Returns = map[string]time.Time{"R2": later} }, false, "R1", "returns", ""},
		{"metadata ended", []repository.Offer{offer("R1", 1)}, nil, true, "", "expired", ""},
		{"metadata ended, in force", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.InForce["app"] = "R1" }, true, "R1", "expired", ""},
		{"metadata ended, installed", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Installed["R1"] = true }, true, "", "expired", ""},
		{"below the floor", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2 }, false, "", "rollback", ""},
		{"below the floor by a word", []repository.Offer{offer("R1", 1)},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2; w.Hold = holds("R2") }, false, "R1", "", ""},
		{"a word about another one", []repository.Offer{offer("R1", 1), offer("R3", 3)},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2; w.Hold = holds("R3") }, false, "", "held", "R3"},
		{"the way back, after both were taken out", []repository.Offer{offer("R1", 1), offer("R2", 2)},
			func(w *wishes) { w.Floors["sequence/app/"] = 2; w.Hold = holds("R2") }, false, "R1", "held", "R2"},
		{"broken", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Broken["R2"] = because("feature", "x") }, false, "R1", "feature", ""},
		{"broken, but in force before", []repository.Offer{offer("R1", 1), offer("R2", 2)},
			func(w *wishes) {
				w.Broken["R2"] = because("fetch", "x")
				w.InForce["app"], w.Floors["sequence/app/"] = "R2", 2
			}, false, "", "fetch", ""},
		{"out of scope", []repository.Offer{offer("R1", 1)}, func(w *wishes) { w.Products = []Glob{"other"} }, false, "", "out-of-scope", ""},
		{"same sequence twice", []repository.Offer{offer("B", 1), offer("A", 1)}, nil, false, "A", "", ""},
		{"an older one held", []repository.Offer{offer("R1", 1), offer("R2", 2)}, func(w *wishes) { w.Hold = holds("R1") }, false, "R2", "", ""},
		{"held, and halted", []repository.Offer{offer("R1", 1), offer("R2", 2, halt(true))}, func(w *wishes) { w.Hold = holds("R2") }, false, "R1", "held", ""},
		{"held below one that is not due", []repository.Offer{offer("R1", 1), offer("R2", 2), offer("R3", 3, func(o *repository.Offer) { o.Rollout.NotBefore = &later })},
			func(w *wishes) { w.Hold = holds("R2") }, false, "R1", "not-before", "R2"},
		{"held below the floor", []repository.Offer{offer("R1", 1)},
			func(w *wishes) { w.InForce["app"] = "R2"; w.Floors["sequence/app/"] = 2; w.Hold = holds("R1") }, false, "", "held", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := noWishes()
			if c.change != nil {
				c.change(&w)
			}
			got := choose(c.offers, device{OS: "linux", Arch: "amd64", Place: 50}, w, noon, !c.stale)["app"]
			id := ""
			if got.Want != nil {
				id = got.Want.ID
			}
			held := ""
			if got.Held != nil {
				held = got.Held.ID
			}
			if id != c.want || got.Why.Code != c.why || held != c.held {
				t.Errorf("wants %q because %q, held %q, not %q because %q, held %q", id, got.Why.Code, held, c.want, c.why, c.held)
			}
		})
	}
}

func TestFits(t *testing.T) {
	d := device{OS: "linux", Arch: "amd64"}
	for _, c := range []struct {
		change func(*repository.Offer)
		code   string
	}{
		{func(*repository.Offer) {}, ""},
		{func(o *repository.Offer) { o.Kind = release.KindBaseline }, "baseline-kind"},
		{func(o *repository.Offer) { o.OS = []string{"windows"} }, "os"},
		{func(o *repository.Offer) { o.OS = []string{"windows", "linux"} }, ""},
		{func(o *repository.Offer) { o.Arch = []string{"arm64"} }, "arch"},
		{func(o *repository.Offer) { o.Baseline = "2026-10" }, "baseline"},
	} {
		r, ok := fits(offer("R", 1, c.change), d)
		if ok != (c.code == "") || r.Code != c.code {
			t.Errorf("%v %q, wanted %q", ok, r.Code, c.code)
		}
	}
}

// drawOffers makes offers of a few products and sequences.
func drawOffers(t *rapid.T) []repository.Offer {
	var out []repository.Offer
	n := rapid.IntRange(0, 6).Draw(t, "offers")
	for i := range n {
		o := offer(fmt.Sprintf("R%d", i), rapid.Uint32Range(1, 4).Draw(t, "sequence"))
		o.Product = rapid.SampledFrom([]string{"app", "demo"}).Draw(t, "product")
		o.Rollout.Percent = rapid.SampledFrom([]int{0, 50, 51, 100}).Draw(t, "percent")
		o.Rollout.Halt = rapid.Bool().Draw(t, "halt")
		o.Rollout.Undo = o.Rollout.Halt && rapid.Bool().Draw(t, "undo")
		if rapid.Bool().Draw(t, "timed") {
			at := noon.Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "hours")) * time.Hour)
			o.Rollout.NotBefore = &at
		}
		if rapid.IntRange(0, 4).Draw(t, "os") == 0 {
			o.OS = []string{"windows"}
		}
		out = append(out, o)
	}
	return out
}

// drawWishes makes wishes about offers drawn before, and about others.
func drawWishes(t *rapid.T, offers []repository.Offer) wishes {
	ids := []string{"gone"}
	for _, o := range offers {
		ids = append(ids, o.ID)
	}
	id := rapid.SampledFrom(ids)
	held := rapid.SliceOfDistinct(id, rapid.ID).Draw(t, "held")
	w := noWishes()
	w.Hold, w.Begun, w.Before = holds(held...), map[string]bool{}, map[string]string{}
	w.Mode = rapid.SampledFrom([]Mode{Automatic, Manual}).Draw(t, "mode")
	for _, x := range rapid.SliceOfDistinct(id, rapid.ID).Draw(t, "installed") {
		w.Installed[x] = true
	}
	for _, x := range rapid.SliceOfNDistinct(id, 0, 2, rapid.ID).Draw(t, "broken") {
		w.Broken[x] = because("fetch", "no network")
	}
	for _, p := range []string{"app", "demo"} {
		if rapid.Bool().Draw(t, "has in force") {
			now := id.Draw(t, "in force")
			w.InForce[p] = now
			if w.Begun[now] = rapid.Bool().Draw(t, "had"); !w.Begun[now] && !w.Installed[now] && rapid.Bool().Draw(t, "has before") {
				w.Before[p] = id.Draw(t, "before")
			}
		}
		w.Floors["sequence/"+p+"/"] = rapid.Uint32Range(0, 5).Draw(t, "floor")
	}
	if rapid.IntRange(0, 4).Draw(t, "scope") == 0 {
		w.Products = []Glob{"app"}
	}
	return w
}

func TestChooseNeverWantsWhatIsRefused(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		offers := drawOffers(t)
		w := drawWishes(t, offers)
		d := device{OS: "linux", Arch: "amd64", Place: 50}
		fresh := rapid.Bool().Draw(t, "fresh")
		got := choose(offers, d, w, noon, fresh)
		for product, c := range got {
			if c.Latest == nil || c.Product != product {
				t.Fatalf("%s: %+v", product, c)
			}
			if (c.Want == nil || c.Want.ID != c.Latest.ID) && c.Why.Code == "" {
				t.Fatalf("%s: %s is not wanted and nobody says why", product, c.Latest.ID)
			}
			o := c.Want
			if o == nil {
				continue
			}
			inForce := w.InForce[product] == o.ID || w.Before[product] == o.ID
			_, heldOut := w.Hold(o.ID)
			_, isBroken := w.Broken[o.ID]
			switch {
			case o.Product != product:
				t.Fatalf("%s is of %s", o.ID, o.Product)
			case heldOut:
				t.Fatalf("wants %s, which is held", o.ID)
			case o.Rollout.Halt && !(inForce && !o.Rollout.Undo):
				t.Fatalf("wants %s, which is halted", o.ID)
			case len(o.OS) > 0:
				t.Fatalf("wants %s, which is for %v", o.ID, o.OS)
			case isBroken:
				t.Fatalf("wants %s, which is broken", o.ID)
			case !fresh && !inForce:
				t.Fatalf("wants %s, which is new, though metadata has ended", o.ID)
			case w.Mode == Manual && !inForce && !w.Installed[o.ID]:
				t.Fatalf("wants %s in mode manual", o.ID)
			case !inForce && !w.Installed[o.ID] && o.Rollout.Percent <= 50:
				t.Fatalf("wants %s off its ring", o.ID)
			case !w.inScope(product):
				t.Fatalf("wants %s out of scope", o.ID)
			}
			// Below what was in force only a word leads, and it is about what is in force:
			// against it, or against what nobody has yet.
			if now := w.InForce[product]; !inForce && o.Sequence < w.Floors[floorKey(*o)] && now != "" {
				if _, out := w.word(now, offers); !out && c.Never.Code == "" {
					t.Fatalf("goes down to %s while %s is in force and nobody is against it", o.ID, now)
				}
			}
		}
		// Every product that has an offer for this device is chosen for, in any order of the offers.
		for i := range offers {
			if _, ok := fits(offers[i], d); ok && got[offers[i].Product].Latest == nil {
				t.Fatalf("nothing is chosen for %s", offers[i].Product)
			}
		}
		shuffled := rapid.Permutation(offers).Draw(t, "order")
		if again := choose(shuffled, d, w, noon, fresh); !reflect.DeepEqual(got, again) {
			t.Fatalf("another order, another choice: %+v, %+v", got, again)
		}
	})
}

func TestInstallable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		offers := drawOffers(t)
		w := drawWishes(t, offers)
		d := device{OS: "linux", Arch: "amd64", Place: 50}
		for _, o := range offers {
			r, ok := installable(o, d, w)
			if !ok && r.Code == "" {
				t.Fatalf("%s cannot be installed and nobody says why", o.ID)
			}
			// What may come into force by itself an operator may install.
			if _, allow := allowed(o, d, w, noon, true); allow && !ok && !o.Rollout.Halt {
				if _, fit := fits(o, d); fit {
					t.Fatalf("%s may come into force by itself, but not by hand: %s", o.ID, r.Text)
				}
			}
		}
	})
}

// TestOpens: the loop is told when time alone lets something in, the first of
// several, and wakes then although its scan is far away.
func TestOpens(t *testing.T) {
	at := func(d time.Duration) *time.Time { v := noon.Add(d); return &v }
	dated := func(id string, sequence uint32, change func(*repository.Offer)) repository.Offer {
		return offer(id, sequence, func(o *repository.Offer) { o.Published = noon.Add(-time.Hour); change(o) })
	}
	plain := func(*repository.Offer) {}
	for name, c := range map[string]struct {
		offers []repository.Offer
		change func(*wishes)
		want   time.Duration // after noon; 0: nothing waits for time
	}{
		"nothing waits":           {[]repository.Offer{dated("R1", 1, plain)}, func(*wishes) {}, 0},
		"a date":                  {[]repository.Offer{dated("R1", 1, func(o *repository.Offer) { o.Rollout.NotBefore = at(time.Hour) })}, func(*wishes) {}, time.Hour},
		"a deferral":              {[]repository.Offer{dated("R1", 1, plain)}, func(w *wishes) { w.Defer = 3 * time.Hour }, 2 * time.Hour},
		"the later of both":       {[]repository.Offer{dated("R1", 1, func(o *repository.Offer) { o.Rollout.NotBefore = at(time.Hour) })}, func(w *wishes) { w.Defer = 3 * time.Hour }, 2 * time.Hour},
		"the first of several":    {[]repository.Offer{dated("R1", 1, plain), dated("R3", 3, func(o *repository.Offer) { o.Rollout.NotBefore = at(9 * time.Hour) })}, func(w *wishes) { w.Defer = 3 * time.Hour }, 2 * time.Hour},
		"not below what is in":    {[]repository.Offer{dated("R1", 1, func(o *repository.Offer) { o.Rollout.NotBefore = at(time.Hour) }), dated("R2", 2, plain)}, func(w *wishes) { w.InForce["app"] = "R2" }, 0},
		"a list has no time":      {[]repository.Offer{dated("R1", 1, plain)}, func(w *wishes) { w.Mode = Approved }, 0},
		"a rollout has no time":   {[]repository.Offer{dated("R1", 1, func(o *repository.Offer) { o.Rollout.Percent = 0; o.Rollout.NotBefore = at(time.Hour) })}, func(*wishes) {}, 0},
		"coming back":             {[]repository.Offer{dated("R1", 1, plain)}, func(w *wishes) { w.Returns = map[string]time.Time{"R1": noon.Add(time.Minute)} }, time.Minute},
		"a rollback is no matter": {[]repository.Offer{dated("R1", 1, plain)}, func(w *wishes) { w.Defer = 3 * time.Hour; w.Floors["sequence/app/"] = 5 }, 0},
	} {
		w := noWishes()
		c.change(&w)
		got := choose(c.offers, device{OS: "linux", Arch: "amd64", Place: 50}, w, noon, true)
		want := time.Time{}
		if c.want != 0 {
			want = noon.Add(c.want)
		}
		if !got["app"].Opens.Equal(want) {
			t.Errorf("%s: opens %v, want %v", name, got["app"].Opens, want)
		}
		if again := (&Agent{}).nextAgain(View{Choices: got}, nil); !again.Equal(want) {
			t.Errorf("%s: the loop wakes %v, want %v", name, again, want)
		}
	}
}

func TestTakenOutReturns(t *testing.T) {
	for times, want := range []time.Duration{0, 0, time.Hour, 2 * time.Hour, 4 * time.Hour, 8 * time.Hour, 16 * time.Hour, 24 * time.Hour, 24 * time.Hour} {
		at := takenOut{Times: times, Last: noon}.returns()
		if want == 0 && !at.IsZero() || want != 0 && !at.Equal(noon.Add(want)) {
			t.Errorf("%d times: %v", times, at)
		}
	}
	if at := (takenOut{Times: 1 << 40, Last: noon}).returns(); !at.Equal(noon.Add(returnMost)) {
		t.Errorf("very often: %v", at)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{72 * time.Hour: "72h", 90 * time.Minute: "1h30m", 30 * time.Second: "30s", 100 * time.Second: "1m40s", time.Minute: "1m", 10 * time.Hour: "10h"} {
		if got := short(d); got != want {
			t.Errorf("%v: %q", d, got)
		}
	}
}
