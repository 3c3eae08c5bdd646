package control

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// Format names of the documents. The number after the slash grows only when a
// key changes its meaning; new keys do not change it.
const (
	FormatStatus      = "hotpatch-status/1"
	FormatEligibility = "hotpatch-eligibility/1"
	FormatOffers      = "hotpatch-list/1"
	FormatProcesses   = "hotpatch-processes/1"
	FormatPlan        = "hotpatch-plan/1"
	FormatChange      = "hotpatch-change/1"
	FormatVerify      = "hotpatch-verify/1"
	FormatHistory     = "hotpatch-history/1"
	FormatExplain     = "hotpatch-explain/1"
	FormatSettings    = "hotpatch-policy/1"
	FormatEvent       = "hotpatch-event/1"
	FormatError       = "hotpatch-error/1"
)

// Header begins every document. The server fills what is empty.
type Header struct {
	Format    string `json:"format"`
	Generated Time   `json:"generated"`
	Version   string `json:"version"` // of the daemon
}

// Time is an instant in a document: RFC 3339 in UTC, whole seconds; null when
// it is not known or has not happened.
type Time struct{ time.Time }

// At makes a Time of t.
func At(t time.Time) Time { return Time{t} }

// MarshalJSON writes null for the zero time.
func (t Time) MarshalJSON() ([]byte, error) {
	if t.IsZero() {
		return []byte("null"), nil
	}
	return json.Marshal(t.UTC().Format(time.RFC3339))
}

// UnmarshalJSON reads what MarshalJSON writes.
func (t *Time) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*t = Time{}
		return nil
	}
	return json.Unmarshal(b, &t.Time)
}

// Addr is an address or RVA in a document: a string of hex digits, because
// JSON numbers of many readers end at 2^53. Zero is the empty string: not
// known, or not for this caller.
type Addr uint64

// MarshalText writes bare lower-case hex digits.
func (a Addr) MarshalText() ([]byte, error) {
	if a == 0 {
		return nil, nil
	}
	return strconv.AppendUint(nil, uint64(a), 16), nil
}

// UnmarshalText reads hex digits, with or without 0x.
func (a *Addr) UnmarshalText(b []byte) error {
	s := strings.TrimPrefix(strings.TrimPrefix(string(b), "0x"), "0X")
	if s == "" {
		*a = 0
		return nil
	}
	v, err := strconv.ParseUint(s, 16, 64)
	*a = Addr(v)
	return err
}

func (a Addr) String() string { return strconv.FormatUint(uint64(a), 16) }

// State is the verdict on the whole device.
type State string

// The states, worst first.
const (
	Unknown          State = "unknown"           // nothing verified yet, or first scan not done
	Ineligible       State = "ineligible"        // no new fixes; what is applied stays
	BaselineRequired State = "baseline-required" // the releases offered need a newer baseline
	Held             State = "held"              // the operator said no to the release that would apply
	RestartRequired  State = "restart-required"  // only a restart of the device ends what is open
	Incomplete       State = "incomplete"        // something is open that does not end by itself at once
	Pending          State = "pending"           // work is under way
	Hotpatched       State = "hotpatched"        // all images run fixed code
	UpToDate         State = "up-to-date"        // verified that nothing applies
)

// States lists all states, worst first.
var States = []State{Unknown, Ineligible, BaselineRequired, Held, RestartRequired, Incomplete, Pending, Hotpatched, UpToDate}

// ImageState is the state of one image in one process.
type ImageState string

// The image states.
const (
	Patched      ImageState = "patched"
	Unpatched    ImageState = "unpatched" // by the operator's word: held, paused, rolled back, mode manual
	PendingImage ImageState = "pending"
	Busy         ImageState = "busy"        // a thread is in the way
	Blocked      ImageState = "blocked"     // refused by rule, guard or OS
	Drifted      ImageState = "drifted"     // right identity but other bytes
	OtherBuild   ImageState = "other-build" // another build than the release names
	Fixed        ImageState = "fixed"       // its file on disk is already the fixed one
	Failed       ImageState = "failed"
	Torn         ImageState = "torn" // could not be written back: restart the process
)

