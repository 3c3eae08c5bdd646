package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/mgr"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
	"hotpatchd/agent/private"
)

const eventSource = `SYSTEM\CurrentControlSet\Services\EventLog\Application\` + serviceName

// TestServiceFromInstallToUninstall goes through a life of the service under
// the system's service manager. The service is this test binary, which is then
// the program (see TestMain), on a simulated machine.
func TestServiceFromInstallToUninstall(t *testing.T) {
	if err := withService(func(*mgr.Service) error { return nil }); !errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		t.Skipf("needs a system on which hotpatchd is not installed: %v", err)
	}
	dir := filepath.Join(shortTempDir(t), "with space")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.toml")
	pipe := fmt.Sprintf(`\\.\pipe\hotpatchd-service-%d`, os.Getpid())
	put(t, path, "format = \"hotpatchd-config/1\"\nstate_dir = \"state\"\npolicy = { file = \"policy.toml\" }\n"+
		"repository = { root = \"root.json\" }\nbackend = { name = \"sim\", scene = \"scene.toml\" }\ncontrol = { socket = '"+pipe+"' }\n")
	put(t, filepath.Join(dir, "scene.toml"), "format = \"hotpatchd-scene/1\"\n")
	t.Cleanup(func() { call("service", "uninstall", "--config", path) })
	logged := func() string {
		b, _ := os.ReadFile(filepath.Join(dir, "hotpatchd.log"))
		return string(b)
	}
	do := func(want string, args ...string) string {
		t.Helper()
		code, out, errOut := call(append([]string{"service"}, append(args, "--config", path)...)...)
		if code != exitDone || errOut != "" || !strings.Contains(out, want) {
			t.Fatalf("%v: exit %d, %q, %q, want %q\nlog:\n%s", args, code, out, errOut, want, logged())
		}
		return out
	}

	out := do("installed, starts with the system", "install")
	t.Log(out)
	for _, part := range []string{"kept     " + path, "written  service hotpatchd: \""} {
		if !strings.Contains(out, part) {
			t.Errorf("no %q in %s", part, out)
		}
	}
	var line string
	err := withService(func(s *mgr.Service) (err error) { line, err = binaryPath(s); return err })
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	words, err := windows.DecomposeCommandLine(line)
	if err != nil || strings.Join(words, "|") != strings.Join([]string{exe, "run", "--config", path, "--service", "--log-file", filepath.Join(dir, "hotpatchd.log"), "--installed-by", ownSID(t)}, "|") {
		t.Errorf("the manager starts %q: %v", words, err)
	}
	if !strings.HasPrefix(line, `"`+exe+`"`) {
		t.Errorf("the program is not quoted: %s", line)
	}
	if k, err := registry.OpenKey(registry.LOCAL_MACHINE, eventSource, registry.QUERY_VALUE); err != nil {
		t.Errorf("no source of events: %v", err)
	} else {
		k.Close()
	}
	// Again: nothing changes.
	do("kept     service hotpatchd", "install")

	do("started", "start")
	do("started", "start") // already so
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client := control.Dial(pipe)
	defer client.Close()
	status, err := client.Status(ctx)
	if err != nil {
		t.Fatalf("%v; log:\n%s", err, logged())
	}
	if status.Backend.Name != "sim" {
		t.Errorf("%+v", status.Backend)
	}
	if _, err := client.Pause(ctx); err != nil {
		t.Error(err)
	}
	history, err := client.History(ctx, 10)
	if err != nil || len(history.Entries) == 0 || !strings.HasPrefix(history.Entries[0].Caller.SID, "S-1-") || history.Entries[0].Caller.User == "" {
		t.Errorf("history %+v, %v", history, err)
	}
	// A second daemon is told, and touches nothing.
	if code, _, errOut := call("run", "--config", path, "--log", "json"); code != exitFailed || !strings.Contains(errOut, control.ErrInUse.Error()) && !strings.Contains(errOut, "in use by another hotpatchd") {
		t.Errorf("a second daemon: exit %d, %s", code, errOut)
	}
	do("restarted", "restart")
	if _, err := client.Status(ctx); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	do("stopped; what is applied stays", "stop")
	do("stopped", "stop")
	if _, err := client.Status(ctx); !errors.Is(err, control.ErrNotReachable) {
		t.Errorf("after stop: %v", err)
	}
	if l := logged(); strings.Count(l, "stopped; what is applied stays") != 2 {
		t.Errorf("log:\n%s", l)
	}
	do("started", "start")
	do("uninstalled. Configuration and state stay", "uninstall") // stops it first
	if err := withService(func(*mgr.Service) error { return nil }); !errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		t.Errorf("the service is still there: %v", err)
	}
	if k, err := registry.OpenKey(registry.LOCAL_MACHINE, eventSource, registry.QUERY_VALUE); err == nil {
		k.Close()
		t.Error("the source of events is still there")
	}
	do("not installed; nothing to do", "uninstall")
	code, _, errOut := call("service", "start", "--config", path)
	if code != exitFailed || !strings.Contains(errOut, "not installed") || !strings.Contains(errOut, "hint: hotpatchd service install") {
		t.Errorf("start of nothing: exit %d, %s", code, errOut)
	}
	if _, err := os.Stat(filepath.Join(dir, "state")); err != nil {
		t.Error("the state is gone: ", err)
	}
}

// TestServiceThatCannotStart: who starts it hears of it, at once.
func TestServiceThatCannotStart(t *testing.T) {
	if err := withService(func(*mgr.Service) error { return nil }); !errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		t.Skipf("needs a system on which hotpatchd is not installed: %v", err)
	}
	dir := shortTempDir(t)
	path := filepath.Join(dir, "config.toml")
	put(t, path, "format = \"hotpatchd-config/1\"\nnonsense = 1\n")
	t.Cleanup(func() { call("service", "uninstall", "--config", path) })
	if code, _, errOut := call("service", "install", "--config", path); code != exitDone {
		t.Fatal(errOut)
	}
	// Asked with another configuration: the log is that of the one in use.
	code, _, errOut := call("service", "start", "--config", filepath.Join(dir, "other", "config.toml"))
	if code != exitFailed || !strings.Contains(errOut, "cannot start the service") || !strings.Contains(errOut, "hint: the log is "+filepath.Join(dir, "hotpatchd.log")) {
		t.Errorf("exit %d, %s", code, errOut)
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "hotpatchd.log")); !strings.Contains(string(b), "config.toml:2:1") {
		t.Errorf("log:\n%s", b)
	}
}

func ownSID(t *testing.T) string {
	t.Helper()
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		t.Fatal(err)
	}
	return user.User.Sid.String()
}

// everyoneMay lets everybody change the file, until the test ends or undo.
func everyoneMay(t *testing.T, path string) (undo func()) {
	t.Helper()
	set := func(sddl string) {
		sd, err := windows.SecurityDescriptorFromString(sddl)
		if err != nil {
			t.Fatal(err)
		}
		dacl, _, err := sd.DACL()
		if err == nil {
			err = windows.SetNamedSecurityInfo(path, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION|windows.PROTECTED_DACL_SECURITY_INFORMATION, nil, nil, dacl, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ours := "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;FA;;;" + ownSID(t) + ")"
	set(ours + "(A;OICI;FA;;;WD)")
	return func() { set(ours) }
}

// TestStrangersFilesAreNotObeyed: neither installed with, nor started with.
func TestStrangersFilesAreNotObeyed(t *testing.T) {
	folder, path := configured(t, "repository = { root = \"root.json\" }\nbackend = { name = \"sim\", scene = \"scene.toml\" }\n")
	put(t, filepath.Join(folder, "scene.toml"), "format = \"hotpatchd-scene/1\"\n")
	put(t, filepath.Join(folder, "policy.toml"), "format = \"hotpatchd-policy/1\"\nmode = \"manual\"\n")
	put(t, filepath.Join(folder, "root.json"), "{}")
	exe := filepath.Join(folder, "hotpatchd.exe")
	put(t, exe, "")
	i := installer{exe: exe, config: path, said: &bytes.Buffer{}}
	if err := i.commanders(); err != nil {
		t.Fatal(err)
	}
	if err := inOurHands(exe); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file   string
		as     string
		starts bool
	}{
		{folder, "configuration", false}, {path, "configuration", false}, {filepath.Join(folder, "root.json"), "root of trust", false},
		{filepath.Join(folder, "policy.toml"), "policy", true},
	} {
		undo := everyoneMay(t, c.file)
		var hinted *hintedError
		if err := i.commanders(); !errors.As(err, &hinted) || !strings.Contains(err.Error(), "as the "+c.as+": ") || !strings.Contains(err.Error(), c.file+": Everyone may write to it") {
			t.Errorf("%s: %v", c.file, err)
		}
		if !c.starts {
			if err := runConfigured(t.Context(), path, nil, zap.NewNop(), func() {}); !errors.Is(err, private.ErrStranger) {
				t.Errorf("%s: the daemon starts: %v", c.file, err)
			}
		}
		if code, out, _ := call("check-config", "--config", path); code != exitFailed || !strings.Contains(out, "Everyone may write to it") {
			t.Errorf("%s: check-config: exit %d, %s", c.file, code, out)
		}
		undo()
	}
	undo := everyoneMay(t, exe)
	if _, err := i.install(); err == nil || !strings.Contains(err.Error(), "program of a service") {
		t.Errorf("a program that everybody may change: %v", err)
	}
	undo()
	put(t, path, "nonsense")
	everyoneMay(t, path)
	if err := i.commanders(); err == nil || !strings.Contains(err.Error(), "Everyone") {
		t.Errorf("a configuration that cannot be read: %v", err)
	}
}

func TestFirstFolderIsProtected(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "hotpatchd")
	var said bytes.Buffer
	i := installer{config: filepath.Join(dir, "config.toml"), said: &said}
	for range 2 {
		if err := i.protectHome(); err != nil {
			t.Fatal(err)
		}
	}
	if want := "written  " + dir + ": for SYSTEM and Administrators only\n"; said.String() != want {
		t.Errorf("said %q, want %q", said.String(), want)
	}
	if err := i.ensureConfig(); err != nil {
		t.Fatal(err)
	}
	file := installer{config: filepath.Join(i.config, "below", "config.toml"), said: &said}
	if err := file.protectHome(); err == nil {
		t.Error("a folder below a file")
	}
}

func TestEmulated(t *testing.T) {
	for _, c := range []struct {
		goarch          string
		process, native uint16
		want            string
	}{
		{"amd64", 0, 0x8664, ""},
		{"arm64", 0, 0xaa64, ""},
		{"amd64", 0, 0xaa64, "this hotpatchd is for amd64, the machine is arm64"},
		{"386", 0x14c, 0x8664, "for 386, the machine is amd64"},
		{"arm64", 0, 0x1234, "the machine is 0x1234"},
		{"riscv64", 0, 0, "for riscv64"},
	} {
		err := emulated(c.goarch, c.process, c.native)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if err := firstOfAll(); err != nil {
		t.Error(err)
	}
}

// slowService is work that becomes ready and stops when told to.
func TestHandler(t *testing.T) {
	requests, statuses := make(chan svc.ChangeRequest), make(chan svc.Status, 100)
	goOn := make(chan struct{})
	h := &serviceHandler{work: func(ctx context.Context, ready func()) error {
		ready()
		<-ctx.Done()
		<-goOn
		return nil
	}}
	code := make(chan uint32, 1)
	go func() { _, c := h.Execute(nil, requests, statuses); code <- c }()
	want := func(states ...svc.State) {
		t.Helper()
		for _, s := range states {
			select {
			case got := <-statuses:
				if got.State != s {
					t.Fatalf("state %d, want %d", got.State, s)
				}
				if s == svc.Running && got.Accepts != svc.AcceptStop|svc.AcceptShutdown|svc.AcceptPreShutdown {
					t.Errorf("it accepts %#x", got.Accepts)
				}
			case <-time.After(patience):
				t.Fatalf("never in state %d", s)
			}
		}
	}
	want(svc.StartPending, svc.Running)
	requests <- svc.ChangeRequest{Cmd: svc.Interrogate, CurrentStatus: svc.Status{State: svc.Running, Accepts: svc.AcceptStop | svc.AcceptShutdown | svc.AcceptPreShutdown}}
	want(svc.Running)
	requests <- svc.ChangeRequest{Cmd: svc.PreShutdown}
	want(svc.StopPending)
	close(goOn)
	select {
	case c := <-code:
		if c != 0 {
			t.Errorf("exit code %d", c)
		}
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
	// A failure is told to the manager: it starts us again.
	failing := &serviceHandler{work: func(context.Context, func()) error { return errors.New("x") }}
	if specific, c := failing.Execute(nil, requests, statuses); !specific || c != 1 {
		t.Errorf("a failure ends with %t, %d", specific, c)
	}
}

// An error after the stop that was asked for is no failure: the recovery actions
// must not start what somebody has stopped.
func TestErrorAfterStop(t *testing.T) {
	requests, statuses := make(chan svc.ChangeRequest, 1), make(chan svc.Status, 100)
	h := &serviceHandler{work: func(ctx context.Context, ready func()) error {
		ready()
		<-ctx.Done()
		return errors.New("x")
	}}
	requests <- svc.ChangeRequest{Cmd: svc.Stop}
	if specific, c := h.Execute(nil, requests, statuses); specific || c != 0 {
		t.Errorf("it ends with %t, %d", specific, c)
	}
	if h.err == nil {
		t.Error("the error is lost to the log")
	}
}

func TestMarkedForDelete(t *testing.T) {
	for _, c := range []struct {
		errs []error
		want error
	}{
		{nil, nil},
		{[]error{windows.ERROR_SERVICE_MARKED_FOR_DELETE}, nil},
		{[]error{windows.ERROR_SERVICE_DATABASE_LOCKED, windows.ERROR_SERVICE_MARKED_FOR_DELETE}, nil},
		{[]error{windows.ERROR_ACCESS_DENIED}, windows.ERROR_ACCESS_DENIED},
	} {
		if err := remove(&balky{errs: c.errs}); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%v: %v", c.errs, err)
		}
	}
}

func TestLogOfTheInstalled(t *testing.T) {
	for line, want := range map[string]string{
		`"C:\Program Files\h.exe" run --config C:\c.toml --service --log-file "D:\with space\h.log" --installed-by S-1-5-21-1`: `D:\with space\h.log`,
		`h.exe run --log-file`: "", `h.exe run`: "", "": "",
	} {
		if got := logOf(line); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

// heardEvents remembers events.
type heardEvents []string

func (h *heardEvents) note(kind string, id uint32, text string) error {
	*h = append(*h, fmt.Sprintf("%s %d %s", kind, id, text))
	return nil
}
func (h *heardEvents) Info(id uint32, text string) error    { return h.note("info", id, text) }
func (h *heardEvents) Warning(id uint32, text string) error { return h.note("warning", id, text) }
func (h *heardEvents) Error(id uint32, text string) error   { return h.note("error", id, text) }

func TestEvents(t *testing.T) {
	var heard heardEvents
	log := zap.New(newEventCore(&heard)).With(zap.String("product", "acme"))
	log.Info("watching")
	log.Info("nobody wants to know")
	log.Warn("call refused or failed", zap.String("user", "eve"))
	log.Error("release refused", zap.String("release", "R-1"), zap.Error(errors.New("no\x00")))
	log.Error("something new")
	for range 3 * eventBurst {
		log.Error("again and again", zap.String("long", strings.Repeat("x", 2*maxEvent)))
	}
	got := strings.Join(heard, "\n")
	for _, want := range []string{
		`info 1 watching {"product": "acme"}`, `error 12 release refused {"product": "acme", "release": "R-1", "error": "no`, "error 99 something new",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in %.500s", want, got)
		}
	}
	if strings.Contains(got, "nobody") || strings.Contains(got, "eve") || strings.Contains(got, "\x00") {
		t.Errorf("%.500s", got)
	}
	if len(heard) != 3+eventBurst {
		t.Errorf("%d events", len(heard))
	}
	for _, e := range heard {
		if len(e) > maxEvent+100 {
			t.Errorf("an event of %d bytes", len(e))
		}
	}
}

