package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
	"hotpatchd/eligibility"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/patcher/target/win32"
)

const (
	// drainWait is how long calls under way may take when the daemon stops.
	drainWait = 5 * time.Second
	// stopWait bounds the whole stop. What is under way in a process is carried
	// through or taken back well within it; if not, we print where we hang and
	// go: the kernel releases whatever we hold. Below the unit's TimeoutStopSec.
	stopWait = 30 * time.Second
)

// heart is what the shell needs of the agent.
type heart interface {
	control.Service
	Run(context.Context) error       // until the context ends
	Reload()                         // reads the policy anew, soon
	Alive(ctx context.Context) error // nil: the loop has answered
	WriteMetrics(ctx context.Context, path string) error
	Close() error // after Run has returned
}

func runCommand(c *command, args []string, _, errOut io.Writer) int {
	f := c.flags(errOut)
	path := f.String("config", agent.DefaultConfigPath(), "")
	format := f.String("log", "", "")
	file := f.String("log-file", "", "")
	managed := f.Bool("service", false, "")         // set by the installed service on Windows
	installedBy := f.String("installed-by", "", "") // and who has installed it: an SID
	if code, done := c.parse(f, args); done {
		return code
	}
	var trust []string
	if *installedBy != "" {
		trust = []string{*installedBy}
	}
	logTo := errOut
	if *file != "" {
		l, err := openLog(*file, maxLog)
		if err != nil {
			return failed(errOut, err)
		}
		defer l.Close()
		logTo = l
	}
	log, err := newLogger(*format, logTo)
	if err != nil {
		fmt.Fprintln(errOut, "hotpatchd: "+err.Error())
		return exitUsage
	}
	work := func(ctx context.Context, ready func()) error { return runConfigured(ctx, *path, trust, log, ready) }
	if *managed {
		log = withEvents(log)
		err = underManager(work)
	} else {
		err = inForeground(work)
	}
	if err != nil {
		if logTo != errOut {
			log.Error("cannot go on", zap.Error(err))
		}
		return failed(errOut, err)
	}
	return exitDone
}

// inForeground works until a signal asks for the end. A second one is not waited for.
func inForeground(work func(context.Context, func()) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from now on a signal ends us at once
	return bounded(ctx, stopWait, func() error { return work(ctx, func() {}) })
}

// bounded gives fn a limited time to return after ctx has ended.
func bounded(ctx context.Context, limit time.Duration, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		return fmt.Errorf("cannot stop within %s; gave up", limit)
	}
}

// runConfigured loads the configuration and works until ctx ends. ready is called
// once the daemon serves. trust are SIDs that may command the daemon beside the
// system (Windows).
func runConfigured(ctx context.Context, path string, trust []string, log *zap.Logger, ready func()) error {
	c, shown, err := agent.LoadManagedConfig(path, management())
	if errors.Is(err, fs.ErrNotExist) {
		return &hintedError{err, writeConfig(path)}
	}
	if err != nil {
		return &hintedError{err, "hotpatchd check-config --config " + path}
	}
	if err := commandersOf(c, trust...); err != nil {
		return err
	}
	modest()
	backend, err := openBackend(c)
	if err != nil {
		return err
	}
	if closer, ok := backend.(io.Closer); ok {
		defer closer.Close()
	}
	log.Info("starting", zap.String("version", programVersion()), zap.String("config", c.File), zap.String("backend", backend.Name()),
		zap.String("state_dir", c.StateDir), zap.String("socket", c.Control.Socket))

	serving := make(chan struct{})
	h, err := newHeart(c, shown, trust, backend, log, func() { close(serving) })
	if errors.Is(err, fs.ErrPermission) {
		return &hintedError{err, "run it with the rights of " + owners(runtime.GOOS) + ", to reach into processes of others; or set state_dir and [control] socket to places of this user's own"}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err := h.Close(); err != nil {
			log.Error("cannot close the state", zap.Error(err))
		}
	}()
	return serve(ctx, c, h, log, notifierFrom(os.Getenv), serving, ready)
}

// newHeart makes the agent of this device.
func newHeart(c *agent.Config, shown []control.Setting, trust []string, backend target.Backend, log *zap.Logger, ready func()) (heart, error) {
	id, err := probe.DeviceID()
	if err != nil {
		log.Warn("this device has no id; rollouts by percentage pass it over until they reach all", zap.Error(err))
	}
	var rights func(context.Context) (string, error)
	if p, ok := backend.(target.Prober); ok {
		rights = p.Probe
	}
	facts := func(ctx context.Context) eligibility.Facts { return probe.Collect(ctx, rights) }
	if file := c.Eligibility.Facts; file != "" {
		facts = func(context.Context) eligibility.Facts {
			f, err := probe.Simulated(file)
			if err != nil {
				log.Error("no facts", zap.Error(err)) // nothing known: not eligible
			}
			return f
		}
	}
	return agent.New(agent.Options{
		Config: c, Backend: backend, Facts: facts, Log: log, Version: programVersion(), Ready: ready,
		Device: func(f eligibility.Facts) probe.Device { return probe.Describe(f, id) },
		Boot:   probe.BootID(), Management: management(), Settings: shown, SystemImage: probe.SystemImage, HostEvents: agent.WatchHost, Slept: probe.Slept,
		Hands: func(file string) error { return inOurHands(file, trust...) },
	})
}

