package agent

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var updateConfig = flag.Bool("update-config", false, "write the golden error texts anew")

func parseFor(goos, file, text string) (*Config, error) {
	c := defaultConfig(goos, `D:\Data`)
	return c, c.parse(file, []byte(text), goos)
}

// Each file of testdata/config holds one mistake; beside it stands what an
// administrator reads about it.
func TestConfigMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/config/*.toml")
	if err != nil || len(files) < 20 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if runtime.GOOS == "windows" && filepath.Base(file) == "socket-long.toml" {
				t.Skip("needs slash paths: the length is that of an absolute one")
			}
			_, err = parseFor("linux", "config.toml", strings.ReplaceAll(string(text), "\r\n", "\n"))
			if err == nil {
				t.Fatal("accepted")
			}
			got, golden := err.Error()+"\n", strings.TrimSuffix(file, ".toml")+".txt"
			if *updateConfig {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != strings.ReplaceAll(string(want), "\r\n", "\n") {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func TestConfigDefaults(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs slash paths; TestConfigOnWindows covers what differs")
	}
	c, err := parseFor("linux", "/etc/hotpatchd/config.toml", "format = \"hotpatchd-config/1\"\n")
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		File: "/etc/hotpatchd/config.toml", StateDir: "/var/lib/hotpatchd",
		Control: ControlConfig{Socket: "/run/hotpatchd/control.sock", Group: "hotpatch"},
		Repository: RepositoryConfig{Root: "/etc/hotpatchd/root.json", CheckEvery: 5 * time.Minute,
			Products: []Glob{"*"}, Images: []Glob{"*"}},
		Backend:     BackendConfig{Name: "auto", ScanEvery: 2 * time.Second},
		Eligibility: EligibilityConfig{Profile: "auto"},
		Policy:      PolicyConfig{File: "/etc/hotpatchd/policy.toml"},
		Report:      ReportConfig{Every: time.Hour},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestConfigEverySetting(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs Unix socket paths; TestConfigOnWindows covers what differs")
	}
	folder := t.TempDir()
	file := filepath.Join(folder, "config.toml")
	text := `format = "hotpatchd-config/1"
state_dir = "state"
[control]
socket = "c.sock"
group = ""
[repository]
url = "https://patches.example.com/acme"
root = "trust/root.json"
check_every = "1h30m"
proxy = "http://proxy.example.com:8080"
ca_file = "ca.pem"
client_cert = "/etc/ssl/client.pem"
products = ["acme-*"]
images = []
[backend]
name = "sim"
scene = "scene.toml"
scan_every = "50ms"
[eligibility]
profile = "windows-client"
facts = "../facts.toml"
[policy]
file = "policy.toml"
[metrics]
listen = "[::1]:9100"
textfile = "metrics.prom"
[report]
url = "https://fleet.example.com/reports"
every = "30m"
proxy = "http://proxy.example.com:8080"
ca_file = "fleet.pem"
client_cert = "device.pem"
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(folder, name) }
	want := &Config{
		File: file, StateDir: in("state"),
		Control: ControlConfig{Socket: in("c.sock")},
		Repository: RepositoryConfig{URL: "https://patches.example.com/acme", Root: in("trust/root.json"), CheckEvery: 90 * time.Minute,
			Proxy: "http://proxy.example.com:8080", CAFile: in("ca.pem"), ClientCert: "/etc/ssl/client.pem",
			Products: []Glob{"acme-*"}, Images: []Glob{}},
		Backend:     BackendConfig{Name: "sim", Scene: in("scene.toml"), ScanEvery: 50 * time.Millisecond},
		Eligibility: EligibilityConfig{Profile: "windows-client", Facts: filepath.Join(filepath.Dir(folder), "facts.toml")},
		Policy:      PolicyConfig{File: in("policy.toml")},
		Metrics:     MetricsConfig{Listen: "[::1]:9100", Textfile: in("metrics.prom")},
		Report: ReportConfig{URL: "https://fleet.example.com/reports", Every: 30 * time.Minute, Proxy: "http://proxy.example.com:8080",
			CAFile: in("fleet.pem"), ClientCert: in("device.pem")},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if c.BackendName() != "sim" {
		t.Errorf("backend %s", c.BackendName())
	}
}

func TestConfigOnWindows(t *testing.T) {
	const head = "format = \"hotpatchd-config/1\"\n"
	c, err := parseFor("windows", "config.toml", head+`[policy]
file = 'E:\policy.toml'
`)
	if err != nil {
		t.Fatal(err)
	}
	if c.StateDir != `D:\Data\hotpatchd\state` || c.Control.Socket != `\\.\pipe\hotpatchd` || c.Policy.File != `E:\policy.toml` {
		t.Errorf("%+v", c)
	}
	for text, want := range map[string]string{
		"[control]\nsocket = \"/run/x.sock\"\n": "config.toml:3:10: [control] socket: ",
		"[backend]\nname = \"ptrace\"\n":        `"ptrace" is for Linux`,
	} {
		if _, err := parseFor("windows", "config.toml", head+text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestConfigFile(t *testing.T) {
	folder := t.TempDir()
	if _, err := LoadConfig(filepath.Join(folder, "none.toml")); err == nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := LoadConfig(folder); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("folder: %v", err)
	}
	big := filepath.Join(folder, "big.toml")
	if err := os.WriteFile(big, make([]byte, maxDocument+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(big); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("big file: %v", err)
	}
}

// No text makes the reader fall over, and an accepted one has its bounds.
func FuzzConfig(f *testing.F) {
	files, _ := filepath.Glob("testdata/config/*.toml")
	for _, file := range files {
		text, _ := os.ReadFile(file)
		f.Add(string(text))
	}
	f.Add("format = \"hotpatchd-config/1\"\n[[control]]\n")
	f.Add("format = \"hotpatchd-config/1\"\nrepository.images = [[\"a\"], {b = 1}]\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseFor("linux", "/etc/hotpatchd/config.toml", text)
		if err != nil {
			if strings.ContainsAny(strings.ReplaceAll(err.Error(), "\n", ""), "\x00\x1b\r") {
				t.Errorf("control characters in %q", err)
			}
			return
		}
		if c.Backend.ScanEvery < minScanEvery || c.Repository.CheckEvery > maxCheckEvery || !filepath.IsAbs(c.StateDir) {
			t.Errorf("%+v", c)
		}
	})
}

// Every error about a key that is in the file points at its value.
func TestPositions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blank := strings.Repeat("\n", rapid.IntRange(0, 5).Draw(t, "lines"))
		indent := strings.Repeat(" ", rapid.IntRange(0, 5).Draw(t, "indent"))
		text := "format = \"hotpatchd-config/1\"\n" + blank + "[backend]\n" + indent + "name = \"ü\"\n"
		_, err := parseFor("linux", "c", text)
		lines := strings.Split(text, "\n")
		row, column := len(lines)-1, len(indent)+8
		want := "c:" + strconv.Itoa(row) + ":" + strconv.Itoa(column) + ": "
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Fatalf("want %s, got %v", want, err)
		}
	})
}

// The README lists every key of both files.
func TestReadmeListsEveryKey(t *testing.T) {
	b, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []struct {
		head string
		of   reflect.Type
	}{{"| config | default |", reflect.TypeFor[configFile]()}, {"| policy | default |", reflect.TypeFor[policyFile]()}} {
		_, table, ok := strings.Cut(string(b), file.head)
		if table, _, _ = strings.Cut(table, "\n\n"); !ok {
			t.Fatalf("no table %q", file.head)
		}
		var look func(of reflect.Type, in string)
		look = func(of reflect.Type, in string) {
			for i := range of.NumField() {
				f := of.Field(i)
				key := f.Tag.Get("toml")
				switch {
				case f.Type.Kind() == reflect.Struct:
					look(f.Type, "["+key+"] ")
				case key != "format" && !strings.Contains(table, "`"+in+key+"`") && !strings.Contains(table, "`"+key+"`"):
					t.Errorf("the table %q does not list %s%s", file.head, in, key)
				}
			}
		}
		look(file.of, "")
	}
}
