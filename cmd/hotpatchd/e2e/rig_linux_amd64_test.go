package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// device is a real daemon on this machine with state, repository and policy of
// its own: what the end-to-end tests drive.
type device struct {
	t      testing.TB
	dir    string
	config string
	set    settings
	as     *syscall.Credential // whom the daemon runs as; nil: as the test
	client *control.Client
	proc   *exec.Cmd
	ended  chan error
}

// settings are what a test may want otherwise in config.toml.
type settings struct {
	state, socket, group, url, root, products, images, policy string
}

// patience bounds every wait of the end-to-end tests; machines may be loaded.
const patience = 60 * time.Second

var built struct {
	sync.Once
	dir string
	err error
}

// program builds the daemon and the operator's command once.
func program(t testing.TB, name string) string {
	t.Helper()
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "hotpatchd-e2e-"); built.err != nil {
			return
		}
		// Other users run them too.
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil {
			return
		}
		if built.err = lookAtSources(hosttest.Root(t)); built.err != nil {
			return
		}
		if out, err := exec.Command("go", "build", "-o", built.dir, "hotpatchd/cmd/hotpatchd", "hotpatchd/cmd/hotpatch", "hotpatchd/cmd/hotpatch-build").CombinedOutput(); err != nil {
			built.err = fmt.Errorf("%v: %s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, name)
}

// lookAtSources opens the folders and files that the programs are built from:
// "go test" repeats a result it remembers unless something changed that the
// test looked at itself.
func lookAtSources(root string) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			_, err = os.Stat(path)
		}
		if err == nil && e.IsDir() && strings.HasPrefix(e.Name(), ".") {
			return fs.SkipDir
		}
		return err
	})
}

func need(t testing.TB, format string, args ...any) {
	t.Helper()
	hosttest.Need(t, format, args...)
}

// fix is one release to be published: hotpatch images of the fixtures.
type fix struct {
	id, product string
	sequence    int
	images      []string // "mingw/app-ref-1.dll"
	unwind      string   // "" is "none"
}

func newDevice(t testing.TB, fixes ...fix) *device {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		need(t, "gcc (apt-get install gcc libc6-dev)")
	}
	d := &device{t: t, dir: t.TempDir()}
	// Other users go through it: to the socket, and to images of their own.
	for _, dir := range []string{d.dir, filepath.Dir(d.dir)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d.config = d.path("config.toml")
	if _, err := repository.GenerateKeys(d.path("keys")); err != nil {
		t.Fatal(err)
	}
	d.publish(fixes...)
	d.policy("")
	d.configure(settings{state: d.path("state"), socket: d.path("s"), url: "file://" + d.path("repo"), root: d.path("repo/root.json"), policy: d.path("policy.toml")})
	t.Cleanup(func() { d.stop(); d.client.Close() })
	return d
}

// configure writes config.toml.
func (d *device) configure(s settings) {
	d.t.Helper()
	d.set = s
	text := fmt.Sprintf(`format = "hotpatchd-config/1"
state_dir = %q
[control]
socket = %q
group = %q
[repository]
url = %q
root = %q
%s%scheck_every = "1s"
[backend]
scan_every = "100ms"
[policy]
file = %q
`, s.state, s.socket, s.group, s.url, s.root, line("products", s.products), line("images", s.images), s.policy)
	d.write("config.toml", text)
	if d.client != nil {
		d.client.Close()
	}
	d.client = control.Dial(s.socket)
}

// line is one list of one pattern in TOML, nothing for none.
func line(key, value string) string {
	if value == "" {
		return ""
	}
	return fmt.Sprintf("%s = [%q]\n", key, value)
}

func (d *device) path(name string) string { return filepath.Join(d.dir, name) }

