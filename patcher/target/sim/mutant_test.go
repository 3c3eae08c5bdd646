package sim_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/patcher/target/targettest"
)

// mutantEnv names the promise that a backend under test breaks.
const mutantEnv = "HOTPATCH_SIM_MUTANT"

// mutants are backends that break one promise, and the case that must find out.
var mutants = map[string]string{
	"opens any life":                    "open refuses another life",
	"names no owner":                    "list finds the victim",
	"lists the dead":                    "list leaves out what is over",
	"short reads are no errors":         "reads and writes end where memory ends",
	"writes by the page protection":     "write to code",
	"regions out of order":              "regions are sorted and cover the code",
	"alloc hints":                       "alloc gives exactly what was asked",
	"alloc over others":                 "alloc refuses",
	"alloc without a kind":              "alloc refuses",
	"protect does nothing":              "protect",
	"free does nothing":                 "free",
	"a thread is missed":                "freeze stops every thread",
	"freeze stops nothing":              "freeze stops every thread",
	"thaw says yes":                     "thaw is idempotent",
	"thaw of another freeze":            "thaw is idempotent",
	"close holds on":                    "close thaws",
	"the context does not matter":       "the end of the context thaws",
	"late freeze":                       "a context that is over stops nothing",
	"no signal frames":                  "a thread on its signal stack",
	"busy without a name":               "a thread that cannot be stopped",
	"alloc while frozen":                "nothing is mapped while frozen",
	"a handle follows exec":             "exec is another life",
	"gone is any error":                 "the end of a process between any two calls",
	"tracers are overlooked":            "another tracer is named and respected",
	"the change counter stands":         "the change counter follows mappings",
	"the change counter always changes": "the change counter follows mappings",
	"writes are not flushed":            "a swap changes what runs, and back",
	"the watch sleeps":                  "the watch tells",
	"the watch tells of others":         "the watch tells",
	"the watch tells no exits":          "the watch tells",
	"the list of some is of all":        "list of some",
	"the list of some is of none":       "list of some",
}

// TestMutants: the suite is worth something only if it fails.
func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("left out with -short: runs the suite once for each of many broken backends")
	}
	for name, finder := range mutants {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := exec.Command(os.Args[0], "-test.run", "^TestMutantSuite$/^"+strings.ReplaceAll(finder, " ", "_")+"$", "-test.v")
			c.Env = append(os.Environ(), mutantEnv+"="+name)
			out, err := c.CombinedOutput()
			var ee *exec.ExitError
			if !errors.As(err, &ee) || !strings.Contains(string(out), "--- FAIL: TestMutantSuite/"+strings.ReplaceAll(finder, " ", "_")) {
				t.Errorf("%q does not find it (%v):\n%s", finder, err, out)
			}
		})
	}
}

func TestMutantSuite(t *testing.T) {
	name, ok := os.LookupEnv(mutantEnv)
	if !ok {
		t.Skip("run by TestMutants")
	}
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	targettest.Run(t, targettest.Setup{Backend: &mutant{Machine: m, name: name, ghosts: map[int]target.Info{}}, Start: start(m), Patience: 300 * time.Millisecond})
}

type mutant struct {
	*sim.Machine
	name    string
	ghosts  map[int]target.Info
	counter uint64
}

func (m *mutant) is(name string) bool { return m.name == name }

func (m *mutant) List(ctx context.Context) ([]target.Info, error) {
	list, err := m.Machine.List(ctx)
	for i := range list {
		x := &list[i]
		switch m.name {
		case "names no owner":
			x.User = ""
		case "lists the dead":
			m.ghosts[x.PID] = *x
		case "the change counter stands":
			x.Change = 1
		case "the change counter always changes":
			m.counter++
			x.Change = m.counter
		case "tracers are overlooked":
			x.Guards = nil
		}
	}
	for pid, g := range m.ghosts {
		if !slices.ContainsFunc(list, func(i target.Info) bool { return i.PID == pid }) {
			list = append(list, g)
		}
	}
	return list, err
}

func (m *mutant) Open(ctx context.Context, id target.ID) (target.Process, error) {
	if m.is("opens any life") {
		list, _ := m.Machine.List(ctx)
		for _, i := range list {
			if i.PID == id.PID {
				id = i.ID
			}
		}
	}
	p, err := m.Machine.Open(ctx, id)
	if err != nil {
		return nil, err
	}
	return &mutantProcess{Process: p, m: m, id: id}, nil
}

func (m *mutant) Watch(ctx context.Context) (<-chan target.Event, error) {
	events, err := m.Machine.Watch(ctx)
	if err != nil || !m.is("the watch sleeps") && !m.is("the watch tells of others") && !m.is("the watch tells no exits") {
		return events, err
	}
	out := make(chan target.Event)
	go func() {
		defer close(out)
		for e := range events {
			switch {
			case m.is("the watch sleeps"), m.is("the watch tells no exits") && e.Kind == target.Exited:
				continue
			case m.is("the watch tells of others"):
				e.PID++
			}
			select {
			case out <- e:
			case <-ctx.Done():
			}
		}
	}()
	return out, nil
}