// openBackend makes what reaches into processes.
func openBackend(c *agent.Config) (target.Backend, error) {
	switch name := c.BackendName(); name {
	case "sim":
		return sim.Load(c.Backend.Scene)
	case "ptrace":
		return ptrace.New()
	case "win32":
		return win32.New()
	default:
		return nil, fmt.Errorf("cannot reach processes: this build has no backend %q", name)
	}
}

// serve runs the loop and the control socket side by side until ctx ends or one of them fails.
func serve(ctx context.Context, c *agent.Config, h heart, log *zap.Logger, manager notifier, first <-chan struct{}, ready func()) error {
	// SIGHUP ("systemctl reload") reads the policy anew, and from here on never ends us.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	// The socket before the loop: a second daemon must find out before it touches anything.
	listener, err := control.Listen(c.Control.Socket)
	if err != nil {
		return err
	}
	server := control.NewServer(control.Config{
		Service: h, Group: c.Control.Group, Version: programVersion(), Now: time.Now, Report: reporter(log),
	})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := server.Serve(listener); err != nil {
			cancel(fmt.Errorf("cannot serve %s any more: %w", c.Control.Socket, err))
		}
	}()
	var helpers helpers
	helpers.start(func() { forward(ctx, hangups, h.Reload) })
	helpers.start(func() { keepAlive(ctx, h, manager, log) })
	helpers.start(func() { exposeMetrics(ctx, c, h, log) })
	helpers.start(func() {
		select {
		case <-first:
			log.Info("watching")
			say(log, manager, "READY=1", "STATUS=watching")
			ready()
		case <-ctx.Done():
		}
	})

	err = h.Run(ctx)
	if err == nil && ctx.Err() == nil {
		err = errors.New("the loop has ended by itself")
	}
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	say(log, manager, "STOPPING=1", "STATUS=stopping; what is applied stays")
	cancel(nil)
	drain, release := context.WithTimeout(context.Background(), drainWait)
	defer release()
	if e := server.Shutdown(drain); e != nil {
		log.Warn("calls were cut off", zap.Error(e))
	}
	<-served
	helpers.wait()
	log.Info("stopped; what is applied stays")
	return err
}

// forward calls reload for every signal that arrives.
func forward(ctx context.Context, hangups <-chan os.Signal, reload func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
			reload()
		}
	}
}

// keepAlive tells the manager's watchdog that the loop answers, and how things are.
func keepAlive(ctx context.Context, h heart, manager notifier, log *zap.Logger) {
	every := watchdogEvery(os.Getenv)
	if every == 0 || manager.socket == "" {
		return
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		// A loop that hangs must not be kept alive by another goroutine.
		answer, cancel := context.WithTimeout(ctx, every)
		err := h.Alive(answer)
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				log.Error("the loop does not answer", zap.Error(err), zap.Duration("for", every))
			}
			continue
		}
		say(log, manager, "WATCHDOG=1")
	}
}

func say(log *zap.Logger, manager notifier, variables ...string) {
	if err := manager.send(variables...); err != nil {
		log.Warn("the service manager does not hear us", zap.Error(err))
	}
}

// reporter writes refused and failed calls to the log, a bounded number: a
// stranger can cause refusals at will.
func reporter(log *zap.Logger) func(control.Caller, error) {
	core := zapcore.NewSamplerWithOptions(log.Core(), time.Minute, 20, 1000)
	log = zap.New(core)
	return func(c control.Caller, err error) {
		log.Warn("call refused or failed", zap.String("user", c.User), zap.Int("uid", c.UID), zap.Int("pid", c.PID), zap.Error(err))
	}
}

// modest keeps an idle daemon small: it allocates little, so that collecting
// more often costs next to nothing, and the heap stays near what is alive.
// GOGC and GOMEMLIMIT, where set, are the owner's word.
func modest() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(idleGC)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(softMemory)
	}
}

const (
	idleGC     = 40        // percent of growth over what is alive
	softMemory = 256 << 20 // bytes; releases are checked in memory, so not much less
)

// newLogger writes one line an event: JSON, or words for a person. By default
// words on a terminal and JSON elsewhere.
func newLogger(format string, w io.Writer) (*zap.Logger, error) {
	if format == "" {
		format = "json"
		if f, ok := w.(*os.File); ok {
			if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
				format = "console"
			}
		}
	}
	cfg := zap.NewProductionEncoderConfig()
	cfg.EncodeTime, cfg.EncodeDuration = zapcore.RFC3339TimeEncoder, zapcore.StringDurationEncoder
	var encoder zapcore.Encoder
	switch format {
	case "json":
		encoder = zapcore.NewJSONEncoder(cfg)
	case "console":
		cfg.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(cfg)
	default:
		return nil, fmt.Errorf("--log is json or console, not %q", format)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), zap.InfoLevel)), nil
}