// ImageStates lists all image states, worst first.
var ImageStates = []ImageState{Torn, Failed, Drifted, Busy, Blocked, OtherBuild, Unpatched, PendingImage, Patched, Fixed}

// Open tells whether an image in this state runs code that a release would fix
// or may be in disorder.
func (s ImageState) Open() bool {
	switch s {
	case Patched, Fixed, OtherBuild:
		return false
	}
	return true
}

// Remedy is what ends an open image or an attention.
type Remedy string

// The remedies.
const (
	RemedyNone           Remedy = ""
	RemedyWait           Remedy = "wait"
	RemedyRestartProcess Remedy = "restart-process"
	RemedyRestartDevice  Remedy = "restart-device"
	RemedyBaseline       Remedy = "baseline"
	RemedyPolicy         Remedy = "policy"
	RemedyAuthor         Remedy = "author"
)

// Result is the outcome of one eligibility check.
type Result string

// The results. Unknown is not a pass, unless waived.
const (
	Pass          Result = "pass"
	Fail          Result = "fail"
	ResultUnknown Result = "unknown"
	NotApplicable Result = "not-applicable"
)

// CheckIDs are the eligibility checks in their order.
var CheckIDs = []string{"os", "edition", "version", "arch", "managed", "policy", "vbs", "chpe", "baseline", "rights"}

// Severities of an Attention, worst first. Those of a release are the author's words.
const (
	SeverityError   = "error"
	SeverityWarning = "warning"
	SeverityInfo    = "info"
)

// Status is the verdict and what leads to it.
type Status struct {
	Header
	Eligible        bool            `json:"eligible"`
	State           State           `json:"state"`
	Releases        []ActiveRelease `json:"releases"` // in force, worst first
	Release         *ActiveRelease  `json:"release"`  // the most urgent of them, or null
	Baseline        Baseline        `json:"baseline"`
	Coverage        Coverage        `json:"coverage"`
	RestartRequired bool            `json:"restart_required"`
	Staged          []StagedFiles   `json:"staged"` // whole files beside their destinations, or kept
	Repository      Repository      `json:"repository"`
	Next            Next            `json:"next"`
	Attention       []Attention     `json:"attention"` // worst first
	Story           []Chapter       `json:"story"`     // what happens next, the gravest first
	Device          Device          `json:"device"`
	Backend         Backend         `json:"backend"`

	Holds  []Hold `json:"holds"`
	Paused bool   `json:"paused"`
	// PausedBy is who can end the pause: operator, policy, or "" if there is none.
	PausedBy string   `json:"paused_by"`
	Mode     string   `json:"mode"`    // automatic or manual
	Waived   []string `json:"waived"`  // checks that fail but are waived by policy
	Fails    []string `json:"fails"`   // checks that stand in the way
	Scanned  Time     `json:"scanned"` // end of the last complete scan; null before the first
	Unseen   int      `json:"unseen"`  // processes that the system does not let the daemon look into
	Latency  Latency  `json:"latency"`
}

// Latency is how long images lay in memory before they were patched, since the
// daemon started: those of programs that started, and apart from them those
// that were loaded later. Each measurement is the longest it may have been.
type Latency struct {
	Quantiles
	Late        Quantiles `json:"late"`
	Watch       string    `json:"watch"` // how starts are noticed: WatchEvents or WatchScan
	Why         string    `json:"why"`   // why not by events
	ScanEveryMS int64     `json:"scan_every_ms"`
}

// Quantiles are of the last measurements, at most 512; 0 while Count is 0.
type Quantiles struct {
	P50MS float64 `json:"p50_ms"`
	P99MS float64 `json:"p99_ms"`
	Count int     `json:"count"`  // of all
	SumMS float64 `json:"sum_ms"` // of all
}

