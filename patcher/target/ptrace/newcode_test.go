//go:build linux && amd64

package ptrace

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// mapper reserves memory and, told so, maps a file executable over it, without
// touching it.
const mapper = `
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
int main(int argc, char **argv) {
	char *at = mmap(0, 1 << 24, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	puts("ready"); fflush(stdout);
	if (argc < 2 || getchar() < 0) return 1;
	if (mmap(at, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, open(argv[1], O_RDONLY), 0) == MAP_FAILED) return 1;
	puts("mapped"); fflush(stdout);
	while (getchar() >= 0);
	return 0;
}
`

// TestListNewCode: a process whose size and page faults are as they were may have
// mapped code all the same, over memory that it had; and what was an ELF file may
// be another one. A List in the next moment knows.
func TestListNewCode(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		hosttest.Need(t, "gcc (apt-get install gcc libc6-dev)")
	}
	dir := t.TempDir()
	source, program, dll := filepath.Join(dir, "mapper.c"), filepath.Join(dir, "mapper"), hosttest.Fixture(t, "mingw/app.dll")
	must(t, "write", os.WriteFile(source, []byte(mapper), 0o600))
	if out, err := exec.Command(gcc, "-O1", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
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
			c := exec.Command(program, dll)
			in, err := c.StdinPipe()
			must(t, "pipe", err)
			out, err := c.StdoutPipe()
			must(t, "pipe", err)
			must(t, "start", c.Start())
			t.Cleanup(func() { in.Close(); c.Process.Kill(); c.Wait() })
			said := bufio.NewScanner(out)
			said.Scan()
			look := func() target.Info {
				t.Helper()
				list, err := b.List(t.Context())
				must(t, "List", err)
				for _, i := range list {
					if i.PID == c.Process.Pid {
						return i
					}
				}
				t.Fatal("it is not in the list")
				panic("")
			}
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
			fmt.Fprintln(in, "map")
			if said.Scan(); said.Text() != "mapped" {
				t.Fatalf("it says %q", said.Text())
			}
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
