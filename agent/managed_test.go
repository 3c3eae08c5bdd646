package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// fleet plays device management.
type fleet struct {
	mu      sync.Mutex
	values  []Setting
	err     error
	changed chan struct{}
}

func newFleet(values ...Setting) *fleet {
	return &fleet{values: values, changed: make(chan struct{}, 10)}
}

func (f *fleet) Source() string { return `HKLM\SOFTWARE\Policies\hotpatchd` }

func (f *fleet) Settings() ([]Setting, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.values), f.err
}

func (f *fleet) Watch(ctx context.Context, onChange func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.changed:
			onChange()
		}
	}
}

func (f *fleet) set(err error, values ...Setting) {
	f.mu.Lock()
	f.values, f.err = values, err
	f.mu.Unlock()
	f.changed <- struct{}{}
}

func asText(name, v string) Setting       { return Setting{name, "REG_SZ", v} }
func asNumber(name string, n int) Setting { return Setting{name, "REG_DWORD", uint32(n)} }
func asList(name string, v ...string) Setting {
	return Setting{name, "REG_MULTI_SZ", v}
}

// TestEveryPolicyKeyCanBeManaged sets all keys, over a file that says otherwise.
func TestEveryPolicyKeyCanBeManaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.toml")
	if err := os.WriteFile(file, []byte(policyHead+"enrolled = false\nmode = \"automatic\"\nring = 3\nhold = [\"OLD\"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := newFleet(asNumber("enrolled", 1), asNumber("allow_hotpatch", 0), asText("mode", "manual"), asList("approve", "C"), asText("defer", "24h"), asNumber("pause", 1), asList("hold", "A", "B"),
		asList("deny", "exe:x.exe", "user:eve"), asList("waive", "vbs"), asNumber("ring", 50), asList("hours", "Mon-Fri 22:00-04:00"), asText("hours_grace", "72h"), asText("busy_budget", "90s"),
		asText("guard", "off"), asText("guard_window", "1m"), asText("canary", "5s"))
	p, shown, err := LoadManagedPolicy(file, f)
	if err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	want := &Policy{File: file, Enrolled: &yes, AllowHotpatch: &no, Mode: Manual, Pause: true, Hold: []string{"A", "B"}, Deny: p.Deny,
		Waive: []string{"vbs"}, Ring: 50, Hours: p.Hours, BusyBudget: 90 * time.Second,
		Approve: []string{"C"}, Defer: 24 * time.Hour, HoursGrace: 72 * time.Hour, Guard: GuardOff, GuardWindow: time.Minute, Canary: 5 * time.Second}
	if !reflect.DeepEqual(p, want) || len(p.Deny) != 2 || len(p.Hours) != 1 {
		t.Errorf("%+v\nwant %+v", p, want)
	}
	all := keys(reflect.TypeFor[policyFile](), "")
	if len(all) != len(f.values) || len(shown) != len(all) {
		t.Errorf("%d keys, %d set, %d shown", len(all), len(f.values), len(shown))
	}
	for i, s := range shown {
		if s.Key != all[i] || s.Source != f.Source()+", "+s.Key {
			t.Errorf("%+v", s)
		}
	}
	for _, w := range []control.Setting{{Key: "enrolled", Value: "true"}, {Key: "mode", Value: `"manual"`}, {Key: "hold", Value: `["A", "B"]`}, {Key: "ring", Value: "50"}} {
		if !slices.ContainsFunc(shown, func(s control.Setting) bool { return s.Key == w.Key && s.Value == w.Value }) {
			t.Errorf("%s is not shown as %s: %v", w.Key, w.Value, shown)
		}
	}
}

