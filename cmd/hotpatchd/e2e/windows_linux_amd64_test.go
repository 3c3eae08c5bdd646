package e2e

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// windows is a device with Windows programs only: the daemon as a service of
// Wine's service manager, the operator's command, the programs to be patched.
// What runs on Linux is this test, which publishes, starts and asks.
type windows struct {
	t      testing.TB
	dir    string // seen by them as drive Z:
	prefix string
	wine   string
	fleet  *device // keys, repository and nothing else of it
	scans  string  // scan_every
}

// dosPath is how Wine shows a path of Linux.
func dosPath(path string) string { return `Z:` + strings.ReplaceAll(path, "/", `\`) }

// newWindows copies the prefix of scripts/wine: registry and services are its own.
func newWindows(t testing.TB, fixes ...fix) *windows {
	t.Helper()
	wine, from := os.Getenv("HOTPATCH_WINE"), os.Getenv("WINEPREFIX")
	if wine == "" || from == "" {
		need(t, "Wine (scripts/wine shell go test ...)")
	}
	if _, err := exec.LookPath("x86_64-w64-mingw32-gcc"); err != nil {
		need(t, "a compiler for Windows (apt-get install gcc-mingw-w64-x86-64)")
	}
	w := &windows{t: t, dir: t.TempDir(), wine: wine, scans: "500ms"}
	w.prefix = filepath.Join(w.dir, "prefix")
	if out, err := exec.Command("cp", "-a", from, w.prefix).CombinedOutput(); err != nil {
		t.Fatalf("cannot copy the prefix: %v\n%s", err, out)
	}
	server := filepath.Join(filepath.Dir(wine), "wineserver")
	w.linux(server, "-p")
	t.Cleanup(func() {
		w.linux(server, "-k") // ends the processes of this prefix, and no others
		w.linux(server, "-w")
	})
	for _, p := range []string{"hotpatchd", "hotpatch"} {
		c := exec.Command("go", "build", "-o", filepath.Join(w.dir, p+".exe"), "hotpatchd/cmd/"+p)
		c.Env = append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("cannot build %s.exe: %v\n%s", p, err, out)
		}
	}
	w.fleet = &device{t: t, dir: w.dir, client: control.Dial(filepath.Join(w.dir, "none"))}
	if _, err := repository.GenerateKeys(w.fleet.path("keys")); err != nil {
		t.Fatal(err)
	}
	w.fleet.publish(fixes...)
	return w
}

// environment is that of every program in the prefix.
func (w *windows) environment() []string {
	return append(os.Environ(), "WINEPREFIX="+w.prefix)
}

// linux runs a program of Linux that works on the prefix. It may fail.
func (w *windows) linux(name string, args ...string) {
	c := exec.Command(name, args...)
	c.Env = w.environment()
	c.Run()
}

// run runs a Windows program to its end and returns what it printed.
func (w *windows) run(code int, name string, args ...string) string {
	w.t.Helper()
	out, got := w.try(name, args...)
	if got != code {
		log, _ := os.ReadFile(filepath.Join(w.dir, "hotpatchd.log"))
		w.t.Fatalf("%s %s: exit code %d, want %d\n%s\n%s", name, strings.Join(args, " "), got, code, out, log[max(0, len(log)-3000):])
	}
	return out
}

func (w *windows) try(name string, args ...string) (string, int) {
	w.t.Helper()
	c := exec.Command(w.wine, append([]string{name}, args...)...)
	c.Env = w.environment()
	// A file, not a pipe: Wine's own services inherit it and would hold it open.
	out, err := os.CreateTemp(w.dir, "out-")
	if err != nil {
		w.t.Fatal(err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	c.Stdout, c.Stderr = out, out
	if err := c.Start(); err != nil {
		w.t.Fatal(err)
	}
	stop := time.AfterFunc(2*patience, func() { c.Process.Kill() })
	defer stop.Stop()
	var exit *exec.ExitError
	if err := c.Wait(); err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		w.t.Fatal(err)
	}
	return string(text), c.ProcessState.ExitCode()
}

func (w *windows) daemon(code int, args ...string) string {
	w.t.Helper()
	return w.run(code, filepath.Join(w.dir, "hotpatchd.exe"), args...)
}

func (w *windows) hotpatch(code int, args ...string) string {
	w.t.Helper()
	return w.run(code, filepath.Join(w.dir, "hotpatch.exe"), append([]string{"--socket", w.pipe()}, args...)...)
}

// pipe is this device's own: tests of other packages may have one in theirs.
func (w *windows) pipe() string { return `\\.\pipe\hotpatchd-` + filepath.Base(filepath.Dir(w.dir)) }

// configure writes what an administrator would.
func (w *windows) configure(url, waive string) {
	w.t.Helper()
	w.fleet.write("config.toml", fmt.Sprintf(`format = "hotpatchd-config/1"
state_dir = '%s'
[control]
socket = '%s'
[repository]
url = "%s"
root = '%s'
check_every = "1s"
[backend]
scan_every = "%s"
[policy]
file = '%s'
`, dosPath(w.fleet.path("state")), w.pipe(), url, dosPath(w.fleet.path("repo/root.json")), w.scans, dosPath(w.fleet.path("policy.toml"))))
	w.fleet.policy(fmt.Sprintf("waive = [%s]\n", waive))
}

// eligible writes into the registry what a managed Windows 11 Enterprise 24H2 has.
func (w *windows) eligible() {
	w.t.Helper()
	w.fleet.write("device.reg", `REGEDIT4

[HKEY_LOCAL_MACHINE\SOFTWARE\Microsoft\Windows NT\CurrentVersion]
"CurrentBuildNumber"="26100"
"CurrentBuild"="26100"
"EditionID"="Enterprise"
"ProductName"="Windows 10 Enterprise"
"DisplayVersion"="24H2"
"InstallationType"="Client"
"UBR"=dword:00001bb4
`)
	w.run(0, "regedit", "/S", dosPath(w.fleet.path("device.reg")))
}

// status asks the daemon; nil while it does not answer.
func (w *windows) status() *control.Status {
	out, code := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "--json", "status")
	var st control.Status
	if code != 0 || json.Unmarshal([]byte(out), &st) != nil {
		return nil
	}
	return &st
}

func (w *windows) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(2 * patience); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			status, _ := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "status")
			eligibility, _ := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "eligibility")
			list, _ := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "processes", "--each")
			log, _ := os.ReadFile(filepath.Join(w.dir, "hotpatchd.log"))
			w.t.Fatalf("waited in vain until %s\n%s\n%s\n%s\n%s", what, status, eligibility, list, log[max(0, len(log)-4000):])
		}
	}
}

// becomes waits for the state of the only image of each program.
func (w *windows) becomes(state control.ImageState, apps ...*winapp) {
	w.t.Helper()
	w.until(fmt.Sprintf("%d programs are %s", len(apps), state), func() bool {
		list, n := w.processes(), 0
		for _, a := range apps {
			if im := imageOf(list, a); im != nil && im.State == state {
				n++
			}
		}
		return n == len(apps)
	})
}

// processes asks the daemon for the state of every image; empty while it does not answer.
func (w *windows) processes() (list control.Processes) {
	w.t.Helper()
	out, _ := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "--json", "processes", "--each")
	if json.Unmarshal([]byte(out), &list) != nil {
		return control.Processes{}
	}
	return list
}

// imageOf is the row of a program's only image; nil if there is none.
func imageOf(list control.Processes, a *winapp) *control.Image {
	for _, p := range list.Processes {
		if p.PID == a.winPID && len(p.Images) == 1 {
			return &p.Images[0]
		}
	}
	return nil
}

// later starts a program while the daemon works, which shall be patched within
// two scans: one may be at work at this moment. Freezing may come too late on a
// loaded machine, so more than one program may try.
func (w *windows) later() *winapp {
	w.t.Helper()
	const tries = 3
	for n := 1; ; n++ {
		a := w.app("mingw/app.dll", 1, 5, 5)
		at, scans := w.processes().Scanned, map[control.Time]bool{}
		w.until("a later program is patched", func() bool {
			list := w.processes()
			if list.Scanned != at && !list.Scanned.IsZero() {
				scans[list.Scanned] = true
			}
			im := imageOf(list, a)
			return im != nil && im.State == control.Patched
		})
		w.t.Logf("a later program was patched by scan %d", len(scans))
		if len(scans) <= 2 {
			return a
		}
		if n == tries {
			w.t.Fatalf("no later program was patched within two scans")
		}
	}
}

// services is what the registry says of all services and sources of events.
func (w *windows) services() string {
	w.t.Helper()
	file := filepath.Join(w.dir, "services.reg")
	defer os.Remove(file)
	w.run(0, "reg", "export", `HKLM\SYSTEM\CurrentControlSet\Services`, dosPath(file), "/y")
	b, err := os.ReadFile(file)
	if err != nil {
		w.t.Fatal(err)
	}
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	return string(utf16.Decode(u))
}

// files are those of the device's own folder and of the folders of the system
// that installing might write to.
func (w *windows) files() (list []string) {
	w.t.Helper()
	for _, pattern := range []string{"*", "prefix/drive_c/*", "prefix/drive_c/ProgramData/*", "prefix/drive_c/Program Files/*", "prefix/drive_c/windows/*", "prefix/drive_c/windows/system32/drivers/*"} {
		names, err := filepath.Glob(filepath.Join(w.dir, pattern))
		if err != nil {
			w.t.Fatal(err)
		}
		list = append(list, names...)
	}
	return list
}

// running are the processes of this device's daemon, its guardian among them.
func (w *windows) running() (list []string) {
	w.t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "hotpatchd.exe") &&
			(strings.Contains(string(b), w.dir) || strings.Contains(string(b), dosPath(w.dir))) {
			list = append(list, string(b))
		}
	}
	return list
}

// app starts a program in this device.
func (w *windows) app(dll string, spin, sleep, block int) *winapp {
	w.t.Helper()
	return startWinappIn(w.t, w.environment(), dll, spin, sleep, block)
}

// The whole job with Windows binaries: service installed and started, device
// eligible, release fetched from a folder and over HTTP, running programs and a
// later one patched, rollback, uninstalled.
func TestWindowsDaemon(t *testing.T) {
	for _, from := range []string{"folder", "http"} {
		t.Run(from, func(t *testing.T) {
			w := newWindows(t, appFix)
			w.eligible()
			url := "file:///Z:" + w.fleet.path("repo")
			if from == "http" {
				s := httptest.NewServer(http.FileServer(http.Dir(w.fleet.path("repo"))))
				t.Cleanup(s.Close)
				url = s.URL
			}
			w.scans = "2s"
			w.configure(url, `"vbs", "baseline"`) // Wine tells nothing of the first, no release of the second
			services, files := w.services(), w.files()
			apps := []*winapp{w.app("mingw/app.dll", 2, 5, 5), w.app("clang/app.dll", 1, 5, 6), w.app("plain/app.dll", 0, 6, 6)}
			w.daemon(0, "service", "install", "--config", dosPath(w.fleet.path("config.toml")))
			w.daemon(0, "service", "start")
			for _, key := range []string{`\services\hotpatchd]`, `\eventlog\application\hotpatchd]`} {
				if !strings.Contains(strings.ToLower(w.services()), key) {
					t.Errorf("installed, and no key %s", key)
				}
			}
			if len(w.running()) == 0 {
				t.Error("started, and no process")
			}
			w.until("the daemon has verified the repository", func() bool {
				st := w.status()
				return st != nil && st.State != control.Unknown && !st.Repository.LastCheck.IsZero()
			})
			eligibility := w.hotpatch(0, "eligibility")
			if !strings.Contains(eligibility, "waived") {
				t.Errorf("nothing is shown as waived:\n%s", eligibility)
			}
			t.Logf("\n%s", eligibility)
			w.becomes(control.Patched, apps...)
			apps = append(apps, w.later())
			for _, a := range apps {
				if s := a.state(); s.value != 43 {
					t.Errorf("program %d answers %d", a.winPID, s.value)
				}
				a.runs(w.fleet)
			}
			t.Logf("\n%s", w.hotpatch(0, "status"))
			w.hotpatch(0, "verify")
			// Wine makes a mode of the descriptor that a file is given.
			w.hotpatch(0, "diagnose", dosPath(w.fleet.path("support.zip")))
			if info, err := os.Stat(w.fleet.path("support.zip")); err != nil || info.Mode()&0o007 != 0 || info.Size() == 0 {
				t.Errorf("the support file: %v, %v", info, err)
			}
			os.Remove(w.fleet.path("support.zip"))
			// 4: a thread did not stop in time, on a loaded machine; the daemon goes on trying.
			if out, code := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "rollback"); code != 0 && code != 4 {
				t.Fatalf("rollback: exit code %d\n%s", code, out)
			}
			w.becomes(control.Unpatched, apps...)
			for _, a := range apps {
				if s := a.state(); s.value != 42 {
					t.Errorf("program %d answers %d after rollback", a.winPID, s.value)
				}
				a.runs(w.fleet)
			}
			t.Logf("\n%s", w.hotpatch(0, "history"))
			w.daemon(0, "service", "stop")
			w.daemon(0, "service", "uninstall")
			w.hotpatch(5, "status")
			if out, code := w.try("sc", "query", "hotpatchd"); code == 0 {
				t.Errorf("the service is still there:\n%s", out)
			}
			if now := w.services(); now != services {
				t.Errorf("the services are not as before; before:\n%s\nafter:\n%s", services, now)
			}
			if list := w.running(); len(list) != 0 {
				t.Errorf("still running: %q", list)
			}
			// What README says that stays, and the log beside the configuration.
			want := append(files, w.fleet.path("state"), w.fleet.path("hotpatchd.log"))
			for _, f := range w.files() {
				if !slices.Contains(want, f) {
					t.Errorf("left behind: %s", f)
				}
			}
			for _, a := range apps {
				a.runs(w.fleet)
			}
		})
	}
}

// Exceptions are thrown through a function all the time while it is patched and
// taken back: the fix's own frames are unwound, every object on the way is
// destroyed once, and no value of the threads is lost.
func TestWindowsExceptions(t *testing.T) {
	w := newWindows(t, fix{"ACME-1", "acme", 1, []string{"throw/throw-1.dll"}, ""})
	w.eligible()
	w.configure("file:///Z:"+w.fleet.path("repo"), `"vbs", "baseline"`)
	thrower := startWindows(t, w.environment(), windowsProgram(t, "x86_64-w64-mingw32-g++", "winthrow.cpp"), hosttest.Fixture(t, "throw/throw.dll"))
	throws := func(value int64) {
		t.Helper()
		var last int64
		for round := range 3 {
			fmt.Fprintln(thrower.stdin, "state")
			line := thrower.line()
			var v, calls, caught, wrong, undestroyed int64
			if _, err := fmt.Sscanf(line, "%d calls %d caught %d wrong %d undestroyed %d", &v, &calls, &caught, &wrong, &undestroyed); err != nil {
				t.Fatalf("the program says %q", line)
			}
			// Of three threads, each may have two objects alive.
			if v != value || wrong != 0 || undestroyed < 0 || undestroyed > 6 || round > 0 && caught <= last {
				t.Errorf("round %d, want %d: %s", round, value, line)
			}
			last = caught
			time.Sleep(50 * time.Millisecond)
		}
	}
	throws(42)
	stop := w.foreground()
	w.becomes(control.Patched, thrower)
	throws(43)
	w.hotpatch(0, "rollback")
	throws(42)
	w.hotpatch(0, "install", "ACME-1")
	throws(43)
	stop()
	throws(43) // patched functions and their tables stay without the daemon
}

// foreground runs the daemon outside of the service manager; the function
// returned ends it as a crash does.
func (w *windows) foreground() (kill func()) {
	w.t.Helper()
	log, err := os.OpenFile(filepath.Join(w.dir, "hotpatchd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	defer log.Close()
	c := exec.Command(w.wine, filepath.Join(w.dir, "hotpatchd.exe"), "run", "--config", dosPath(w.fleet.path("config.toml")), "--log", "json")
	c.Env, c.Stdout, c.Stderr = w.environment(), log, log
	if err := c.Start(); err != nil {
		w.t.Fatal(err)
	}
	return sync.OnceFunc(func() { c.Process.Kill(); c.Wait() })
}

// The daemon is killed at random moments while it patches and takes out. No
// thread stays suspended, no value is ever wrong, and after a restart memory is
// as the record says.
func TestWindowsDaemonKilled(t *testing.T) {
	kills := 100
	if testing.Short() {
		kills = 10
	}
	w := newWindows(t, appFix)
	w.eligible()
	w.configure("file:///Z:"+w.fleet.path("repo"), `"vbs", "baseline"`)
	apps := []*winapp{w.app("mingw/app.dll", 1, 4, 4), w.app("clang/app.dll", 0, 2, 2)}
	const owner = "waive = [\"vbs\", \"baseline\"]\n"
	seen, patched := map[int64]int{}, true
	// How long a life takes to its work depends on the machine.
	w.fleet.policy(owner)
	began := time.Now()
	kill := w.foreground()
	w.until("the programs are patched", func() bool { return apps[0].state().value == 43 && apps[1].state().value == 43 })
	whole := time.Since(began)
	kill()
	for i := range kills {
		// Each life has something to do at once: what was out goes in, what was in goes out.
		if patched {
			w.fleet.policy(owner + "hold = [\"ACME-1\"]\n")
		} else {
			w.fleet.policy(owner)
		}
		kill := w.foreground()
		time.Sleep(whole/2 + time.Duration(rand.Int64N(int64(whole)*3/4)))
		kill()
		patched = apps[0].state().value == 43
		for _, a := range apps {
			v := a.state().value
			if seen[v]++; v != 42 && v != 43 {
				t.Fatalf("kill %d: program %d answers %d", i, a.winPID, v)
			}
			a.runs(w.fleet)
		}
	}
	t.Logf("answers after a kill: %v; a life takes %v to patch", seen, whole.Round(time.Millisecond))
	if len(seen) < 2 && !testing.Short() {
		t.Error("no kill came after a change")
	}
	w.fleet.policy(owner)
	defer w.foreground()()
	w.becomes(control.Patched, apps...)
	w.hotpatch(0, "verify")
}
