//go:build linux && amd64

package ptrace

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// mapper reserves memory and, told so, maps a file executable over it, without
// touching it. With another argument it forks at once, or touches it.
const mapper = `
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv) {
	char *at = mmap(0, 1 << 24, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	puts("ready"); fflush(stdout);
	if (argc < 2 || getchar() < 0) return 1;
	if (mmap(at, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, open(argv[1], O_RDONLY), 0) == MAP_FAILED) return 1;
	if (argc > 2 && *argv[2] == 'f' && !fork()) pause();
	if (argc > 2 && *argv[2] == 't' && !*(volatile char *)at) return 1;
	puts("mapped"); fflush(stdout);
	while (getchar() >= 0);
	return 0;
}
`

// TestListNewCode: a process whose size and page faults are as they were may have
// mapped code all the same, over memory that it had; and what was an ELF file may
// be another one. A List in the next moment knows.
func TestListNewCode(t *testing.T) {
	program, dll := buildMapper(t), hosttest.Fixture(t, "mingw/app.dll")
	for _, known := range []bool{false, true} {
		t.Run(fmt.Sprintf("known as ELF %v", known), func(t *testing.T) {
			b := newBackend(t)
			if _, err := b.Watch(t.Context()); err != nil {
				t.Skipf("needs news of processes, which come in the first namespaces only: %v", err)
			}
			if known {
				var s unix.Stat_t
				must(t, "stat", unix.Stat(dll, &s))
				b.elfs.add(inode{makeDevice(uint64(unix.Major(s.Dev)), uint64(unix.Minor(s.Dev))), s.Ino})
			}
			pid, mapIt := startMapper(t, program, dll)
			look := func() target.Info { return listed(t, b, pid) }
			was := look()
			for same := 0; same < 4; same++ {
				time.Sleep(watchNews)
				if i := look(); i.Change != was.Change {
					was, same = i, 0
				}
			}
			if !was.Bare {
				t.Fatal("it is not bare before")
			}
			mapIt()
			for range 3 { // far fewer than statRounds
				if i := look(); i.Change != was.Change {
					if i.Bare {
						t.Error("it is bare with a PE image")
					}
					return
				}
				time.Sleep(watchNews)
			}
			t.Error("Lists do not see what was mapped")
		})
	}
}

