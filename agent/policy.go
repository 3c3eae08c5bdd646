package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/eligibility"
)

// PolicyFormat is the first key of a policy file.
const PolicyFormat = "hotpatchd-policy/1"

// Bounds of a policy.
const (
	maxHolds      = 1000
	maxDenials    = 1000
	maxHours      = 100
	maxGlob       = 512 // bytes of one pattern
	maxBusyBudget = 24 * time.Hour
	busyBudget    = 10 * time.Minute // default
)

// Mode tells who begins the work.
type Mode string

const (
	Automatic Mode = "automatic" // releases are applied as they come
	Manual    Mode = "manual"    // only "hotpatch install" applies
)

// Policy is the owner's word. It may be replaced while the daemon runs; a
// Policy itself never changes.
type Policy struct {
	File   string
	Absent bool // there is no file: the device is not enrolled

	Enrolled      *bool // nil: not said. Linux: not enrolled; Windows: device management decides
	AllowHotpatch *bool // nil: not said. Linux: not allowed; Windows: device management decides
	Mode          Mode
	Pause         bool     // nothing new is applied; what is applied stays
	Hold          []string // releases that are not wanted
	Deny          []Denial
	Waive         []string // ids of eligibility checks
	// Ring is the device's place in rollouts, 0 (first) to 99 (last): a release
	// with rollout percent N reaches places below N. -1: by a hash of the device id.
	Ring int
	// Hours are when work may begin by itself, in local time; none: always.
	Hours Hours
	// BusyBudget is how long a busy process is tried again and again at short
	// intervals; after that it is tried at each pass of the loop only. Never given up.
	BusyBudget time.Duration
}

// Kinds of error of LoadPolicy and ParsePolicy, for errors.Is. An absent file is neither.
var (
	ErrPolicyUnreadable = errors.New("policy unreadable") // the file is there but the system did not let us read it
	ErrPolicyWrong      = errors.New("policy wrong")      // read, but it says something it cannot
)

// policyError keeps the sentence free of the kind's name.
type policyError struct{ kind, err error }

func (e *policyError) Error() string   { return e.err.Error() }
func (e *policyError) Unwrap() []error { return []error{e.kind, e.err} }

// policyFile is Policy as the file writes it.
type policyFile struct {
	Format        string   `toml:"format"`
	Enrolled      *bool    `toml:"enrolled"`
	AllowHotpatch *bool    `toml:"allow_hotpatch"`
	Mode          string   `toml:"mode"`
	Pause         bool     `toml:"pause"`
	Hold          []string `toml:"hold"`
	Deny          []string `toml:"deny"`
	Waive         []string `toml:"waive"`
	Ring          *int     `toml:"ring"`
	Hours         []string `toml:"hours"`
	BusyBudget    string   `toml:"busy_budget"`
}

// LoadPolicy reads the policy. A file that is not there is a policy with Absent
// set, and no error. After an error the caller keeps the last policy that was
// good; if there never was one, Judged tells eligibility so.
func LoadPolicy(path string) (*Policy, error) {
	p, _, err := LoadManagedPolicy(path, nil)
	return p, err
}

// LoadManagedPolicy is LoadPolicy with what device management has set over it
// (m may be nil), and with every key as it is in force. Where management has
// set a key the policy is not absent without its file.
func LoadManagedPolicy(path string, m Management) (*Policy, []control.Setting, error) {
	all, err := managedBy(m)
	if err != nil {
		return nil, nil, &policyError{ErrPolicyUnreadable, err}
	}
	over := all.of(&policyFile{})
	text, err := readDocument(path)
	absent := errors.Is(err, fs.ErrNotExist)
	switch {
	case absent:
		text = []byte("format = \"" + PolicyFormat + "\"\n")
	case err != nil:
		return nil, nil, &policyError{ErrPolicyUnreadable, fmt.Errorf("cannot read the policy: %w", err)}
	}
	p, shown, err := parsePolicy(path, text, over)
	if err != nil {
		return nil, nil, &policyError{ErrPolicyWrong, err}
	}
	p.Absent = absent && len(over.all) == 0
	return p, shown, nil
}

// ParsePolicy reads the text of a policy; file is used in errors only.
func ParsePolicy(file string, text []byte) (*Policy, error) {
	p, _, err := parsePolicy(file, text, settings{})
	if err != nil {
		return nil, &policyError{ErrPolicyWrong, err}
	}
	return p, nil
}

