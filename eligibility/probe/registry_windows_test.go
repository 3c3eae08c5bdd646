package probe

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"

	"hotpatchd/eligibility"
)

// override makes a key of our own the HKEY_LOCAL_MACHINE of this process: the
// code under test reads the real registry, and other processes do not notice.
func override(t *testing.T) {
	t.Helper()
	path := fmt.Sprintf(`Software\hotpatchd-test-%d`, os.Getpid())
	k, _, err := registry.CreateKey(registry.CURRENT_USER, path, registry.ALL_ACCESS)
	if err != nil {
		t.Fatal(err)
	}
	proc := windows.NewLazySystemDLL("advapi32.dll").NewProc("RegOverridePredefKey")
	if code, _, _ := proc.Call(uintptr(registry.LOCAL_MACHINE), uintptr(k)); code != 0 {
		t.Fatalf("RegOverridePredefKey: %v", windows.Errno(code))
	}
	t.Cleanup(func() {
		proc.Call(uintptr(registry.LOCAL_MACHINE), 0)
		removeKey(t, k, "")
		k.Close()
		if err := registry.DeleteKey(registry.CURRENT_USER, path); err != nil {
			t.Error(err)
		}
	})
}

// removeKey removes the keys below one.
func removeKey(t *testing.T, k registry.Key, path string) {
	names, err := k.ReadSubKeyNames(0)
	if err != nil {
		t.Errorf("%s: %v", path, err)
	}
	for _, n := range names {
		below, err := registry.OpenKey(k, n, registry.ALL_ACCESS)
		if err != nil {
			t.Errorf("%s: %v", n, err)
			continue
		}
		removeKey(t, below, path+`\`+n)
		below.Close()
		if err := registry.DeleteKey(k, n); err != nil {
			t.Errorf("%s: %v", n, err)
		}
	}
}

// write puts values into the registry: strings, numbers, or bytes.
func write(t *testing.T, at string, v any) {
	t.Helper()
	key, name, _ := strings.Cut(at, "|")
	k, _, err := registry.CreateKey(registry.LOCAL_MACHINE, key, registry.ALL_ACCESS)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	switch v := v.(type) {
	case string:
		err = k.SetStringValue(name, v)
	case int:
		err = k.SetDWordValue(name, uint32(v))
	case []byte:
		err = k.SetBinaryValue(name, v)
	default:
		t.Fatalf("%T", v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func erase(t *testing.T, at string) {
	t.Helper()
	key, name, _ := strings.Cut(at, "|")
	k, err := registry.OpenKey(registry.LOCAL_MACHINE, key, registry.ALL_ACCESS)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := k.DeleteValue(name); err != nil {
		t.Fatal(err)
	}
}

// TestEnterpriseDeviceInTheRegistry writes a managed Windows 11 Enterprise 24H2
// device into the registry, and takes one fact at a time away from it. VBS is
// asked of the kernel, which Wine is not: there it is waived, as an owner would.
func TestEnterpriseDeviceInTheRegistry(t *testing.T) {
	override(t)
	for at, v := range enterprise() {
		write(t, at, v)
	}
	a := running()
	judged := func() eligibility.Verdict {
		sys := wineCannotTell{answers: a}
		f := device{localMachine{}, sys}.collect(t.Context(), granted)
		return eligibility.Judge(eligibility.ProfileOf(f), f, eligibility.Policy{Waive: []string{"vbs", "baseline"}})
	}
	whole := judged()
	if !whole.Eligible || whole.Profile != eligibility.WindowsClient {
		t.Fatalf("%+v", whole)
	}
	for _, c := range []struct {
		at    string
		v     any // nil: taken away
		id    eligibility.ID
		want  eligibility.Result
		found string
	}{
		{keyVersion + "|EditionID", nil, eligibility.Edition, eligibility.Unknown, `there is no value EditionID in HKLM\` + keyVersion},
		{keyVersion + "|EditionID", 4, eligibility.Edition, eligibility.Unknown, `HKLM\` + keyVersion + `, EditionID is REG_DWORD, not REG_SZ`},
		{keyVersion + "|EditionID", "Core", eligibility.Edition, eligibility.Fail, "Core"},
		{keyVersion + "|CurrentBuildNumber", nil, eligibility.Version, eligibility.Unknown, "there is no value CurrentBuildNumber"},
		{keyVersion + "|CurrentBuildNumber", "19045", eligibility.Version, eligibility.Unknown, "the kernel says build 26100, the registry 19045"},
		{keyVersion + "|UBR", nil, eligibility.Version, eligibility.Unknown, "there is no value UBR"},
		{keyVersion + "|UBR", "7092", eligibility.Version, eligibility.Unknown, "UBR is REG_SZ, not REG_DWORD"},
		{keyVersion + "|UBR", []byte{1, 2, 3, 4}, eligibility.Version, eligibility.Unknown, "UBR is REG_BINARY, not REG_DWORD"},
		{keyVersion + "|UBR", 1742, eligibility.Version, eligibility.Fail, "26100.1742"},
		{keyVersion + "|InstallationType", nil, eligibility.OS, eligibility.Unknown, "there is no value InstallationType"},
		{keyUpdate + "|AllowRebootlessUpdates", nil, eligibility.Permission, eligibility.Fail, "there is no value AllowRebootlessUpdates"},
		{keyUpdate + "|AllowRebootlessUpdates", 0, eligibility.Permission, eligibility.Fail, "AllowRebootlessUpdates = 0"},
		{keyUpdate + "|AllowRebootlessUpdates", "1", eligibility.Permission, eligibility.Unknown, "is REG_SZ, not REG_DWORD"},
		{enrolment + "|ProviderID", nil, eligibility.Managed, eligibility.Fail, "not enrolled"},
		{enrolment + "|EnrollmentState", 0, eligibility.Managed, eligibility.Fail, "not enrolled"},
		{enrolment + "|EnrollmentState", "1", eligibility.Managed, eligibility.Unknown, "is REG_SZ, not REG_DWORD"},
		{enrolment + "|EnrollmentType", nil, eligibility.Managed, eligibility.Fail, "not enrolled"},
	} {
		t.Run(fmt.Sprintf("%s=%v", c.at[strings.LastIndex(c.at, "|")+1:], c.v), func(t *testing.T) {
			if c.v == nil {
				erase(t, c.at)
			} else {
				write(t, c.at, c.v)
			}
			defer write(t, c.at, enterprise()[c.at])
			after := judged()
			if after.Eligible {
				t.Error("still eligible")
			}
			for i, k := range after.Checks {
				switch {
				case k.ID != c.id && k != whole.Checks[i]:
					t.Errorf("%s changed too: %+v", k.ID, k)
				case k.ID == c.id && (k.Result != c.want || !strings.Contains(k.Found, c.found)):
					t.Errorf("%s, found %q; want %s, %q", k.Result, k.Found, c.want, c.found)
				}
			}
		})
	}
	// A whole key.
	for _, n := range []string{enrolment, unmanaged, keyEnrolments} {
		if err := registry.DeleteKey(registry.LOCAL_MACHINE, n); err != nil {
			t.Fatal(err)
		}
	}
	if c := judged().Checks[4]; c.Result != eligibility.Fail || !strings.Contains(c.Found, `there is no key HKLM\`+keyEnrolments) {
		t.Errorf("no key: %+v", c)
	}
}

// wineCannotTell has the true answers of the system where there are some, and
// played ones where the real registry is not the one that we wrote.
type wineCannotTell struct {
	*answers
	calls
}

func (w wineCannotTell) Version() (osVersion, error) { return w.answers.Version() }
func (w wineCannotTell) Machine() (uint16, error)    { return w.calls.Machine() }
func (w wineCannotTell) Isolated() (byte, error)     { return w.calls.Isolated() }
func (w wineCannotTell) Engine() (bool, error)       { return w.calls.Engine() }
func (w wineCannotTell) Token() (token, error)       { return w.calls.Token() }

func TestRegistryErrors(t *testing.T) {
	override(t)
	const key = `SOFTWARE\x`
	write(t, key+"|text", "t")
	write(t, key+"|number", 7)
	write(t, key+"|huge", strings.Repeat("x", maxRegistry))
	write(t, key+"|odd", []byte("abc"))
	var m localMachine
	for _, c := range []struct {
		err  error
		want string
		gone bool
	}{
		{second(m.Text(`SOFTWARE\none`, "x")), `there is no key HKLM\SOFTWARE\none`, true},
		{second(m.Text(key, "x")), `there is no value x in HKLM\SOFTWARE\x`, true},
		{second(m.Text(key, "number")), "is REG_DWORD, not REG_SZ", false},
		{second(m.Text(key, "odd")), "is REG_BINARY, not REG_SZ", false},
		{second(m.Text(key, "huge")), "at most 16384 are read", false},
		{second(m.Number(key, "text")), "is REG_SZ, not REG_DWORD", false},
		{second(m.Number(`SOFTWARE\none`, "x")), "there is no key", true},
		{second(m.Keys(`SOFTWARE\none`)), "there is no key", true},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) || errors.Is(c.err, fs.ErrNotExist) != c.gone {
			t.Errorf("%v, want %q", c.err, c.want)
		}
	}
	if s, err := m.Text(key, "TEXT"); err != nil || s != "t" {
		t.Errorf("names have no case: %q, %v", s, err)
	}
	if names, err := m.Keys(`SOFTWARE`); err != nil || len(names) != 1 || names[0] != "x" {
		t.Errorf("%v, %v", names, err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestCalls asks the real system. Wine has no answer for VBS and the hotpatch
// engine: it must say so, and not that they are off.
func TestCalls(t *testing.T) {
	v, err := calls{}.Version()
	if err != nil || v.major < 6 || v.build < 1000 {
		t.Errorf("version %+v, %v", v, err)
	}
	if m, err := (calls{}).Machine(); err != nil || m != machineAMD64 && m != machineARM64 {
		t.Errorf("machine %#x, %v", m, err)
	}
	k, err := calls{}.Token()
	if err != nil || k.user == "" {
		t.Errorf("token %+v, %v", k, err)
	}
	wine := windows.NewLazySystemDLL("ntdll.dll").NewProc("wine_get_version").Find() == nil
	flags, err := calls{}.Isolated()
	if wine && err == nil || err != nil && strings.Count(err.Error(), "NTSTATUS 0x") != 1 {
		t.Errorf("isolated user mode: %#x, %v", flags, err)
	}
	on, err := calls{}.Engine()
	if wine && err == nil {
		t.Errorf("engine: %t", on)
	}
	t.Logf("%+v; isolated %#x; engine %t, %v; %+v; boot %s", v, flags, on, err, k, BootID())
	if b := BootID(); len(b) != 16 || b != BootID() {
		t.Errorf("boot id %q", b)
	}
}