// TestEventsAreOfThisDaemon: each text that has an id is one that is logged.
func TestEventsAreOfThisDaemon(t *testing.T) {
	var source strings.Builder
	for _, pattern := range []string{"*.go", "../../agent/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && !strings.HasSuffix(f, "_test.go") && !strings.HasPrefix(filepath.Base(f), "events_") {
				source.Write(b)
			}
		}
	}
	ids := map[uint32]bool{otherError: true}
	for text, id := range eventIDs {
		if !regexp.MustCompile(`\.(Info|Warn|Error)\("` + regexp.QuoteMeta(text) + `"`).MatchString(source.String()) {
			t.Errorf("nothing logs %q", text)
		}
		if ids[id] || id == 0 || id > 1000 { // the message file knows 1 to 1000
			t.Errorf("%q has id %d", text, id)
		}
		ids[id] = true
	}
}

// balky is a service whose manager has no time, at first.
type balky struct {
	errs   []error // of the next orders
	states []svc.State
	orders int
}

func (b *balky) order() error {
	b.orders++
	if len(b.errs) == 0 {
		return nil
	}
	err := b.errs[0]
	b.errs = b.errs[1:]
	return err
}

func (b *balky) Delete() error { return b.order() }

func (b *balky) Start(...string) error { return b.order() }

