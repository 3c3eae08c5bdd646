// Package eligibility judges whether a device may be given fixes, fact by fact.
//
// It is pure: facts go in (package probe collects them, or a test writes them
// down), a Verdict comes out. There is one check for each of ten questions, in
// a fixed order, each with what was wanted, what was found, where it was read
// and what to do. A fact that could not be read makes its check unknown, and
// unknown is never taken for a pass. The owner's policy may waive a check; a
// waived check keeps its true result.
//
// The rules of the two Windows profiles are those Microsoft publishes for its
// own hotpatch updates (learn.microsoft.com, Windows Autopatch, "Hotpatch
// updates", and the Windows release health pages), as far as a device can know
// them: the licence is known to Microsoft's cloud only. Releases of hotpatchd do
// not need all of them, which is what waiving is for.
package eligibility

// ID names a check and the fact it judges. The words are a contract: policies
// name them in "waive", machines read them from JSON.
type ID string

// The checks, in the order in which they are judged and shown.
const (
	OS         ID = "os"
	Edition    ID = "edition"
	Version    ID = "version"
	Arch       ID = "arch"
	Managed    ID = "managed"
	Permission ID = "policy" // that hotpatching is allowed; Policy is the owner's whole word
	VBS        ID = "vbs"
	CHPE       ID = "chpe"
	Baseline   ID = "baseline"
	Rights     ID = "rights"
)

var ids = [...]ID{OS, Edition, Version, Arch, Managed, Permission, VBS, CHPE, Baseline, Rights}

// IDs are all checks in their order.
func IDs() []ID { return append([]ID(nil), ids[:]...) }

// Known tells whether name is the id of a check.
func Known(name string) bool {
	for _, id := range ids {
		if string(id) == name {
			return true
		}
	}
	return false
}

// The values that facts take, besides names and numbers.
const (
	Linux       = "Linux" // OS
	Windows10   = "Windows 10"
	Windows11   = "Windows 11"
	Server2019  = "Windows Server 2019"
	Server2022  = "Windows Server 2022"
	Server2025  = "Windows Server 2025"
	AMD64       = "amd64" // Arch, of the machine, not of the program that asks
	ARM64       = "arm64"
	Enrolled    = "enrolled" // Managed
	NotEnrolled = "not enrolled"
	Allowed     = "allowed" // Permission
	NotAllowed  = "not allowed"
	Running     = "running" // VBS
	Configured  = "configured, not running"
	Off         = "off"     // VBS, CHPE
	On          = "on"      // CHPE
	Granted     = "granted" // Rights
	Denied      = "denied"
)

// Fact is one thing known, or not known, about the device.
type Fact struct {
	Known bool
	// Value is what the rules compare: one of the values above; for Edition the
	// EditionID ("Enterprise"); for Version "build.revision" ("26100.7092"), on
	// Linux the kernel release; for Baseline the month installed ("2026-10").
	Value string
	// Text is how the value is said to people, where the bare value says too
	// little: "24H2, 26100.7092", "enrolled, MS DM Server". Empty: Value.
	Text string
	// Source is where it was read, or where it would have been.
	Source string
	// Problem says why it is not known.
	Problem string
	// Wanted is used by Baseline only: the month of the baseline in force.
	Wanted string
	// NotApplicable: the question does not arise on this device. Believed for
	// CHPE only; elsewhere it makes the check unknown.
	NotApplicable bool
}

// Facts are keyed by the check that judges them. A missing one is not known.
type Facts map[ID]Fact

// Profile selects the rules.
type Profile string

const (
	WindowsClient Profile = "windows-client"
	WindowsServer Profile = "windows-server"
	LinuxDevice   Profile = "linux"
)

// Policy is what the owner's policy says about eligibility. Its word on
// enrolment and permission comes before what device management left in the
// registry; nil means that it says nothing, and then the registry decides
// (Windows) or the device is not enrolled (Linux).
type Policy struct {
	Enrolled      *bool
	AllowHotpatch *bool
	Waive         []string // ids of checks; unknown ones waive nothing
	Source        string   // the policy file's path
	Absent        bool     // there is no such file: a word of its own, "not enrolled"
	Problem       string   // why it could not be read; what it would have said is unknown
}

// Result is the outcome of one check.
type Result string

const (
	Pass          Result = "pass"
	Fail          Result = "fail"
	Unknown       Result = "unknown"
	NotApplicable Result = "not-applicable"
)

// Check is one question answered. Wanted and Found are never empty; Remedy is
// never empty when the result is fail or unknown, and empty otherwise; it may
// have several lines, to be copied as they are.
type Check struct {
	ID     ID
	Title  string
	Result Result
	Waived bool // by policy; Result stays what it is
	Wanted string
	Found  string
	Source string
	Remedy string
}

// Open tells whether this check stands in the way.
func (c Check) Open() bool { return !c.Waived && (c.Result == Fail || c.Result == Unknown) }

// Verdict is the judgement on a device.
type Verdict struct {
	Profile  Profile
	Eligible bool // no check is open
	Checks   []Check
}

// Judge applies the rules of p to f. It always returns the ten checks in order.
// An unknown profile is judged by the rules for Linux, where OS then fails.
func Judge(p Profile, f Facts, pol Policy) Verdict {
	v := Verdict{Profile: p, Eligible: true}
	j := judge{profile: p, facts: f, policy: pol}
	for _, id := range ids {
		c := j.check(id)
		for _, w := range pol.Waive {
			// Waiving what passes would say more than is true.
			if w == string(id) && (c.Result == Fail || c.Result == Unknown) {
				c.Waived = true
			}
		}
		if c.Open() {
			v.Eligible = false
		}
		v.Checks = append(v.Checks, c)
	}
	return v
}

// ProfileOf tells by which rules a device with these facts is judged. Without a
// known operating system it answers LinuxDevice, where the check "os" is unknown.
func ProfileOf(f Facts) Profile {
	switch f[OS].Value {
	case Windows10, Windows11:
		return WindowsClient
	case Server2019, Server2022, Server2025:
		return WindowsServer
	}
	return LinuxDevice
}
