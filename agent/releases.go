package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/regular"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
)

// loaded is a verified release ready to be applied, or why it cannot be.
type loaded struct {
	offer    repository.Offer
	manifest release.Manifest
	patches  []*patcher.Patch
	shapes   map[string]shape // by the hash of the hotpatch image, hex
	problem  reason
}

// codeFetch is the one problem of a release that time may end.
const codeFetch = "fetch"

// retryLoadAfter is how long a release that could not be fetched is left alone.
const retryLoadAfter = time.Minute

// openRepository makes the client and takes what was verified before, so that
// a start without network knows what is in force.
func (a *Agent) openRepository() {
	a.openOutside()
	defer func() {
		if a.repoErr == nil {
			return
		}
		a.log.Warn("the repository cannot be asked", zap.String("code", a.repoErr.Code), zap.String("why", a.repoErr.Text))
		if at, ok := a.sinces.at[sinceConfig]; ok {
			a.repoErr.Since = control.At(at)
		}
	}()
	c := a.o.Config.Repository
	root, err := ReadRoot(c.Root)
	if err != nil && c.URL != "" {
		a.repoErr = &control.RepositoryError{Code: repository.CodeConfig, Text: fmt.Sprintf("cannot read the root of trust: %v; put the repository's root.json there, then restart the daemon", err), Since: control.At(a.o.Now())}
	}
	if err != nil {
		return
	}
	var floors repository.Floors
	a.store.View(func(tx *store.Tx) error {
		if b, ok := tx.Get(settingFloors); ok {
			return json.Unmarshal(b, &floors)
		}
		return nil
	})
	a.client, err = repository.New(repository.Config{
		URL: c.URL, Dir: filepath.Join(a.o.Config.StateDir, "repository"), InitialRoot: root,
		Proxy: c.Proxy, CAFile: c.CAFile, ClientCert: c.ClientCert, Floors: floors, Now: a.o.Now,
		Notice: func(text string) { a.log.Warn("repository cache", zap.String("text", text)) },
	})
	if err != nil {
		a.repoErr = a.repositoryError(err)
		return
	}
	if cat, err := a.client.Cached(); err == nil {
		a.take(cat)
	}
}

// succeeded takes what a check brought. A clock that cannot be right is said
// although everything verified by it.
func (a *Agent) succeeded(cat *repository.Catalog) {
	switch {
	case cat.Doubt != nil:
		now := a.repositoryError(cat.Doubt)
		if a.fail(now) {
			a.log.Warn("the clock cannot be right", zap.String("text", now.Text))
			a.history(own, control.HistoryEntry{Action: "clock", Text: now.Text})
		}
	default:
		if since := a.outside.contact.Since; !since.IsZero() {
			a.log.Info("repository check succeeded again")
			a.history(own, control.HistoryEntry{Action: "check-again", Text: fmt.Sprintf("checks of the repository are in order again, after %s (%s)", control.Span(a.o.Now().Sub(since)), a.outside.contact.Code)})
		}
		a.repoErr = nil
	}
	a.take(cat)
}

// take makes a verified catalog the one in use.
func (a *Agent) take(cat *repository.Catalog) {
	a.offers, a.skipped, a.expires, a.verified, a.dirty = cat.Offers, cat.Skipped, cat.Expires, true, true
}

func (a *Agent) repositoryError(err error) *control.RepositoryError {
	e := &control.RepositoryError{Code: repository.CodeOf(err), Text: err.Error(), Since: control.At(a.o.Now())}
	if e.Code == "" {
		e.Code = repository.CodeUnreachable
	}
	var re *repository.Error
	if errors.As(err, &re) {
		e.Text = re.Text
		if re.Hint != "" {
			e.Text += "; " + re.Hint
		}
	}
	return e
}

