package house

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allowed is the map of the house: what each room may import of ours. A room
// imports only lower floors. A new line here needs a reason in the commit.
var allowed = map[string]string{
	"pe":                               "",
	"patcher/target":                   "",
	"patcher/target/sim":               "patcher/target pe",
	"patcher/target/ptrace":            "patcher/target",
	"patcher/target/ptrace/hosttest":   "",
	"patcher/target/win32":             "patcher/target",
	"patcher/target/win32/winhosttest": "",
	"patcher/target/targettest":        "patcher/target",
	"patcher":                          "patcher/target pe",
	"patcher/build":                    "pe",
	"eligibility":                      "",
	"eligibility/probe":                "eligibility",
	"agent/calendar":                   "",
	"agent/control":                    "",
	"agent/guard":                      "",
	"agent/release":                    "pe",
	"agent/regular":                    "",
	"agent/report":                     "agent/regular",
	"agent/private":                    "",
	"agent/store":                      "agent/control agent/private",
	"agent/repository":                 "agent/private agent/regular agent/release pe",
	"agent/baseline":                   "",
	"agent":                            "agent/baseline agent/calendar agent/control agent/guard agent/regular agent/release agent/report agent/repository agent/store eligibility eligibility/probe patcher patcher/target pe",
	"cmd/hotpatch":                     "agent/control agent/private",
	"cmd/hotpatch-build":               "agent/baseline agent/control agent/release agent/repository patcher patcher/build patcher/target patcher/target/sim pe",
	"cmd/hotpatchd":                    "agent agent/control agent/private agent/release agent/repository cmd/hotpatchd/pehost eligibility eligibility/probe patcher/target patcher/target/ptrace patcher/target/sim patcher/target/win32 testdata/fixtures/demo",
	"cmd/hotpatchd-nats":               "agent/control agent/report",
	"cmd/hotpatchd/pehost":             "pe",
	"cmd/hotpatchd/e2e":                "",
	"cmd/hotpatchd/house":              "",
}

// onlyHere names the packages that only some rooms may import.
var onlyHere = map[string][]string{
	"go.uber.org/zap":              {"agent", "cmd/hotpatchd"},
	"golang.org/x/sys/unix":        {"patcher/target/ptrace", "patcher/target/ptrace/hosttest", "eligibility/probe", "agent/control", "agent/store", "cmd/hotpatchd", "cmd/hotpatchd/pehost"},
	"golang.org/x/sys/windows":     {"patcher/target/win32", "patcher/target/win32/winhosttest", "eligibility/probe", "agent/control", "agent/store", "agent/baseline", "agent/private", "cmd/hotpatchd"},
	"github.com/spf13/cobra":       {"cmd/hotpatch", "cmd/hotpatch-build"},
	"github.com/kardianos/service": {"cmd/hotpatchd"},
	"go.etcd.io/bbolt":             {"agent/store"},
	"github.com/nats-io":           {"cmd/hotpatchd-nats"},
	"github.com/fsnotify/fsnotify": {"agent"},
	"testing":                      {"patcher/target/ptrace/hosttest", "patcher/target/targettest", "patcher/target/win32/winhosttest"},
}

const module = "hotpatchd/"

func goList(t *testing.T, goos string, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH=amd64", "CGO_ENABLED=0")
	cmd.Dir = "../../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestImportsGoDownward(t *testing.T) {
	for _, goos := range []string{"linux", "windows"} {
		for _, line := range goList(t, goos, "-f", "{{.ImportPath}}|{{join .Imports \" \"}}", "./...") {
			room, imports, _ := strings.Cut(line, "|")
			room = strings.TrimPrefix(room, module)
			may, known := allowed[room]
			if !known {
				t.Errorf("%s: room %s is not on the map of the house", goos, room)
				continue
			}
			for _, i := range strings.Fields(imports) {
				if own, is := strings.CutPrefix(i, module); is && !slices.Contains(strings.Fields(may), own) {
					t.Errorf("%s: %s may not import %s", goos, room, own)
				}
				for path, rooms := range onlyHere {
					if (i == path || strings.HasPrefix(i, path+"/")) && !slices.Contains(rooms, room) {
						t.Errorf("%s: %s may not import %s", goos, room, i)
					}
				}
			}
		}
	}
}

// The daemon runs as root: what it links is on a committed list, one a line.
func TestLinkedModules(t *testing.T) {
	for _, goos := range []string{"linux", "windows"} {
		got := goList(t, goos, "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", "./cmd/hotpatchd")
		slices.Sort(got)
		got = slices.DeleteFunc(slices.Compact(got), func(s string) bool { return s == "" || s == "hotpatchd" })
		file := filepath.Join("testdata", "modules-"+goos+".txt")
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Fields(string(b))
		for _, m := range got {
			if !slices.Contains(want, m) {
				t.Errorf("%s: the daemon links %s, which %s does not list: give the reason in the commit that adds it", goos, m, file)
			}
		}
		for _, m := range want {
			if !slices.Contains(got, m) {
				t.Errorf("%s: %s lists %s, which the daemon does not link any more", goos, file, m)
			}
		}
	}
}

// The top level is fixed.
func TestTopLevel(t *testing.T) {
	fixed := []string{"cmd", "agent", "patcher", "pe", "eligibility", "testdata", "scripts", "go.mod", "go.sum", "README.md", "LICENSE"}
	entries, err := os.ReadDir("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") && !slices.Contains(fixed, e.Name()) {
			t.Errorf("%s does not belong to the top level", e.Name())
		}
	}
}
