package release

import (
	"errors"
	"fmt"
	"regexp"

	"hotpatchd/pe"
)

// Format is the first word of every release.json; a reader refuses any other.
const Format = "hotpatch-release/1"

// Kinds of release.
const (
	KindHotpatch = "hotpatch" // changes running processes
	KindBaseline = "baseline" // whole files, in force after a restart
)

// Consistencies: which threads stand in the way of a swap.
const (
	ConsistencyEntry     = "entry"     // only threads inside the replaced bytes
	ConsistencyQuiescent = "quiescent" // threads in or below a function to be replaced, too
)

// The author's word on unwind tables.
const (
	UnwindNone     = "none"     // nothing unwinds through the functions
	UnwindRequired = "required" // the tables must be registered in the target
)

// DefaultProduct is the product of a manifest that names none.
const DefaultProduct = "default"

// Caps on what a release may hold. All bound memory and time of a daemon that
// reads a release; none is near what a sane release needs.
const (
	MaxRelease  = 256 << 20 // bytes of the container
	MaxManifest = 1 << 20   // bytes of release.json
	MaxExpanded = 512 << 20 // bytes of all entries together
	MaxImage    = 64 << 20  // bytes of one hotpatch image
	MaxFile     = 256 << 20 // bytes of one file of a baseline
	MaxRatio    = 200       // expanded bytes a stored byte of one entry
	MaxImages   = 256       // images, and files of a baseline
	MaxList     = 256       // cves, features, architectures
	MaxName     = 255       // bytes of a file name
	MaxTitle    = 512       // bytes of title, os_build, min_build
	MaxPath     = 1024      // bytes of a destination or an address
	MaxInfo     = 64 << 10  // bytes of info as JSON
)

// Manifest is release.json. The keys of release.toml are the same.
type Manifest struct {
	Format      string         `json:"format" toml:"format"`
	ID          string         `json:"id" toml:"id"`
	Product     string         `json:"product" toml:"product"`
	Kind        string         `json:"kind" toml:"kind"`
	Month       string         `json:"month" toml:"month"`       // YYYY-MM, "" if the product has no calendar
	Baseline    string         `json:"baseline" toml:"baseline"` // "": base identities alone decide
	Sequence    uint32         `json:"sequence" toml:"sequence"` // grows within (product, baseline); from 1 for a hotpatch
	Title       string         `json:"title" toml:"title"`
	Severity    string         `json:"severity" toml:"severity"` // one of Severities or "", see CheckLabels
	CVEs        []string       `json:"cves" toml:"cves"`         // CVE-YYYY-NNNN
	SupportURL  string         `json:"support_url" toml:"support_url"`
	OSBuild     string         `json:"os_build" toml:"os_build"`
	Requires    Requires       `json:"requires" toml:"requires"`
	Consistency string         `json:"consistency" toml:"consistency"` // ConsistencyEntry, ConsistencyQuiescent
	Unwind      string         `json:"unwind" toml:"unwind"`           // UnwindNone, UnwindRequired
	Info        map[string]any `json:"info" toml:"info"`               // shown, never interpreted
	Images      []Image        `json:"images,omitempty" toml:"images"` // kind hotpatch
	Files       []File         `json:"files,omitempty" toml:"files"`   // kind baseline; of a hotpatch, its successors on disk
}

// Requires is what a device must have. Empty lists and texts ask for nothing.
// An unknown feature makes the release blocked on that device, by name.
type Requires struct {
	OS       []string `json:"os" toml:"os"`     // "windows", "linux"
	Arch     []string `json:"arch" toml:"arch"` // "amd64", "arm64"
	MinBuild string   `json:"min_build" toml:"min_build"`
	Features []string `json:"features" toml:"features"`
}

// Image is one hotpatch image and the one build of the base image it is for.
// Several may have one name with different bases. Name is a label, never a match.
type Image struct {
	Name   string      `json:"name" toml:"name"` // file name of the base image
	Arch   string      `json:"arch" toml:"arch"` // as Go spells it
	File   string      `json:"file" toml:"file"` // entry of the container, below images/
	Size   int64       `json:"size" toml:"size"` // bytes
	SHA256 string      `json:"sha256" toml:"sha256"`
	Base   pe.Identity `json:"base" toml:"base"`
}

// File is one whole file: of a baseline, or what a hotpatch release brings so
// that the fix is on disk after the next restart anyway. Destination is an
// absolute path of the system that requires.os names; see CheckUnix and
// CheckWindows of package baseline for what a device adds to these rules.
type File struct {
	Destination string `json:"destination" toml:"destination"`
	File        string `json:"file" toml:"file"` // entry of the container, below files/
	Size        int64  `json:"size" toml:"size"` // bytes
	SHA256      string `json:"sha256" toml:"sha256"`
	// Replaces are the contents, as SHA-256 in lower-case hex, that may lie at the
	// destination before. None: the file is new, and nothing may lie there.
	Replaces []string `json:"replaces,omitempty" toml:"replaces"`
	// Identity of a PE image: processes that have mapped this build are fixed. nil
	// for other files.
	Identity *pe.Identity `json:"identity,omitempty" toml:"identity"`
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// ValidID tells whether s may be the id of a release or the name of a product.
func ValidID(s string) bool { return idPattern.MatchString(s) }

// ReadManifest reads release.json strictly: unknown format, unknown or repeated
// fields, wrong spelling of case, and anything after the document are refused.
// Fields with a default come back filled.
func ReadManifest(b []byte) (*Manifest, error) {
	if len(b) > MaxManifest {
		return nil, fmt.Errorf("release.json has %d bytes, more than %d", len(b), MaxManifest)
	}
	id, format := peek(b)
	if format != "" && format != Format {
		return nil, fmt.Errorf("%s has the format %q: this daemon does not know it; newer daemons may", id, format)
	}
	m := new(Manifest)
	if err := Decode(b, m); err != nil {
		var unknown *UnknownField
		if errors.As(err, &unknown) {
			return nil, fmt.Errorf("%s %w", id, err)
		}
		return nil, fmt.Errorf("cannot read the manifest of %s: %w", id, err)
	}
	m.fill()
	if err := m.Check(); err != nil {
		return nil, err
	}
	return m, nil
}

// fill sets the defaults of fields that were left out.
func (m *Manifest) fill() {
	if m.Product == "" {
		m.Product = DefaultProduct
	}
	if m.Consistency == "" {
		m.Consistency = ConsistencyEntry
	}
	if m.Unwind == "" {
		m.Unwind = UnwindNone
	}
	if m.CVEs == nil {
		m.CVEs = []string{}
	}
	for _, list := range []*[]string{&m.Requires.OS, &m.Requires.Arch, &m.Requires.Features} {
		if *list == nil {
			*list = []string{}
		}
	}
	if m.Info == nil {
		m.Info = map[string]any{}
	}
}

// Arch lists the architectures of the images, each once, in order of appearance;
// for a baseline what it requires.
func (m *Manifest) Arch() []string {
	seen := map[string]bool{}
	list := []string{}
	for _, image := range m.Images {
		if !seen[image.Arch] {
			seen[image.Arch] = true
			list = append(list, image.Arch)
		}
	}
	if m.Kind == KindBaseline {
		list = append(list, m.Requires.Arch...)
	}
	return list
}