// How starts of processes are noticed.
const (
	WatchEvents = "events" // the system tells of them
	WatchScan   = "scan"   // by looking at all processes, every scan_every
)

// ActiveRelease is a release in force on this device.
type ActiveRelease struct {
	Product  string   `json:"product"`
	ID       string   `json:"id"`
	Sequence int64    `json:"sequence"`
	Month    string   `json:"month"` // "2026-11"
	Since    Time     `json:"since"`
	Title    string   `json:"title"`
	Severity string   `json:"severity"`
	CVEs     []string `json:"cves"`
}

// Baseline is the last update with a restart.
type Baseline struct {
	ID      string `json:"id"`
	Month   string `json:"month"`
	Current bool   `json:"current"`
}

// StagedFiles is what one release has put, or will put, on the disk.
type StagedFiles struct {
	Product string `json:"product"`
	ID      string `json:"id"`
	Kind    string `json:"kind"`  // of the release
	Month   string `json:"month"` // "2026-11"
	Phase   string `json:"phase"` // staged, active (the old files are kept), leaving
	Since   Time   `json:"since"` // of the phase
	Files   int    `json:"files"`
	Text    string `json:"text"`
}

// Coverage counts images by state. The counts after Images add up to Images.
type Coverage struct {
	Processes  int `json:"processes"` // that have loaded an image a release names
	Images     int `json:"images"`
	Patched    int `json:"patched"`
	Unpatched  int `json:"unpatched"`
	Pending    int `json:"pending"`
	Busy       int `json:"busy"`
	Blocked    int `json:"blocked"`
	Drifted    int `json:"drifted"`
	OtherBuild int `json:"other_build"`
	Fixed      int `json:"fixed"`
	Failed     int `json:"failed"`
	Torn       int `json:"torn"`
}

// Add counts one image.
func (c *Coverage) Add(s ImageState) {
	c.Images++
	if n := c.slot(s); n != nil {
		*n++
		return
	}
	c.Failed++ // a state nobody knows is not well, and the counts must add up
}

// Count is the number of images in state s.
func (c Coverage) Count(s ImageState) int {
	if n := c.slot(s); n != nil {
		return *n
	}
	return 0
}

// Open is the number of images that are not well.
func (c Coverage) Open() int {
	n := 0
	for _, s := range ImageStates {
		if s.Open() {
			n += c.Count(s)
		}
	}
	return n
}

func (c *Coverage) slot(s ImageState) *int {
	switch s {
	case Patched:
		return &c.Patched
	case Unpatched:
		return &c.Unpatched
	case PendingImage:
		return &c.Pending
	case Busy:
		return &c.Busy
	case Blocked:
		return &c.Blocked
	case Drifted:
		return &c.Drifted
	case OtherBuild:
		return &c.OtherBuild
	case Fixed:
		return &c.Fixed
	case Failed:
		return &c.Failed
	case Torn:
		return &c.Torn
	}
	return nil
}

// Repository is where releases come from and how fresh what we know is.
type Repository struct {
	URL       string           `json:"url"`
	LastCheck Time             `json:"last_check"` // last one that succeeded
	Expires   Time             `json:"expires"`
	Error     *RepositoryError `json:"error"` // null when the last try succeeded
}

// RepositoryError is why the last try failed.
type RepositoryError struct {
	Code  string `json:"code"`
	Text  string `json:"text"`
	Since Time   `json:"since"`
}

// Next holds the next dates of the calendar; null where none is known.
type Next struct {
	Hotpatch Time `json:"hotpatch"`
	Baseline Time `json:"baseline"`
}

// Scope says who may read a text that the daemon writes about something. It
// does not travel. The zero value is for administrators only.
type Scope struct {
	Public bool // about the device, not about a process: for everyone
	OfUser bool // about a process of the user UID: for that user too
	UID    int
}