func buildMapper(t *testing.T) string {
	t.Helper()
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		hosttest.Need(t, "gcc (apt-get install gcc libc6-dev)")
	}
	dir := t.TempDir()
	source, program := filepath.Join(dir, "mapper.c"), filepath.Join(dir, "mapper")
	must(t, "write", os.WriteFile(source, []byte(mapper), 0o600))
	if out, err := exec.Command(gcc, "-O1", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// startMapper starts a mapper, and gives back what has it map, once it says that it is ready.
func startMapper(t *testing.T, program string, args ...string) (pid int, mapIt func()) {
	t.Helper()
	c := exec.Command(program, args...)
	in, err := c.StdinPipe()
	must(t, "pipe", err)
	out, err := c.StdoutPipe()
	must(t, "pipe", err)
	must(t, "start", c.Start())
	t.Cleanup(func() { in.Close(); c.Process.Kill(); c.Wait() })
	said := bufio.NewScanner(out)
	said.Scan()
	return c.Process.Pid, func() {
		t.Helper()
		fmt.Fprintln(in, "map")
		if said.Scan(); said.Text() != "mapped" {
			t.Fatalf("it says %q", said.Text())
		}
	}
}

// listed is what a List says of a process.
func listed(t *testing.T, b *backend, pid int) target.Info {
	t.Helper()
	list, err := b.List(t.Context())
	must(t, "List", err)
	k := slices.IndexFunc(list, func(i target.Info) bool { return i.PID == pid })
	if k < 0 {
		t.Fatal("it is not in the list")
	}
	return list[k]
}

// TestListUntoldCode: where nobody tells of new code a bare process is looked at
// each time, as any other.
func TestListUntoldCode(t *testing.T) {
	b := newBackend(t)
	b.news.begin(false)
	pid, mapIt := startMapper(t, buildMapper(t), hosttest.Fixture(t, "mingw/app.dll"), "touch")
	look := func() target.Info { return listed(t, b, pid) }
	was := look()
	for range 3 {
		was = look()
	}
	if !was.Bare {
		t.Fatal("it is not bare before")
	}
	mapIt()
	b.round = -uint64(pid)
	for range statRounds - 1 { // then all are looked at
		if i := look(); i.Change != was.Change {
			if i.Bare {
				t.Error("it is bare with a PE image")
			}
			return
		}
	}
	t.Error("Lists do not see what was mapped")
}

// TestForkTold is TestForkedWithNewCode with real processes, whenever their events
// are read.
func TestForkTold(t *testing.T) {
	program, dll := buildMapper(t), hosttest.Fixture(t, "mingw/app.dll")
	events, err := newBackend(t).Watch(t.Context())
	if err != nil {
		t.Skipf("needs news of processes, which come in the first namespaces only: %v", err)
	}
	for n := range 30 {
		c := exec.Command(program, dll, "fork")
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		in, err := c.StdinPipe()
		must(t, "pipe", err)
		must(t, "start", c.Start())
		end := sync.OnceFunc(func() { syscall.Kill(-c.Process.Pid, syscall.SIGKILL); in.Close(); c.Wait() })
		t.Cleanup(end)
		time.Sleep(time.Duration(n) * watchGather / 10)
		fmt.Fprintln(in, "map")
		mapped, child := map[int]bool{}, 0
		for limit := time.After(time.Minute); child == 0 || !mapped[child]; {
			select {
			case e := <-events:
				switch {
				case e.Kind == target.Lost:
					t.Skip("the machine is too busy: events were lost")
				case e.Kind == target.Forked && e.Parent == c.Process.Pid:
					if child = e.PID; !e.Told {
						t.Skip("nobody tells of new code here")
					}
				case e.Kind == target.Mapped:
					mapped[e.PID] = true
				}
			case <-limit:
				t.Fatalf("try %d: it is not told that child %d of %d has new code", n, child, c.Process.Pid)
			}
		}
		end()
	}
}

// TestForkedWithNewCode: the child of a process that got new code right before has
// it too, and is told of whichever comes first to be read of, the code or the fork.
func TestForkedWithNewCode(t *testing.T) {
	w, put := ringWatcher(100)
	const parent, child, grandchild = 5, 6, 7
	code := func(pid int, at uint64) func() {
		return func() { put(mmap2(pid, 8, 1, 3, "/app.dll", at, 0)) }
	}
	tell := func(m message) func() { return func() { w.tell(m) } }
	forked := func(pid, by int, at uint64) func() {
		return tell(message{what: eventFork, pid: pid, parent: by, at: at})
	}
	does := func(what uint32, pid int) func() { return tell(message{what: what, pid: pid, at: 50}) }
	// Each reading is of the records, then of the socket, as in read.
	type reading struct{ records, events []func() }
	for name, c := range map[string]struct {
		readings []reading
		want     []int
	}{
		"the code is read of first":           {[]reading{{[]func(){code(parent, 9)}, []func(){forked(child, parent, 10)}}}, []int{parent, child}},
		"the fork is":                         {[]reading{{nil, []func(){forked(child, parent, 10)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent, child}},
		"the fork was before":                 {[]reading{{nil, []func(){forked(child, parent, 8)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent}},
		"the fork was before, and is told":    {[]reading{{[]func(){code(parent, 9)}, []func(){forked(child, parent, 8)}}}, []int{parent}},
		"the parent ends":                     {[]reading{{[]func(){code(parent, 9)}, []func(){forked(child, parent, 10), does(eventExit, parent)}}}, []int{child}},
		"the child has ended":                 {[]reading{{nil, []func(){forked(child, parent, 10), does(eventExit, child)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent}},
		"it executes another program":         {[]reading{{nil, []func(){forked(child, parent, 10), does(eventExec, child)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent}},
		"a child of the child, which ended":   {[]reading{{nil, []func(){forked(child, parent, 10), forked(grandchild, child, 11), does(eventExit, child)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent, grandchild}},
		"told in another order":               {[]reading{{nil, []func(){forked(grandchild, child, 11), forked(child, parent, 10)}}, {[]func(){code(parent, 9)}, nil}}, []int{parent, child, grandchild}},
		"a fork that was told long before":    {[]reading{{nil, []func(){forked(child, parent, 10)}}, {}, {[]func(){code(parent, 9)}, nil}}, []int{parent}},
		"the code of another":                 {[]reading{{nil, []func(){forked(child, parent, 10)}}, {[]func(){code(grandchild, 9)}, nil}}, []int{grandchild}},
		"it executes a program and gets more": {[]reading{{nil, []func(){forked(child, parent, 10), does(eventExec, child)}}, {[]func(){code(parent, 9), code(child, 60)}, nil}}, []int{parent, child}},
	} {
		t.Run(name, func(t *testing.T) {
			clear(w.forks)
			var got []int
			for _, x := range c.readings {
				for _, do := range x.records {
					do()
				}
				w.readMapped()
				w.inherit()
				for _, do := range x.events {
					do()
				}
				w.tellMapped()
				for len(w.events) > 0 {
					if e := <-w.events; e.Kind == target.Mapped {
						got = append(got, e.PID)
					}
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, c.want) {
				t.Errorf("new code is told of %v, want %v", got, c.want)
			}
		})
	}
}

// ringWatcher has one ring, into which put writes as the kernel does.
func ringWatcher(events int) (w *watcher, put func(record []byte)) {
	r := &ring{page: &unix.PerfEventMmapPage{}, data: make([]byte, perfRing)}
	w = &watcher{perf: &perf{rings: []*ring{r}, counted: time.Now(), record: make([]byte, 1<<16)}, news: &news{}, elfs: &elfs{}, self: 77,
		mapped: map[int]uint64{}, forks: map[int]fork{}, events: make(chan target.Event, events)}
	w.news.begin(true)
	w.news.take()
	return w, func(record []byte) {
		for _, c := range record {
			r.data[r.page.Data_head%perfRing] = c
			r.page.Data_head++
		}
	}
}

// TestMappedTold: of which new code is told at once, and which is for the next List.
func TestMappedTold(t *testing.T) {
	for _, c := range []struct {
		name        string
		record      []byte
		told, noted bool
	}{
		{"a file", mmap2(5, 8, 1, 3, "/app.dll", 9, 0), true, true},
		{"no file", mmap2(5, 0, 0, 0, "//anon", 9, 0), true, true},
		{"an ELF file", mmap2(5, 8, 1, 4, "/lib.so", 9, 0), false, true},
		{"the kernel's", mmap2(5, 0, 0, 0, "[vdso]", 9, 0), false, false},
		{"ours", mmap2(77, 8, 1, 3, "/app.dll", 9, 0), false, false},
	} {
		w, put := ringWatcher(1)
		w.elfs.add(inode{makeDevice(8, 1), 4})
		put(c.record)
		put(c.record) // once of each process
		w.readMapped()
		w.tellMapped()
		if told, noted := len(w.events) == 1, len(w.news.take().pids) == 1; told != c.told || noted != c.noted || w.lost {
			t.Errorf("%s: told %v, for the next List %v, want %v, %v; lost %v", c.name, told, noted, c.told, c.noted, w.lost)
		}
	}
	w, put := ringWatcher(1)
	put(mmap2(5, 8, 1, 3, "/app.dll", 9, 0))
	put(mmap2(6, 8, 1, 3, "/app.dll", 9, 0))
	w.readMapped()
	w.tellMapped()
	if !w.lost || !w.news.take().untold {
		t.Error("one is told more than can be taken, and nothing is lost")
	}
}
