package agent

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// build is the identity of build n of an image, told by its headers.
func build(n uint32) pe.Identity {
	return pe.Identity{Machine: 0x8664, SizeOfImage: 0x1000, TimeDateStamp: n}
}

// fixing makes an offer name builds of app.dll.
func fixing(builds ...uint32) func(*repository.Offer) {
	return func(o *repository.Offer) {
		for _, n := range builds {
			o.Bases = append(o.Bases, repository.Base{Name: "app.dll", Identity: build(n)})
		}
	}
}

// quiet is a view of an eligible device on which nobody said anything.
func quiet() View {
	return View{
		Now: noon, Eligible: true, Choices: map[string]choice{},
		Word:    func(string) (reason, bool) { return reason{}, false },
		Ready:   func(string) bool { return true },
		Deny:    func(target.Info, string, string) (reason, bool) { return reason{}, false },
		InScope: func(string) bool { return true },
		Procs:   []Proc{{Info: target.Info{ID: target.ID{PID: 1}, Change: 7}, Images: []ImageView{{Name: "app.dll", Identity: build(1)}}}},
	}
}

// wants makes the view want an offer of product app.
func (v *View) wants(o repository.Offer) {
	v.Choices["app"] = choice{Product: "app", Want: &o, Latest: &o}
}

// has gives the first image a record of product app.
func (v *View) has(release string, sequence uint32, s patcher.State) {
	v.Procs[0].Images[0].Records = map[string]patcher.Record{"app": {Product: "app", Release: release, Sequence: sequence, State: s}}
}