func TestEveryConfigKeyCanBeManaged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("format = \"hotpatchd-config/1\"\n[repository]\nurl = \"https://old.example.com\"\nproxy = \"http://bob:secret@proxy:8080\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	values := map[string]Setting{}
	for _, key := range keys(reflect.TypeFor[configFile](), "") {
		field, _ := leaf(reflect.ValueOf(&configFile{}), key)
		switch field.Kind() {
		case reflect.String:
			values[key] = asText(key, "x")
		case reflect.Slice:
			values[key] = asList(key, "x*")
		default:
			t.Fatalf("%s is a %s", key, field.Kind())
		}
	}
	socket, at := "x.sock", filepath.Join(filepath.Dir(file), "x.sock")
	if runtime.GOOS == "windows" {
		socket, at = `\\.\pipe\x`, `\\.\pipe\x`
	}
	for key, v := range map[string]string{
		"control.socket": socket, "repository.url": "https://new.example.com", "repository.check_every": "1h", "repository.proxy": "",
		"report.url": "https://fleet.example.com", "report.every": "30m", "report.proxy": "",
		"backend.name": "sim", "backend.scan_every": "3s", "eligibility.profile": "windows-client", "metrics.listen": "127.0.0.1:9",
	} {
		values[key] = asText(strings.ToUpper(key), v) // names in the registry have no case
	}
	f := newFleet()
	for _, s := range values {
		f.values = append(f.values, s)
	}
	c, shown, err := LoadManagedConfig(file, f)
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(filepath.Dir(file), name) }
	want := &Config{File: file, StateDir: in("x"), Control: ControlConfig{at, "x"},
		Repository: RepositoryConfig{URL: "https://new.example.com", Root: in("x"), CheckEvery: time.Hour, CAFile: in("x"), ClientCert: in("x"), Products: []Glob{"x*"}, Images: []Glob{"x*"}},
		Backend:    BackendConfig{"sim", in("x"), 3 * time.Second}, Eligibility: EligibilityConfig{"windows-client", in("x")},
		Policy: PolicyConfig{in("x")}, Metrics: MetricsConfig{"127.0.0.1:9", in("x")},
		Report: ReportConfig{URL: "https://fleet.example.com", Every: 30 * time.Minute, CAFile: in("x"), ClientCert: in("x")}}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v\nwant %+v", c, want)
	}
	for _, s := range shown {
		if s.Source != f.Source()+", "+s.Key {
			t.Errorf("%+v", s)
		}
	}
	// Without management the file and the defaults speak.
	_, shown, err = LoadManagedConfig(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]control.Setting{}
	for _, s := range shown {
		got[s.Key] = s
	}
	for _, w := range []control.Setting{
		{Key: "repository.url", Value: `"https://old.example.com"`, Source: file + ":3"},
		{Key: "repository.proxy", Value: `"http://bob:xxxxx@proxy:8080"`, Source: file + ":4"},
		{Key: "repository.check_every", Value: `"5m0s"`, Source: "default"},
		{Key: "repository.products", Value: `["*"]`, Source: "default"},
		{Key: "state_dir", Value: fmt.Sprintf("%q", DefaultConfig().StateDir), Source: "default"},
		{Key: "metrics.listen", Value: `""`, Source: "default"},
	} {
		if got[w.Key] != w {
			t.Errorf("%+v, want %+v", got[w.Key], w)
		}
	}
}

// TestManagedValuesAreTypedStrictly: errors name the place, the type, and what is wrong.
func TestManagedValuesAreTypedStrictly(t *testing.T) {
	const at = `HKLM\SOFTWARE\Policies\hotpatchd, `
	file := filepath.Join(t.TempDir(), "none.toml")
	many := make([]Setting, maxSettings+1)
	for i := range many {
		many[i] = asText("mode", "manual")
	}
	for _, c := range []struct {
		want string
		set  []Setting
	}{
		{at + "mode: must be REG_SZ, not REG_DWORD", []Setting{asNumber("mode", 1)}},
		{at + "enrolled: must be REG_DWORD, not REG_SZ", []Setting{asText("enrolled", "true")}},
		{at + "enrolled: must be 0 or 1, not 2", []Setting{asNumber("Enrolled", 2)}},
		{at + "ring: must be REG_DWORD, not REG_MULTI_SZ", []Setting{asList("ring", "1")}},
		{at + "ring: 100 is not between 0", []Setting{asNumber("ring", 100)}},
		{at + "ring: 4294967295 is not between", []Setting{{"ring", "REG_DWORD", ^uint32(0)}}},
		{at + "hold: must be REG_MULTI_SZ, not REG_SZ", []Setting{asText("hold", "A")}},
		{at + "hold[1]: \"../x\" is not the id of a release", []Setting{asList("hold", "A", "../x")}},
		{at + "deny[0]: ", []Setting{asList("deny", "nonsense:x")}},
		{at + "busy_budget: \"soon\" is not a duration", []Setting{asText("busy_budget", "soon")}},
		{at + "mode: \"fast\" is none of", []Setting{asText("mode", "fast")}},
		{at + "pause: must be REG_DWORD, not REG_BINARY", []Setting{{"pause", "REG_BINARY", nil}}},
		{at + "nonsense: no such key", []Setting{asText("nonsense", "x")}},
		{at + "format: no such key", []Setting{asText("format", PolicyFormat)}},
		{at + "repository: no such key", []Setting{asText("repository", "x")}},
		{at + "mode.x: no such key", []Setting{asText("mode.x", "x")}},
		{at + ": no such key", []Setting{asText("", "x")}},
		{at + "a b: no such key", []Setting{asText("a\x1bb", "x")}},
		{"has 201 values, at most 200 are read", many},
	} {
		_, _, err := LoadManagedPolicy(file, newFleet(c.set...))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %s", c.set[0], err, c.want)
		}
	}
	for _, c := range []struct{ want, name, value string }{
		{at + "repository.check_every: 1ns is not between", "repository.check_every", "1ns"},
		{at + "repository.url: http is for this machine's own addresses", "repository.url", "http://patches.example.com"},
		{at + "metrics.listen: ", "metrics.listen", "0.0.0.0:80"},
	} {
		config := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(config, []byte("format = \"hotpatchd-config/1\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := LoadManagedConfig(config, newFleet(asText(c.name, c.value))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	denied := errors.New(`cannot open HKLM\SOFTWARE\Policies\hotpatchd: access is denied`)
	f := newFleet()
	f.err = denied
	if _, _, err := LoadManagedPolicy(file, f); !errors.Is(err, ErrPolicyUnreadable) || !strings.Contains(err.Error(), "access is denied") {
		t.Errorf("got %v", err)
	}
}

// TestAbsentFile: management alone enrols a device; configuration alone does not.
func TestAbsentFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "none.toml")
	for _, c := range []struct {
		set    []Setting
		absent bool
	}{{nil, true}, {[]Setting{asText("repository.url", "https://x.example.com")}, true}, {[]Setting{asNumber("enrolled", 1)}, false}} {
		p, _, err := LoadManagedPolicy(file, newFleet(c.set...))
		if err != nil || p.Absent != c.absent || (p.Enrolled != nil) == c.absent {
			t.Errorf("%v: %+v, %v", c.set, p, err)
		}
	}
}

