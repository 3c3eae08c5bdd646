package agent

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/eligibility"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// fixtures is the folder that scenes and releases take their images from.
const fixtures = "../testdata/fixtures"

// patience is how long a condition may take on a machine that is busy with
// other things. Nothing is ever concluded from time passing, except failure.
var patience = 60 * time.Second

func init() { flag.DurationVar(&patience, "patience", patience, "how long a condition may take") }

// rig is one simulated device: machine, repository, clock, and the daemon.
type rig struct {
	management Management // nil: none
	t          testing.TB
	dir        string
	m          *sim.Machine
	cfg        *Config
	keys       repository.Keys
	boot       string
	clock      atomic.Int64 // added to real time, nanoseconds
	slept      atomic.Int64 // nanoseconds

	mu    sync.Mutex
	facts eligibility.Facts
	dieOp sim.Op // we die at the dieAt-th operation of this kind, 0: never
	dieAt int

	full    atomic.Bool  // the disk is full: the state cannot be written
	dead    atomic.Bool  // we are dead: nothing is written any more
	updates atomic.Int64 // transactions so far
	dieOnTx atomic.Int64 // die just before (odd) or after (even) transaction n/2

	backend target.Backend // nil: m itself
	tune    func(*Agent)   // before the loop begins
	unheard bool           // nothing waits for the system: no socket, no watch on files or addresses

	life *life // the daemon that runs now, nil if none
}

// life is one life of the daemon.
type life struct {
	agent  *Agent
	client *control.Client
	server *control.Server
	cancel context.CancelFunc
	ran    chan error
	served chan error
}

// goodPolicy enrols the device.
const goodPolicy = `format = "hotpatchd-policy/1"
enrolled = true
allow_hotpatch = true
canary = "0s"
`

