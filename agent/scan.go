package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// procState is what the loop remembers of one life.
type procState struct {
	info    target.Info
	images  []*imageState
	err     error     // why its images are not known
	again   time.Time // when to look again although nothing changed, after an error
	used    int       // times in a row that it used up its share of a pass
	vain    int       // times in a row that nothing came of it
	rest    time.Time // no work on it before
	looked  time.Time // when it was last looked into, and
	dear    time.Time // when again at the earliest, if that took long
	slow    bool      // the last look into it took long
	doubt   bool      // something went wrong in it: what is known of it may not be so any more
	at      time.Time // when it was last looked into, by a clock that nobody sets
	deaf    time.Time // news of new code in it are not heard before
	ignored time.Time // news of new code that was not heard since then
	unheard int       // how often in a row such news were of no image
}

// imageState is what the loop remembers of one image in one life.
type imageState struct {
	ImageView
	clocked
}

// keepProc remembers a process.
func (a *Agent) keepProc(p *procState) {
	id := p.info.ID
	a.procs[id], a.lives[id.PID] = p, id
	if len(p.images) > 0 || p.err != nil {
		a.hosts[id] = p
	} else {
		delete(a.hosts, id)
	}
}

// dropProc forgets a process.
func (a *Agent) dropProc(id target.ID) {
	if p := a.procs[id]; p != nil && a.lives[id.PID] == id {
		a.depart(p)
	}
	delete(a.procs, id)
	delete(a.hosts, id)
	if a.lives[id.PID] == id {
		delete(a.lives, id.PID)
	}
}

// endLife forgets a process that is over; true if it was shown. Its records go
// with the next pass, all in one transaction: that waits for the disk.
func (a *Agent) endLife(id target.ID) bool {
	_, shown := a.hosts[id]
	a.dropProc(id)
	return shown
}

// recordedLives are the processes that have records.
func (a *Agent) recordedLives() map[target.ID]bool {
	lives := map[target.ID]bool{}
	for _, r := range a.allRecords() {
		lives[r.ID] = true
	}
	return lives
}

// isDue tells whether a process is to be looked into: it is new, or something in it changed.
func (a *Agent) isDue(info *target.Info) bool {
	p := a.procs[info.ID]
	return p == nil || a.left[info.ID] == nil && !a.o.Now().Before(p.dear) &&
		(p.doubt || p.info.Change != info.Change || p.err != nil && !a.o.Now().Before(p.again))
}

// lookOrPass looks into a process, or passes it by if there is nothing to be
// found; true if what is shown of it may have changed.
func (a *Agent) lookOrPass(ctx context.Context, info target.Info, recorded map[target.ID]bool) bool {
	_, shown := a.hosts[info.ID]
	if info.Bare && !shown && !recorded[info.ID] {
		a.keepProc(&procState{info: info, looked: a.o.Now(), at: time.Now()})
		return false
	}
	a.look(ctx, info)
	_, shows := a.hosts[info.ID]
	return shown || shows
}

// firstShare stands for lookShare after the first look that took long.
const firstShare = 2

// lookAgain is when a process that could not be looked into is tried anew.
const lookAgain = 30 * time.Second

// scan brings the list of processes and images up to date. Its cost follows
// starts and changes: a process whose mappings did not change is not opened.
// It reports whether anything changed.
func (a *Agent) scan(ctx context.Context) bool {
	began := time.Now()
	defer func() { a.scanCost = time.Since(began) }()
	infos, err := a.listWith("listing the processes", func() ([]target.Info, error) { return a.o.Backend.List(ctx) })
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
		if a.isDue(info) {
			due = append(due, info)
		}
	}
	slices.SortStableFunc(due, func(x, y *target.Info) int { return a.lookedAt(x.ID).Compare(a.lookedAt(y.ID)) })
	recorded := a.recordedLives()
	for i, info := range due {
		if i > 0 && time.Since(began) > scanMost {
			a.more = true
			break
		}
		changed = a.lookOrPass(ctx, *info, recorded) || changed
		if a.procs[info.ID] == nil { // it is over
			delete(seen, info.ID)
		}
	}
	for id := range a.procs {
		if !seen[id] {
			_, shown := a.hosts[id]
			a.dropProc(id)
			changed = changed || shown
		}
	}
	var over []patcher.Record
	for _, r := range a.allRecords() {
		if !seen[r.ID] && a.left[r.ID] == nil && (r.Boot == a.o.Boot || r.Boot == "") {
			over = append(over, r)
		}
	}
	if len(over) > 0 {
		a.forgetAll(over, "the process is over")
		changed = true
	}
	a.countUnseen()
	a.growUp(time.Now())
	if !a.more || !a.scannedAt.IsZero() { // the first scan is done when all was seen
		a.scannedAt = now
	}
	a.listedAt = began
	return changed
}

// countUnseen counts the processes that could not be looked into.
func (a *Agent) countUnseen() {
	a.denied, a.unread = 0, 0
	for _, p := range a.hosts {
		if errors.Is(p.err, target.ErrDenied) && p.info.Image == "" && !neverTouched(p.info) {
			a.denied++
		}
		// What is over the caps or does not answer; a single failure passes by itself.
		if errors.Is(p.err, patcher.ErrTooManyImages) || errors.Is(p.err, context.DeadlineExceeded) {
			a.unread++
		}
	}
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

// listWith asks for processes, and waits for no list that does not end. What
// such a one tells in the end is too old: who is not in it may live.
func (a *Agent) listWith(step string, list func() ([]target.Info, error)) ([]target.Info, error) {
	a.heart.at(step)
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
		infos, err := list()
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
	p := &procState{info: info, looked: a.o.Now(), at: began}
	old := a.procs[info.ID]
	if old != nil {
		p.used, p.vain, p.rest = old.used, old.vain, old.rest
		p.deaf, p.unheard = old.deaf, old.unheard
	}
	images, err := aside(ctx, a, info, "looking into", lookMost, func(ctx context.Context) ([]ImageView, error) { return a.imagesOf(ctx, info.ID) })
	if cost := time.Since(began); cost > dearLook {
		// Once may be the machine's fault, and its images may be on their way.
		share := time.Duration(firstShare)
		if old != nil && old.slow {
			share = lookShare
		}
		p.slow, p.dear = true, a.o.Now().Add(min(restMost, share*cost))
	}
	if errors.Is(err, target.ErrGone) {
		a.dropProc(info.ID)
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
			im.Tried, im.clocked = o.Tried, o.clocked
		} else {
			im.clocked = a.clockedFrom(old, info)
		}
		p.images = append(p.images, im)
	}
	a.keepProc(p)
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
