package agent

import (
	"context"
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
	"hotpatchd/agent/release"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// procState is what the loop remembers of one life.
type procState struct {
	info   target.Info
	images []*imageState
	err    error     // why its images are not known
	again  time.Time // when to look again although nothing changed, after an error
	used   int       // times in a row that it used up its share of a pass
	vain   int       // times in a row that nothing came of it
	rest   time.Time // no work on it before
	looked time.Time // when it was last looked into, and
	dear   time.Time // when again at the earliest, if that took long
	doubt  bool      // something went wrong in it: what is known of it may not be so any more
}

// imageState is what the loop remembers of one image in one life.
type imageState struct {
	ImageView
}

// lookAgain is when a process that could not be looked into is tried anew.
const lookAgain = 30 * time.Second

// scan brings the list of processes and images up to date. Its cost follows
// starts and changes: a process whose mappings did not change is not opened.
// It reports whether anything changed.
func (a *Agent) scan(ctx context.Context) bool {
	began := time.Now()
	defer func() { a.scanCost = time.Since(began) }()
	infos, err := a.list(ctx)
	if err != nil {
		if a.scanErr == nil {
			a.log.Error("cannot list processes", zap.Error(err))
		}
		changed := a.scanErr == nil
		a.scanErr = err
		return changed
	}
	changed := a.scanErr != nil || a.scannedAt.IsZero()
	a.scanErr = nil
	seen := make(map[target.ID]bool, len(infos))
	now := a.o.Now()
	var due []*target.Info
	for i := range infos {
		info := &infos[i]
		seen[info.ID] = true
		p := a.procs[info.ID]
		if p != nil && (a.left[info.ID] != nil || now.Before(p.dear) || !p.doubt && p.info.Change == info.Change && (p.err == nil || now.Before(p.again))) {
			continue
		}
		due = append(due, info)
	}
	slices.SortStableFunc(due, func(x, y *target.Info) int { return a.lookedAt(x.ID).Compare(a.lookedAt(y.ID)) })
	for i, info := range due {
		if i > 0 && time.Since(began) > scanMost {
			a.more = true
			break
		}
		changed = true
		if err := a.look(ctx, *info); errors.Is(err, target.ErrGone) {
			delete(seen, info.ID)
		}
	}
	for id := range a.procs {
		if !seen[id] {
			delete(a.procs, id)
			changed = true
		}
	}
	for _, r := range a.allRecords() {
		if !seen[r.ID] && a.left[r.ID] == nil && (r.Boot == a.o.Boot || r.Boot == "") {
			a.forget(r, "the process is over")
			changed = true
		}
	}
	a.denied, a.unread = 0, 0
	for _, p := range a.procs {
		if errors.Is(p.err, target.ErrDenied) && p.info.Image == "" && !neverTouched(p.info) {
			a.denied++
		}
		// What is over the caps or does not answer; a single failure passes by itself.
		if errors.Is(p.err, patcher.ErrTooManyImages) || errors.Is(p.err, context.DeadlineExceeded) {
			a.unread++
		}
	}
	if !a.more || !a.scannedAt.IsZero() { // the first scan is done when all was seen
		a.scannedAt = now
	}
	return changed
}

// lookedAt is when a process was last looked into, the zero time if never.
func (a *Agent) lookedAt(id target.ID) time.Time {
	if p := a.procs[id]; p != nil {
		return p.looked
	}
	return time.Time{}
}

// listMost bounds a list of the processes; it takes some milliseconds, and each
// file of a process that is read for it may hang.
const listMost = 10 * time.Second

// listed is what a list came to.
type listed struct {
	infos []target.Info
	err   error
}

var errListing = fmt.Errorf("listing the processes does not end within %s", listMost)

// list asks for the processes, and waits for no list that does not end. What
// such a one tells in the end is too old: who is not in it may live.
func (a *Agent) list(ctx context.Context) ([]target.Info, error) {
	a.heart.at("listing the processes")
	t := time.NewTimer(listMost)
	defer t.Stop()
	if a.listing != nil {
		select {
		case <-a.listing:
			a.listing = nil
		case <-t.C:
			return nil, errListing
		}
	}
	ch := make(chan listed, 1)
	go func() {
		infos, err := a.o.Backend.List(ctx)
		ch <- listed{infos, err}
	}()
	select {
	case l := <-ch:
		return withOwners(l.infos), l.err
	case <-t.C:
		a.listing = ch
		return nil, errListing
	}
}

// withOwners gives owners that have a security identifier the number by which the
// control pipe knows its callers: everyone sees his own processes.
func withOwners(infos []target.Info) []target.Info {
	for i := range infos {
		if sid := infos[i].SID; sid != "" {
			infos[i].UID = control.SIDNumber(sid)
		}
	}
	return infos
}

// neverTouched: that these cannot be looked into is nobody's trouble.
func neverTouched(info target.Info) bool {
	for _, g := range info.Guards {
		if g.Code == target.GuardSystem || g.Code == target.GuardSelf {
			return true
		}
	}
	return false
}

// look opens one process and finds its images.
func (a *Agent) look(ctx context.Context, info target.Info) error {
	began := time.Now()
	p := &procState{info: info, looked: a.o.Now()}
	old := a.procs[info.ID]
	if old != nil {
		p.used, p.vain, p.rest = old.used, old.vain, old.rest
	}
	images, err := aside(ctx, a, info, "looking into", lookMost, func(ctx context.Context) ([]ImageView, error) { return a.imagesOf(ctx, info.ID) })
	if cost := time.Since(began); cost > dearLook {
		p.dear = a.o.Now().Add(min(restMost, lookShare*cost))
	}
	if errors.Is(err, target.ErrGone) {
		delete(a.procs, info.ID)
		return err
	}
	if err != nil {
		p.err, p.again = err, a.o.Now().Add(lookAgain)
		if (old == nil || old.err == nil) && !errors.Is(err, target.ErrDenied) {
			a.log.Warn("cannot look into a process", zap.Int("pid", info.PID), zap.String("exe", programOf(info)), zap.Error(err))
		}
		if old != nil {
			p.images = old.images // what was known stays known
		}
	}
	known := map[target.Addr]*imageState{}
	if old != nil {
		for _, o := range old.images {
			known[o.Base] = o
		}
	}
	for i := range images {
		im := &imageState{ImageView: images[i]}
		if o := known[im.Base]; o != nil && sameHeaders(o.Identity, im.Identity) {
			im.Tried = o.Tried
		}
		p.images = append(p.images, im)
	}
	a.procs[info.ID] = p
	if err == nil {
		return a.compare(ctx, p)
	}
	return nil
}

// compare looks whether the records of a process whose mappings changed still
// tell the truth: a module may have been unloaded, loaded again, another one
// put in its place, or an entry written by somebody else. Memory decides. What
// the time of one process is too short for comes when it is looked into again.
func (a *Agent) compare(ctx context.Context, p *procState) error {
	began := time.Now()
	byBase := make(map[target.Addr]*imageState, len(p.images))
	for _, im := range p.images {
		byBase[im.Base] = im
	}
	imageOf := func(r patcher.Record) *imageState {
		if im := byBase[r.Base]; im != nil && sameHeaders(im.Identity, r.Identity) {
			return im
		}
		return nil
	}
	var amiss, ask []patcher.Record
	for _, r := range a.recordsOfLife(p.info.ID) {
		switch im := imageOf(r); {
		case im == nil:
			amiss = append(amiss, r)
		case !unsettled(r): // else decide has it brought to an end
			ask = append(ask, r)
		}
	}
	slices.SortFunc(ask, func(x, y patcher.Record) int { return a.checked[x.Key()].Compare(a.checked[y.Key()]) })
	answers, err := a.verifyAll(ctx, p.info, ask)
	if errors.Is(err, errLeft) {
		return nil
	}
	p.doubt = len(answers) < len(ask)
	for _, v := range answers {
		im := imageOf(v.record)
		if v.err != nil || len(v.bad) > 0 && v.record.Live() {
			amiss = append(amiss, v.record)
			continue
		}
		a.checked[v.record.Key()] = a.o.Now()
		if im.Tried[v.record.Product].State == control.Drifted {
			delete(im.Tried, v.record.Product)
		}
	}
	for _, r := range amiss {
		if time.Since(began) > a.share {
			p.doubt = true
			break
		}
		im := imageOf(r)
		switch err := a.recoverOne(ctx, r); {
		case errors.Is(err, target.ErrGone):
			return err
		case err != nil && im != nil:
			in := Intent{Kind: DoRecover, Proc: &Proc{Info: p.info}, Image: &im.ImageView, Product: r.Product}
			in.Image.Records = map[string]patcher.Record{r.Product: r}
			if o := a.failed(in, err); o.try != nil {
				im.Tried[r.Product] = *o.try
			}
			in.Image.Records = nil
		}
	}
	return nil
}

// asked is what memory says of one record.
type asked struct {
	record patcher.Record
	bad    []patcher.Mismatch
	err    error
}

// verifyAll asks memory about records of one process, one after the other as
// long as the process's time lasts. Where the process cannot be opened that is
// the answer for all.
func (a *Agent) verifyAll(ctx context.Context, info target.Info, list []patcher.Record) ([]asked, error) {
	if len(list) == 0 {
		return nil, nil
	}
	share := a.share
	out, err := aside(ctx, a, info, "comparing", lookMost, func(ctx context.Context) ([]asked, error) {
		began := time.Now()
		p, err := a.o.Backend.Open(ctx, info.ID)
		if err != nil {
			return nil, err
		}
		defer p.Close()
		var out []asked
		for _, r := range list {
			if time.Since(began) > share {
				break
			}
			bad, err := patcher.Verify(p, r)
			out = append(out, asked{r, bad, err})
		}
		return out, nil
	})
	if err != nil {
		for _, r := range list {
			out = append(out, asked{record: r, err: err})
		}
	}
	return out, err
}

// imagesOf reads all that is to be known of a process's images while it is open.
func (a *Agent) imagesOf(ctx context.Context, id target.ID) ([]ImageView, error) {
	p, err := a.o.Backend.Open(ctx, id)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	s := patcher.Look(ctx, p)
	images, err := s.Images()
	if err != nil || len(images) == 0 {
		return nil, err
	}
	claims, err := s.Claims()
	switch {
	case errors.Is(err, target.ErrGone), errors.Is(err, target.ErrDenied):
		return nil, err
	case err != nil:
		// What claims to be ours cannot be told just now: the images can, and
		// applying finds what is in force.
		a.log.Warn("cannot look for patches of ours", zap.Int("pid", id.PID), zap.Error(err))
		claims = nil
	}
	out := make([]ImageView, len(images))
	for i, l := range images {
		out[i] = ImageView{Name: l.Name, Path: l.Path, Base: l.Base, Identity: headers(l.Image), Tried: map[string]Try{}}
		for _, c := range claims {
			// Foreign memory may claim anything: what is no id is no claim.
			if c.Base == l.Base && release.ValidID(c.Release) && release.ValidID(c.Product) {
				out[i].Claims = append(out[i].Claims, c)
			}
		}
	}
	return out, nil
}

// headers is the identity that headers tell.
func headers(im *pe.Image) pe.Identity {
	id := pe.Identity{Machine: im.Machine, SizeOfImage: im.SizeOfImage, TimeDateStamp: im.TimeDateStamp, CheckSum: im.CheckSum}
	if r, err := im.RSDS(); err == nil && r != nil {
		id.RSDS = r.String()
	}
	return id
}

// view gathers one value for decide.
func (a *Agent) view(forced string) (View, wishes) {
	now := a.o.Now()
	w := a.wishes()
	offers := a.allOffers()
	v := View{
		Now: now, Eligible: a.verdict.Eligible, Fails: openChecks(a.verdict), Forced: forced, Closed: a.closed(now),
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
	v.Paused, v.Lost, v.Chosen = a.paused(), a.lost(), w.Installed
	records := a.recordsByImage()
	for _, p := range a.procs {
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
	w := wishes{Products: a.o.Config.Repository.Products, Mode: Automatic, Installed: map[string]bool{}, InForce: map[string]string{},
		Floors: map[string]uint32{}, Broken: a.broken(), Ends: a.expires}
	if a.policy != nil && a.policy.Mode != "" {
		w.Mode = a.policy.Mode
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
		for product, f := range inForceIn(tx) {
			w.InForce[product] = f.ID
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
// else a hash of the device id, the same for ever.
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
