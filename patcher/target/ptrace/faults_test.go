//go:build linux && amd64

package ptrace

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// A process that faults is told of with its signal, and where the kernel's log
// may be read, with the place.
func TestWatchTellsOfFaults(t *testing.T) {
	gcc, err := exec.LookPath("gcc")
	if err != nil {
		hosttest.Need(t, "gcc (apt-get install gcc libc6-dev)")
	}
	source, program := filepath.Join(t.TempDir(), "fault.c"), filepath.Join(t.TempDir(), "fault")
	text := "#include <stdio.h>\nint main(void) { printf(\"%d %lx\\n\", 0, (unsigned long)main); fflush(stdout); *(volatile int *)8 = 1; return 0; }\n"
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(gcc, "-O1", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	b, err := New()
	if err != nil {
		hosttest.Need(t, "ptrace: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	events, err := b.(target.Watcher).Watch(ctx)
	if err != nil {
		t.Skipf("needs news of processes, which come in the first namespaces only: %v", err)
	}
	cmd := exec.Command(program)
	out, err := cmd.Output()
	if err == nil {
		t.Fatal("it did not crash")
	}
	var main target.Addr
	if _, err := fmt.Sscanf(string(out), "0 %x", (*uint64)(&main)); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	for e := range events {
		if e.Kind != target.Exited || e.PID != cmd.Process.Pid {
			continue
		}
		if e.Signal != 11 || e.Code != 0 {
			t.Errorf("signal %d, code %d", e.Signal, e.Code)
		}
		f := openFaults()
		defer f.close()
		if f.fd < 0 {
			t.Log("the kernel's log may not be read here: where it crashed was not tried")
			return
		}
		for _, at := range e.Faults {
			if at >= main && at < main+target.PageSize {
				return
			}
		}
		t.Fatalf("main at %s, faults at %v", main, e.Faults)
	}
	t.Fatal("nothing was told of its end")
}

func TestParseFault(t *testing.T) {
	for record, want := range map[string]target.Addr{
		"6,1,20558015931,-;uffdvic[7805]: segfault at 7f388cd08768 ip 00007f388ce08d39 sp 00007ffc6fa44680 error 4 in libc.so.6[fdd39,7f388cd31000+156000] likely on CPU 0\n SUBSYSTEM=x\n": 0x7f388ce08d39,
		"6,2,1,-;host[25236]: segfault at 64abd1c9d000 ip 000064abd1c9d000 sp 00007f7f29d08de8 error 14 likely on CPU 0 (core 0, socket 0)\n":                                               0x64abd1c9d000,
		"4,3,1,-;traps: app[12] trap invalid opcode ip:7f0012345678 sp:7ffc0 error:0 in app[400000+1000]\n":                                                                                 0x7f0012345678,
		"4,3,1,-;traps: app[12] general protection fault ip:401136 sp:7ffc0 error:0 in app[400000+1000]\n":                                                                                  0x401136,
		"4,3,1,-;traps: a[1]: b[12] trap divide error ip:401136 sp:7ffc0 error:0\n":                                                                                                         0x401136,
		"12,4,1,-;app[1]: segfault at 0 ip 0000000000401136 sp 0000 error 4\n":                                                                                                              0, // a program wrote it
		"6,5,1,-;usb 1-1: new device\n":                                     0,
		"6,6,1,-;app[1]: segfault at 0 ip 11112222333344445 sp 0 error 4\n": 0,
		"6": 0, "": 0, "x,1,1;a[1]: segfault at 0 ip 1 sp 1 error 4": 0,
	} {
		if at, ok := parseFault([]byte(record)); at != want || ok != (want != 0) {
			t.Errorf("%q: %s %v, want %s", record, at, ok, want)
		}
	}
}