// unsaid words what the policy means where it says nothing.
func unsaid(in *policyFile) map[string]string {
	word := map[string]string{"busy_budget": strconv.Quote(busyBudget.String())}
	for key, silent := range map[string]bool{"enrolled": in.Enrolled == nil, "allow_hotpatch": in.AllowHotpatch == nil} {
		if silent {
			word[key] = "not set"
		}
	}
	if in.Ring == nil {
		word["ring"] = "by the device's id"
	}
	return word
}

func parsePolicy(file string, text []byte, over settings) (*Policy, []control.Setting, error) {
	in := policyFile{Mode: string(Automatic)}
	d, err := decode(file, text, PolicyFormat, &in)
	if err == nil {
		err = d.overlay(&in, over)
	}
	if err != nil {
		return nil, nil, err
	}
	p, err := in.policy(file, d)
	if err != nil {
		return nil, nil, err
	}
	return p, d.effective(&in, unsaid(&in)), nil
}

// policy checks what was read and makes a Policy of it.
func (in *policyFile) policy(file string, d *document) (*Policy, error) {
	var err error
	p := &Policy{
		File: file, Enrolled: in.Enrolled, AllowHotpatch: in.AllowHotpatch, Mode: Mode(in.Mode), Pause: in.Pause,
		Hold: in.Hold, Waive: in.Waive, Ring: -1,
	}
	if err := d.oneOf("mode", in.Mode, string(Automatic), string(Manual)); err != nil {
		return nil, err
	}
	for _, list := range []struct {
		key    string
		length int
		most   int
	}{{"hold", len(in.Hold), maxHolds}, {"deny", len(in.Deny), maxDenials}, {"hours", len(in.Hours), maxHours}} {
		if list.length > list.most {
			return nil, d.errorf(list.key, "has %d entries, at most %d are read", list.length, list.most)
		}
	}
	for i, id := range in.Hold {
		if !release.ValidID(id) {
			return nil, d.errorf(fmt.Sprintf("hold[%d]", i), "%q is not the id of a release", id)
		}
	}
	for i, id := range in.Waive {
		if !eligibility.Known(id) {
			return nil, d.errorf(fmt.Sprintf("waive[%d]", i), "%q is not a check; the checks are %s", id, checkIDs())
		}
	}
	for i, rule := range in.Deny {
		denial, err := parseDenial(rule)
		if err != nil {
			return nil, d.errorf(fmt.Sprintf("deny[%d]", i), "%s", err)
		}
		p.Deny = append(p.Deny, denial)
	}
	for i, text := range in.Hours {
		window, err := parseWindow(text)
		if err != nil {
			return nil, d.errorf(fmt.Sprintf("hours[%d]", i), "%s", err)
		}
		p.Hours = append(p.Hours, window)
	}
	if in.Ring != nil {
		if p.Ring = *in.Ring; p.Ring < 0 || p.Ring > 99 {
			return nil, d.errorf("ring", "%d is not between 0 (first) and 99 (last)", p.Ring)
		}
	}
	if p.BusyBudget, err = d.duration("busy_budget", in.BusyBudget, busyBudget, 0, maxBusyBudget); err != nil {
		return nil, err
	}
	return p, nil
}

func checkIDs() string {
	var words []string
	for _, id := range eligibility.IDs() {
		words = append(words, string(id))
	}
	return strings.Join(words, " ")
}

// Judged is the policy as eligibility judges it. err is what the last LoadPolicy
// said; with a good policy in hand (the last one that was good) it does not count.
func (p *Policy) Judged(path string, err error) eligibility.Policy {
	switch {
	case p != nil:
		return eligibility.Policy{Enrolled: p.Enrolled, AllowHotpatch: p.AllowHotpatch, Waive: p.Waive, Source: path, Absent: p.Absent}
	case err != nil:
		first, _, _ := strings.Cut(err.Error(), "\n")
		return eligibility.Policy{Source: path, Problem: first}
	}
	return eligibility.Policy{Source: path, Problem: "it was not read yet"}
}

// Held tells whether the policy holds a release.
func (p *Policy) Held(id string) bool {
	for _, h := range p.Hold {
		if h == id {
			return true
		}
	}
	return false
}

