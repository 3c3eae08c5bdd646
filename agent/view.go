package agent

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/store"
	"hotpatchd/patcher/target"
)

// view gathers one value for decide.
func (a *Agent) view(forced string) (View, wishes) {
	now := a.o.Now()
	w := a.wishes()
	offers := a.allOffers()
	v := View{
		Now: now, Eligible: a.verdict.Eligible, Fails: openChecks(a.verdict), Forced: forced, Closed: a.closed(now),
		Opens: a.hoursOpen(now), Grace: a.graceEnds(),
		Choices: choose(offers, a.deviceFor(), w, now, a.fresh(now)),
		Word:    func(id string) (reason, bool) { return w.word(id, offers) },
		Ready:   a.ready,
		Scope:   w.inScope,
		InScope: func(image string) bool {
			g := a.o.Config.Repository.Images
			return len(g) == 0 || MatchAny(g, image)
		},
		Deny: a.deniedByPolicy,
	}
	v.Paused, v.Lost, v.Chosen, v.Trial, v.Harms = a.paused(), a.lost(), w.Installed, a.trial(), a.harms
	v.Standing = maps.Clone(a.bases.standing)
	v.Builds = a.builds(v.Choices, a.filesWanted(w, v.Choices, now))
	records := a.recordsByImage()
	for _, p := range a.hosts {
		proc := Proc{Info: p.info, Err: p.err, Used: p.used, Rest: p.rest, Left: a.left[p.info.ID] != nil}
		for _, im := range p.images {
			iv := im.ImageView
			iv.Claims = slices.Clone(im.Claims) // settle takes some out
			iv.Records = records[imageKey{p.info.ID, im.Base}]
			proc.Images = append(proc.Images, iv)
		}
		if len(proc.Images) > 0 {
			v.Procs = append(v.Procs, proc)
		}
	}
	return v, w
}

// fresh tells whether the metadata has not ended: only then something new comes into force.
func (a *Agent) fresh(now time.Time) bool { return a.expires.IsZero() || now.Before(a.expires) }

// closed tells whether the policy's hours keep work from beginning by itself.
func (a *Agent) closed(now time.Time) bool { return a.policy != nil && !a.policy.Hours.Open(now) }

// deviceFor says this device in the words of releases.
func (a *Agent) deviceFor() device {
	d := device{OS: "linux", Arch: a.device.Arch, Place: a.place()}
	if strings.HasPrefix(strings.ToLower(a.device.OS), "windows") {
		d.OS = "windows"
	}
	d.Baselines = map[string]string{}
	for product, s := range a.bases.standing {
		d.Baselines[product] = s.ID
	}
	return d
}

// Who paused, as it is said.
const (
	pausedByOperator = "paused by the operator"
	pausedByPolicy   = "paused by the policy"
)

func (a *Agent) paused() reason {
	paused := false
	a.store.View(func(tx *store.Tx) error { paused = tx.Paused(); return nil })
	switch {
	case paused:
		return because("paused", pausedByOperator)
	case a.policy != nil && a.policy.Pause:
		return because("paused", pausedByPolicy)
	}
	return reason{}
}

// lost tells whether holds and pause went with a damaged state, and the operator
// has not said yet how to go on. What he took out could come back: nothing new
// is done meanwhile but what he asks for.
func (a *Agent) lost() (r reason) {
	a.store.View(func(tx *store.Tx) error {
		if _, lost := tx.Lost(); lost {
			r = because("state-lost", "the state was damaged, and holds may be lost with it: nothing new is applied until somebody has looked")
		}
		return nil
	})
	return r
}