func (b *balky) Control(svc.Cmd) (svc.Status, error) { return svc.Status{}, b.order() }

func (b *balky) Query() (svc.Status, error) {
	now := b.states[0]
	if len(b.states) > 1 {
		b.states = b.states[1:]
	}
	return svc.Status{State: now}, nil
}

// What the manager has no time for is tried again; what it refuses is not.
func TestBusyManagerIsWaitedFor(t *testing.T) {
	for _, c := range []struct {
		name   string
		do     func(controlled) error
		errs   []error
		states []svc.State
		orders int
		want   error
	}{
		{"start, locked", startService, []error{windows.ERROR_SERVICE_DATABASE_LOCKED}, []svc.State{svc.StartPending, svc.Running}, 2, nil},
		{"start, locked while it started", startService, []error{windows.ERROR_SERVICE_DATABASE_LOCKED, windows.ERROR_SERVICE_ALREADY_RUNNING}, []svc.State{svc.Running}, 2, nil},
		{"start, refused", startService, []error{windows.ERROR_ACCESS_DENIED}, []svc.State{svc.Stopped}, 1, windows.ERROR_ACCESS_DENIED},
		{"stop, still starting", stopService, []error{windows.ERROR_SERVICE_CANNOT_ACCEPT_CTRL}, []svc.State{svc.StartPending, svc.StopPending, svc.Stopped}, 2, nil},
		{"stop, ends already", stopService, []error{windows.ERROR_INVALID_SERVICE_CONTROL, windows.ERROR_INVALID_SERVICE_CONTROL}, []svc.State{svc.StopPending, svc.Stopped}, 2, nil},
		{"stop, stopped", stopService, []error{windows.ERROR_SERVICE_NOT_ACTIVE}, []svc.State{svc.Stopped}, 1, nil},
		{"stop, refused", stopService, []error{windows.ERROR_ACCESS_DENIED}, []svc.State{svc.Running}, 1, windows.ERROR_ACCESS_DENIED},
	} {
		b := &balky{errs: c.errs, states: c.states}
		if err := c.do(b); !errors.Is(err, c.want) || b.orders != c.orders {
			t.Errorf("%s: %v after %d orders", c.name, err, b.orders)
		}
	}
}

