package eligibility

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func yes() *bool { b := true; return &b }
func no() *bool  { b := false; return &b }

func known(v string) Fact { return Fact{Known: true, Value: v, Source: "here"} }

// The three devices on which every check passes or does not apply.
func client(arch string) Facts {
	f := Facts{
		OS: known(Windows11), Edition: known("Enterprise"), Version: known("26100.7092"), Arch: known(arch),
		Managed: known(Enrolled), Permission: known(Allowed), VBS: known(Running),
		Baseline: {Known: true, Value: "2026-10", Wanted: "2026-10", Source: "here"}, Rights: known(Granted),
	}
	f[CHPE] = known(Off)
	if arch == AMD64 {
		f[CHPE] = Fact{NotApplicable: true}
	}
	return f
}

func server() Facts {
	f := client(AMD64)
	f[OS], f[Edition], f[Version] = known(Server2025), known("ServerTurbine"), known("26100.32772")
	delete(f, Permission)
	return f
}

func linux() Facts {
	return Facts{OS: known(Linux), Version: known("6.1.0-26-amd64"), Arch: known(AMD64), Rights: known(Granted)}
}

var ours = Policy{Enrolled: yes(), AllowHotpatch: yes(), Source: "/etc/hotpatchd/policy.toml"}
var silent = Policy{Source: "/etc/hotpatchd/policy.toml"}

var devices = []struct {
	name    string
	profile Profile
	facts   func() Facts
	policy  Policy
}{
	{"client amd64", WindowsClient, func() Facts { return client(AMD64) }, silent},
	{"client arm64", WindowsClient, func() Facts { return client(ARM64) }, silent},
	{"server", WindowsServer, server, silent},
	{"linux", LinuxDevice, linux, ours},
}

func TestGoodDevicesAreEligible(t *testing.T) {
	for _, d := range devices {
		v := Judge(d.profile, d.facts(), d.policy)
		if !v.Eligible || v.Profile != d.profile {
			t.Errorf("%s: not eligible: %+v", d.name, v.Checks)
		}
		for i, c := range v.Checks {
			if c.ID != IDs()[i] {
				t.Errorf("%s: check %d is %s, want %s", d.name, i, c.ID, IDs()[i])
			}
			if c.Result != Pass && c.Result != NotApplicable {
				t.Errorf("%s: %s is %s", d.name, c.ID, c.Result)
			}
			complete(t, c)
		}
		if p := ProfileOf(d.facts()); p != d.profile {
			t.Errorf("%s: ProfileOf = %s", d.name, p)
		}
	}
}

// complete checks that a person could act on c.
func complete(t interface{ Errorf(string, ...any) }, c Check) {
	if c.Title == "" || c.Wanted == "" || c.Found == "" {
		t.Errorf("%s: title, wanted or found is empty: %+v", c.ID, c)
	}
	open := c.Result == Fail || c.Result == Unknown
	if open && c.Remedy == "" {
		t.Errorf("%s is %s without a remedy", c.ID, c.Result)
	}
	if !open && (c.Remedy != "" || c.Waived) {
		t.Errorf("%s is %s, waived %t, with the remedy %q", c.ID, c.Result, c.Waived, c.Remedy)
	}
}