func TestDecide(t *testing.T) {
	r1, r2 := offer("R1", 1, fixing(1)), offer("R2", 2, fixing(1))
	r3 := offer("R3", 3, fixing(9)) // names app.dll, another build of it
	word := func(id string) func(string) (reason, bool) {
		return func(x string) (reason, bool) { return because("held", "held"), x == id }
	}
	tried := func(v *View, what string, s control.ImageState, ago time.Duration) {
		v.Procs[0].Images[0].Tried = map[string]Try{"app": {Release: what, State: s, Reason: because("code", "text"), Change: 7, Since: noon.Add(-ago), Next: noon.Add(time.Minute)}}
	}
	for _, c := range []struct {
		name   string
		change func(*View)
		kind   Kind
		offer  string // of an apply
		state  control.ImageState
		code   string
	}{
		{"apply", func(v *View) { v.wants(r1) }, DoApply, "R1", control.PendingImage, ""},
		{"not loaded", func(v *View) { v.wants(r1); v.Ready = func(string) bool { return false } }, DoNothing, "", control.PendingImage, "loading"},
		{"in force", func(v *View) { v.wants(r1); v.has("R1", 1, patcher.Applied) }, DoNothing, "", control.Patched, ""},
		{"replace", func(v *View) { v.wants(r2); v.has("R1", 1, patcher.Applied) }, DoApply, "R2", control.PendingImage, ""},
		{"no longer named", func(v *View) { v.wants(r3); v.has("R1", 1, patcher.Applied) }, DoUndo, "", control.PendingImage, "replaced"},
		{"no longer named, paused", func(v *View) { v.wants(r3); v.has("R1", 1, patcher.Applied); v.Paused = because("paused", "") },
			DoNothing, "", control.Patched, "paused"},
		{"no longer named, not loaded", func(v *View) {
			v.wants(r3)
			v.has("R1", 1, patcher.Applied)
			v.Ready = func(string) bool { return false }
		},
			DoNothing, "", control.PendingImage, "loading"},
		{"no longer wanted, but nobody's word", func(v *View) {
			v.Choices["app"] = choice{Product: "app", Latest: &r1, Why: because("expired", "")}
			v.has("R1", 1, patcher.Applied)
		}, DoNothing, "", control.Patched, ""},
		{"a word about another release", func(v *View) {
			v.Choices["app"] = choice{Product: "app", Latest: &r2, Why: because("held", "")}
			v.has("R1", 1, patcher.Applied)
			v.Word = word("R2")
		}, DoNothing, "", control.Patched, ""},
		{"taken out", func(v *View) {
			v.Choices["app"] = choice{Product: "app", Latest: &r1, Why: because("held", "")}
			v.has("R1", 1, patcher.Applied)
			v.Word = word("R1")
		}, DoUndo, "", control.PendingImage, "held"},
		{"taken out, not offered any more", func(v *View) { v.has("R1", 1, patcher.Applied); v.Word = word("R1") }, DoUndo, "", control.PendingImage, "held"},
		{"taken out, back", func(v *View) { v.wants(r1); v.has("R2", 2, patcher.Applied); v.Word = word("R2") }, DoApply, "R1", control.PendingImage, "held"},
		{"a new process, the operator's word is lost", func(v *View) { v.wants(r1); v.Lost = because("state-lost", "") }, DoNothing, "", control.Unpatched, "state-lost"},
		{"a new process, asked for since", func(v *View) {
			v.wants(r1)
			v.Lost, v.Chosen = because("state-lost", ""), map[string]bool{"R1": true}
		}, DoApply, "R1", control.PendingImage, ""},
		{"taken out, the one before may have been held", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word, v.Lost = word("R2"), because("state-lost", "")
		}, DoUndo, "", control.PendingImage, "held"},
		{"taken out, back, paused and closed and not eligible", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word, v.Paused, v.Closed, v.Eligible = word("R2"), because("paused", ""), true, false
		}, DoApply, "R1", control.PendingImage, "held"},
		{"taken out, denied: not back", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word = word("R2")
			v.Deny = func(target.Info, string, string) (reason, bool) { return because("denied", ""), true }
		}, DoUndo, "", control.PendingImage, "held"},
		{"in force, and denied since", func(v *View) {
			v.wants(r1)
			v.has("R1", 1, patcher.Applied)
			v.Deny = func(target.Info, string, string) (reason, bool) { return because("denied", ""), true }
		}, DoNothing, "", control.Patched, "denied"},
		{"taken out, on, paused", func(v *View) {
			v.wants(r2)
			v.has("R1", 1, patcher.Applied)
			v.Word, v.Paused = word("R1"), because("paused", "")
		}, DoUndo, "", control.PendingImage, "held"},
		{"taken out, the one before is refused here", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word = word("R2")
			tried(v, "R1", control.Blocked, time.Second)
		}, DoUndo, "", control.PendingImage, "held"},
		{"taken out, the one before is busy", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word = word("R2")
			tried(v, "R1", control.Busy, time.Second)
		}, DoNothing, "", control.Busy, "code"},
		{"taken out, the one before is busy too long", func(v *View) {
			v.wants(r1)
			v.has("R2", 2, patcher.Applied)
			v.Word = word("R2")
			tried(v, "R1", control.Busy, time.Minute)
		}, DoUndo, "", control.PendingImage, "held"},
		{"torn", func(v *View) { v.wants(r2); v.has("R1", 1, patcher.TornUp) }, DoRecover, "", control.Torn, "torn"},
		{"under way when we died", func(v *View) { v.wants(r2); v.has("R1", 1, patcher.Swapping); v.Word = word("R1") }, DoRecover, "", control.PendingImage, ""},
		{"being undone when we died", func(v *View) { v.has("R1", 1, patcher.Undoing) }, DoRecover, "", control.PendingImage, ""},
		{"ours without a record", func(v *View) {
			v.wants(r2)
			v.Procs[0].Images[0].Claims = []patcher.Claim{{Product: "app", Release: "R1"}}
		}, DoAdopt, "", control.PendingImage, ""},
		{"ours without a record, not offered", func(v *View) {
			v.Procs[0].Images[0].Claims = []patcher.Claim{{Product: "app", Release: "R1"}}
		}, DoAdopt, "", control.PendingImage, ""},
		{"claimed, and refused a moment ago", func(v *View) {
			v.Procs[0].Images[0].Claims = []patcher.Claim{{Product: "app", Release: "R1"}}
			tried(v, "adopt R1", control.Blocked, time.Second)
		}, DoNothing, "", control.Blocked, "code"},
		{"other build", func(v *View) { v.wants(r3) }, DoNothing, "", control.OtherBuild, "identity"},
		{"paused", func(v *View) { v.wants(r1); v.Paused = because("paused", "") }, DoNothing, "", control.Unpatched, "paused"},
		{"not eligible", func(v *View) { v.wants(r1); v.Eligible = false }, DoNothing, "", control.Unpatched, "not-eligible"},
		{"denied", func(v *View) {
			v.wants(r1)
			v.Deny = func(target.Info, string, string) (reason, bool) { return because("denied", ""), true }
		}, DoNothing, "", control.Blocked, "denied"},
		{"out of scope", func(v *View) { v.wants(r1); v.InScope = func(string) bool { return false } }, DoNothing, "", control.Blocked, "out-of-scope"},
		{"closed", func(v *View) { v.wants(r1); v.Closed = true }, DoNothing, "", control.PendingImage, "hours"},
		{"closed, but asked for", func(v *View) { v.wants(r1); v.Closed = true; v.Forced = "app" }, DoApply, "R1", control.PendingImage, ""},
		{"feature", func(v *View) { v.Choices["app"] = choice{Product: "app", Latest: &r1, Why: because("feature", "")} }, DoNothing, "", control.Blocked, "feature"},
		{"held", func(v *View) { v.Choices["app"] = choice{Product: "app", Latest: &r1, Why: because("held", "")} }, DoNothing, "", control.Unpatched, "held"},
		{"busy a moment ago", func(v *View) { v.wants(r1); tried(v, "R1", control.Busy, time.Second) }, DoNothing, "", control.Busy, "code"},
		{"blocked a moment ago, the process has changed", func(v *View) {
			v.wants(r1)
			tried(v, "R1", control.Blocked, time.Second)
			v.Procs[0].Info.Change = 8
		}, DoApply, "R1", control.Blocked, "code"},
		{"failed a moment ago, the process has changed by it", func(v *View) {
			v.wants(r1)
			tried(v, "R1", control.Failed, time.Second)
			v.Procs[0].Info.Change = 8
		}, DoNothing, "", control.Failed, "code"},
		{"another release was busy", func(v *View) { v.wants(r1); tried(v, "R0", control.Busy, time.Second) }, DoApply, "R1", control.PendingImage, ""},
		{"its turn has come again", func(v *View) {
			v.wants(r1)
			tried(v, "R1", control.Busy, time.Second)
			v.Now = noon.Add(time.Hour)
		}, DoApply, "R1", control.Busy, "code"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := quiet()
			c.change(&v)
			list := decide(v)
			if len(list) != 1 {
				t.Fatalf("%d intents: %+v", len(list), list)
			}
			in := list[0]
			if in.Kind != c.kind || in.State != c.state || in.Reason.Code != c.code {
				t.Errorf("%q, %s because %q; wanted %q, %s because %q", in.Kind, in.State, in.Reason.Code, c.kind, c.state, c.code)
			}
			if in.Kind == DoApply && in.Offer.ID != c.offer {
				t.Errorf("applies %s, wanted %s", in.Offer.ID, c.offer)
			}
		})
	}
	v := quiet()
	v.wants(offer("X", 1, func(o *repository.Offer) { o.Bases = []repository.Base{{Name: "third.dll", Identity: build(3)}} }))
	if list := decide(v); len(list) != 0 {
		t.Errorf("an image that nobody names has %+v", list)
	}
}