func (d *device) write(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// policy replaces the policy file as an editor does, by rename. Releases come
// into all processes at once unless lines say otherwise.
func (d *device) policy(lines string) {
	d.t.Helper()
	if !strings.Contains(lines, "canary") {
		lines += "\ncanary = \"0s\"\n"
	}
	d.write("policy.new", "format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true\n"+lines)
	if err := os.Rename(d.path("policy.new"), d.path("policy.toml")); err != nil {
		d.t.Fatal(err)
	}
}

func (d *device) publish(fixes ...fix) {
	d.t.Helper()
	keys, err := repository.LoadKeys(d.path("keys"))
	if err != nil {
		d.t.Fatal(err)
	}
	var all [][]byte
	for _, f := range fixes {
		all = append(all, makeRelease(d.t, f))
	}
	if _, err := repository.Publish(d.path("repo"), keys, all, repository.PublishOptions{Now: time.Now()}); err != nil {
		d.t.Fatal(err)
	}
}

func makeRelease(t testing.TB, f fix) []byte {
	t.Helper()
	text := fmt.Sprintf("format = \"hotpatch-release/1\"\nid = %q\nproduct = %q\nkind = \"hotpatch\"\nsequence = %d\ntitle = \"t\"\nseverity = \"critical\"\ncves = [\"CVE-2026-%04d\"]\nunwind = %q\n", f.id, f.product, f.sequence, f.sequence, cmp.Or(f.unwind, "none"))
	for _, im := range f.images {
		name := filepath.Base(im)
		name = name[:strings.IndexByte(name, '-')] + ".dll"
		text += fmt.Sprintf("[[images]]\nname = %q\nfile = %q\n", name, im)
	}
	m, files, err := release.FromTOML([]byte(text), os.DirFS(filepath.Join(hosttest.Root(t), "testdata", "fixtures")))
	if err != nil {
		t.Fatal(err)
	}
	b, err := release.Write(m, files)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// start runs the daemon and waits until it has verified the repository and scanned.
func (d *device) start() {
	d.t.Helper()
	d.launch()
	d.until("the daemon is ready", func() bool {
		st, err := d.client.Status(context.Background())
		return err == nil && st.State != control.Unknown && !st.Repository.LastCheck.IsZero()
	})
}

// launch runs the daemon and waits for nothing.
func (d *device) launch() {
	d.t.Helper()
	log, err := os.OpenFile(d.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.proc = exec.Command(program(d.t, "hotpatchd"), "run", "--config", d.config, "--log", "json")
	d.proc.SysProcAttr = &syscall.SysProcAttr{Credential: d.as}
	d.proc.Stdout, d.proc.Stderr = log, log
	if err := d.proc.Start(); err != nil {
		d.t.Fatal(err)
	}
	ended := make(chan error, 1)
	d.ended = ended
	proc := d.proc
	go func() { ended <- proc.Wait() }()
}

// kill ends the daemon as a crash does.
func (d *device) kill() {
	d.t.Helper()
	d.proc.Process.Kill()
	<-d.ended
	d.proc = nil
}

// stop ends the daemon as a service manager does.
func (d *device) stop() {
	if d.proc == nil {
		return
	}
	d.proc.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(patience):
		d.proc.Process.Kill()
		<-d.ended
		d.t.Error("the daemon did not stop when asked")
	}
	d.proc = nil
}

func (d *device) until(what string, ok func() bool) {
	d.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			st, _ := d.client.Status(context.Background())
			text, _ := json.MarshalIndent(st, "", " ")
			list, _ := d.client.Processes(context.Background(), control.ProcessQuery{})
			rows, _ := json.Marshal(list)
			log, _ := os.ReadFile(d.path("log"))
			d.t.Fatalf("waited in vain until %s\n%s\n%s\n%s", what, text, rows, log[max(0, len(log)-4000):])
		}
	}
}

func (d *device) status() *control.Status {
	d.t.Helper()
	st, err := d.client.Status(context.Background())
	if err != nil {
		d.t.Fatal(err)
	}
	return st
}

// image is the row of a process's only image that a release names; nil if there is none.
func (d *device) image(pid int) *control.Image {
	list, err := d.client.Processes(context.Background(), control.ProcessQuery{PID: pid})
	if err != nil || len(list.Processes) == 0 || len(list.Processes[0].Images) == 0 {
		return nil
	}
	return &list.Processes[0].Images[0]
}

// becomes waits for the state of a process's image.
func (d *device) becomes(pid int, want control.ImageState) *control.Image {
	d.t.Helper()
	var im *control.Image
	d.until(fmt.Sprintf("process %d is %s", pid, want), func() bool {
		im = d.image(pid)
		return im != nil && im.State == want
	})
	return im
}

func app(t testing.TB, o hosttest.Options) *hosttest.Host {
	t.Helper()
	if o.DLL == "" {
		o.DLL = "mingw/app.dll"
	}
	o.DLL = hosttest.Fixture(t, o.DLL)
	if o.Call == "" {
		o.Call = "vuln"
	}
	if o.Allow == nil {
		o.Allow = []int{42, 43, 44}
	}
	return hosttest.Start(t, o)
}
