package eligibility

import (
	"fmt"
	"strconv"
	"strings"
)

// judge is one judgement under way.
type judge struct {
	profile Profile
	facts   Facts
	policy  Policy
}

func (j judge) check(id ID) Check {
	switch id {
	case OS:
		return j.os()
	case Edition:
		return j.edition()
	case Version:
		return j.version()
	case Arch:
		return j.arch()
	case Managed:
		return j.managed()
	case Permission:
		return j.permission()
	case VBS:
		return j.vbs()
	case CHPE:
		return j.chpe()
	case Baseline:
		return j.baseline()
	}
	return j.rights()
}

// titles are what each check asks, as a statement that should be true.
var titles = map[ID]string{
	OS:         "The operating system is one that hotpatching knows",
	Edition:    "The edition takes part in hotpatching",
	Version:    "The version is recent enough",
	Arch:       "The processor architecture is supported",
	Managed:    "The device is enrolled",
	Permission: "Hotpatching is allowed",
	VBS:        "Virtualization-based security is running",
	CHPE:       "CHPE binaries are switched off (ARM64 only)",
	Baseline:   "The latest baseline is installed",
	Rights:     "The daemon may reach into other processes",
}

// begin fills in what all checks share. ok is false when the fact is not known
// or does not apply; the check is then complete. readable says how the fact can
// be made readable.
func (j judge) begin(id ID, wanted, readable string) (c Check, f Fact, ok bool) {
	f = j.facts[id]
	c = Check{ID: id, Title: titles[id], Wanted: wanted, Source: f.Source, Found: f.Text}
	if c.Found == "" {
		c.Found = f.Value
	}
	switch {
	case f.NotApplicable && id == CHPE:
		c.Result = NotApplicable
		if c.Found == "" {
			c.Found = "does not apply to this device"
		}
		return c, f, false
	case f.NotApplicable:
		// A question that the profile asks cannot be answered with "does not
		// apply": that would be a way around it.
		return c.unknown("said not to apply, but these rules ask for it", readable), f, false
	case !f.Known || f.Value == "":
		problem := f.Problem
		if problem == "" {
			problem = "nothing was reported"
		}
		return c.unknown("could not be read: "+problem, readable), f, false
	}
	return c, f, true
}

func (c Check) pass() Check { c.Result = Pass; return c }

func (c Check) fail(remedy string) Check { c.Result, c.Remedy = Fail, remedy; return c }

func (c Check) unknown(found, remedy string) Check {
	c.Result, c.Found, c.Remedy = Unknown, found, remedy
	return c
}

// inapplicable is the whole check when the profile has no such rule.
func inapplicable(id ID, why string) Check {
	return Check{ID: id, Title: titles[id], Wanted: "nothing", Found: why, Result: NotApplicable}
}

// waivable adds to a remedy how the owner can do without.
func waivable(id ID, remedy string) string {
	return fmt.Sprintf("%s; a policy may waive it for releases that do not need it: waive = [%q]", remedy, string(id))
}

func (j judge) os() Check {
	wanted := map[Profile]string{
		WindowsClient: Windows11,
		WindowsServer: Server2022 + " or " + Server2025,
		LinuxDevice:   Linux,
	}[j.profile]
	if wanted == "" {
		wanted = "a profile that this daemon knows, not " + strconv.Quote(string(j.profile))
	}
	c, f, ok := j.begin(OS, wanted, "run the daemon on the device itself, as a service with full rights")
	if !ok {
		return c
	}
	for _, name := range strings.Split(wanted, " or ") {
		if f.Value == name {
			return c.pass()
		}
	}
	return c.fail("use " + wanted + "; if the device is judged by the wrong rules, set [eligibility] profile to \"auto\"")
}