// The folder of the defaults is the system's, whatever the environment says.
func TestProgramDataIsTheSystems(t *testing.T) {
	t.Setenv("ProgramData", `C:\Users\Public`)
	if err := fixedProgramData(); err != nil {
		t.Fatal(err)
	}
	want, err := windows.KnownFolderPath(windows.FOLDERID_ProgramData, 0)
	if err != nil || !strings.EqualFold(filepath.Dir(agent.DefaultConfigPath()), filepath.Join(want, "hotpatchd")) || strings.Contains(want, "Public") {
		t.Errorf("%s, not below %s (%v)", agent.DefaultConfigPath(), want, err)
	}
}

// TestLinkIsNoHome: what stands in the place of our folder and leads elsewhere
// is not used, and what it leads to keeps its rights. A link that is shown in
// the handle's attributes only is private's to test.
func TestLinkIsNoHome(t *testing.T) {
	// In Wine this is a link that every prefix has: of the user's, to a folder of Unix.
	link, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	link = filepath.Join(link, "Documents")
	name, err := windows.UTF16PtrFromString(link)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := windows.GetFileAttributes(name); err != nil || a&windows.FILE_ATTRIBUTE_REPARSE_POINT == 0 {
		t.Skipf("needs a link to a folder, %s: %#x, %v", link, a, err)
	}
	i := installer{config: filepath.Join(link, "config.toml"), said: &bytes.Buffer{}}
	if err := i.protectHome(); !errors.Is(err, private.ErrLink) {
		t.Errorf("got %v", err)
	}
}