func (m *mutant) ListOf(ctx context.Context, pids []int) ([]target.Info, error) {
	if m.is("the list of some is of all") {
		return m.Machine.List(ctx)
	}
	list, err := m.Machine.ListOf(ctx, pids)
	if m.is("the list of some is of none") {
		list = nil
	}
	return list, err
}

type mutantProcess struct {
	target.Process
	m  *mutant
	id target.ID
	f  *mutantFrozen
}

func (p *mutantProcess) is(name string) bool { return p.m.is(name) }

func (p *mutantProcess) Info() target.Info {
	i := p.Process.Info()
	if p.is("tracers are overlooked") {
		i.Guards = nil
	}
	return i
}

// follow opens whatever life the pid has now.
func (p *mutantProcess) follow(err error) bool {
	if !p.is("a handle follows exec") || !errors.Is(err, target.ErrGone) {
		return false
	}
	list, _ := p.m.Machine.List(context.Background())
	for _, i := range list {
		if i.PID == p.id.PID && i.ID != p.id {
			q, err := p.m.Machine.Open(context.Background(), i.ID)
			if err == nil {
				p.Process = q
			}
			return err == nil
		}
	}
	return false
}

func (p *mutantProcess) ReadAt(b []byte, at target.Addr) (int, error) {
	n, err := p.Process.ReadAt(b, at)
	switch {
	case p.is("short reads are no errors") && n > 0:
		err = nil
	case p.is("gone is any error") && errors.Is(err, target.ErrGone):
		err = errors.New("no such process")
	}
	return n, err
}

func (p *mutantProcess) WriteAt(b []byte, at target.Addr) (int, error) {
	if p.is("writes by the page protection") {
		for _, r := range must(p.Process.Regions()) {
			if at >= r.Start && at < r.End && r.Prot&target.Write == 0 {
				return 0, errors.New("bad address")
			}
		}
	}
	n, err := p.Process.WriteAt(b, at)
	if p.follow(err) {
		return p.Process.WriteAt(b, at)
	}
	return n, err
}

func must[T any](v T, _ error) T { return v }

func (p *mutantProcess) Flush(at target.Addr, n int) error {
	if p.is("writes are not flushed") {
		return nil
	}
	return p.Process.Flush(at, n)
}

func (p *mutantProcess) Regions() ([]target.Region, error) {
	list, err := p.Process.Regions()
	if p.is("regions out of order") {
		slices.Reverse(list)
	}
	return list, err
}

func (p *mutantProcess) Alloc(at target.Addr, size uint64, prot target.Prot) error {
	switch p.m.name {
	case "alloc hints":
		return p.Process.Alloc(at+0x10000, size, prot)
	case "alloc while frozen":
		if p.f != nil {
			p.f.Frozen.Thaw()
			return p.Process.Alloc(at, size, prot)
		}
	}
	err := p.Process.Alloc(at, size, prot)
	if errors.Is(err, target.ErrTaken) {
		switch p.m.name {
		case "alloc over others":
			if p.Process.Free(at, size) == nil {
				return p.Process.Alloc(at, size, prot)
			}
		case "alloc without a kind":
			return errors.New("file exists")
		}
	}
	return err
}

func (p *mutantProcess) Protect(at target.Addr, size uint64, prot target.Prot) error {
	if p.is("protect does nothing") {
		return nil
	}
	return p.Process.Protect(at, size, prot)
}

func (p *mutantProcess) Free(at target.Addr, size uint64) error {
	if p.is("free does nothing") {
		return nil
	}
	return p.Process.Free(at, size)
}

func (p *mutantProcess) Freeze(ctx context.Context) (target.Frozen, error) {
	if p.is("the context does not matter") {
		ctx = context.WithoutCancel(ctx)
	}
	if p.is("late freeze") && ctx.Err() != nil {
		ctx = context.Background()
	}
	f, err := p.Process.Freeze(ctx)
	if err != nil {
		var te *target.Error
		if p.is("busy without a name") && errors.As(err, &te) {
			te.Note = ""
		}
		return nil, err
	}
	p.f = &mutantFrozen{Frozen: f, p: p}
	if p.is("freeze stops nothing") {
		f.Thaw()
	}
	return p.f, nil
}

func (p *mutantProcess) Close() error {
	if p.is("close holds on") && p.f != nil {
		return nil
	}
	return p.Process.Close()
}

type mutantFrozen struct {
	target.Frozen
	p *mutantProcess
}

func (f *mutantFrozen) Threads() ([]target.Thread, error) {
	if f.p.is("freeze stops nothing") {
		return []target.Thread{}, nil
	}
	list, err := f.Frozen.Threads()
	if f.p.is("a thread is missed") && len(list) > 1 {
		list = list[1:]
	}
	return list, err
}

func (f *mutantFrozen) Thaw() error {
	if f.p.is("thaw says yes") {
		return nil
	}
	if f.p.is("thaw of another freeze") && f.p.f != f {
		f.p.f.Frozen.Thaw()
	}
	return f.Frozen.Thaw()
}

func (f *mutantFrozen) Interrupted(b []byte, at target.Addr) []target.Addr {
	if f.p.is("no signal frames") {
		return nil
	}
	return f.Frozen.(target.Interrupter).Interrupted(b, at)
}

func (f *mutantFrozen) Pause() time.Duration { return f.Frozen.(target.Pauser).Pause() }
