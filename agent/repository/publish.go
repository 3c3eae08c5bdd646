package repository

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
)

// How long metadata holds. Timestamp and snapshot end soon, so that a device
// notices when it is kept from news; a job re-signs them (Refresh). Root and
// targets hold long, for their keys lie offline.
const (
	DefaultExpires = 30 * 24 * time.Hour
	longExpires    = 365 * 24 * time.Hour
	renewBefore    = longExpires / 4    // root and targets are signed anew this long before they end where their keys are at hand; else a warning says so
	soonBefore     = DefaultExpires / 4 // timestamp and snapshot end soon from then on
)

// PublishOptions are the same for Publish and Refresh.
type PublishOptions struct {
	Expires    time.Duration  // of timestamp and snapshot from Now on; 0 is DefaultExpires
	Now        time.Time      // the publisher's time, also the releases' time of publication
	Thresholds map[string]int // signatures by role, for a new repository; 1 where not given
	Rollout    *Rollout       // of releases that are new; nil: all devices, at once
}

// Result tells what a publisher's call did.
type Result struct {
	Created   bool      `json:"created"`   // the repository is new
	Changed   bool      `json:"changed"`   // timestamp.json is new
	Published []string  `json:"published"` // ids, new in this call
	Unchanged []string  `json:"unchanged"` // ids, there before with the same bytes
	Expires   time.Time `json:"expires"`   // of the metadata that ends first
	ExpiresIn string    `json:"expires_in"`
	Warnings  []string  `json:"warnings"`
}

// publisher is one call's work on one repository.
type publisher struct {
	dir   string
	keys  Keys
	opts  PublishOptions
	set   *trustedSet       // as it stands; members are replaced as they are made anew
	files map[string][]byte // releases by path below targets/
	res   Result
}

// Publish adds releases, each the bytes of a container, to the repository in
// dir and makes the repository if there is none. The same bytes again change
// nothing; an id with other bytes is refused, and then nothing at all is
// published. timestamp.json is written last: until then clients see the old state.
func Publish(dir string, keys Keys, releases [][]byte, opts PublishOptions) (Result, error) {
	if len(releases) == 0 {
		return Result{}, errors.New("no release to publish")
	}
	p, unlock, err := open(dir, keys, opts, true)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	for _, b := range releases {
		if err := p.add(b); err != nil {
			return Result{}, err
		}
	}
	for file, b := range p.files {
		if err := p.writeRelease(file, b); err != nil {
			return Result{}, err
		}
	}
	p.warnBaselines()
	if len(p.res.Published) == 0 {
		return p.report(), nil
	}
	return p.finish(true)
}

// Refresh signs snapshot and timestamp anew, and root and targets as well if
// they end within a quarter of a year and their keys are at hand.
func Refresh(dir string, keys Keys, opts PublishOptions) (Result, error) {
	p, unlock, err := open(dir, keys, opts, false)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	return p.finish(false)
}

// open locks the repository and reads it as its own clients would, so that a
// publisher never signs what somebody else put there.
func open(dir string, keys Keys, opts PublishOptions, create bool) (*publisher, func(), error) {
	if opts.Expires == 0 {
		opts.Expires = DefaultExpires
	}
	opts.Now = opts.Now.UTC().Truncate(time.Second)
	if opts.Expires < 0 || opts.Now.IsZero() {
		return nil, nil, errors.New("metadata needs a time and has to hold for some")
	}
	p := &publisher{dir: dir, keys: keys, opts: opts, files: map[string][]byte{}, res: Result{Published: []string{}, Unchanged: []string{}, Warnings: []string{}}}
	root, err := os.ReadFile(filepath.Join(dir, "root.json"))
	missing := errors.Is(err, os.ErrNotExist)
	if err != nil && !(missing && create) {
		return nil, nil, fmt.Errorf("%s is not a repository: %w", dir, err)
	}
	for _, d := range []string{"metadata", "targets/releases"} {
		if err := os.MkdirAll(p.path(d), 0o755); err != nil {
			return nil, nil, fmt.Errorf("cannot make the repository: %w", err)
		}
	}
	unlock, err := lock(p.path(".publishing"))
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(sweep(dir), sweep(p.path("metadata")), sweep(p.path("targets/releases"))); err != nil {
		unlock()
		return nil, nil, err
	}
	if missing {
		err = p.create()
	} else {
		p.set, _, err = verify(root, folderSource(os.DirFS(p.path("metadata"))), time.Time{})
	}
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return p, unlock, nil
}

