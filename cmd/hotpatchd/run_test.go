package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/win32"
)

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// asProgram makes the test binary be the program.
const asProgram = "HOTPATCHD_TEST_PROGRAM"

func TestMain(m *testing.M) {
	win32.Guardian()
	// Windows' service manager hands down no environment of ours.
	if os.Getenv(asProgram) != "" || len(os.Args) > 1 && os.Args[1] == "run" {
		main()
	}
	os.Exit(m.Run())
}

// fakeHeart is a loop that can be held.
type fakeHeart struct {
	control.Service
	first    chan struct{}
	reloads  atomic.Int64
	deaf     atomic.Bool // Alive gets no answer
	end      chan error  // Run returns what is sent
	ended    atomic.Bool
	lateStop atomic.Bool // Run had returned before the socket was closed
	closed   atomic.Bool
}

func newFakeHeart() *fakeHeart {
	return &fakeHeart{first: make(chan struct{}), end: make(chan error, 1)}
}

func (h *fakeHeart) Run(ctx context.Context) error {
	defer h.ended.Store(true)
	close(h.first)
	select {
	case <-ctx.Done():
		return nil
	case err := <-h.end:
		return err
	}
}
func (h *fakeHeart) Reload() { h.reloads.Add(1) }
func (h *fakeHeart) Alive(ctx context.Context) error {
	if h.deaf.Load() {
		<-ctx.Done()
	}
	return ctx.Err()
}
func (h *fakeHeart) Metrics(context.Context) ([]byte, error) {
	return []byte("hotpatchd_state 1\n"), nil
}
func (h *fakeHeart) WriteMetrics(_ context.Context, path string) error {
	return os.WriteFile(path, []byte("hotpatchd_state 1\n"), 0o600)
}
func (h *fakeHeart) Close() error { h.closed.Store(true); return nil }

// logged is a log that tests can read while it is written.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(b) }
func (l *logged) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func logger(t *testing.T) (*zap.Logger, *logged) {
	t.Helper()
	b := &logged{}
	log, err := newLogger("json", b)
	if err != nil {
		t.Fatal(err)
	}
	return log, b
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// served starts serve with a fake loop.
func served(t *testing.T, more string, h *fakeHeart, manager notifier) (c *agent.Config, log *logged, stop func() error) {
	t.Helper()
	_, path := configured(t, more)
	c, err := agent.LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	zlog, b := logger(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	ready := make(chan struct{})
	go func() { done <- serve(ctx, c, h, zlog, manager, h.first, func() { close(ready) }) }()
	var once sync.Once
	var result error
	stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-done:
			case <-time.After(patience):
				result = errors.New("serve did not end")
			}
		})
		return result
	}
	t.Cleanup(func() { stop() })
	select {
	case <-ready:
	case err := <-done:
		done <- err
	case <-time.After(patience):
		t.Fatal("never ready")
	}
	return c, b, stop
}

func TestServeAnswersAndStops(t *testing.T) {
	h := newFakeHeart()
	c, log, stop := served(t, "", h, notifier{})
	client := control.Dial(c.Control.Socket)
	b, err := client.Metrics(t.Context())
	if err != nil || !strings.Contains(string(b), "hotpatchd_state 1") {
		t.Fatalf("%s, %v", b, err)
	}
	client.Close()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := client.Metrics(t.Context()); !errors.Is(err, control.ErrNotReachable) {
		t.Errorf("after the stop: %v", err)
	}
	if !h.ended.Load() || !strings.Contains(log.String(), "stopped; what is applied stays") {
		t.Errorf("log: %s", log)
	}
}

