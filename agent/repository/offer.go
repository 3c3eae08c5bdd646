package repository

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
	"hotpatchd/pe"
)

// TargetFormat is the first word of a target's custom data. A target with
// another is skipped, alone: it is for newer daemons.
const TargetFormat = "hotpatch-target/1"

// MaxOffers bounds the releases of one repository.
const MaxOffers = 4096

// Base is one build of an image that a release fixes.
type Base struct {
	Name string `json:"name"` // file name, a label
	Arch string `json:"arch"`
	pe.Identity
}

// Rollout is the publisher's word on who may take a release, and when.
type Rollout struct {
	Percent   int        `json:"percent"` // of devices, 0 to 100
	NotBefore *time.Time `json:"not_before,omitempty"`
	Halt      bool       `json:"halt"`             // no device takes it any more
	Undo      bool       `json:"undo"`             // devices that have it take it out
	Reason    string     `json:"reason,omitempty"` // for halt, shown to people
}

// custom is a target's custom data: enough for a device to decide without a
// download. All numbers are integers: TUF's canonical JSON has no others.
type custom struct {
	Format    string    `json:"format"`
	ID        string    `json:"id"`
	Product   string    `json:"product"`
	Kind      string    `json:"kind"`
	Month     string    `json:"month"`
	Baseline  string    `json:"baseline"`
	Sequence  uint32    `json:"sequence"`
	OS        []string  `json:"os"`
	Arch      []string  `json:"arch"`
	Title     string    `json:"title"`
	Severity  string    `json:"severity"`
	CVEs      []string  `json:"cves"`
	Bases     []Base    `json:"bases"`
	Files     []Base    `json:"files,omitempty"`
	Published time.Time `json:"published"`
	Rollout   Rollout   `json:"rollout"`
}

// Offer is one release that verified metadata names.
type Offer struct {
	ID        string
	Product   string
	Kind      string
	Month     string
	Baseline  string
	Sequence  uint32
	OS        []string // empty: any
	Arch      []string
	Title     string
	Severity  string
	CVEs      []string
	Bases     []Base
	Files     []Base // builds of images that it puts on the disk: processes that have mapped them are fixed
	Published time.Time
	Rollout   Rollout
	Target    string // name in the repository
	Length    int64  // bytes
	SHA256    string // lower-case hex
}

// Skipped is a target that is no offer to this daemon, and why.
type Skipped struct {
	Target string
	Reason string
}

// Agrees tells whether a manifest is the one the offer was made for. Metadata
// decided that the release fits; a manifest that says otherwise must not be used.
func (o Offer) Agrees(m *release.Manifest) error {
	want := customOf(m, o.Published, o.Rollout)
	switch {
	case want.ID != o.ID || want.Product != o.Product || want.Kind != o.Kind || want.Month != o.Month:
		return fmt.Errorf("release %s: manifest and metadata differ in id, product, kind or month", o.ID)
	case want.Baseline != o.Baseline || want.Sequence != o.Sequence:
		return fmt.Errorf("release %s: manifest and metadata differ in baseline or sequence", o.ID)
	case !slices.Equal(want.Arch, o.Arch) || !slices.Equal(want.OS, o.OS) || !slices.Equal(want.Bases, o.Bases) || !slices.Equal(want.Files, o.Files):
		return fmt.Errorf("release %s: manifest and metadata differ in what they are for", o.ID)
	}
	return nil
}

// targetName is the name of a release in the repository.
func targetName(id string) string { return "releases/" + id + ".hotpatch" }

// targetFile is the path of a release below targets/: consistent snapshots
// put the hash before the last element of the name.
func targetFile(name, sha256 string) string {
	return path.Join(path.Dir(name), sha256+"."+path.Base(name))
}