// TestManagementIsFollowed: what is changed there is in force soon; a wrong
// value leaves the last good policy in force, loudly; configuration waits for a restart.
func TestManagementIsFollowed(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat})
	f := newFleet(asText("mode", "manual"))
	r.management = f
	if err := r.start(); err != nil {
		t.Fatal(err)
	}
	defer r.stop()
	ctx := t.Context()
	want := func(what string, ok func(s *control.Status, p *control.Settings) bool) {
		t.Helper()
		err := r.until(func() string {
			s, err := r.life.client.Status(ctx)
			if err != nil {
				return err.Error()
			}
			p, err := r.life.client.Policy(ctx)
			if err != nil {
				return err.Error()
			}
			if !ok(s, p) {
				return fmt.Sprintf("%s: mode %s, eligible %t, problem %q, attention %v", what, s.Mode, s.Eligible, p.Problem, s.Attention)
			}
			return ""
		})
		if err != nil {
			t.Error(err)
		}
	}
	about := func(s *control.Status, text string) bool {
		return slices.ContainsFunc(s.Attention, func(a control.Attention) bool { return strings.Contains(a.Text+" "+a.Remedy, text) })
	}
	want("the first word", func(s *control.Status, p *control.Settings) bool {
		return s.Mode == "manual" && s.Eligible && p.Problem == ""
	})
	f.set(nil, asText("mode", "automatic"), asNumber("enrolled", 0))
	want("another word", func(s *control.Status, _ *control.Settings) bool { return s.Mode == "automatic" && !s.Eligible })
	f.set(nil, asNumber("mode", 1))
	want("a wrong type", func(s *control.Status, p *control.Settings) bool {
		return s.Mode == "automatic" && !s.Eligible && strings.Contains(p.Problem, "mode: must be REG_SZ, not REG_DWORD") && about(s, "mend HKLM\\SOFTWARE\\Policies\\hotpatchd, mode: must be REG_SZ")
	})
	f.set(errors.New("access is denied"))
	want("denied", func(s *control.Status, p *control.Settings) bool {
		return !s.Eligible && strings.Contains(p.Problem, "access is denied")
	})
	f.set(nil, asText("repository.check_every", "1h"))
	want("a configuration", func(s *control.Status, p *control.Settings) bool {
		return s.Eligible && p.Problem == "" && about(s, "takes effect when the service is restarted")
	})
	e, err := r.life.client.Eligibility(ctx)
	if err != nil || strings.Contains(e.Checks[4].Source, "HKLM") {
		t.Errorf("%+v, %v", e.Checks[4], err)
	}
	f.set(nil, asNumber("enrolled", 1))
	err = r.until(func() string {
		e, err := r.life.client.Eligibility(ctx)
		if err != nil || !strings.HasSuffix(e.Checks[4].Source, `policy.toml and HKLM\SOFTWARE\Policies\hotpatchd`) {
			return fmt.Sprintf("%+v, %v", e, err)
		}
		return ""
	})
	if err != nil {
		t.Error(err)
	}
}

// TestSystemImagesAreLeftToTheSystem: by the path of the file, never by a name.
func TestSystemImagesAreLeftToTheSystem(t *testing.T) {
	a := &Agent{o: Options{SystemImage: func(path string) bool { return strings.HasPrefix(path, `C:\Windows\`) }}, policy: &Policy{}}
	for path, want := range map[string]bool{`C:\Windows\System32\x.dll`: true, `C:\Acme\x.dll`: false, "": false} {
		r, denied := a.deniedByPolicy(target.Info{}, "x.dll", path)
		if denied != want || denied && r.Code != "os-hotpatch" {
			t.Errorf("%q: %+v, %t", path, r, denied)
		}
	}
}