func (p *publisher) path(name string) string { return filepath.Join(p.dir, filepath.FromSlash(name)) }

// create sets up the first version of all roles.
func (p *publisher) create() error {
	root := metadata.Root(p.opts.Now.Add(longExpires))
	for _, role := range Roles {
		if len(p.keys[role]) == 0 {
			return fmt.Errorf("there is no repository in %s, and a new one needs a key for %s: %s.pem in the folder of keys", p.dir, role, role)
		}
		for _, key := range p.keys[role] {
			k, _, err := tufKey(key)
			if err != nil {
				return err
			}
			if err := root.Signed.AddKey(k, role); err != nil {
				return err
			}
		}
		if n := p.opts.Thresholds[role]; n > 0 {
			root.Signed.Roles[role].Threshold = n
		}
	}
	if err := sign(root, metadata.ROOT, root, p.keys); err != nil {
		return err
	}
	p.set = &trustedSet{root: root, targets: metadata.Targets(p.opts.Now.Add(longExpires)),
		snapshot: metadata.Snapshot(p.opts.Now), timestamp: metadata.Timestamp(p.opts.Now)}
	// Each of the four is made anew by finish and becomes version 1.
	p.set.targets.Signed.Version, p.set.snapshot.Signed.Version, p.set.timestamp.Signed.Version = 0, 0, 0
	p.res.Created = true
	b, err := root.ToBytes(true)
	if err != nil {
		return err
	}
	p.set.rootBytes = b
	return p.write(versioned(1, metadata.ROOT), b)
}

// add checks one release and names it in the new targets role.
func (p *publisher) add(b []byte) error {
	r, err := release.Open(b)
	if err != nil {
		return err
	}
	targets := p.set.targets.Signed.Targets
	name := targetName(r.ID)
	p.files[targetFile(name, r.SHA256)] = b
	if old, ok := targets[name]; ok {
		if old.VerifyLengthHashes(b) != nil {
			return fmt.Errorf("%s was published before with other content; raise the sequence and take a new id", r.ID)
		}
		if !slices.Contains(p.res.Published, r.ID) && !slices.Contains(p.res.Unchanged, r.ID) {
			p.res.Unchanged = append(p.res.Unchanged, r.ID)
		}
		return nil
	}
	if len(targets) >= MaxOffers {
		return fmt.Errorf("the repository has %d releases, devices read no more", MaxOffers)
	}
	p.warnSequence(&r.Manifest)
	t, err := metadata.TargetFile().FromBytes(name, b, "sha256")
	if err != nil {
		return err
	}
	rollout := Rollout{Percent: 100}
	if p.opts.Rollout != nil {
		rollout = *p.opts.Rollout
	}
	if err := rollout.check(); err != nil {
		return err
	}
	text, err := json.Marshal(customOf(&r.Manifest, p.opts.Now, rollout))
	if err != nil {
		return err
	}
	raw := json.RawMessage(text)
	t.Custom = &raw
	if _, err := readOffer(name, t); err != nil {
		return fmt.Errorf("release %s would not be read by devices: %w", r.ID, err)
	}
	targets[name] = t
	p.res.Published = append(p.res.Published, r.ID)
	return nil
}

// warnSequence says when a release will not be taken where others are.
func (p *publisher) warnSequence(m *release.Manifest) {
	offers, _, err := readOffers(p.set.targets.Signed.Targets)
	if err != nil || m.Kind != release.KindHotpatch {
		return
	}
	for _, o := range offers {
		if o.Kind == m.Kind && o.Product == m.Product && o.Baseline == m.Baseline && o.Sequence >= m.Sequence {
			p.res.Warnings = append(p.res.Warnings, fmt.Sprintf("%s has sequence %d, but %s with sequence %d is there already and replaces it",
				m.ID, m.Sequence, o.ID, o.Sequence))
		}
	}
}

