package probe

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/fstest"

	"hotpatchd/eligibility"
)

const machine = "0123456789abcdef0011223344556677"

func files(m map[string]string) root {
	fs := fstest.MapFS{}
	for path, text := range m {
		fs[path] = &fstest.MapFile{Data: []byte(text)}
	}
	return root{fs}
}

func TestCollectSaysWhereAndWhat(t *testing.T) {
	r := files(map[string]string{"etc/os-release": "# us\nNAME=\"Debian GNU/Linux\"\nPRETTY_NAME='Debian 12'\nnonsense\n"})
	rights := func(context.Context) (string, error) { return "CAP_SYS_PTRACE held", nil }
	f := r.collect(t.Context(), name{system: "Linux", release: "6.1.0-26-amd64", machine: "x86_64"}, rights)
	for id, want := range map[eligibility.ID]eligibility.Fact{
		eligibility.OS:      {Known: true, Value: "Linux", Source: "uname"},
		eligibility.Version: {Known: true, Value: "6.1.0-26-amd64", Source: "uname"},
		eligibility.Arch:    {Known: true, Value: "amd64", Source: "uname"},
		eligibility.Edition: {Known: true, Value: "Debian 12", Source: "/etc/os-release"},
		eligibility.Rights:  {Known: true, Value: "granted", Text: "CAP_SYS_PTRACE held", Source: "backend"},
	} {
		if f[id] != want {
			t.Errorf("%s: %+v, want %+v", id, f[id], want)
		}
	}
	if d := Describe(f, "x"); d != (Device{OS: "Linux", Arch: "amd64", Build: "6.1.0-26-amd64", Edition: "Debian 12", ID: "x"}) {
		t.Errorf("device %+v", d)
	}
}

func TestWhatCannotBeReadIsNotKnown(t *testing.T) {
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	denied := errors.New("kernel.yama.ptrace_scope = 3 forbids tracing until the next boot")
	for _, c := range []struct {
		name string
		f    eligibility.Facts
		id   eligibility.ID
		want eligibility.Fact
	}{
		{"no os-release", files(nil).collect(t.Context(), name{}, nil), eligibility.Edition,
			eligibility.Fact{Source: "/etc/os-release", Problem: "there is no os-release"}},
		{"empty os-release", files(map[string]string{"usr/lib/os-release": "\n"}).collect(t.Context(), name{}, nil), eligibility.Edition,
			eligibility.Fact{Source: "/etc/os-release", Problem: "/usr/lib/os-release names no distribution"}},
		{"endless os-release", files(map[string]string{"etc/os-release": strings.Repeat("A", maxFile+1)}).collect(t.Context(), name{}, nil), eligibility.Edition,
			eligibility.Fact{Source: "/etc/os-release", Problem: "/etc/os-release is longer than 65536 bytes"}},
		{"uname fails", files(nil).collect(t.Context(), name{err: errors.New("no")}, nil), eligibility.Version,
			eligibility.Fact{Source: "uname", Problem: "no"}},
		{"no backend", files(nil).collect(t.Context(), name{}, nil), eligibility.Rights,
			eligibility.Fact{Source: "backend", Problem: "no backend was asked"}},
		{"refused", files(nil).collect(t.Context(), name{}, func(context.Context) (string, error) { return "", denied }), eligibility.Rights,
			eligibility.Fact{Known: true, Value: "denied", Text: denied.Error(), Source: "backend"}},
		{"too late", files(nil).collect(gone, name{}, func(ctx context.Context) (string, error) { return "", ctx.Err() }), eligibility.Rights,
			eligibility.Fact{Source: "backend", Problem: "it did not answer in time"}},
	} {
		if c.f[c.id] != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, c.f[c.id], c.want)
		}
	}
}

// Root whose unit takes CAP_SYS_PTRACE away sees little, and a trial on its own child does not show it.
func TestBlindRoot(t *testing.T) {
	granted := func(context.Context) (string, error) { return "all processes", nil }
	for _, c := range []struct{ status, want string }{
		{"Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n", eligibility.Granted},
		{"Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t000001fffff7ffff\n", eligibility.Denied},
		{"Name:\tx\nUid:\t1000\t0\t0\t0\nCapEff:\t0000000000000000\n", eligibility.Denied},
		{"Name:\tx\nUid:\t0\t1000\t0\t0\nCapEff:\t0000000000000000\n", eligibility.Granted}, // an ordinary user's
		{"Uid:\t0\t0\t0\t0\nCapEff:\tnonsense\n", eligibility.Granted},
		{"", eligibility.Granted},
	} {
		f := files(map[string]string{"proc/self/status": c.status}).collect(t.Context(), name{}, granted)[eligibility.Rights]
		if f.Value != c.want || !f.Known {
			t.Errorf("%q: %+v", c.status, f)
		}
	}
	refused := files(map[string]string{"proc/self/status": "Uid:\t0\t0\nCapEff:\t0\n"}).collect(t.Context(), name{},
		func(context.Context) (string, error) { return "", errors.New("yama") })[eligibility.Rights]
	if refused.Text != "yama" {
		t.Errorf("the backend's own word is lost: %+v", refused)
	}
}

// A hostile os-release must not reach a terminal as control sequences.
func TestTextIsFitForATerminal(t *testing.T) {
	got := osRelease("NAME=\"a\x1b[2Jb\u202e" + strings.Repeat("x", 1000) + "\"\n")["NAME"]
	if len(got) > maxText || !strings.HasPrefix(got, "a[2Jbx") {
		t.Errorf("got %q", got)
	}
}

