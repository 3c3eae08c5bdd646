//go:build linux && amd64

package ptrace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// tracerEnv makes the test binary a tracer of the process it names.
const tracerEnv = "HOTPATCHD_TEST_TRACER"

func TestMain(m *testing.M) {
	if os.Getenv(goVictimEnv) != "" {
		goVictim()
	}
	if s := os.Getenv(fuseEnv); s != "" {
		serveFuse(s)
	}
	if s := os.Getenv(ordinaryEnv); s != "" {
		ordinaryUser(s)
	}
	if s := os.Getenv(tracerEnv); s != "" {
		job := strings.Split(s, ":") // PID:ORDER[:MOMENT]
		n, _ := strconv.Atoi(job[0])
		seed := rand.Uint32() | 1
		before = func(a, b *candidate) bool {
			if job[1] == "computing" && a.rank != b.rank {
				return a.rank > b.rank
			}
			return uint32(a.tid)*seed < uint32(b.tid)*seed // any
		}
		if len(job) == 3 {
			k, _ := strconv.Atoi(job[2])
			passing = func(m moment) {
				if m == moment(k) {
					unix.Kill(unix.Getpid(), unix.SIGKILL)
				}
			}
		}
		traceForEver(n)
	}
	os.Exit(m.Run())
}

// traceForEver does everything to a process that can be done, again and again,
// until it is killed. It ends by itself only if something fails.
func traceForEver(pid int) {
	fail := func(what string, err error) {
		if err != nil {
			fmt.Println(what, err)
			os.Exit(1)
		}
	}
	b, err := New()
	fail("New", err)
	ctx := context.Background()
	l, err := b.List(ctx)
	fail("List", err)
	for _, i := range l {
		if i.PID != pid {
			continue
		}
		p, err := b.Open(ctx, i.ID)
		fail("Open", err)
		// Each tracer works where those before it may have left something.
		at := target.Addr(0x3000_0000_0000 + rand.Int64N(1<<28)<<16)
		fmt.Println("ready")
		for {
			fail("Alloc", busyIsFine(p.Alloc(at, 4*target.PageSize, target.Read|target.Exec)))
			if rand.IntN(4) == 0 {
				if z, err := p.Freeze(ctx); err == nil {
					_, err = z.Threads()
					fail("Threads", err)
					fail("Thaw", z.Thaw())
				}
			}
			fail("Protect", busyIsFine(p.Protect(at, target.PageSize, target.Read)))
			fail("Free", busyIsFine(p.Free(at, 4*target.PageSize)))
		}
	}
	fmt.Println("no such process")
	os.Exit(1)
}

func busyIsFine(err error) error {
	if err != nil && !errors.Is(err, target.ErrBusy) {
		return err
	}
	return nil
}

// victims are hosts with the kinds of threads that differ in how they are
// interrupted, and the work that must go on.
var victims = []struct {
	name  string
	order string // which threads are to make the calls first
	o     hosttest.Options
	work  func(hosttest.Stats) uint64
}{
	{"all registers full", "computing", hosttest.Options{FP: 1}, func(s hosttest.Stats) uint64 { return s.FP }},
	{"sleeps", "any", hosttest.Options{Sleep: 4}, func(s hosttest.Stats) uint64 { return s.Sleeps }},
	{"read, poll and futex", "any", hosttest.Options{Block: 3}, func(s hosttest.Stats) uint64 { return s.Reads }},
	{"waits without a time limit", "any", hosttest.Options{Wait: true}, func(s hosttest.Stats) uint64 { return s.Waits }},
	{"everything", "computing", hosttest.Options{Wait: true, Spin: 1, FP: 1, Sleep: 4, Block: 3, Churn: 1, AltStack: true}, func(s hosttest.Stats) uint64 { return s.Calls }},
	{"static", "computing", hosttest.Options{FP: 1, Sleep: 1, Block: 1, Static: true}, func(s hosttest.Stats) uint64 { return s.FP }},
}

// randomKills is how often each victim loses its tracer at any moment,
// roundsOfKills how often at each moment of a remote call.
const (
	randomKills   = 25
	roundsOfKills = 3
)

// A tracer that is killed leaves its target running, unharmed.
func TestTracerKilled(t *testing.T) {
	for _, v := range victims {
		t.Run(v.name, func(t *testing.T) {
			h := hosttest.Start(t, demo(t, v.o))
			kills := 0
			goesOn := func(what string) {
				t.Helper()
				kills++
				from := v.work(h.Stats())
				for end := time.Now().Add(hosttest.Patience); v.work(h.Stats()) <= from; time.Sleep(time.Millisecond) {
					if !h.Alive() || time.Now().After(end) {
						t.Fatalf("killed %s: the target is harmed (alive: %v, %+v)", what, h.Alive(), h.Stats())
					}
				}
			}
			for range randomKills {
				killTracer(t, fmt.Sprintf("%d:%s", h.PID, v.order), time.Duration(rand.IntN(4000))*time.Microsecond)
				goesOn("at random")
			}
			for range roundsOfKills {
				for m := range moments {
					killTracer(t, fmt.Sprintf("%d:%s:%d", h.PID, v.order, m), hosttest.Patience)
					goesOn(fmt.Sprintf("at moment %d", m))
				}
			}
			h.Healthy()
			if h.Value() != 42 { // the control thread is well too
				t.Error("wrong value")
			}
			if held := tracedThreads(t, h.PID); held != 0 {
				t.Errorf("%d threads are still traced", held)
			}
			t.Logf("%d tracers killed, %+v", kills, h.Stats())
		})
	}
}

func tracedThreads(t *testing.T, pid int) (n int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		if b, err := os.ReadFile(f); err == nil && statusField(b, "TracerPid") != "0" {
			n++
		}
	}
	return n
}

// killTracer lets a tracer work for a while and kills it, unless it dies by
// itself before.
func killTracer(t *testing.T, job string, after time.Duration) {
	t.Helper()
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), tracerEnv+"="+job)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	line, err := r.ReadString('\n')
	if line != "ready\n" {
		after = 0
	}
	timer := time.AfterFunc(after, func() { c.Process.Kill() })
	rest, _ := io.ReadAll(r)
	early := timer.Stop()
	c.Wait()
	if line != "ready\n" || len(rest) > 0 || !c.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
		t.Fatalf("the tracer says %q %q, %v, %v", line, rest, err, c.ProcessState)
	}
	if dies := strings.Count(job, ":") == 2; dies && !early {
		t.Fatalf("the tracer did not come to its moment (%s)", job)
	}
}