// Denied finds the first rule that forbids touching an image of a process. An
// empty image asks about the process as a whole.
func (p *Policy) Denied(exe, user, image string) (Denial, bool) {
	for _, d := range p.Deny {
		if d.Match(exe, user, image) {
			return d, true
		}
	}
	return Denial{}, false
}

// DenialKind is what a rule of "deny" looks at.
type DenialKind string

const (
	DenyExe   DenialKind = "exe"   // the process's program: its PE path or name
	DenyUser  DenialKind = "user"  // the process's owner
	DenyImage DenialKind = "image" // the image's path or name
)

// Denial is one rule of "deny".
type Denial struct {
	Kind DenialKind
	Glob Glob
}

// parseDenial reads "exe:GLOB", "user:GLOB", "image:GLOB" or "GLOB", which means
// exe. One letter before a colon is a drive.
func parseDenial(text string) (Denial, error) {
	kind, glob, ok := strings.Cut(text, ":")
	if !ok || len(kind) < 2 || strings.ContainsAny(kind, `/\*?.`) {
		kind, glob = string(DenyExe), text
	}
	d := Denial{Kind: DenialKind(kind), Glob: Glob(glob)}
	switch d.Kind {
	case DenyExe, DenyUser, DenyImage:
		return d, d.Glob.valid()
	}
	return Denial{}, fmt.Errorf("%q is none of exe:, user:, image:", kind+":")
}

func (d Denial) String() string { return string(d.Kind) + ":" + string(d.Glob) }

// Match tells whether the rule forbids. Paths and names are as the process has
// them; either may be given.
func (d Denial) Match(exe, user, image string) bool {
	switch d.Kind {
	case DenyUser:
		return d.Glob.Match(user)
	case DenyImage:
		return image != "" && d.Glob.Match(image)
	}
	return d.Glob.Match(exe)
}

// Glob is a pattern for paths and names: * stands for any run of characters,
// folders included, ? for one. Upper and lower case, and / and \, are the same:
// Windows' names are, and a rule that forbids too much is noticed, one that
// forbids too little is not. It matches a whole path or its last element.
type Glob string

func (g Glob) valid() error {
	switch {
	case g == "":
		return errors.New("the pattern is empty")
	case len(g) > maxGlob:
		return fmt.Errorf("the pattern is longer than %d bytes", maxGlob)
	case !utf8.ValidString(string(g)):
		return errors.New("the pattern is not UTF-8")
	}
	return nil
}

// Match tells whether path, or its last element, fits the pattern.
func (g Glob) Match(path string) bool {
	pattern, name := fold(string(g)), fold(path)
	if wild(pattern, name) {
		return true
	}
	i := strings.LastIndexByte(name, '/')
	return i >= 0 && wild(pattern, name[i+1:])
}

// MatchAny tells whether one of the patterns matches.
func MatchAny(globs []Glob, path string) bool {
	for _, g := range globs {
		if g.Match(path) {
			return true
		}
	}
	return false
}

// fold makes equal what is the same file: \\?\C:\A and c:/a.
func fold(s string) string {
	s = strings.ToLower(strings.ReplaceAll(s, `\`, "/"))
	for _, prefix := range []string{"//?/", "/??/", "//./"} {
		s = strings.TrimPrefix(s, prefix)
	}
	return s
}

// wild matches with * and ?. It never takes more than len(pattern)·len(name)
// steps: only the last * is ever tried again.
func wild(pattern, name string) bool {
	p, n, star, mark := 0, 0, -1, 0
	for n < len(name) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, n
			p++
			continue
		}
		if p < len(pattern) && pattern[p] == '?' {
			_, size := utf8.DecodeRuneInString(name[n:])
			p, n = p+1, n+size
			continue
		}
		if p < len(pattern) && pattern[p] == name[n] {
			p, n = p+1, n+1
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, n = star+1, mark
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// globs checks a list of patterns; a key that is not in the file is the default.
func (d *document) globs(key string, texts []string, fallback []Glob) ([]Glob, error) {
	if !d.set(key) {
		return fallback, nil
	}
	if len(texts) > maxGlobs {
		return nil, d.errorf(key, "has %d entries, at most %d are read", len(texts), maxGlobs)
	}
	globs := []Glob{}
	for i, text := range texts {
		g := Glob(text)
		if err := g.valid(); err != nil {
			return nil, d.errorf(fmt.Sprintf("%s[%d]", key, i), "%s", err)
		}
		globs = append(globs, g)
	}
	return globs, nil
}