// Each row changes one thing on a good device; exactly one check may change,
// unless the row names the others that read the same fact.
func TestOneChangeOneCheck(t *testing.T) {
	set := func(id ID, f Fact) func(Facts, *Policy) { return func(m Facts, _ *Policy) { m[id] = f } }
	gone := func(id ID) func(Facts, *Policy) { return func(m Facts, _ *Policy) { delete(m, id) } }
	pol := func(edit func(*Policy)) func(Facts, *Policy) { return func(_ Facts, p *Policy) { edit(p) } }
	refused := Fact{Source: "there", Problem: "access denied"}

	rows := []struct {
		name   string
		device string
		change func(Facts, *Policy)
		id     ID
		want   Result
		found  string // part of Found
		remedy string // part of Remedy
		also   []ID
	}{
		{"windows 10", "client amd64", set(OS, known(Windows10)), OS, Fail, "Windows 10", "Windows 11", nil},
		{"os unread", "client amd64", set(OS, refused), OS, Unknown, "access denied", "service", nil},
		{"os missing", "client amd64", gone(OS), OS, Unknown, "nothing was reported", "", nil},
		{"os does not apply", "client amd64", set(OS, Fact{NotApplicable: true}), OS, Unknown, "not to apply", "", nil},
		{"os empty", "client amd64", set(OS, Fact{Known: true}), OS, Unknown, "could not be read", "", nil},
		{"home", "client amd64", set(Edition, known("Core")), Edition, Fail, "Core", "Enterprise", nil},
		{"se", "client amd64", set(Edition, known("CloudEdition")), Edition, Fail, "Cloud", "Enterprise", nil},
		{"pro", "client amd64", set(Edition, known("Professional")), Edition, Unknown, "licence", "waive", nil},
		{"ltsc", "client amd64", set(Edition, known("EnterpriseS")), Edition, Unknown, "licence", "waive", nil},
		{"unheard-of edition", "client amd64", set(Edition, known("Zebra")), Edition, Unknown, "no rule", "vendor", nil},
		{"edition unread", "client amd64", set(Edition, refused), Edition, Unknown, "access denied", "EditionID", nil},
		{"23H2", "client amd64", set(Version, known("22631.4000")), Version, Fail, "22631", "24H2", nil},
		{"too few fixes, x64", "client amd64", set(Version, known("26100.2032")), Version, Fail, "2032", "cumulative", nil},
		{"too few fixes, arm64", "client arm64", set(Version, known("26100.4928")), Version, Fail, "4928", "cumulative", nil},
		{"odd build", "client amd64", set(Version, known("26100")), Version, Unknown, "build.revision", "UBR", nil},
		{"negative revision", "client amd64", set(Version, known("26100.-1")), Version, Unknown, "build.revision", "UBR", nil},
		{"version unread", "client amd64", set(Version, refused), Version, Unknown, "access denied", "UBR", nil},
		{"x86", "client amd64", set(Arch, known("386")), Arch, Fail, "386", "64-bit", nil},
		{"arch unread, x64", "client amd64", set(Arch, refused), Arch, Unknown, "access denied", "IsWow64Process2", nil},
		{"arch unread, arm64", "client arm64", set(Arch, refused), Arch, Unknown, "access denied", "IsWow64Process2", nil},
		{"not in Intune", "client amd64", set(Managed, known(NotEnrolled)), Managed, Fail, "not enrolled", "Intune", nil},
		{"enrolment unread", "client amd64", set(Managed, refused), Managed, Unknown, "access denied", "enrolled = true", nil},
		{"owner says not enrolled", "client amd64", pol(func(p *Policy) { p.Enrolled = no() }), Managed, Fail, "enrolled = false", "policy.toml", nil},
		{"owner forbids", "client amd64", pol(func(p *Policy) { p.AllowHotpatch = no() }), Permission, Fail, "= false", "policy.toml", nil},
		{"policy says no", "client amd64", set(Permission, known(NotAllowed)), Permission, Fail, "not allowed", "AllowRebootlessUpdates", nil},
		{"policy unread", "client amd64", set(Permission, refused), Permission, Unknown, "access denied", "PolicyManager", nil},
		{"vbs configured", "client amd64", set(VBS, known(Configured)), VBS, Fail, "not running", "firmware", nil},
		{"vbs off", "client amd64", set(VBS, known(Off)), VBS, Fail, "off", "EnableVirtualization", nil},
		{"vbs unread", "client amd64", set(VBS, refused), VBS, Unknown, "access denied", "msinfo32", nil},
		{"chpe on", "client arm64", set(CHPE, Fact{Known: true, Value: On, Text: "value absent"}), CHPE, Fail, "value absent", "HotPatchRestrictions", nil},
		{"chpe unread", "client arm64", set(CHPE, refused), CHPE, Unknown, "access denied", "Memory Management", nil},
		{"old baseline", "client amd64", set(Baseline, Fact{Known: true, Value: "2026-07", Wanted: "2026-10"}), Baseline, Fail, "2026-07", "2026-10", nil},
		{"baseline of last year", "client amd64", set(Baseline, Fact{Known: true, Value: "2025-12", Wanted: "2026-01"}), Baseline, Fail, "2025-12", "2026-01", nil},
		{"baseline unread", "client amd64", set(Baseline, Fact{Wanted: "2026-10", Problem: "no list"}), Baseline, Unknown, "no list", "hotpatch check", nil},
		{"baseline in force unknown", "client amd64", set(Baseline, known("2026-10")), Baseline, Unknown, "not known", "hotpatch check", nil},
		{"baseline is no month", "client amd64", set(Baseline, Fact{Known: true, Value: "2026-13", Wanted: "2026-10"}), Baseline, Unknown, "not a month", "YYYY-MM", nil},
		{"no rights", "client amd64", set(Rights, Fact{Known: true, Value: Denied, Text: "SeDebugPrivilege is missing"}), Rights, Fail, "SeDebug", "SYSTEM", nil},
		{"rights unread", "client amd64", gone(Rights), Rights, Unknown, "nothing", "log", nil},

		{"server 2019", "server", set(OS, known(Server2019)), OS, Fail, "2019", "2025", nil},
		{"server core edition", "server", set(Edition, known("ServerWeb")), Edition, Fail, "ServerWeb", "Azure Edition", nil},
		{"server build between", "server", set(Version, known("25398.1")), Version, Fail, "25398", "2025", nil},
		{"server not enrolled", "server", set(Managed, known(NotEnrolled)), Managed, Fail, "not enrolled", "Arc", nil},
		{"server engine off", "server", set(Permission, known(NotAllowed)), Permission, Fail, "not allowed", "engine", nil},
		{"server on arm64", "server", set(Arch, known(ARM64)), Arch, Unknown, "arm64", "waive", nil},
		{"server vbs off", "server", set(VBS, known(Off)), VBS, Fail, "off", "waive", nil},

		{"linux elsewhere", "linux", set(OS, known(Windows11)), OS, Fail, "Windows 11", "profile", nil},
		{"linux on arm64", "linux", set(Arch, known(ARM64)), Arch, Unknown, "arm64", "waive", nil},
		{"linux on riscv", "linux", set(Arch, known("riscv64")), Arch, Fail, "riscv64", "x86", nil},
		{"old kernel", "linux", set(Version, known("4.16.18")), Version, Fail, "4.16", "4.17", nil},
		{"odd kernel", "linux", set(Version, known("next")), Version, Unknown, "major.minor", "uname", nil},
		{"no trace", "linux", set(Rights, Fact{Known: true, Value: Denied, Text: "kernel.yama.ptrace_scope = 3"}), Rights, Fail, "ptrace_scope", "CAP_SYS_PTRACE", nil},
		{"no policy file", "linux", pol(func(p *Policy) { *p = Policy{Absent: true, Source: p.Source} }), Managed, Fail, "no policy file", "hotpatchd-policy/1", []ID{Permission}},
		{"policy says little", "linux", pol(func(p *Policy) { p.AllowHotpatch = nil }), Permission, Fail, "not set", "allow_hotpatch = true", nil},
		{"policy broken", "linux", pol(func(p *Policy) { *p = Policy{Problem: "line 3", Source: p.Source} }), Managed, Unknown, "line 3", "check-config", []ID{Permission}},
		{"not enrolled by file", "linux", pol(func(p *Policy) { p.Enrolled = no() }), Managed, Fail, "enrolled = false", "enrolled = true", nil},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			for _, d := range devices {
				if d.name != r.device {
					continue
				}
				before := Judge(d.profile, d.facts(), d.policy)
				f, p := d.facts(), d.policy
				r.change(f, &p)
				after := Judge(d.profile, f, p)
				if after.Eligible {
					t.Error("still eligible")
				}
				for i, c := range after.Checks {
					complete(t, c)
					may := c.ID == r.id
					for _, id := range r.also {
						may = may || c.ID == id
					}
					if !may && c.Result != before.Checks[i].Result {
						t.Errorf("%s changed too, to %s: %s", c.ID, c.Result, c.Found)
					}
					if c.ID != r.id {
						continue
					}
					if c.Result != r.want || !strings.Contains(c.Found, r.found) || !strings.Contains(c.Remedy, r.remedy) {
						t.Errorf("got %s, found %q, remedy %q", c.Result, c.Found, c.Remedy)
					}
				}
				return
			}
			t.Fatalf("no device %q", r.device)
		})
	}
}