// Editions of the Windows client, by EditionID in lower case. Microsoft lists
// licences, not editions: those that come with an Enterprise or Education
// licence pass, Home and SE cannot be enrolled; for the rest the licence, which
// the device does not know, decides.
var clientEditions = map[string]Result{
	"enterprise":               Pass,
	"enterprisen":              Pass,
	"enterpriseeval":           Unknown,
	"enterprises":              Unknown, // LTSC: not named by Microsoft either way
	"enterprisesn":             Unknown,
	"serverrdsh":               Pass, // Enterprise multi-session
	"education":                Pass,
	"educationn":               Pass,
	"iotenterprise":            Unknown,
	"iotenterprises":           Unknown,
	"professional":             Unknown, // Business Premium leaves a device on Pro
	"professionaln":            Unknown,
	"professionalworkstation":  Unknown,
	"professionalworkstationn": Unknown,
	"professionaleducation":    Unknown,
	"professionaleducationn":   Unknown,
	"core":                     Fail, // Home
	"coren":                    Fail,
	"coresinglelanguage":       Fail,
	"corecountryspecific":      Fail,
	"cloudedition":             Fail, // SE
	"cloudeditionn":            Fail,
}

// Editions of the Windows server. Azure Edition has hotpatching built in from
// 2022 on; Standard and Datacenter get it from 2025 on, through Azure Arc.
var azureEditions = map[string]bool{"serverturbine": true, "serverturbinecor": true, "serverturbineeval": true}
var arcEditions = map[string]bool{
	"serverstandard": true, "serverstandardcor": true, "serverdatacenter": true, "serverdatacentercor": true,
}

func (j judge) edition() Check {
	const readable = `read EditionID under HKLM\SOFTWARE\Microsoft\Windows NT\CurrentVersion by hand (winver shows it); the key must be readable by the service`
	switch j.profile {
	case WindowsClient:
		c, f, ok := j.begin(Edition, "Enterprise or Education", readable)
		if !ok {
			return c
		}
		result, listed := clientEditions[strings.ToLower(f.Value)]
		switch {
		case result == Pass:
			return c.pass()
		case result == Fail:
			return c.fail("move the device to Enterprise or Education: this edition cannot be enrolled")
		case !listed:
			return c.unknown(c.Found+", an edition that this daemon has no rule for", waivable(Edition, "ask the vendor whether it takes part"))
		}
		return c.unknown(c.Found+", where the licence decides and the device cannot know it", waivable(Edition, "move the device to Enterprise or Education"))
	case WindowsServer:
		c, f, ok := j.begin(Edition, "Datacenter: Azure Edition, or from 2025 on Standard or Datacenter", readable)
		if !ok {
			return c
		}
		name := strings.ToLower(f.Value)
		switch {
		case azureEditions[name]:
			return c.pass()
		case !arcEditions[name]:
			return c.fail("move the server to Datacenter: Azure Edition, or to Standard or Datacenter of " + Server2025)
		case j.facts[OS].Value == Server2025:
			return c.pass()
		case !j.facts[OS].Known:
			return c.unknown(c.Found+", which is enough on "+Server2025+" only", "make the operating system's name readable")
		}
		return c.fail("move the server to Datacenter: Azure Edition, or to " + Server2025)
	}
	return inapplicable(Edition, "any distribution will do")
}

// Builds from which hotpatching is known to work.
const (
	client24H2  = 26100 // later client builds (26200 is 25H2) have it from their first revision
	clientAMD64 = 2033  // least revision of 26100 on x64
	clientARM64 = 4929  // and on ARM64
	server2022  = 20348
	server2025  = 26100
	linuxMajor  = 4 // 4.17 is the first kernel with MAP_FIXED_NOREPLACE: memory exactly there, or an error
	linuxMinor  = 17
)

