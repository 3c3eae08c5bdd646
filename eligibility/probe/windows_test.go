package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"hotpatchd/eligibility"
)

// memory is a hive by path and name: a string, a number, or an error in place of either.
type memory map[string]any

func (m memory) get(key, name string) (any, error) {
	v, ok := m[key+"|"+name]
	if !ok {
		return nil, fmt.Errorf(`value %s in HKLM\%s: %w`, name, key, fs.ErrNotExist)
	}
	if err, is := v.(error); is {
		return nil, err
	}
	return v, nil
}

func (m memory) Text(key, name string) (string, error) {
	v, err := m.get(key, name)
	if err != nil {
		return "", err
	}
	s, ok := v.(string)
	if !ok {
		return "", fmt.Errorf(`HKLM\%s, %s is REG_DWORD, not REG_SZ`, key, name)
	}
	return s, nil
}

func (m memory) Number(key, name string) (uint64, error) {
	v, err := m.get(key, name)
	if err != nil {
		return 0, err
	}
	n, ok := v.(int)
	if !ok {
		return 0, fmt.Errorf(`HKLM\%s, %s is REG_SZ, not REG_DWORD`, key, name)
	}
	return uint64(n), nil
}

func (m memory) Keys(key string) ([]string, error) {
	var names []string
	for k := range m {
		if rest, ok := strings.CutPrefix(k, key+`\`); ok {
			name, _, _ := strings.Cut(rest, "|")
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	if v, is := m[key+"|"].(error); is {
		return nil, v
	}
	if len(names) == 0 {
		return nil, fmt.Errorf(`key HKLM\%s: %w`, key, fs.ErrNotExist)
	}
	slices.Sort(names)
	return names, nil
}

// answers plays the calls.
type answers struct {
	version                                                  osVersion
	machine                                                  uint16
	isolated                                                 byte
	engine                                                   bool
	token                                                    token
	versionErr, machineErr, isolatedErr, engineErr, tokenErr error
}

func (a *answers) Version() (osVersion, error) { return a.version, a.versionErr }
func (a *answers) Machine() (uint16, error)    { return a.machine, a.machineErr }
func (a *answers) Isolated() (byte, error)     { return a.isolated, a.isolatedErr }
func (a *answers) Engine() (bool, error)       { return a.engine, a.engineErr }
func (a *answers) Token() (token, error)       { return a.token, a.tokenErr }

const (
	enrolment = keyEnrolments + `\12345678-0000-0000-0000-000000000001`
	unmanaged = keyEnrolments + `\12345678-0000-0000-0000-000000000000`
)

// enterprise is what a managed Windows 11 Enterprise 24H2 device has in its registry.
func enterprise() memory {
	return memory{
		keyVersion + "|EditionID":                       "Enterprise",
		keyVersion + "|CurrentBuildNumber":              "26100",
		keyVersion + "|UBR":                             7092,
		keyVersion + "|DisplayVersion":                  "24H2",
		keyVersion + "|InstallationType":                "Client",
		keyVersion + "|ProductName":                     "Windows 10 Enterprise", // as on the real thing
		keyUpdate + "|AllowRebootlessUpdates":           1,
		keyGuard + "|EnableVirtualizationBasedSecurity": 1,
		keyMemory + "|HotPatchTableSize":                4096,
		keyMemory + "|HotPatchRestrictions":             1,
		unmanaged + "|EnrollmentState":                  1,
		enrolment + "|ProviderID":                       "MS DM Server",
		enrolment + "|EnrollmentState":                  1,
		enrolment + "|EnrollmentType":                   6,
		keyMachine + "|MachineGuid":                     "01234567-89ab-cdef-0011-223344556677",
	}
}

func running() *answers {
	return &answers{version: osVersion{10, 0, 26100, false}, machine: machineAMD64, isolated: secureKernel,
		engine: true, token: token{`NT AUTHORITY\SYSTEM`, true, true}}
}

func granted(context.Context) (string, error) { return "all processes", nil }

func TestWindowsDevice(t *testing.T) {
	d := device{enterprise(), running()}
	f := d.collect(t.Context(), granted)
	for id, want := range map[eligibility.ID]string{
		eligibility.OS: "Windows 11", eligibility.Edition: "Enterprise", eligibility.Version: "26100.7092", eligibility.Arch: "amd64",
		eligibility.Managed: "enrolled", eligibility.Permission: "allowed", eligibility.VBS: "running", eligibility.Rights: "granted",
	} {
		if !f[id].Known || f[id].Value != want || f[id].Source == "" {
			t.Errorf("%s: %+v, want %s", id, f[id], want)
		}
	}
	if got := f[eligibility.Version].Text; got != "24H2, 26100.7092" {
		t.Errorf("the version is said as %q", got)
	}
	if !f[eligibility.CHPE].NotApplicable || f[eligibility.Baseline].Known {
		t.Errorf("chpe %+v, baseline %+v", f[eligibility.CHPE], f[eligibility.Baseline])
	}
	v := eligibility.Judge(eligibility.ProfileOf(f), f, eligibility.Policy{Waive: []string{"baseline"}})
	if !v.Eligible || v.Profile != eligibility.WindowsClient {
		t.Errorf("%+v", v)
	}
	id, err := d.deviceID()
	if err != nil || id != "605f0c9ff7940f83592c23f86a921a632b0040cb4d0e4fc860ac0f475214844f" {
		t.Errorf("%s, %v", id, err)
	}
}

// TestOneFactChanged changes one fact at a time and expects its check, and no
// other, to say so and why. An error is never a pass.
func TestOneFactChanged(t *testing.T) {
	denied := errors.New("access is denied")
	gone := func(keys ...string) func(memory, *answers) {
		return func(m memory, _ *answers) {
			for _, k := range keys {
				delete(m, k)
			}
		}
	}
	set := func(k string, v any) func(memory, *answers) { return func(m memory, _ *answers) { m[k] = v } }
	call := func(fn func(*answers)) func(memory, *answers) { return func(_ memory, a *answers) { fn(a) } }
	for _, c := range []struct {
		name   string
		change func(memory, *answers)
		id     eligibility.ID
		want   eligibility.Result
		found  string // a part
	}{
		{"no edition", gone(keyVersion + "|EditionID"), eligibility.Edition, eligibility.Unknown, "EditionID"},
		{"edition empty", set(keyVersion+"|EditionID", "\x1b"), eligibility.Edition, eligibility.Unknown, "empty"},
		{"edition of wrong type", set(keyVersion+"|EditionID", 4), eligibility.Edition, eligibility.Unknown, "is REG_DWORD, not REG_SZ"},
		{"edition denied", set(keyVersion+"|EditionID", denied), eligibility.Edition, eligibility.Unknown, "access is denied"},
		{"Home", set(keyVersion+"|EditionID", "Core"), eligibility.Edition, eligibility.Fail, "Core"},
		{"no build", gone(keyVersion + "|CurrentBuildNumber"), eligibility.Version, eligibility.Unknown, "CurrentBuildNumber"},
		{"build is no number", set(keyVersion+"|CurrentBuildNumber", "26100a"), eligibility.Version, eligibility.Unknown, "no number"},
		{"builds disagree", set(keyVersion+"|CurrentBuildNumber", "26200"), eligibility.Version, eligibility.Unknown, "the kernel says build 26100, the registry 26200"},
		{"no revision", gone(keyVersion + "|UBR"), eligibility.Version, eligibility.Unknown, "UBR"},
		{"revision of wrong type", set(keyVersion+"|UBR", "7092"), eligibility.Version, eligibility.Unknown, "is REG_SZ, not REG_DWORD"},
		{"revision denied", set(keyVersion+"|UBR", denied), eligibility.Version, eligibility.Unknown, "access is denied"},
		{"old revision", set(keyVersion+"|UBR", 2032), eligibility.Version, eligibility.Fail, "26100.2032"},
		{"no installation type", gone(keyVersion + "|InstallationType"), eligibility.OS, eligibility.Unknown, "InstallationType"},
		{"odd installation type", set(keyVersion+"|InstallationType", "Toaster"), eligibility.OS, eligibility.Unknown, "Toaster"},
		{"no rebootless updates", gone(keyUpdate + "|AllowRebootlessUpdates"), eligibility.Permission, eligibility.Fail, "not allowed"},
		{"rebootless updates off", set(keyUpdate+"|AllowRebootlessUpdates", 0), eligibility.Permission, eligibility.Fail, "AllowRebootlessUpdates = 0"},
		{"rebootless updates of wrong type", set(keyUpdate+"|AllowRebootlessUpdates", "1"), eligibility.Permission, eligibility.Unknown, "is REG_SZ, not REG_DWORD"},
		{"rebootless updates denied", set(keyUpdate+"|AllowRebootlessUpdates", denied), eligibility.Permission, eligibility.Unknown, "access is denied"},
		{"no provider", gone(enrolment + "|ProviderID"), eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"other provider", set(enrolment+"|ProviderID", "WMI_Bridge_SCCM_Server"), eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"enrolment not in force", set(enrolment+"|EnrollmentState", 3), eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"no state", gone(enrolment + "|EnrollmentState"), eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"no device enrolment", set(enrolment+"|EnrollmentType", 0), eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"state denied", set(enrolment+"|EnrollmentState", denied), eligibility.Managed, eligibility.Unknown, "access is denied"},
		{"provider denied", set(enrolment+"|ProviderID", denied), eligibility.Managed, eligibility.Unknown, "access is denied"},
		{"state of wrong type", set(enrolment+"|EnrollmentState", "1"), eligibility.Managed, eligibility.Unknown, "is REG_SZ, not REG_DWORD"},
		{"enrolments denied", set(keyEnrolments+"|", denied), eligibility.Managed, eligibility.Unknown, "access is denied"},
		{"never enrolled", func(m memory, _ *answers) {
			for k := range m {
				if strings.HasPrefix(k, keyEnrolments) {
					delete(m, k)
				}
			}
		}, eligibility.Managed, eligibility.Fail, "not enrolled"},
		{"vbs off", call(func(a *answers) { a.isolated = 0 }), eligibility.VBS, eligibility.Fail, "configured, not running"},
		{"vbs off, trustlet bit only", func(m memory, a *answers) {
			a.isolated = 0xfe
			delete(m, keyGuard+"|EnableVirtualizationBasedSecurity")
		},
			eligibility.VBS, eligibility.Fail, "off"},
		{"vbs not told", call(func(a *answers) { a.isolatedErr = errors.New("invalid information class") }), eligibility.VBS, eligibility.Unknown, "invalid information class"},
		{"machine not told", call(func(a *answers) { a.machineErr = errors.New("no such call") }), eligibility.Arch, eligibility.Unknown, "no such call"},
		{"other machine", call(func(a *answers) { a.machine = 0x1234 }), eligibility.Arch, eligibility.Fail, "machine 0x1234"},
		{"no debug privilege", call(func(a *answers) { a.token.debug = false }), eligibility.Rights, eligibility.Fail, "without SeDebugPrivilege"},
		{"token not read", call(func(a *answers) { a.tokenErr = denied }), eligibility.Rights, eligibility.Unknown, "access is denied"},
		{"multi-session is a client", func(_ memory, a *answers) { a.version.server = true }, "", "", ""},
		{"no label", gone(keyVersion + "|DisplayVersion"), "", "", ""},
		{"ordinary user's daemon", call(func(a *answers) { a.token = token{`PC\alice`, false, false} }), "", "", ""},
		{"engine not told", call(func(a *answers) { a.engineErr = errNotTold }), "", "", ""},
		{"provider in other case", set(enrolment+"|ProviderID", "ms dm server"), "", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			judged := func(m memory, a *answers) eligibility.Verdict {
				return eligibility.Judge(eligibility.WindowsClient, device{m, a}.collect(t.Context(), granted), eligibility.Policy{Waive: []string{"baseline"}})
			}
			before := judged(enterprise(), running())
			if !before.Eligible {
				t.Fatalf("%+v", before)
			}
			m, a := enterprise(), running()
			c.change(m, a)
			after := judged(m, a)
			if after.Eligible != (c.id == "") {
				t.Errorf("eligible %t", after.Eligible)
			}
			for i, k := range after.Checks {
				if k.ID != c.id {
					chpe := k.ID == eligibility.CHPE && c.id == eligibility.Arch // it hangs on the architecture
					if k.Result != before.Checks[i].Result && !chpe {
						t.Errorf("%s changed too: %+v", k.ID, k)
					}
					continue
				}
				if k.Result != c.want || !strings.Contains(k.Found, c.found) {
					t.Errorf("%s, found %q; want %s, %q", k.Result, k.Found, c.want, c.found)
				}
			}
			if p := eligibility.ProfileOf(device{m, a}.collect(t.Context(), granted)); p != eligibility.WindowsClient {
				t.Errorf("judged as %s", p)
			}
		})
	}
}

var errNotTold = errors.New("not told")

func TestNames(t *testing.T) {
	for want, c := range map[string]struct {
		v    osVersion
		kind string
	}{
		"Windows 10":          {osVersion{10, 0, 19045, false}, "Client"},
		"Windows 11":          {osVersion{10, 0, 22000, false}, "client"},
		"Windows Server 2016": {osVersion{10, 0, 14393, true}, "Server"},
		"Windows Server 2019": {osVersion{10, 0, 17763, true}, "Server Core"},
		"Windows Server 2022": {osVersion{10, 0, 20348, true}, "Server"},
		"Windows Server 2025": {osVersion{10, 0, 26100, true}, "Server Core"},
		"Windows 6.1":         {osVersion{6, 1, 7601, false}, "Client"},
	} {
		m := enterprise()
		m[keyVersion+"|InstallationType"] = c.kind
		if got := (device{m, &answers{version: c.v}}).os(); !got.Known || got.Value != want {
			t.Errorf("%+v: %+v, want %s", c, got, want)
		}
	}
	if got := (device{enterprise(), &answers{versionErr: errNotTold}}).os(); got.Known || got.Problem != "not told" {
		t.Errorf("no version: %+v", got)
	}
}

// TestServer: a server is enrolled by a package and permitted by its engine.
func TestServer(t *testing.T) {
	m, a := enterprise(), running()
	m[keyVersion+"|InstallationType"] = "Server Core"
	m[keyVersion+"|EditionID"] = "ServerTurbineCor"
	m[keyServer+"|Name"] = "Hotpatch Enrollment Package"
	judged := func() eligibility.Verdict {
		f := device{m, a}.collect(t.Context(), granted)
		return eligibility.Judge(eligibility.ProfileOf(f), f, eligibility.Policy{Waive: []string{"baseline"}})
	}
	if v := judged(); !v.Eligible || v.Profile != eligibility.WindowsServer {
		t.Errorf("%+v", v)
	}
	a.engine = false
	if c := judged().Checks[5]; c.Result != eligibility.Fail || !strings.Contains(c.Found, "engine is off") {
		t.Errorf("engine off: %+v", c)
	}
	delete(m, keyServer+"|Name")
	if c := judged().Checks[4]; c.Result != eligibility.Fail {
		t.Errorf("no package: %+v", c)
	}
}

func TestEngine(t *testing.T) {
	for _, c := range []struct {
		on   bool
		err  error
		size any
		want string // "" is not known
	}{
		{true, nil, nil, "on"},
		{false, nil, 4096, "off"}, // the call knows better than the registry
		{false, errNotTold, 4096, "on"},
		{false, errNotTold, 0, "off"},
		{false, errNotTold, nil, "off"},
		{false, errNotTold, "4096", ""},
		{true, errNotTold, errors.New("access is denied"), ""},
	} {
		m := memory{}
		if c.size != nil {
			m[keyMemory+"|HotPatchTableSize"] = c.size
		}
		f := device{m, &answers{engine: c.on, engineErr: c.err}}.Engine()
		if f.Known != (c.want != "") || f.Value != c.want || f.Source == "" || !f.Known && f.Problem == "" {
			t.Errorf("%+v: %+v", c, f)
		}
	}
}

func TestCHPE(t *testing.T) {
	arm := func(v any) eligibility.Fact {
		m := memory{}
		if v != nil {
			m[keyMemory+"|HotPatchRestrictions"] = v
		}
		return device{m, &answers{machine: machineARM64}}.chpe(eligibility.Fact{Known: true, Value: eligibility.ARM64})
	}
	for _, c := range []struct {
		v    any
		want string
	}{{1, "off"}, {0, "on"}, {2, "on"}, {nil, "on"}, {"1", ""}} {
		if f := arm(c.v); f.Value != c.want || f.Known != (c.want != "") || f.NotApplicable {
			t.Errorf("%v: %+v, want %q", c.v, f, c.want)
		}
	}
	// Where the architecture is not known, it may be ARM64.
	if f := (device{memory{}, &answers{}}).chpe(eligibility.Fact{}); f.NotApplicable || f.Value != eligibility.On {
		t.Errorf("%+v", f)
	}
}

// TestSystemImage: what came with Windows is left to Windows where it hotpatches.
func TestSystemImage(t *testing.T) {
	on, off, open := eligibility.Fact{Known: true, Value: eligibility.On}, eligibility.Fact{Known: true, Value: eligibility.Off}, eligibility.Fact{}
	for _, c := range []struct {
		path   string
		engine eligibility.Fact
		want   bool
	}{
		{`C:\Windows\System32\ntdll.dll`, on, true},
		{`c:/windows/system32/NTDLL.DLL`, on, true},
		{`\\?\C:\Windows\WinSxS\x\y.dll`, on, true},
		{`\??\C:\WINDOWS\System32\x.dll`, on, true},
		{`\Device\HarddiskVolume3\Windows\System32\ntdll.dll`, on, true},
		{`C:\Windows\System32\ntdll.dll`, open, true}, // not known is not off
		{`C:\Windows\System32\ntdll.dll`, off, false},
		{`C:\Windows.old\System32\ntdll.dll`, on, false},
		{`C:\Acme\Windows\app.dll`, on, false},
		{`\Device\HarddiskVolume3\Acme\app.dll`, on, false},
		{`\Device\HarddiskVolume3`, on, false},
		{`C:\Windows`, on, false},
		{``, on, false},
	} {
		if got := systemImage(c.path, `C:\Windows`, c.engine); got != c.want {
			t.Errorf("%q, engine %+v: %t", c.path, c.engine, got)
		}
	}
}
