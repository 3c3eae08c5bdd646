package sim_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/patcher/target/targettest"
)

const (
	codeAt    target.Addr = 0x7000_0001_0000
	scratchAt target.Addr = 0x7000_0002_0000
	demoDLL               = "../../../testdata/fixtures/demo/demo.dll"
)

// codeWords are "mov eax, 42; ret" and filler.
var codeWords = []any{uint64(0xccccc30000002ab8), uint64(0xcccccccccccccccc), uint64(0xcccccccccccccccc), uint64(0xcccccccccccccccc)}

// victim is a simulated process that runs a function all the time: whenever
// somebody asks, it has run it again, unless it is frozen.
type victim struct {
	t     testing.TB
	m     *sim.Machine
	id    target.ID
	mu    sync.Mutex
	calls uint64
	value int
	n     int // threads
}

func program(w targettest.Want) sim.Process {
	p := sim.Process{
		Exe: "/usr/bin/victim", User: "tester", UID: 1000, Denied: w.Denied,
		Regions: []sim.Region{
			{At: codeAt, Size: target.PageSize, Prot: "r-x", Kind: "file", Path: "/usr/bin/victim", Words: codeWords},
			{At: scratchAt, Size: target.PageSize, Words: []any{1}},
		},
	}
	for range max(w.Threads, 1) {
		p.Threads = append(p.Threads, sim.Thread{PC: codeAt})
	}
	for range w.Blocked {
		p.Threads = append(p.Threads, sim.Thread{State: "read"})
	}
	if w.AltStack {
		p.Threads = append(p.Threads, sim.Thread{ID: altThread, SP: altNormal, Stack: []any{codeAt + 5},
			State: "pause", AltStack: &sim.Signal{PC: codeAt, Stack: []any{7, 8}}})
	}
	if w.Unstoppable {
		p.Threads = append(p.Threads, sim.Thread{State: "vfork", Unstoppable: true})
	}
	return p
}

const (
	altThread             = 77777
	altNormal target.Addr = 0x6000_0000_8ff0
)

func start(m *sim.Machine) func(testing.TB, targettest.Want) (targettest.Victim, error) {
	return func(t testing.TB, w targettest.Want) (targettest.Victim, error) {
		p := program(w)
		id, err := m.Start(p)
		if err != nil {
			return nil, err
		}
		v := &victim{t: t, m: m, id: id, n: len(p.Threads)}
		t.Cleanup(v.Exit)
		if w.Churn {
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					// A frozen process starts and ends no thread: both then fail.
					if id, err := m.StartThread(v.id.PID, sim.Thread{}); err == nil {
						m.EndThread(v.id.PID, id)
					}
				}
			})
			t.Cleanup(func() { close(stop); wg.Wait() })
		}
		return v, nil
	}
}

func (v *victim) PID() int                 { return v.id.PID }
func (v *victim) Arch() target.Arch        { return target.AMD64 }
func (v *victim) Code() (target.Addr, int) { return codeAt, 32 }
func (v *victim) Threads() int             { return v.n }
func (v *victim) Scratch() target.Addr     { return scratchAt }
func (v *victim) Kill()                    { v.m.Exit(v.id.PID) }

// Exit ends the victim after a look at the invariant; the case that breaks it
// on purpose is left out.
func (v *victim) Exit() {
	if v.Alive() && !strings.HasSuffix(v.t.Name(), "/nothing_is_mapped_while_frozen") {
		if err := v.m.Invariant(v.id.PID); err != nil {
			v.t.Errorf("invariant: %v", err)
		}
	}
	v.m.Exit(v.id.PID)
}

func (v *victim) Alive() bool {
	list, err := v.m.List(context.Background())
	if err != nil {
		v.t.Errorf("List: %v", err)
	}
	for _, i := range list {
		if i.ID == v.id {
			return true
		}
	}
	return false
}

// run runs the function once, if the process is not frozen.
func (v *victim) run() error {
	if v.m.Stopped(v.id.PID) {
		return nil
	}
	at, err := v.m.Executes(v.id.PID, codeAt)
	if err != nil {
		return err
	}
	b, err := v.m.Fetch(v.id.PID, at, 6)
	if err != nil {
		return err
	}
	if b[0] != 0xb8 || b[5] != 0xc3 {
		return fmt.Errorf("the code at %s is % x", at, b)
	}
	v.calls++
	v.value = int(binary.LittleEndian.Uint32(b[1:]))
	return nil
}

func (v *victim) Calls() (uint64, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	err := v.run()
	return v.calls, err
}

func (v *victim) Value() (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	err := v.run()
	return v.value, err
}

func (v *victim) Swap() targettest.Swap {
	return targettest.Swap{At: codeAt + 1, Old: []byte{42, 0, 0, 0}, New: []byte{43, 0, 0, 0}, OldValue: 42, NewValue: 43}
}

func (v *victim) Exec() (target.Addr, error) {
	next := program(targettest.Want{})
	next.Exe = "/usr/bin/other"
	next.Regions[1].Words = []any{uint64(0x5a5a5a5a5a5a5a5a), uint64(0x5a5a5a5a5a5a5a5a)}
	_, err := v.m.Exec(v.id.PID, next)
	return scratchAt, err
}

func (v *victim) Fork() (targettest.Victim, error) {
	id, err := v.m.Fork(v.id.PID)
	if err != nil {
		return nil, err
	}
	c := &victim{t: v.t, m: v.m, id: id, n: 1}
	v.t.Cleanup(c.Exit)
	return c, nil
}

func (v *victim) Map() (target.Span, error) {
	b, err := os.ReadFile(demoDLL)
	if err != nil {
		return target.Span{}, err
	}
	if _, err := v.m.LoadModule(v.id.PID, sim.Module{Name: "demo.dll", Image: b}); err != nil {
		return target.Span{}, err
	}
	return v.m.Module(v.id.PID, "demo.dll")
}

func (v *victim) Unmap() error { return v.m.UnloadModule(v.id.PID, "demo.dll") }

func (v *victim) Trace() (func(), error) {
	err := v.m.SetGuards(v.id.PID, target.Guard{Code: target.GuardTracer, Text: "traced by strace, pid 31211"})
	return func() { v.m.SetGuards(v.id.PID) }, err
}

func (v *victim) Normal() (int, target.Addr) { return altThread, altNormal }

func TestSuite(t *testing.T) {
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	targettest.Run(t, targettest.Setup{Backend: m, Start: start(m)})
}