func (j judge) version() Check {
	const readable = `read CurrentBuild and UBR under HKLM\SOFTWARE\Microsoft\Windows NT\CurrentVersion by hand (winver shows them); the key must be readable by the service`
	switch j.profile {
	case WindowsClient:
		arch := j.facts[Arch]
		wanted := fmt.Sprintf("%d.%d (x64) or %d.%d (ARM64), or later", client24H2, clientAMD64, client24H2, clientARM64)
		low, high := clientAMD64, clientARM64
		switch arch.Value {
		case AMD64:
			wanted, high = fmt.Sprintf("%d.%d or later", client24H2, clientAMD64), clientAMD64
		case ARM64:
			wanted, low = fmt.Sprintf("%d.%d or later", client24H2, clientARM64), clientARM64
		}
		c, f, ok := j.begin(Version, wanted, readable)
		if !ok {
			return c
		}
		build, revision, err := windowsBuild(f.Value)
		switch {
		case err != nil:
			return c.unknown(c.Found+", "+err.Error(), readable)
		case build > client24H2 || build == client24H2 && revision >= high:
			return c.pass()
		case build < client24H2:
			return c.fail("upgrade to Windows 11 24H2 or later")
		case revision < low:
			return c.fail("install the latest cumulative update, with a restart")
		}
		return c.unknown(c.Found+", enough on x64 but not on ARM64", "make the processor architecture readable, or install the latest cumulative update")
	case WindowsServer:
		c, f, ok := j.begin(Version, fmt.Sprintf("build %d (2022) or %d (2025) or later", server2022, server2025), readable)
		if !ok {
			return c
		}
		build, _, err := windowsBuild(f.Value)
		switch {
		case err != nil:
			return c.unknown(c.Found+", "+err.Error(), readable)
		case build == server2022 || build >= server2025:
			return c.pass()
		}
		return c.fail("upgrade to " + Server2022 + " Datacenter: Azure Edition or to " + Server2025)
	}
	c, f, ok := j.begin(Version, fmt.Sprintf("kernel %d.%d or later", linuxMajor, linuxMinor), "uname -r must work where the daemon runs")
	if !ok {
		return c
	}
	major, minor, err := kernelRelease(f.Value)
	switch {
	case err != nil:
		return c.unknown(c.Found+", "+err.Error(), "uname -r must begin with two numbers, as in 6.1")
	case major > linuxMajor || major == linuxMajor && minor >= linuxMinor:
		return c.pass()
	}
	return c.fail(fmt.Sprintf("boot a kernel from %d.%d on", linuxMajor, linuxMinor))
}

// windowsBuild splits "26100.7092".
func windowsBuild(s string) (build, revision int, err error) {
	b, r, ok := strings.Cut(s, ".")
	build, err1 := strconv.Atoi(b)
	revision, err2 := strconv.Atoi(r)
	if !ok || err1 != nil || err2 != nil || build < 0 || revision < 0 {
		return 0, 0, fmt.Errorf("which is not build.revision")
	}
	return build, revision, nil
}

// kernelRelease takes major and minor from "6.18.44-fc".
func kernelRelease(s string) (major, minor int, err error) {
	a, rest, ok := strings.Cut(s, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(rest[:end])
	if !ok || err1 != nil || err2 != nil || major < 0 {
		return 0, 0, fmt.Errorf("which is not major.minor")
	}
	return major, minor, nil
}

func (j judge) arch() Check {
	if j.profile == LinuxDevice {
		c, f, ok := j.begin(Arch, AMD64, "uname -m must work where the daemon runs")
		switch {
		case !ok:
			return c
		case f.Value == AMD64:
			return c.pass()
		case f.Value == ARM64:
			return c.unknown(c.Found+", where this daemon has not been proved on real devices", waivable(Arch, "try it on a device that may be lost"))
		}
		return c.fail("only 64-bit x86 is supported on Linux")
	}
	c, f, ok := j.begin(Arch, AMD64+" or "+ARM64, "IsWow64Process2 must answer; a daemon of the machine's own architecture helps")
	switch {
	case !ok:
		return c
	case f.Value == AMD64 || f.Value == ARM64 && j.profile == WindowsClient:
		return c.pass()
	case f.Value == ARM64:
		return c.unknown(c.Found+", of which no hotpatching server is known", waivable(Arch, "use an x64 server"))
	}
	return c.fail("a 64-bit operating system is needed")
}