func TestWhatPassesToo(t *testing.T) {
	get := func(p Profile, f Facts, pol Policy, id ID) Check {
		for _, c := range Judge(p, f, pol).Checks {
			if c.ID == id {
				return c
			}
		}
		return Check{}
	}
	with := func(f Facts, id ID, v string) Facts { f[id] = known(v); return f }
	rows := []struct {
		name string
		c    Check
		want Result
	}{
		{"first x64 revision", get(WindowsClient, with(client(AMD64), Version, "26100.2033"), silent, Version), Pass},
		{"first arm64 revision", get(WindowsClient, with(client(ARM64), Version, "26100.4929"), silent, Version), Pass},
		{"25H2", get(WindowsClient, with(client(ARM64), Version, "26200.1"), silent, Version), Pass},
		{"education, other case", get(WindowsClient, with(client(AMD64), Edition, "eDUCATION"), silent, Edition), Pass},
		{"chpe does not matter on amd64", get(WindowsClient, with(client(AMD64), CHPE, On), silent, CHPE), NotApplicable},
		{"vbs of 2022", get(WindowsServer, with(with(server(), OS, Server2022), VBS, Off), silent, VBS), NotApplicable},
		{"datacenter 2025", get(WindowsServer, with(server(), Edition, "ServerDatacenter"), silent, Edition), Pass},
		{"datacenter 2022", get(WindowsServer, with(with(server(), Edition, "ServerDatacenter"), OS, Server2022), silent, Edition), Fail},
		{"owner's word before the registry", get(WindowsClient, with(client(AMD64), Managed, NotEnrolled), ours, Managed), Pass},
		{"owner's permission before the registry", get(WindowsClient, with(client(AMD64), Permission, NotAllowed), ours, Permission), Pass},
		{"newer baseline", get(WindowsClient, Facts{Baseline: {Known: true, Value: "2026-10", Wanted: "2026-07"}}, silent, Baseline), Pass},
		{"first kernel", get(LinuxDevice, with(linux(), Version, "4.17-rc1"), ours, Version), Pass},
		{"low revision, arch unknown", get(WindowsClient, Facts{Version: known("26100.3000")}, silent, Version), Unknown},
		{"datacenter, os unknown", get(WindowsServer, Facts{Edition: known("ServerDatacenter")}, silent, Edition), Unknown},
	}
	for _, r := range rows {
		if r.c.Result != r.want {
			t.Errorf("%s: %s, found %q", r.name, r.c.Result, r.c.Found)
		}
	}
}