// warnBaselines says which of the published releases need a baseline that devices
// will not find here: it may be on its way, or a slip of the pen.
func (p *publisher) warnBaselines() {
	offers, _, err := readOffers(p.set.targets.Signed.Targets)
	if err != nil {
		return
	}
	for _, o := range offers {
		there := func(b Offer) bool {
			return b.Kind == release.KindBaseline && b.Product == o.Product && b.ID == o.Baseline
		}
		if o.Baseline != "" && slices.Contains(p.res.Published, o.ID) && !slices.ContainsFunc(offers, there) {
			p.res.Warnings = append(p.res.Warnings, fmt.Sprintf("%s needs the baseline %s of product %s, which this repository does not have: no device takes it before", o.ID, o.Baseline, o.Product))
		}
	}
}

// writeRelease puts a release where it is named, also one that was published
// before and whose file got lost.
func (p *publisher) writeRelease(file string, b []byte) error {
	file = p.path("targets/" + file)
	if old, err := os.ReadFile(file); err == nil && string(old) == string(b) {
		return nil
	}
	return writeFile(file, b, 0o644)
}

// finish signs what changed, upwards, and commits.
func (p *publisher) finish(targetsChanged bool) (Result, error) {
	if err := p.renewRoot(); err != nil {
		return Result{}, err
	}
	targets := p.set.targets
	ending := targets.Signed.Expires.Sub(p.opts.Now) < renewBefore
	if targetsChanged || ending && len(p.keys[metadata.TARGETS]) > 0 {
		targets.Signed.Version = p.next(targets.Signed.Version, metadata.TARGETS)
		targets.Signed.Expires = p.opts.Now.Add(longExpires)
		b, err := signed(targets, metadata.TARGETS, p)
		if err != nil {
			return Result{}, err
		}
		if err := p.write(versioned(targets.Signed.Version, metadata.TARGETS), b); err != nil {
			return Result{}, err
		}
		meta, err := metaFile(targets.Signed.Version, b)
		if err != nil {
			return Result{}, err
		}
		p.set.snapshot.Signed.Meta["targets.json"] = meta
	}
	snapshot := p.set.snapshot
	snapshot.Signed.Version = p.next(snapshot.Signed.Version, metadata.SNAPSHOT)
	snapshot.Signed.Expires = p.opts.Now.Add(p.opts.Expires)
	b, err := signed(snapshot, metadata.SNAPSHOT, p)
	if err != nil {
		return Result{}, err
	}
	if err := p.write(versioned(snapshot.Signed.Version, metadata.SNAPSHOT), b); err != nil {
		return Result{}, err
	}
	meta, err := metaFile(snapshot.Signed.Version, b)
	if err != nil {
		return Result{}, err
	}
	timestamp := p.set.timestamp
	timestamp.Signed.Meta["snapshot.json"] = meta
	timestamp.Signed.Version++
	timestamp.Signed.Expires = p.opts.Now.Add(p.opts.Expires)
	if b, err = signed(timestamp, metadata.TIMESTAMP, p); err != nil {
		return Result{}, err
	}
	if err := p.write("timestamp.json", b); err != nil {
		return Result{}, err
	}
	if p.res.Created {
		// Last of all: until it is there the next publish begins anew.
		if err := writeFile(p.path("root.json"), p.set.rootBytes, 0o644); err != nil {
			return Result{}, err
		}
	}
	p.res.Changed = true
	return p.report(), nil
}

// renewRoot signs the same keys anew before the root ends.
func (p *publisher) renewRoot() error {
	root := p.set.root
	if root.Signed.Expires.Sub(p.opts.Now) >= renewBefore || len(p.keys[metadata.ROOT]) == 0 {
		return nil
	}
	root.Signed.Version++
	root.Signed.Expires = p.opts.Now.Add(longExpires)
	if err := sign(root, metadata.ROOT, root, p.keys); err != nil {
		return err
	}
	return p.writeRoot()
}