func TestArchitectures(t *testing.T) {
	for machine, want := range map[string]string{"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "riscv64": "riscv64"} {
		if got := goArch(machine); got != want {
			t.Errorf("%s: %s, want %s", machine, got, want)
		}
	}
}

func TestDeviceID(t *testing.T) {
	// Printed by: printf 'hotpatchd device id 1\0%s' ID | sha256sum
	const want = "605f0c9ff7940f83592c23f86a921a632b0040cb4d0e4fc860ac0f475214844f"
	for _, m := range []map[string]string{
		{"etc/machine-id": machine + "\n"},
		{"var/lib/dbus/machine-id": machine},
		{"etc/machine-id": machine, "var/lib/dbus/machine-id": strings.Repeat("ab", 16)},
		{"etc/machine-id": "01234567-89AB-CDEF-0011-223344556677"},
	} {
		if got, err := files(m).deviceID(); err != nil || got != want {
			t.Errorf("%v: %s, %v", m, got, err)
		}
	}
	for text, part := range map[string]string{
		"":                      "not 32 hexadecimal",
		"uninitialized\n":       "not 32 hexadecimal",
		strings.Repeat("0", 32): "never set",
		machine + "00":          "not 32 hexadecimal",
		machine[:31] + "g":      "not 32 hexadecimal",
	} {
		m := map[string]string{"etc/machine-id": text, "var/lib/dbus/machine-id": machine}
		if got, err := files(m).deviceID(); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
	if _, err := files(nil).deviceID(); err == nil || !strings.Contains(err.Error(), "systemd-machine-id-setup") {
		t.Errorf("no file: %v", err)
	}
}

func TestThisDevice(t *testing.T) {
	f := Collect(t.Context(), func(context.Context) (string, error) { return "all", nil })
	if runtime.GOOS == "windows" { // see TestCalls
		return
	}
	if runtime.GOOS != "linux" {
		if f[eligibility.OS].Known || f[eligibility.OS].Problem == "" {
			t.Errorf("os: %+v", f[eligibility.OS])
		}
		return
	}
	if f[eligibility.OS].Value != "Linux" || f[eligibility.Arch].Value != runtime.GOARCH || !f[eligibility.Version].Known {
		t.Errorf("%+v", f)
	}
	if id := BootID(); len(id) != 36 || id != BootID() {
		t.Errorf("boot id %q", id)
	}
	if id, err := DeviceID(); err == nil && len(id) != 64 {
		t.Errorf("device id %q", id)
	}
}

func TestSimulated(t *testing.T) {
	f, err := Simulated(filepath.Join("testdata", "facts.toml"))
	if err != nil {
		t.Fatal(err)
	}
	v := eligibility.Judge(eligibility.ProfileOf(f), f, eligibility.Policy{})
	var open []string
	for _, c := range v.Checks {
		if c.Open() {
			open = append(open, string(c.ID))
		}
	}
	if v.Eligible || v.Profile != eligibility.WindowsClient || strings.Join(open, " ") != "vbs chpe" {
		t.Errorf("%s, eligible %t, open %q", v.Profile, v.Eligible, open)
	}
	if got := f[eligibility.CHPE]; got.Text != "value absent" || !strings.HasPrefix(got.Source, "HKLM") {
		t.Errorf("chpe %+v", got)
	}
	if got := f[eligibility.Version].Source; got != filepath.Join("testdata", "facts.toml") {
		t.Errorf("a fact without a source comes from %q, want the file", got)
	}
}

func TestSimulatedRefuses(t *testing.T) {
	const head = "format = \"hotpatchd-facts/1\"\n"
	for _, c := range []struct{ name, text, want string }{
		{"no format", "[os]\nvalue = \"Linux\"\n", `f.toml: format is "", this daemon reads "hotpatchd-facts/1"`},
		{"newer", "format = \"hotpatchd-facts/2\"\nfuture = 1\n", `format is "hotpatchd-facts/2"`},
		{"unknown check", head + "[tpm]\nvalue = \"2\"\n", "f.toml:2:2: unknown key\n"},
		{"unknown key", head + "[os]\nvalue = \"Linux\"\nvalu = 1\n", "f.toml:4:1: unknown key\n"},
		{"wrong type", head + "[os]\nvalue = 11\n", "f.toml:3:9: "},
		{"no toml", head + "[os\n", "f.toml:2:"},
		{"nothing said", head + "[os]\nsource = \"x\"\n", "[os] has none of value, problem and not_applicable"},
		{"said twice", head + "[os]\nvalue = \"x\"\nproblem = \"y\"\n", "[os] has more than one of"},
		{"wanted elsewhere", head + "[os]\nvalue = \"x\"\nwanted = \"y\"\n", "[os] wanted"},
	} {
		f, err := parseFacts("f.toml", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", c.name, f, err)
		}
	}
	big := filepath.Join(t.TempDir(), "big.toml")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Simulated(big); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("big file: %v", err)
	}
	if f, err := parseFacts("f.toml", []byte(head)); err != nil || f[eligibility.VBS].Known || f[eligibility.VBS].Problem == "" {
		t.Errorf("left out: %+v, %v", f[eligibility.VBS], err)
	}
}