// drawView makes any view: of any choices, records, claims, attempts and words.
func drawView(t *rapid.T) View {
	offers := drawOffers(t)
	for i := range offers {
		fixing(rapid.SliceOfNDistinct(rapid.Uint32Range(1, 3), 1, 2, rapid.ID).Draw(t, "builds")...)(&offers[i])
	}
	w := drawWishes(t, offers)
	v := quiet()
	v.Choices = choose(offers, device{OS: "linux", Arch: "amd64", Place: 50}, w, noon, rapid.Bool().Draw(t, "fresh"))
	v.Eligible, v.Closed = rapid.Bool().Draw(t, "eligible"), rapid.Bool().Draw(t, "closed")
	if rapid.Bool().Draw(t, "paused") {
		v.Paused = because("paused", "paused")
	}
	ready := map[string]bool{}
	ids := []string{"gone"}
	for _, o := range offers {
		ids = append(ids, o.ID)
		ready[o.ID] = rapid.Bool().Draw(t, "ready")
	}
	v.Ready = func(id string) bool { return ready[id] }
	v.Word = func(id string) (reason, bool) { return w.word(id, offers) }
	denied := rapid.IntRange(0, 3).Draw(t, "denied pid")
	v.Deny = func(i target.Info, _, _ string) (reason, bool) { return because("denied", "denied"), i.PID == denied }
	id := rapid.SampledFrom(ids)
	v.Procs = nil
	for pid := range rapid.IntRange(0, 3).Draw(t, "processes") {
		p := Proc{Info: target.Info{ID: target.ID{PID: pid}, Change: 1}}
		for base := range rapid.IntRange(0, 2).Draw(t, "images") {
			im := ImageView{Name: rapid.SampledFrom([]string{"app.dll", "third.dll"}).Draw(t, "name"), Base: target.Addr(base + 1),
				Identity: build(rapid.Uint32Range(1, 4).Draw(t, "build")), Records: map[string]patcher.Record{}, Tried: map[string]Try{}}
			for _, product := range []string{"app", "demo"} {
				if rapid.Bool().Draw(t, "record") {
					im.Records[product] = patcher.Record{Product: product, Release: id.Draw(t, "of"), Sequence: rapid.Uint32Range(1, 4).Draw(t, "sequence"),
						State: rapid.SampledFrom([]patcher.State{patcher.Staging, patcher.Staged, patcher.Swapping, patcher.Applied, patcher.Undoing, patcher.TornUp}).Draw(t, "state")}
				}
				if rapid.IntRange(0, 3).Draw(t, "claim") == 0 {
					im.Claims = append(im.Claims, patcher.Claim{Product: product, Release: id.Draw(t, "claimed")})
				}
				if rapid.Bool().Draw(t, "tried") {
					im.Tried[product] = Try{Release: rapid.SampledFrom([]string{"", "undo ", "adopt ", "recover "}).Draw(t, "what") + id.Draw(t, "tried of"),
						State:  rapid.SampledFrom([]control.ImageState{control.Busy, control.Blocked, control.Failed, control.Drifted}).Draw(t, "tried state"),
						Reason: because("code", "text"), Remedy: control.RemedyWait, Change: rapid.Uint64Range(1, 2).Draw(t, "change"),
						Next: noon.Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "next")) * time.Minute)}
				}
			}
			p.Images = append(p.Images, im)
		}
		v.Procs = append(v.Procs, p)
	}
	return v
}

func TestDecideKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawView(t)
		list := decide(v)
		if again := decide(v); !reflect.DeepEqual(list, again) {
			t.Fatalf("two decisions about one view")
		}
		seen := map[string]bool{}
		for _, in := range list {
			key := fmt.Sprint(in.Proc.Info.PID, in.Image.Base, in.Product)
			if seen[key] {
				t.Fatalf("%s has two rows", key)
			}
			seen[key] = true
			promise(t, v, in)
		}
		// Every image that a product names, that runs a patch of ours, or claims to, has its row.
		for i := range v.Procs {
			for j := range v.Procs[i].Images {
				im := &v.Procs[i].Images[j]
				for product, c := range v.Choices {
					o := c.Want
					if o == nil {
						o = c.Latest
					}
					if named, _ := match(o, im); named && !seen[fmt.Sprint(v.Procs[i].Info.PID, im.Base, product)] {
						t.Fatalf("%s names an image that has no row", o.ID)
					}
				}
				for product, r := range im.Records {
					if r.Live() && !seen[fmt.Sprint(v.Procs[i].Info.PID, im.Base, product)] {
						t.Fatalf("a patch of %s in force has no row", r.Release)
					}
				}
				for _, c := range im.Claims {
					if !seen[fmt.Sprint(v.Procs[i].Info.PID, im.Base, c.Product)] {
						t.Fatalf("a claim of %s has no row", c.Release)
					}
				}
			}
		}
	})
}