// refresh asks the repository. It runs outside the loop: servers may be slow.
// What it finds is handed to the loop, success or not.
func (a *Agent) refresh(ctx context.Context) error {
	if !a.polled() {
		return a.unpolled()
	}
	a.checkMu.Lock()
	cat, err := a.client.Refresh(ctx)
	floors := a.client.Floors()
	a.checks++
	n := a.checks
	a.checkMu.Unlock()
	cerr := a.call(ctx, func() { a.takeCheck(n, cat, floors, err) })
	if err != nil {
		return err
	}
	return cerr
}

// newest tells whether the nth check, or import, is not older than what the loop
// has taken in, and notes it. Two that end together may come to the loop in the other
// order: an older catalog, and its floors, must never replace newer ones.
func (a *Agent) newest(n uint64) bool {
	if n < a.tookCheck {
		return false
	}
	a.tookCheck = n
	return true
}

// takeCheck takes in how the nth check ended. It belongs to the loop.
func (a *Agent) takeCheck(n uint64, cat *repository.Catalog, floors repository.Floors, err error) {
	if !a.newest(n) {
		return
	}
	defer func() {
		if serr := a.asked(floors, err != nil); serr != nil {
			a.log.Error("cannot keep the repository's versions", zap.Error(serr))
		}
	}()
	a.dirty = true
	if err != nil {
		now := a.repositoryError(err)
		if a.fail(now) {
			a.log.Warn("repository check failed", zap.String("code", now.Code), zap.Error(err))
			a.history(own, control.HistoryEntry{Action: "check-failed", Text: now.Text})
		}
		a.hub.send(control.Event{Type: control.EventRepository, Text: "repository: " + now.Text, Scope: control.Scope{Public: true}})
	} else {
		a.checkedAt = a.o.Now()
		a.succeeded(cat)
		text := fmt.Sprintf("repository: checked, %s, good until %s", counted(len(cat.Offers), "release", "releases"), stamp(cat.Expires))
		if cat.Doubt != nil {
			text = "repository: " + a.repoErr.Text
		}
		a.hub.send(control.Event{Type: control.EventRepository, Text: text, Scope: control.Scope{Public: true}})
	}
	a.Wake()
}

// load fetches, verifies and reads one release. It runs outside the loop.
func (a *Agent) load(ctx context.Context, o repository.Offer) *loaded {
	l := &loaded{offer: o, shapes: map[string]shape{}}
	b, err := a.bytesOf(ctx, o)
	if err != nil {
		l.problem = because(codeFetch, "cannot fetch %s: %v", o.ID, err)
		return l
	}
	r, err := release.Open(b)
	if err == nil {
		err = o.Agrees(&r.Manifest)
	}
	if err != nil {
		l.problem = because("damaged", "%v", err)
		return l
	}
	l.manifest = r.Manifest
	if r.Consistency != "" && r.Consistency != release.ConsistencyEntry {
		l.problem = because("consistency", "%s asks for consistency %q; this daemon reaches \"entry\" only", o.ID, r.Consistency)
		return l
	}
	if unknown := unknownFeatures(r.Requires.Features); len(unknown) > 0 {
		l.problem = because("feature", "%s needs the feature %q, which this daemon does not have", o.ID, unknown[0])
		return l
	}
	for i, im := range r.Images {
		p, err := patcher.NewPatch(patcher.Origin{
			Product: r.Product, Release: r.ID, Sequence: r.Sequence, Image: im.Name, Base: im.Base,
			Consistency: r.Consistency, Unwind: r.Unwind,
		}, r.ImageBytes(i))
		if err != nil {
			l.problem = because("damaged", "%v", err)
			return l
		}
		l.patches = append(l.patches, p)
		l.shapes[hex.EncodeToString(p.Hash[:])] = shapeOf(p, r.ImageBytes(i))
	}
	return l
}

// unknownFeatures: this engine has none that a release could ask for yet.
func unknownFeatures(features []string) []string { return slices.Clone(features) }

