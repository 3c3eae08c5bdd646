package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// chaosEnv repeats a run: the seed it printed.
const chaosEnv = "HOTPATCH_E2E_SEED"

// Everything at once: processes start, fork, exec, stop, reload their images,
// lose their main threads and share their memory, while fixes go in and out and
// the daemon is killed. None is ever harmed, and when it is quiet again all are
// as they should be.
func TestEverythingAtOnce(t *testing.T) {
	long := 12 * time.Second
	if testing.Short() {
		long = 4 * time.Second
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv(chaosEnv), 10, 64); err == nil {
		seed = s
	}
	t.Logf("%s=%d", chaosEnv, seed)
	d := newDevice(t, appFix)
	d.start()
	c := &chaos{device: d, r: rand.New(rand.NewPCG(seed, 1))}
	for range 4 {
		c.begin()
	}
	var operator sync.WaitGroup
	quiet := make(chan struct{})
	operator.Go(func() { c.operate(rand.New(rand.NewPCG(seed, 2)), quiet) })
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(time.Duration(c.r.IntN(20)) * time.Millisecond) {
		c.step()
	}
	close(quiet)
	operator.Wait()
	for _, m := range c.members {
		c.calm(m)
	}
	t.Logf("%d processes; %v", len(c.members), c.done)

	d.until("the daemon answers", func() bool { _, err := d.client.Status(context.Background()); return err == nil })
	d.hotpatch(0, "resume")
	d.hotpatch(0, "wait", "--for", "settled", "--timeout", "60s")
	for _, round := range []struct {
		command string
		state   control.ImageState
		value   int
	}{{"install", control.Patched, 43}, {"rollback", control.Unpatched, 42}, {"install", control.Patched, 43}} {
		d.run(nil, "hotpatch", "--socket", d.set.socket, round.command, "ACME-1")
		for _, m := range c.members {
			d.becomes(m.PID, round.state)
			if v := m.Value(); v != round.value {
				t.Errorf("process %d, which is %s, answers %d", m.PID, round.state, v)
			}
			m.Runs()
		}
		d.hotpatch(0, "verify")
	}
	for _, m := range c.members {
		m.Healthy()
	}
}

// member is one process of the chaos.
type member struct {
	*hosttest.Host
	own      bool // started by us, not forked by another
	children int
	stops    bool // may be stopped by a signal: nothing in it minds
	stopped  bool
	unloaded bool
	shares   bool
	leader   bool // its main thread lives
}

type chaos struct {
	*device
	r       *rand.Rand
	members []*member
	lives   int // blocks of counters used up
	done    map[string]int
}

// most bounds the processes at a time, and mostLives those that one host's counters hold.
const (
	most      = 16
	mostLives = 100
)

func (c *chaos) begin() {
	o := []hosttest.Options{
		{Spin: 1, FP: 1},
		{Spin: 1, Sleep: 2, Block: 1},
		{DLL: "clang/app.dll", Map: "anon", Spin: 2},
		{DLL: "plain/app.dll", Spin: 1, Sleep: 1},
	}[c.r.IntN(4)]
	m := &member{Host: app(c.t, o), own: true, stops: o.Sleep+o.Block == 0, leader: true}
	c.members = append(c.members, m)
}

// step does one thing to one process.
func (c *chaos) step() {
	if c.done == nil {
		c.done = map[string]int{}
	}
	if len(c.members) == 0 {
		c.begin()
	}
	m := c.members[c.r.IntN(len(c.members))]
	what := []string{"start", "fork", "fork", "exit", "exec", "stop", "reload", "unload", "sharer", "end of leader", "ask"}[c.r.IntN(11)]
	if m.stopped || m.unloaded || m.shares {
		c.calm(m)
		return
	}
	switch {
	case what == "start" && len(c.members) < most:
		c.begin()
	case what == "fork" && m.children < 8 && len(c.members) < most:
		m.children++
		c.members = append(c.members, &member{Host: m.Fork(), stops: m.stops, leader: true})
	case what == "exit" && len(c.members) > 4 && m.children == 0:
		m.Healthy()
		m.Exit()
		for i := range c.members {
			if c.members[i] == m {
				c.members = append(c.members[:i], c.members[i+1:]...)
				break
			}
		}
	case what == "exec" && m.own && m.children == 0 && c.lives < mostLives:
		c.lives++
		m.Exec()
		m.leader = true
	case what == "stop" && m.stops && m.children == 0: // children are spoken to through it
		unix.Kill(m.PID, unix.SIGSTOP)
		m.stopped = true
	case what == "reload":
		m.Do("reload")
	case what == "unload":
		m.Do("unload")
		m.unloaded = true
	case what == "sharer":
		m.Do([]string{"vfork", "clone-vm"}[c.r.IntN(2)])
		m.shares = true
	case what == "end of leader" && m.leader:
		m.Do("stop-leader")
		m.leader = false
	case what == "ask":
		if v := m.Value(); v != 42 && v != 43 {
			c.t.Fatalf("process %d answers %d", m.PID, v)
		}
	default:
		return
	}
	c.done[what]++
}

// calm ends what a process is in the middle of.
func (c *chaos) calm(m *member) {
	switch {
	case m.stopped:
		unix.Kill(m.PID, unix.SIGCONT)
		m.stopped = false
	case m.unloaded:
		m.Do("reload")
		m.unloaded = false
	case m.shares:
		m.Do("unshare")
		m.shares = false
	}
}

// operate gives orders and ends daemons until it is to be quiet; then one runs.
func (c *chaos) operate(r *rand.Rand, quiet <-chan struct{}) {
	for {
		select {
		case <-quiet:
			return
		case <-time.After(time.Duration(r.IntN(300)) * time.Millisecond):
		}
		switch what := r.IntN(10); what {
		case 0:
			c.kill()
			c.launch()
		case 1:
			c.stop()
			c.launch()
		default:
			order := []string{"rollback ACME-1", "install ACME-1", "pause", "resume", "verify", "hold ACME-1", "check", "processes"}[what-2]
			// Any outcome will do: the daemon may be starting just now.
			c.run(nil, "hotpatch", append([]string{"--socket", c.set.socket}, strings.Fields(order)...)...)
		}
	}
}