// wishes gathers holds, installs, what is in force and the floors.
func (a *Agent) wishes() wishes {
	w := wishes{Products: a.o.Config.Repository.Products, Mode: Automatic, Returns: map[string]time.Time{}, Installed: map[string]bool{}, InForce: map[string]string{}, Before: map[string]string{}, OnDisk: map[string]bool{}, Begun: map[string]bool{},
		Floors: map[string]uint32{}, Broken: a.broken(), Ends: a.expires}
	if a.policy != nil && a.policy.Mode != "" {
		w.Mode = a.policy.Mode
		w.Approve, w.Defer = a.policy.Approve, a.policy.Defer
	}
	holds := map[string]store.Hold{}
	err := a.store.View(func(tx *store.Tx) error {
		var err error
		if holds, err = tx.Holds(); err != nil {
			return err
		}
		installed, err := tx.Installed()
		if err != nil {
			return err
		}
		for id := range installed {
			w.Installed[id] = true
		}
		floors, err := tx.Floors()
		if err != nil {
			return err
		}
		for k, n := range floors {
			w.Floors[k] = uint32(n)
		}
		for id := range a.trials {
			w.Begun[id] = true
		}
		for product, f := range inForceIn(tx) {
			w.InForce[product], w.OnDisk[f.ID] = f.ID, f.OnDisk || a.inPlace(f.ID)
			if o, ok := a.offerOf(f.ID); f.Before != "" && (!ok || !w.had(o)) {
				w.Before[product] = f.Before
			}
		}
		for id, t := range haltsIn(tx) {
			w.Returns[id] = t.returns()
		}
		return nil
	})
	if err != nil {
		a.log.Error("cannot read the state", zap.Error(err))
	}
	w.Hold = func(id string) (reason, bool) {
		if h, ok := holds[id]; ok {
			text := fmt.Sprintf("held by %s since %s", h.By, stamp(h.Since))
			if h.Reason != "" {
				text += ": " + h.Reason
			}
			if a.policy != nil && a.policy.Held(id) {
				text += "; and by the policy"
			}
			return reason{"held", text}, true
		}
		if a.policy != nil && a.policy.Held(id) {
			return because("held", "held by the policy"), true
		}
		return reason{}, false
	}
	return w
}

func inForceIn(tx *store.Tx) map[string]inForce {
	out := map[string]inForce{}
	if b, ok := tx.Get(settingInForce); ok {
		_ = json.Unmarshal(b, &out) // damaged: the next release that comes into force writes it anew
	}
	return out
}

// place is where this device stands in rollouts, 0 to 99: the policy's ring,
// else a hash of the device id, the same for ever and for every release. So the
// same devices are always first: their owner knows which, watches them, and
// chooses them by ring. A place by release would spread the risk over all, and
// make each of them somebody's most important machine once.
func (a *Agent) place() int {
	if a.policy != nil && a.policy.Ring >= 0 {
		return a.policy.Ring
	}
	b, err := hex.DecodeString(a.device.ID)
	if err != nil || len(b) < 8 {
		return 0
	}
	return int(binary.BigEndian.Uint64(b) % 100)
}

// programOf names a process as people know it: the PE program where it is
// known, else what hosts it.
func programOf(info target.Info) string {
	switch {
	case info.Image != "":
		return info.Image
	case info.Exe != "":
		return info.Exe
	}
	return info.Host
}

func foldEqual(a, b string) bool { return strings.EqualFold(a, b) }

func lastElement(path string) string {
	if i := strings.LastIndexAny(path, `/\`); i >= 0 {
		return path[i+1:]
	}
	return path
}

// deniedRow stands for the unknown images of a process that is known to run a
// PE program but cannot be looked into: it is reported, not passed over.
func deniedRow(p *procState, choices map[string]choice) (control.Image, bool) {
	if p.err == nil || p.info.Image == "" || len(p.images) > 0 || neverTouched(p.info) {
		return control.Image{}, false
	}
	im := control.Image{Name: lastElement(p.info.Image), State: control.Blocked, ReasonCode: "denied",
		Reason: "the process may not be opened: the system refuses access", Remedy: control.RemedyPolicy, ToDo: deniedToDo, Detail: p.err.Error()}
	if !errors.Is(p.err, target.ErrDenied) {
		im.ReasonCode, im.Reason, im.Remedy, im.ToDo = "unreadable", "the images of the process could not be read", control.RemedyWait, ""
	}
	for _, product := range slices.Sorted(maps.Keys(choices)) {
		c := choices[product]
		o := c.Want
		if o == nil {
			o = c.Latest
		}
		im.Product, im.Release, im.Sequence = product, o.ID, int64(o.Sequence)
		return im, true
	}
	return control.Image{}, false
}