// newRig makes a device on which nothing runs yet. Its files lie in memory
// where the system has such a place: every transaction of the state is synced.
func newRig(t testing.TB, scene *sim.Scene) *rig {
	t.Helper()
	parent := ""
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		parent = "/dev/shm"
	}
	dir, err := os.MkdirTemp(parent, "hotpatch")
	if err != nil {
		if dir, err = os.MkdirTemp("", "hotpatch"); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if dir, err = filepath.Abs(dir); err != nil { // under Wine, /dev/shm has no drive yet
		t.Fatal(err)
	}
	m, err := sim.New(scene, sceneFiles())
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, m: m, boot: "boot-1"}
	r.facts = eligibility.Facts{}
	for id, v := range map[eligibility.ID]string{eligibility.OS: eligibility.Linux, eligibility.Version: "6.1.0-26-amd64", eligibility.Arch: "amd64", eligibility.Rights: eligibility.Granted} {
		r.facts[id] = eligibility.Fact{Known: true, Value: v, Source: "here"}
	}
	if _, err := repository.GenerateKeys(r.path("keys")); err != nil {
		t.Fatal(err)
	}
	if r.keys, err = repository.LoadKeys(r.path("keys")); err != nil {
		t.Fatal(err)
	}
	r.cfg = DefaultConfig()
	r.cfg.StateDir, r.cfg.Policy.File = r.path("state"), r.path("policy.toml")
	r.cfg.Control.Socket, r.cfg.Control.Group = r.path("s"), ""
	if runtime.GOOS == "windows" {
		r.cfg.Control.Socket = `\\.\pipe\` + filepath.Base(dir)
	}
	r.cfg.Repository.URL, r.cfg.Repository.Root = "file:///"+strings.TrimPrefix(filepath.ToSlash(r.path("repo")), "/"), r.path("root.json")
	r.cfg.Repository.CheckEvery = time.Hour
	r.cfg.Backend.Name, r.cfg.Backend.ScanEvery = "sim", 50*time.Millisecond
	if os.Getuid() != 0 { // root may change things; anyone else by a group
		if g, err := user.LookupGroupId(strconv.Itoa(os.Getgid())); err == nil {
			r.cfg.Control.Group = g.Name
		}
	}
	r.write("policy.toml", goodPolicy)
	return r
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

// write replaces a file as a whole, as editors and device management do.
func (r *rig) write(name, text string) {
	r.t.Helper()
	if err := os.WriteFile(r.path(name+".new"), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	// On Windows nothing takes the place of a file that the daemon just reads.
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := os.Rename(r.path(name+".new"), r.path(name))
		if err == nil {
			return
		}
		if runtime.GOOS != "windows" || time.Now().After(end) {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) now() time.Time { return time.Now().Add(time.Duration(r.clock.Load())) }

// start begins a life of the daemon and waits until its first pass is done.
func (r *rig) start() error {
	if r.life != nil {
		return errors.New("the daemon runs already")
	}
	if r.dead.Load() {
		r.m.Revive()
	}
	r.dead.Store(false)
	r.mu.Lock()
	r.dieAt = 0
	r.mu.Unlock()
	r.dieOnTx.Store(0)
	ready := make(chan struct{})
	backend := r.backend
	if backend == nil {
		backend = r.m
	}
	a, err := New(Options{
		Config: r.cfg, Backend: backend, Boot: r.boot, Log: r.log(), Version: "test", Now: r.now, Slept: func() time.Duration { return time.Duration(r.slept.Load()) },
		Facts: func(context.Context) eligibility.Facts {
			r.mu.Lock()
			defer r.mu.Unlock()
			out := eligibility.Facts{}
			for k, v := range r.facts {
				out[k] = v
			}
			return out
		},
		Device:     func(f eligibility.Facts) probe.Device { return probe.Describe(f, "0123456789abcdef") },
		Management: r.management,
		Ready:      func() { close(ready) },
	})
	if err != nil {
		return err
	}
	a.store = &mortal{state: a.store, r: r}
	a.promptly = true
	if r.tune != nil {
		r.tune(a)
	}
	a.unwatched = r.unheard
	l := &life{agent: a, client: control.Dial(r.cfg.Control.Socket), ran: make(chan error, 1), served: make(chan error, 1)}
	var ln net.Listener
	if !r.unheard {
		if ln, err = control.Listen(r.cfg.Control.Socket); err != nil {
			a.Close()
			return err
		}
	}
	l.server = control.NewServer(control.Config{Service: a, Group: r.cfg.Control.Group, Version: "test", Now: r.now})
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	if ln != nil {
		go func() { l.served <- l.server.Serve(ln) }()
	}
	go func() { l.ran <- a.Run(ctx) }()
	r.life = l
	select {
	case <-ready:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("the daemon was not ready within %s", patience)
	}
}

var logged = flag.Bool("agent-log", false, "print what the daemon logs")

func (r *rig) log() *zap.Logger {
	if !*logged {
		return zap.NewNop()
	}
	return zap.Must(zap.NewDevelopment())
}

// stop ends the daemon in an orderly way.
func (r *rig) stop() error {
	l := r.life
	if l == nil {
		return nil
	}
	r.life = nil
	l.cancel()
	var err error
	select {
	case err = <-l.ran:
	case <-time.After(patience):
		return fmt.Errorf("the daemon did not stop within %s", patience)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if !r.unheard {
		err = errors.Join(err, l.server.Shutdown(ctx), <-l.served)
	}
	l.client.Close()
	return errors.Join(err, l.agent.Close())
}

// kill is kill -9: from now on nothing of this life touches a process or the
// state any more. What is left of it is swept up.
func (r *rig) kill() error {
	r.dead.Store(true)
	r.m.Die()
	return r.stop()
}

// dieAtOp has us die at the n-th operation of a kind from now. If that is a
// write, all of it is done (full) or nothing; a write within a page is never
// half done when a program dies: the kernel does not stop in it.
func (r *rig) dieAtOp(n int, op sim.Op, full bool) {
	f := sim.Fault{Do: sim.Die, Op: op}
	if full {
		f.Bytes = 1 << 20
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dieOp, r.dieAt = op, r.m.Count(op)+n
	r.m.FailAt(n, f)
}

// isDead tells whether the moment of death has come.
func (r *rig) isDead() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dieAt != 0 && r.m.Count(r.dieOp) >= r.dieAt {
		r.dead.Store(true)
	}
	return r.dead.Load()
}

// mortal is the state as a daemon sees it that may die, or whose disk may be full.
type mortal struct {
	state
	r *rig
}

var errDead = errors.New("we are dead")

func (s *mortal) Update(fn func(*store.Tx) error) error {
	r := s.r
	n := r.updates.Add(1)
	switch {
	case r.isDead():
		return errDead
	case r.full.Load():
		return fmt.Errorf("cannot write state: %w", syscall.ENOSPC)
	case r.dieOnTx.Load() == 2*n-1:
		r.dead.Store(true)
		r.m.Die()
		return errDead
	}
	err := s.state.Update(fn)
	if r.dieOnTx.Load() == 2*n {
		r.dead.Store(true)
		r.m.Die()
		return errDead
	}
	return err
}

// pass has the loop look and act once more, and waits for its end.
func (r *rig) pass() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a := r.life.agent
	return a.call(ctx, func() { a.dirty = true; a.pass(context.Background(), "", nil) })
}

// until waits for a condition. It answers "" when it holds, else what it found.
func (r *rig) until(condition func() string) error {
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for {
		found := condition()
		if found == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %s; last: %s", patience, found)
		}
		<-tick.C
	}
}

// judge is the end of every test: no process is harmed and the history is whole.
func (r *rig) judge() error {
	errs := []error{r.unharmed()}
	if r.life != nil {
		h, err := r.life.client.History(context.Background(), 10000)
		if err == nil && h.Broken != "" {
			err = errors.New(h.Broken)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// unharmed is the invariant of every process.
func (r *rig) unharmed() error {
	var errs []error
	for pid := range maxPID { // nil where there is none
		errs = append(errs, r.m.Invariant(pid))
	}
	return errors.Join(errs...)
}

// maxPID bounds the pids that scenes use.
const maxPID = 1200

// longScan is for tests that count operations: nothing is looked at unless something calls for it.
const longScan = 10 * time.Minute
