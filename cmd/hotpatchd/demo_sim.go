package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/testdata/fixtures/demo"
)

// simStage plays on a simulated machine inside this process: the daemon's own
// code with a simulated memory writer.
type simStage struct {
	machine *sim.Machine
	dir     string
	next    int
	cancel  context.CancelFunc
	ended   chan error
	heart   heart
	// direct: no control socket, the story asks the service itself.
	direct bool
}

func newSimStage() *simStage {
	return &simStage{next: 4711, direct: runtime.GOOS != "linux" && runtime.GOOS != "windows"}
}

const simFacts = `format = "hotpatchd-facts/1"
[os]
value = "Linux"
source = "simulated"
[edition]
value = "simulated"
source = "simulated"
[version]
value = "6.1"
source = "simulated"
[arch]
value = "amd64"
source = "simulated"
[rights]
value = "granted"
source = "simulated"
`

func (s *simStage) config(d *story) string {
	s.dir = d.dir
	facts := d.path("facts.toml")
	os.WriteFile(facts, []byte(simFacts), 0o600)
	os.WriteFile(d.path("scene.toml"), []byte("format = \""+sim.SceneFormat+"\"\n"), 0o600)
	return fmt.Sprintf("[backend]\nname = \"sim\"\nscene = %q\nscan_every = \"50ms\"\n[eligibility]\nprofile = \"linux\"\nfacts = %q\n", d.path("scene.toml"), facts)
}

func (s *simStage) start() (int, error) {
	if s.machine == nil {
		m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: uint64(time.Now().UnixNano())}, os.DirFS(os.TempDir()))
		if err != nil {
			return 0, err
		}
		s.machine = m
	}
	pid := s.next
	s.next += 7
	_, err := s.machine.Start(sim.Process{PID: pid, Exe: "/usr/bin/host", Image: "", Modules: []sim.Module{{File: "demo.dll", Image: demo.DLL}}})
	return pid, err
}

// answers follows the jumps from the export to the code that would run, and
// reads what it returns: mov eax, VALUE.
func (s *simStage) answers(pid int) (int, error) {
	entry, err := s.machine.Export(pid, "demo.dll", "answer")
	if err != nil {
		return 0, err
	}
	at, err := s.machine.Executes(pid, entry)
	if err != nil {
		return 0, err
	}
	return s.returned(pid, at)
}

func (s *simStage) returned(pid int, at target.Addr) (int, error) {
	const window = 32
	code, err := s.machine.Fetch(pid, at, window)
	if err != nil {
		return 0, err
	}
	i := bytes.IndexByte(code, 0xb8)
	if i < 0 || i+5 > len(code) {
		return 0, fmt.Errorf("process %d: no constant in the code at %s", pid, at)
	}
	return int(binary.LittleEndian.Uint32(code[i+1:])), nil
}

func (s *simStage) calls(pid int) (n, wrong uint64, err error) {
	return 0, 0, s.machine.Invariant(pid)
}

func (s *simStage) daemon(config string) error {
	c, err := agent.LoadConfig(config)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "daemon.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	logger, err := newLogger("json", log)
	if err != nil {
		return err
	}
	serving := make(chan struct{})
	h, err := newHeart(c, nil, nil, s.machine, logger, func() { close(serving) })
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel, s.ended = cancel, make(chan error, 1)
	s.heart = h
	if s.direct {
		go func() {
			err := h.Run(ctx)
			h.Close()
			log.Close()
			s.ended <- err
		}()
		return nil
	}
	go func() {
		err := serve(ctx, c, h, zap.NewNop(), notifier{}, serving, func() {})
		h.Close()
		log.Close()
		s.ended <- err
	}()
	return nil
}

func (s *simStage) operator(socket string) operator {
	if s.direct {
		return &directOperator{s}
	}
	return control.Dial(socket)
}

// kill ends every handle at once, as the death of a process does, then lets
// the machine be reached again.
func (s *simStage) kill() error {
	s.machine.Die()
	s.stop()
	s.machine.Revive()
	return nil
}

func (s *simStage) stop() {
	if s.cancel == nil {
		return
	}
	s.cancel()
	<-s.ended
	s.cancel = nil
}

func (s *simStage) close() { s.stop() }

// directOperator asks the service of the life that is running, as root would over the socket.
type directOperator struct{ s *simStage }

var demoCaller = control.Caller{User: "demo", Admin: true}

func (d *directOperator) Status(ctx context.Context) (*control.Status, error) {
	return d.s.heart.Status(ctx, demoCaller)
}

func (d *directOperator) Eligibility(ctx context.Context) (*control.Eligibility, error) {
	return d.s.heart.Eligibility(ctx, demoCaller)
}

func (d *directOperator) Offers(ctx context.Context) (*control.Offers, error) {
	return d.s.heart.Offers(ctx, demoCaller)
}

func (d *directOperator) Processes(ctx context.Context, q control.ProcessQuery) (*control.Processes, error) {
	return d.s.heart.Processes(ctx, demoCaller, q)
}

func (d *directOperator) Check(ctx context.Context) (*control.Status, error) {
	return d.s.heart.Check(ctx, demoCaller)
}

func (d *directOperator) Plan(ctx context.Context, q control.PlanQuery) (*control.Plan, error) {
	return d.s.heart.Plan(ctx, demoCaller, q)
}

func (d *directOperator) Install(ctx context.Context, r control.InstallRequest, progress func(control.Event)) (*control.Change, error) {
	return d.s.heart.Install(ctx, demoCaller, r, progress)
}

func (d *directOperator) Rollback(ctx context.Context, r control.RollbackRequest, progress func(control.Event)) (*control.Change, error) {
	return d.s.heart.Rollback(ctx, demoCaller, r, progress)
}

func (d *directOperator) Verify(ctx context.Context) (*control.Verify, error) {
	return d.s.heart.Verify(ctx, demoCaller)
}

func (d *directOperator) Close() {}