// Attention is something a person should know or do.
type Attention struct {
	Code     string `json:"code"`
	Severity string `json:"severity"`
	Since    Time   `json:"since"`
	Text     string `json:"text"`
	Remedy   string `json:"remedy"` // a Remedy, or a sentence on what to do
	Product  string `json:"product"`

	Scope Scope `json:"-"`
	// About is what it tells of, while its text may change: it stands since it first
	// told of that. "": the text tells.
	About string `json:"-"`
}

// Chapter is one thing that is not to stay as it is: what is so and since when,
// what the device does next by itself, and when it does or what it waits for.
// What somebody should do about it is in Attention, under the same code if there
// is one.
type Chapter struct {
	// Code is that of the Attention that tells of the same: state-damaged, policy,
	// held, guard, baseline-required, restart-required, waiting, expired, repository,
	// no-repository, or the state of images; or one of its own: ineligible, paused, halted,
	// hours, loading, canary, guard-window, baseline-proof, scan, poll.
	Code  string `json:"code"`
	What  string `json:"what"`
	Since Time   `json:"since"` // of What, over restarts of the daemon; null: not known
	Next  string `json:"next"`
	// At is when Next comes; null where that depends on WaitsFor alone. Where both
	// are set, the device tries at that time, and succeeds when WaitsFor allows it.
	At       Time   `json:"at"`
	WaitsFor string `json:"waits_for"` // one of the words below
	Product  string `json:"product"`

	Scope Scope `json:"-"`
}

// What a Chapter waits for.
const (
	WaitsForTime        = "time"          // and nothing else
	WaitsForRequirement = "requirement"   // one of the eligibility checks, to pass
	WaitsForRestart     = "restart"       // of the device
	WaitsForProcess     = "process"       // one that starts, or leaves the code it is in
	WaitsForEnd         = "end"           // of a process
	WaitsForApproval    = "approval"      // hotpatch install, or the policy's approve
	WaitsForOperator    = "operator"      // hotpatch resume, release-hold, …
	WaitsForPolicy      = "policy"        // its owner, to change it
	WaitsForPublisher   = "publisher"     // to sign, publish or roll out
	WaitsForNetwork     = "network"       // the way to the repository
	WaitsForConfig      = "configuration" // or clock, disk: of this device
)

// Device is the machine. ID is a hash, stable for one installation of the OS.
type Device struct {
	Name    string `json:"name"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	Build   string `json:"build"`
	Edition string `json:"edition"`
	ID      string `json:"id"`
}

// Backend is the memory writer in use. Freeze is one sentence on how it stops threads.
type Backend struct {
	Name   string `json:"name"`
	Freeze string `json:"freeze"`
}

// Hold is the operator's "not this release".
type Hold struct {
	ID      string   `json:"id"`
	Product string   `json:"product"`
	By      string   `json:"by"` // user name, or "policy"
	Since   Time     `json:"since"`
	Reason  string   `json:"reason"`
	CVEs    []string `json:"cves"` // open because of it
	// Decisive: without it this release would be the one in force. A hold on an
	// older release, or on one that would not come anyway, is not.
	Decisive bool `json:"decisive"`
}

// Eligibility is every check: wanted, found, where it was read, what to do.
type Eligibility struct {
	Header
	Eligible bool    `json:"eligible"`
	Checks   []Check `json:"checks"`
	Looked   Time    `json:"looked"` // when the device was looked at
	Again    Time    `json:"again"`  // when it will be; a change of the policy is judged at once
}

// Check is one of them.
type Check struct {
	ID     string `json:"id"`
	Title  string `json:"title"`
	Result Result `json:"result"`
	Waived bool   `json:"waived"`
	Wanted string `json:"wanted"`
	Found  string `json:"found"`
	Source string `json:"source"`
	Since  Time   `json:"since"` // since when the result is this, over restarts of the daemon
	Remedy string `json:"remedy"`
}