// bytesOf takes a release from those that came as files, else from the
// repository (or its cache). Length and hash are those of verified metadata.
func (a *Agent) bytesOf(ctx context.Context, o repository.Offer) ([]byte, error) {
	b, err := regular.Read(a.localFile(o.SHA256), release.MaxRelease)
	if err == nil {
		sum := sha256.Sum256(b)
		if hex.EncodeToString(sum[:]) == o.SHA256 {
			return b, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("cannot read a release kept from a file", zap.String("id", o.ID), zap.Error(err))
	}
	if a.client == nil {
		return nil, fmt.Errorf("no repository is configured")
	}
	return a.client.Fetch(ctx, o)
}

// localFile is where a release is kept that came as a file, by its SHA-256 in
// hex: on some systems ids that differ in case only are one name, and CON or
// NUL.1 is none.
func (a *Agent) localFile(sum string) string {
	return filepath.Join(a.o.Config.StateDir, "releases", sum+".hotpatch")
}

// keepLocal stores the bytes of a release that came as a file: written whole or not at all.
func (a *Agent) keepLocal(b []byte) error {
	sum := sha256.Sum256(b)
	path := a.localFile(hex.EncodeToString(sum[:]))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// want makes sure a release is being loaded; the loop goes on meanwhile. nil:
// its load is under way. What was refused as it is stays refused; what could
// not be fetched is tried again after a while.
func (a *Agent) want(ctx context.Context, o repository.Offer) *loaded {
	if l := a.releases[o.ID]; l != nil && l.offer.SHA256 == o.SHA256 {
		if l.problem.Code != codeFetch || a.o.Now().Before(a.retryLoad[o.ID]) {
			return l
		}
	}
	if !a.loading[o.ID] {
		a.loading[o.ID] = true
		go func() {
			l := a.load(ctx, o)
			a.post(func() { a.loading[o.ID] = false; a.keep(l); a.Wake() })
		}()
	}
	return nil
}

// ready tells whether a release is verified and loaded.
func (a *Agent) ready(id string) bool {
	l := a.releases[id]
	return l != nil && l.problem.Code == ""
}

// known tells whether all is known about a release that can be known now: it
// is false while it is being loaded.
func (a *Agent) known(ctx context.Context, id string) bool {
	o, ok := a.offerOf(id)
	return !ok || a.want(ctx, o) != nil
}

// broken lists the releases that metadata names and that cannot be used here, and why.
func (a *Agent) broken() map[string]reason {
	out := map[string]reason{}
	for id, l := range a.releases {
		if o, ok := a.offerOf(id); ok && l.problem.Code != "" && l.offer.SHA256 == o.SHA256 {
			out[id] = l.problem
		}
	}
	return out
}

// keep takes a loaded release into use. One that cannot be used is said once.
func (a *Agent) keep(l *loaded) {
	old := a.releases[l.offer.ID]
	a.releases[l.offer.ID] = l
	a.dirty = true
	if l.problem.Code == "" {
		a.log.Info("release verified", zap.String("id", l.offer.ID), zap.String("product", l.offer.Product), zap.Uint32("sequence", l.offer.Sequence))
		return
	}
	a.retryLoad[l.offer.ID] = a.o.Now().Add(retryLoadAfter)
	if old != nil && old.problem == l.problem {
		return
	}
	a.log.Error("release refused", zap.String("id", l.offer.ID), zap.String("code", l.problem.Code), zap.String("text", l.problem.Text))
	a.history(own, control.HistoryEntry{Action: "release-refused", Release: l.offer.ID, Product: l.offer.Product, Text: l.problem.Text})
}

// allOffers are those of the repository, then those that came as files, by id.
func (a *Agent) allOffers() []repository.Offer {
	out := slices.Clone(a.offers)
	for _, id := range slices.Sorted(maps.Keys(a.local)) {
		if !slices.ContainsFunc(a.offers, func(x repository.Offer) bool { return x.ID == id }) {
			out = append(out, a.local[id])
		}
	}
	return out
}

func (a *Agent) offerOf(id string) (repository.Offer, bool) {
	for _, o := range a.allOffers() {
		if o.ID == id {
			return o, true
		}
	}
	return repository.Offer{}, false
}