func customOf(m *release.Manifest, published time.Time, r Rollout) custom {
	c := custom{Format: TargetFormat, ID: m.ID, Product: m.Product, Kind: m.Kind, Month: m.Month, Baseline: m.Baseline,
		Sequence: m.Sequence, OS: m.Requires.OS, Arch: m.Arch(), Title: m.Title, Severity: m.Severity, CVEs: m.CVEs,
		Bases: []Base{}, Published: published.UTC().Truncate(time.Second), Rollout: r}
	for _, i := range m.Images {
		c.Bases = append(c.Bases, Base{Name: i.Name, Arch: i.Arch, Identity: i.Base})
	}
	for _, f := range m.Files {
		if f.Identity != nil {
			name := f.Destination[strings.LastIndexAny(f.Destination, `/\`)+1:]
			c.Files = append(c.Files, Base{Name: name, Arch: release.ArchOf(f.Identity.Machine), Identity: *f.Identity})
		}
	}
	return c
}

// readOffer turns one signed target into an offer, or says why not.
func readOffer(name string, t *metadata.TargetFiles) (Offer, error) {
	if t == nil || t.Custom == nil {
		return Offer{}, errors.New("it has no custom data")
	}
	var head struct {
		Format string `json:"format"`
	}
	if err := json.Unmarshal(*t.Custom, &head); err != nil {
		return Offer{}, fmt.Errorf("its custom data cannot be read: %w", err)
	}
	if head.Format != TargetFormat {
		return Offer{}, fmt.Errorf("it has the format %.64q: this daemon does not know it; newer daemons may", head.Format)
	}
	var c custom
	if err := release.Decode(*t.Custom, &c); err != nil {
		return Offer{}, fmt.Errorf("it %w", err)
	}
	sum, ok := t.Hashes["sha256"]
	switch {
	case !release.ValidID(c.ID) || name != targetName(c.ID):
		return Offer{}, fmt.Errorf("its name is not that of the release %.64q", c.ID)
	case !release.ValidID(c.Product):
		return Offer{}, fmt.Errorf("its product is %.64q", c.Product)
	case c.Kind != release.KindHotpatch && c.Kind != release.KindBaseline:
		return Offer{}, fmt.Errorf("its kind is %.64q", c.Kind)
	case !ok || len(sum) != 32 || len(t.Hashes) != 1:
		return Offer{}, errors.New("it does not have exactly one hash, a sha256")
	case t.Length < 1 || t.Length > release.MaxRelease:
		return Offer{}, fmt.Errorf("its length is %d, not 1 to %d", t.Length, release.MaxRelease)
	case c.Rollout.Percent < 0 || c.Rollout.Percent > 100:
		return Offer{}, fmt.Errorf("its rollout is %d percent", c.Rollout.Percent)
	case len(c.Bases) > release.MaxImages || len(c.Files) > release.MaxImages:
		return Offer{}, fmt.Errorf("it names %d builds, more than %d", max(len(c.Bases), len(c.Files)), release.MaxImages)
	}
	return Offer{ID: c.ID, Product: c.Product, Kind: c.Kind, Month: c.Month, Baseline: c.Baseline, Sequence: c.Sequence,
		OS: c.OS, Arch: c.Arch, Title: c.Title, Severity: c.Severity, CVEs: c.CVEs, Bases: c.Bases, Files: c.Files, Published: c.Published,
		Rollout: c.Rollout, Target: name, Length: t.Length, SHA256: hex.EncodeToString(sum)}, nil
}

// readOffers lists a targets role's offers by name, and what is none.
func readOffers(targets map[string]*metadata.TargetFiles) ([]Offer, []Skipped, error) {
	if len(targets) > MaxOffers {
		return nil, nil, fail(CodeTooLarge, nil, "targets.json names %d releases, more than %d", len(targets), MaxOffers)
	}
	names := make([]string, 0, len(targets))
	for name := range targets {
		names = append(names, name)
	}
	slices.Sort(names)
	var offers []Offer
	var skipped []Skipped
	for _, name := range names {
		o, err := readOffer(name, targets[name])
		if err != nil {
			skipped = append(skipped, Skipped{Target: name, Reason: err.Error()})
			continue
		}
		offers = append(offers, o)
	}
	return offers, skipped, nil
}
