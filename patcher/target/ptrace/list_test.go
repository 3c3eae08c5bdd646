//go:build linux && amd64

package ptrace

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// BenchmarkList measures one List, with and without news of process starts.
func BenchmarkList(b *testing.B) {
	b.Run("told", func(b *testing.B) {
		k := newBackend(b)
		if _, err := k.Watch(b.Context()); err != nil {
			b.Skip(err)
		}
		benchList(b, k)
	})
	b.Run("untold", func(b *testing.B) { benchList(b, newBackend(b)) })
}

func benchList(b *testing.B, k *backend) {
	for range 200 {
		c := exec.Command("sleep", "1000")
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Process.Kill(); c.Wait() })
	}
	k.List(context.Background())
	n := 0
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		l, err := k.List(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		n = len(l)
	}
	b.ReportMetric(float64(n), "processes")
	b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

// TestListTold: a List that need not ask each process whether it executed a
// program misses none that did, and none that maps something.
func TestListTold(t *testing.T) {
	b := newBackend(t)
	events, err := b.Watch(t.Context())
	if err != nil {
		t.Skipf("needs news of processes, which come in the first namespaces only: %v", err)
	}
	h := hosttest.Start(t, hosttest.Options{DLL: hosttest.Unnamed(t, "mingw/app.dll"), Call: "vuln", Allow: []int{42}})
	look := func() target.Info {
		t.Helper()
		l, err := b.List(t.Context())
		must(t, "List", err)
		for _, i := range l {
			if i.PID == h.PID {
				return i
			}
		}
		t.Fatal("the host is not in the list")
		panic("")
	}
	quiet := func() target.Info { // until nothing changes by itself
		t.Helper()
		last := look()
		for same := 0; same < 3; same++ {
			time.Sleep(5 * time.Millisecond)
			if i := look(); i.Change != last.Change {
				last, same = i, 0
			}
		}
		return last
	}
	if quiet(); !b.procs[h.PID].brief {
		t.Fatal("it is not looked at by the cheap file")
	}
	for n := range 30 {
		was, at := quiet(), time.Now()
		h.Exec()
		for {
			var e target.Event
			select {
			case e = <-events:
			case <-time.After(time.Minute):
				t.Fatal("nobody tells of the exec")
			}
			if e.Kind == target.Started && e.PID == h.PID && e.At.After(at) {
				break
			}
		}
		if now := look(); now.ID == was.ID {
			t.Fatalf("exec %d: the new life has the old one's id", n)
		}
	}
	was := quiet()
	if _, err := h.Ask("load " + hosttest.Fixture(t, "mingw/app.dll")); err != nil {
		t.Fatal(err)
	}
	if now := look(); now.ID != was.ID || now.Change == was.Change {
		t.Errorf("an image was mapped: %+v, before it %+v", now, was)
	}
}

// TestNews: what the next List may go by.
func TestNews(t *testing.T) {
	var n news
	check := func(what string, untold, code bool, pids ...int) {
		t.Helper()
		h := n.take()
		if h.untold != untold || h.code != code || len(h.pids) != len(pids) {
			t.Errorf("%s: %+v", what, h)
		}
		for _, pid := range pids {
			if !h.pids[pid] {
				t.Errorf("%s: %d is not among %v", what, pid, h.pids)
			}
		}
	}
	check("nobody tells", true, false)
	check("nobody tells, still", true, false)
	n.begin(true)
	check("before the first news", true, false)
	check("no news", false, true)
	n.add(1)
	n.add(2)
	n.add(1)
	check("two", false, true, 1, 2)
	check("taken", false, true)
	n.add(1)
	n.miss()
	n.add(2)
	check("some were lost", true, false)
	check("after that", false, true)
	for pid := range maxNews {
		n.add(pid)
		n.add(pid)
	}
	if h := n.take(); len(h.pids) != maxNews || h.untold {
		t.Errorf("%d processes, untold %v", len(h.pids), h.untold)
	}
	for pid := range maxNews + 1 {
		n.add(pid)
	}
	check("too many", true, false)
	n.end(true)
	check("new code is not told any more", true, false)
	check("but the rest is", false, false)
	n.end(false)
	check("over", true, false)
	check("over, still", true, false)
	n.begin(false)
	check("again, without new code", true, false)
	check("again", false, false)
}

// TestListBroken: what was told is not forgotten with a List that fails.
func TestListBroken(t *testing.T) {
	for _, c := range []struct {
		name string
		list func(b *backend) error
	}{
		{"/proc cannot be read", func(b *backend) error {
			proc := b.proc
			b.proc = -1
			_, err := b.List(t.Context())
			b.proc = proc
			return err
		}},
		{"nobody waits for it", func(b *backend) error {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := b.List(ctx)
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBackend(t)
			b.news.begin(true)
			_, err := b.List(t.Context())
			must(t, "List", err)
			b.news.add(1)
			if err := c.list(b); err == nil {
				t.Fatal("it does not fail")
			}
			_, err = b.List(t.Context())
			must(t, "List", err)
			if !b.heard.untold && !b.heard.pids[1] {
				t.Error("the next List does not know that 1 did something")
			}
			if _, err = b.List(t.Context()); err != nil || b.heard.untold {
				t.Errorf("nor does it go by what is told later (%v)", err)
			}
		})
	}
}

// cpu is the processor time this process has used: what a loaded machine does not distort.
func cpu() time.Duration {
	var r unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
