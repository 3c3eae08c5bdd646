package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

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
	maxApprovals  = 1000
	maxBusyBudget = 24 * time.Hour
	busyBudget    = 10 * time.Minute // default
	// maxDefer bounds defer and hours_grace: what waits for longer than a quarter
	// is replaced by the next baseline, and a longer word is a mistake in units.
	maxDefer      = 90 * 24 * time.Hour
	minHoursGrace = time.Minute // with less, hours would mean nothing
	// A window below a second tells nothing; beyond a day the daemon of a laptop
	// rarely lives to see its end.
	minGuardWindow     = time.Second
	maxGuardWindow     = 24 * time.Hour
	defaultGuardWindow = 10 * time.Minute // default
	maxCanary          = time.Hour        // the others stay unfixed meanwhile
	defaultCanary      = time.Minute      // default
)

// Mode tells who begins the work.
type Mode string

const (
	Automatic Mode = "automatic" // releases are applied as they come
	Approved  Mode = "approved"  // only releases that the policy names come into force
	Manual    Mode = "manual"    // only "hotpatch install" applies
)

// Guard tells what the health guard may do when patched processes end badly.
type Guard string

const (
	GuardOff     Guard = "off"     // nothing is watched, and there is no canary
	GuardObserve Guard = "observe" // watched and reported, nothing is taken out
	GuardEnforce Guard = "enforce" // a release that harms is taken out and held
)

// Policy is the owner's word. It may be replaced while the daemon runs; a
// Policy itself never changes.
type Policy struct {
	File   string
	Absent bool // there is no file: the device is not enrolled

	Enrolled      *bool // nil: not said. Linux: not enrolled; Windows: device management decides
	AllowHotpatch *bool // nil: not said. Linux: not allowed; Windows: device management decides
	Mode          Mode
	Approve       []string // releases that may come into force in mode "approved"; none is implied by another
	// Defer is how long after its publication a release is left to others, whatever
	// its severity. 0: not at all.
	Defer time.Duration
	Pause bool     // nothing new is applied; what is applied stays
	Hold  []string // releases that are not wanted
	Deny  []Denial
	Waive []string // ids of eligibility checks
	// Ring is the device's place in rollouts, 0 (first) to 99 (last): a release
	// with rollout percent N reaches places below N. -1: by a hash of the device id.
	Ring int
	// Hours are when work may begin by itself, in local time; none: always.
	Hours Hours
	// HoursGrace is how long after it came into force here a release keeps to
	// Hours; then it is applied at any time. 0: it keeps to them for ever.
	HoursGrace time.Duration
	// BusyBudget is how long a busy process is tried again and again at short
	// intervals; after that it is tried at each pass of the loop only. Never given up.
	BusyBudget time.Duration
	// Guard, GuardWindow and Canary are the health guard's: how long patched
	// processes are watched after a release was applied, and how long the first of
	// them runs before the others follow (0: all at once).
	Guard       Guard
	GuardWindow time.Duration
	Canary      time.Duration
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
	Approve       []string `toml:"approve"`
	Defer         string   `toml:"defer"`
	Pause         bool     `toml:"pause"`
	Hold          []string `toml:"hold"`
	Deny          []string `toml:"deny"`
	Waive         []string `toml:"waive"`
	Ring          *int     `toml:"ring"`
	Hours         []string `toml:"hours"`
	HoursGrace    string   `toml:"hours_grace"`
	BusyBudget    string   `toml:"busy_budget"`
	Guard         string   `toml:"guard"`
	GuardWindow   string   `toml:"guard_window"`
	Canary        string   `toml:"canary"`
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
	word := map[string]string{}
	for key, d := range map[string]time.Duration{"defer": 0, "busy_budget": busyBudget, "guard_window": defaultGuardWindow, "canary": defaultCanary} {
		word[key] = strconv.Quote(d.String())
	}
	for key, silent := range map[string]bool{"enrolled": in.Enrolled == nil, "allow_hotpatch": in.AllowHotpatch == nil} {
		if silent {
			word[key] = "not set"
		}
	}
	if in.HoursGrace == "" {
		word["hours_grace"] = "never"
	}
	if in.Ring == nil {
		word["ring"] = "by the device's id"
	}
	return word
}

func parsePolicy(file string, text []byte, over settings) (*Policy, []control.Setting, error) {
	in := policyFile{Mode: string(Automatic), Guard: string(GuardEnforce)}
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
		Approve: in.Approve, Hold: in.Hold, Waive: in.Waive, Ring: -1, Guard: Guard(in.Guard),
	}
	if err := d.oneOf("mode", in.Mode, string(Automatic), string(Approved), string(Manual)); err != nil {
		return nil, err
	}
	if err := d.oneOf("guard", in.Guard, string(GuardOff), string(GuardObserve), string(GuardEnforce)); err != nil {
		return nil, err
	}
	// Who lists what may come does not want the rest.
	if p.Mode == Automatic && len(in.Approve) > 0 {
		return nil, d.errorf("approve", "needs mode = %q: with %q every release comes into force, listed or not", Approved, Automatic)
	}
	for _, list := range []struct {
		key    string
		length int
		most   int
	}{{"approve", len(in.Approve), maxApprovals}, {"hold", len(in.Hold), maxHolds}, {"deny", len(in.Deny), maxDenials}, {"hours", len(in.Hours), maxHours}} {
		if list.length > list.most {
			return nil, d.errorf(list.key, "has %d entries, at most %d are read", list.length, list.most)
		}
	}
	for _, list := range []struct {
		key string
		ids []string
	}{{"approve", in.Approve}, {"hold", in.Hold}} {
		for i, id := range list.ids {
			if !release.ValidID(id) {
				return nil, d.errorf(fmt.Sprintf("%s[%d]", list.key, i), "%q is not the id of a release", id)
			}
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
	for _, x := range []struct {
		into                  *time.Duration
		key, text             string
		fallback, least, most time.Duration
	}{
		{&p.Defer, "defer", in.Defer, 0, 0, maxDefer},
		{&p.BusyBudget, "busy_budget", in.BusyBudget, busyBudget, 0, maxBusyBudget},
		{&p.GuardWindow, "guard_window", in.GuardWindow, defaultGuardWindow, minGuardWindow, maxGuardWindow},
		{&p.Canary, "canary", in.Canary, defaultCanary, 0, maxCanary},
	} {
		if *x.into, err = d.duration(x.key, x.text, x.fallback, x.least, x.most); err != nil {
			return nil, err
		}
	}
	if in.HoursGrace != "" { // "" is the default's own word: never
		p.HoursGrace, err = d.duration("hours_grace", in.HoursGrace, 0, minHoursGrace, maxDefer)
	}
	return p, err
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