// promise checks one intent against what is promised to the owner of the process.
func promise(t *rapid.T, v View, in Intent) {
	rec := in.Image.Records[in.Product]
	_, out := v.Word(rec.Release)
	c := v.Choices[in.Product]
	switch {
	case !slices.Contains(control.ImageStates, in.State):
		t.Fatalf("state %q", in.State)
	case in.State != control.Patched && in.State != control.PendingImage && (in.Reason.Code == "" || in.Remedy == ""):
		t.Fatalf("%s without a reason or a remedy: %+v", in.State, in)
	case unsettled(rec) && in.Kind != DoRecover && in.Kind != DoNothing:
		t.Fatalf("%s before memory and record are brought together", in.Kind)
	case rec.State == patcher.TornUp && (in.Kind != DoNothing && in.Kind != DoRecover || in.State != control.Torn):
		t.Fatalf("a torn image: %s, %s", in.Kind, in.State)
	}
	gated := v.Paused.Code != "" || !v.Eligible || v.Closed
	_, denied := v.Deny(in.Proc.Info, in.Image.Name, in.Image.Path)
	gated = gated || denied
	switch in.Kind {
	case DoUndo:
		if !rec.Live() {
			t.Fatal("undoes what is not in force")
		}
		replaced := c.Want != nil && c.Want.ID != rec.Release && !gated && v.Ready(c.Want.ID)
		if _, same := match(c.Want, in.Image); !out && (!replaced || same) {
			t.Fatalf("takes out %s, and nobody said so", rec.Release)
		}
	case DoApply:
		_, same := match(in.Offer, in.Image)
		if c.Want == nil || in.Offer.ID != c.Want.ID || !v.Ready(in.Offer.ID) || !same {
			t.Fatalf("applies %s, which is not wanted, not there, or not for this image", in.Offer.ID)
		}
		if back := rec.Live() && out && in.Offer.Sequence <= rec.Sequence && !denied; gated && !back {
			t.Fatal("new work in spite of pause, rules, hours or eligibility")
		}
		if rec.Live() && rec.Release == in.Offer.ID && !out {
			t.Fatal("applies what is in force")
		}
	case DoAdopt:
		if rec.Live() || in.Claim == nil || in.Claim.Product != in.Product {
			t.Fatal("adopts what has a record")
		}
	case DoRecover:
		if !unsettled(rec) && rec.State != patcher.TornUp {
			t.Fatal("recovers what is settled")
		}
	}
	// An attempt that waits is not made, and says when it will be.
	if tried, ok := in.Image.Tried[in.Product]; ok && in.Kind != DoNothing && tried.Release == in.what() && tried.Change == in.Proc.Info.Change && v.Now.Before(tried.Next) {
		t.Fatal("tries again before its time")
	}
	if !in.Again.IsZero() && !v.Now.Before(in.Again) {
		t.Fatal("waits for what is past")
	}
}

func TestCoverageAddsUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var c control.Coverage
		counts := map[control.ImageState]int{}
		for _, in := range decide(drawView(t)) {
			c.Add(in.State)
			counts[in.State]++
		}
		sum := 0
		for _, s := range control.ImageStates {
			sum += c.Count(s)
			if c.Count(s) != counts[s] {
				t.Fatalf("%s: %d counted, %d there", s, c.Count(s), counts[s])
			}
		}
		if sum != c.Images || len(slices.Collect(maps.Keys(counts))) > len(control.ImageStates) {
			t.Fatalf("%d images, the counts add up to %d", c.Images, sum)
		}
	})
}