func TestWaivingNeverHides(t *testing.T) {
	f := client(AMD64)
	f[VBS] = known(Configured)
	delete(f, Baseline)
	p := silent
	p.Waive = []string{"vbs", "os", "nonsense"}
	v := Judge(WindowsClient, f, p)
	if v.Eligible {
		t.Error("eligible although the baseline is unknown and not waived")
	}
	p.Waive = append(p.Waive, "baseline")
	v = Judge(WindowsClient, f, p)
	if !v.Eligible {
		t.Error("not eligible although both are waived")
	}
	for _, c := range v.Checks {
		want := map[ID]Result{VBS: Fail, Baseline: Unknown}[c.ID]
		if want != "" && (!c.Waived || c.Result != want || c.Remedy == "") {
			t.Errorf("%s: waived %t, result %s, remedy %q", c.ID, c.Waived, c.Result, c.Remedy)
		}
		if want == "" && c.Waived {
			t.Errorf("%s passes and is shown as waived", c.ID)
		}
	}
}

func TestNothingKnownIsNotEligible(t *testing.T) {
	for _, p := range []Profile{WindowsClient, WindowsServer, LinuxDevice, "", "beos"} {
		v := Judge(p, nil, Policy{})
		if v.Eligible || len(v.Checks) != len(ids) {
			t.Errorf("%q: eligible %t, %d checks", p, v.Eligible, len(v.Checks))
		}
		for _, c := range v.Checks {
			complete(t, c)
			if c.Result == Pass {
				t.Errorf("%q: %s passes with nothing known", p, c.ID)
			}
		}
	}
	if v := Judge("beos", linux(), ours); v.Eligible || v.Checks[0].Result != Fail {
		t.Errorf("unknown profile: %+v", v.Checks[0])
	}
}

