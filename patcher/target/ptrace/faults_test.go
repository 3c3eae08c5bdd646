//go:build linux && amd64

package ptrace

import (
	"testing"

	"hotpatchd/patcher/target"
)

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