// writeRoot writes the root that was signed.
// N.root.json comes first: clients look for it, root.json is for new devices.
func (p *publisher) writeRoot() error {
	b, err := p.set.root.ToBytes(true)
	if err != nil {
		return err
	}
	if err := p.write(versioned(p.set.root.Signed.Version, metadata.ROOT), b); err != nil {
		return err
	}
	p.set.rootBytes = b
	return writeFile(p.path("root.json"), b, 0o644)
}

// next is the version after current that no file has: a publisher that died
// before its commit may have left one, and a mirror may have copied it.
func (p *publisher) next(current int64, role string) int64 {
	entries, err := os.ReadDir(p.path("metadata"))
	if err != nil {
		return current + 1 // write will say what is wrong
	}
	for _, e := range entries {
		number, ok := strings.CutSuffix(e.Name(), "."+role+".json")
		if n, err := strconv.ParseInt(number, 10, 64); ok && err == nil && n > current && n < current+maxLeftOver {
			current = n
		}
	}
	return current + 1
}

// maxLeftOver bounds how far leftovers can push a version.
const maxLeftOver = 1000

func (p *publisher) write(name string, b []byte) error {
	return writeFile(p.path("metadata/"+name), b, 0o644)
}

func signed[T metadata.Roles](m *metadata.Metadata[T], role string, p *publisher) ([]byte, error) {
	if err := sign(m, role, p.set.root, p.keys); err != nil {
		return nil, err
	}
	return m.ToBytes(true)
}

// metaFile names a file by version, length and hash.
func metaFile(version int64, b []byte) (*metadata.MetaFiles, error) {
	t, err := metadata.TargetFile().FromBytes("", b, "sha256")
	if err != nil {
		return nil, err
	}
	m := metadata.MetaFile(version)
	m.Length, m.Hashes = t.Length, t.Hashes
	return m, nil
}

func (p *publisher) report() Result {
	p.res.Expires, p.res.ExpiresIn = p.set.ends()
	p.res.Warnings = append(p.res.Warnings, p.set.warnings(p.opts.Now, min(soonBefore, p.opts.Expires/4))...)
	return p.res
}

// warnings names the roles that end soon or have ended, and what signs them
// anew. soon is for timestamp and snapshot, which each refresh signs.
func (t *trustedSet) warnings(now time.Time, soon time.Duration) []string {
	list := []string{}
	for _, r := range []struct {
		role    string
		expires time.Time
		soon    time.Duration
	}{{metadata.TIMESTAMP, t.timestamp.Signed.Expires, soon}, {metadata.SNAPSHOT, t.snapshot.Signed.Expires, soon},
		{metadata.TARGETS, t.targets.Signed.Expires, renewBefore}, {metadata.ROOT, t.root.Signed.Expires, renewBefore}} {
		keys := "snapshot.pem and timestamp.pem"
		if r.soon == renewBefore {
			keys = "snapshot.pem, timestamp.pem and " + r.role + ".pem"
		}
		if r.role == metadata.SNAPSHOT && r.expires.Equal(t.timestamp.Signed.Expires) {
			continue // signed together, said once
		}
		switch left := r.expires.Sub(now); {
		case left <= 0:
			list = append(list, fmt.Sprintf("%s.json ended %s, and devices take nothing new: run hotpatch-build refresh with %s in KEYS", r.role, moment(r.expires), keys))
		case left < r.soon:
			list = append(list, fmt.Sprintf("%s.json ends %s, in %s: run hotpatch-build refresh with %s in KEYS", r.role, moment(r.expires), inWords(left), keys))
		}
	}
	return list
}

// inWords is a time left, in days, or in hours where days say nothing.
func inWords(d time.Duration) string {
	if d < 48*time.Hour {
		return fmt.Sprintf("%d hours", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