func TestServeEndsWithTheLoop(t *testing.T) {
	for _, end := range []error{errors.New("state is full"), nil} {
		h := newFakeHeart()
		_, _, stop := served(t, "", h, notifier{})
		h.end <- end
		until(t, "the loop has ended", h.ended.Load)
		want := "the loop has ended by itself"
		if end != nil {
			want = end.Error()
		}
		if err := stop(); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestSecondDaemonDoesNotStart(t *testing.T) {
	c, _, _ := served(t, "", newFakeHeart(), notifier{})
	second := newFakeHeart()
	zlog, _ := logger(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := serve(ctx, c, second, zlog, notifier{}, second.first, func() {})
	if !errors.Is(err, control.ErrInUse) || second.ended.Load() {
		t.Errorf("%v; loop ran: %t", err, second.ended.Load())
	}
}

func TestManagerHears(t *testing.T) {
	name := filepath.Join(shortTempDir(t), "n")
	m := manager(t, name)
	t.Setenv("WATCHDOG_USEC", "20000")
	h := newFakeHeart()
	_, log, stop := served(t, "", h, notifier{name})
	heard := func() string {
		b := make([]byte, 200)
		n, err := m.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	for seen := map[string]bool{}; !seen["READY=1\nSTATUS=watching"] || !seen["WATCHDOG=1"]; {
		seen[heard()] = true
	}
	// A loop that hangs is not kept alive.
	h.deaf.Store(true)
	until(t, "it is said that the loop does not answer", func() bool { return strings.Contains(log.String(), "the loop does not answer") })
	m.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	for b := make([]byte, 200); ; {
		if _, err := m.Read(b); err != nil {
			break // what was sent before is read
		}
	}
	m.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := m.Read(make([]byte, 200)); err == nil {
		t.Errorf("%d bytes although the loop hangs", n)
	}
	m.SetReadDeadline(time.Now().Add(patience))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if got := heard(); !strings.HasPrefix(got, "STOPPING=1") {
		t.Errorf("heard %q", got)
	}
}

func TestMetricsByNetworkAndFile(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	c, _, stop := served(t, "metrics = { listen = \""+address+"\", textfile = \"m.prom\" }\n", newFakeHeart(), notifier{})
	until(t, "the file is there", func() bool {
		b, _ := os.ReadFile(c.Metrics.Textfile)
		return strings.Contains(string(b), "hotpatchd_state 1")
	})
	var body string
	until(t, "the port answers", func() bool {
		r, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		body = string(b)
		return true
	})
	if body != "hotpatchd_state 1\n" {
		t.Errorf("got %q", body)
	}
	for _, path := range []string{"/", "/v1/status"} {
		r, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		if r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestStopIsBounded(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	hang := make(chan struct{})
	defer close(hang)
	if err := bounded(ctx, time.Millisecond, func() error { <-hang; return nil }); err == nil || !strings.Contains(err.Error(), "cannot stop within") {
		t.Errorf("hanging: %v", err)
	}
	want := errors.New("x")
	if err := bounded(t.Context(), 0, func() error { return want }); err != want {
		t.Errorf("ending by itself: %v", err)
	}
	if err := bounded(ctx, patience, func() error { return nil }); err != nil {
		t.Errorf("ending in time: %v", err)
	}
}

func TestLogFormats(t *testing.T) {
	for format, want := range map[string]string{
		"":        "{\"level\":\"info\"", // not a terminal
		"json":    "\"msg\":\"hello\"",
		"console": "INFO\thello\t{\"n\": 1}",
	} {
		var b bytes.Buffer
		log, err := newLogger(format, &b)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("hello", zap.Int("n", 1))
		log.Debug("hidden")
		if !strings.Contains(b.String(), want) || strings.Count(b.String(), "\n") != 1 {
			t.Errorf("%q: %s", format, b.String())
		}
	}
}

// A stranger who is refused again and again must not fill the log.
func TestRefusalsAreBounded(t *testing.T) {
	log, b := logger(t)
	report := reporter(log)
	for range 500 {
		report(control.Caller{User: "eve", UID: 1000}, errors.New("not permitted"))
	}
	if n := strings.Count(b.String(), "\n"); n == 0 || n > 50 {
		t.Errorf("%d lines", n)
	}
}

// program starts the real program on a simulated machine.
func program(t *testing.T, environment []string, args ...string) (*exec.Cmd, *logged) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	log := &logged{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(append(os.Environ(), asProgram+"=1"), environment...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, log
}

func TestTheProgramServesAndStops(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux: signals")
	}
	folder, path := configured(t, "repository = { root = \"root.json\" }\nbackend = { name = \"sim\", scene = \"scene.toml\" }\n")
	put(t, filepath.Join(folder, "scene.toml"), "format = \"hotpatchd-scene/1\"\n")
	socket := filepath.Join(folder, "notify")
	m := manager(t, socket)
	cmd, log := program(t, []string{"NOTIFY_SOCKET=" + socket}, "run", "--config", path)
	b := make([]byte, 200)
	m.SetReadDeadline(time.Now().Add(patience))
	n, err := m.Read(b)
	if err != nil || !strings.HasPrefix(string(b[:n]), "READY=1") {
		t.Fatalf("%q, %v; log:\n%s", b[:n], err, log)
	}
	// A second one finds out and touches nothing.
	second, secondLog := program(t, nil, "run", "--config", path)
	if err := second.Wait(); err == nil || second.ProcessState.ExitCode() != exitFailed {
		t.Errorf("the second daemon: %v; log:\n%s", err, secondLog)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v; log:\n%s", err, log)
	}
	if !strings.Contains(log.String(), "stopped; what is applied stays") {
		t.Errorf("log:\n%s", log)
	}
}