// readers are the checks that look at facts besides their own.
var readers = map[ID][]ID{OS: {Edition, VBS}, Arch: {Version, CHPE}}

// Whatever the facts are: every check is complete, eligible means that nothing
// is open, and changing one fact changes only the checks that read it.
func TestAnyFacts(t *testing.T) {
	values := []string{"", Linux, Windows10, Windows11, Server2022, Server2025, AMD64, ARM64, "386", Enrolled, NotEnrolled, Allowed,
		NotAllowed, Running, Configured, Off, On, Granted, Denied, "Enterprise", "Core", "Professional", "ServerTurbine",
		"ServerDatacenter", "26100.2033", "26100.4000", "26200.1", "20348.1", "6.1", "4.9", "x.y", "2026-10", "2026-07"}
	fact := rapid.Custom(func(t *rapid.T) Fact {
		return Fact{
			Known: rapid.Bool().Draw(t, "known"), Value: rapid.SampledFrom(values).Draw(t, "value"),
			Wanted:        rapid.SampledFrom([]string{"", "2026-07", "2026-10", "soon"}).Draw(t, "wanted"),
			NotApplicable: rapid.IntRange(0, 9).Draw(t, "na") == 0,
		}
	})
	word := rapid.SampledFrom([]*bool{nil, yes(), no()})
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom([]Profile{WindowsClient, WindowsServer, LinuxDevice}).Draw(t, "profile")
		f := Facts{}
		for _, id := range ids {
			f[id] = fact.Draw(t, string(id))
		}
		pol := Policy{Enrolled: word.Draw(t, "enrolled"), AllowHotpatch: word.Draw(t, "allow"), Absent: rapid.Bool().Draw(t, "absent")}
		for _, id := range ids {
			if rapid.IntRange(0, 4).Draw(t, "waive") == 0 {
				pol.Waive = append(pol.Waive, string(id))
			}
		}
		before := Judge(p, f, pol)
		open := 0
		for _, c := range before.Checks {
			complete(t, c)
			if c.Open() {
				open++
			}
			if own := f[c.ID]; c.Result == Pass && !own.Known && pol.Enrolled == nil && pol.AllowHotpatch == nil {
				t.Errorf("%s passes without being known", c.ID)
			}
		}
		if before.Eligible != (open == 0) {
			t.Errorf("eligible %t with %d open", before.Eligible, open)
		}
		id := rapid.SampledFrom(ids[:]).Draw(t, "changed")
		f[id] = fact.Draw(t, "to")
		for i, c := range Judge(p, f, pol).Checks {
			reads := c.ID == id
			for _, r := range readers[id] {
				reads = reads || c.ID == r
			}
			if !reads && c != before.Checks[i] {
				t.Errorf("%s changed with %s", c.ID, id)
			}
		}
	})
}
