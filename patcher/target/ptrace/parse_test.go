//go:build linux && amd64

package ptrace

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

func TestParseStat(t *testing.T) {
	const tail = "S 7 1 1 0 -1 4194304 111 0 5 0 1 2 0 0 20 0 3 0 98765 123456789 300 18446744073709551615 94000 95000 140001 0 0"
	want := stat{state: 'S', ppid: 7, flags: 4194304, faults: 116, threads: 3, start: 98765, vsize: 123456789, startCode: 94000, startStack: 140001}
	for _, name := range []string{"sleep", "a b", "x) S 1 (", ")", "", "(((("} {
		var s stat
		if !parseStat([]byte("42 ("+name+") "+tail+"\n"), &s) || s != want {
			t.Errorf("%q: %+v", name, s)
		}
	}
	var s stat
	for _, bad := range []string{"", "42 (x", "42 (x)", "42 (x) ", "42 (x) S 1 2 3"} {
		if parseStat([]byte(bad), &s) {
			t.Errorf("%q is taken for whole", bad)
		}
	}
}

func TestParseMaps(t *testing.T) {
	const text = `00400000-00401000 r-xp 00000000 08:01 42                                 /opt/a b (deleted)
00600000-00602000 rw-p 00001000 08:01 42                                 /opt/a b (deleted)
01000000-01100000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0000001000 rw-s 00000000 00:05 7                          /dev/shm/x
7f0000001000-7f0000002000 ---p 00000000 00:00 0 
7f0000001800-7f0000003000 rw-p 00000000 00:00 0 
7f0000004000-7f0000005000 rw-p 00000000 00:00 0                          [anon:arena]
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00100000-7ffc00102000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
`
	const rw, rx = target.Read | target.Write, target.Read | target.Exec
	want := []target.Region{
		{Start: 0x400000, End: 0x401000, Prot: rx, Kind: target.File, Path: "/opt/a b (deleted)", Inode: 42},
		{Start: 0x600000, End: 0x602000, Prot: rw, Kind: target.File, Path: "/opt/a b (deleted)", Inode: 42, Offset: 0x1000},
		{Start: 0x1000000, End: 0x1100000, Prot: rw, Kind: target.Heap},
		{Start: 0x7f0000000000, End: 0x7f0000001000, Prot: rw, Shared: true, Kind: target.File, Path: "/dev/shm/x", Inode: 7},
		{Start: 0x7f0000001000, End: 0x7f0000002000, Kind: target.Private},
		// what overlaps the line before was mapped while the file was made
		{Start: 0x7f0000004000, End: 0x7f0000005000, Prot: rw, Kind: target.Private},
		{Start: 0x7ffc00000000, End: 0x7ffc00021000, Prot: rw, Kind: target.Stack},
		{Start: 0x7ffc00100000, End: 0x7ffc00102000, Prot: rx, Kind: target.Special},
		{Start: 0xffffffffff600000, End: 0xffffffffff601000, Prot: target.Exec, Kind: target.Special},
	}
	got, ok := parseMaps([]byte(text), nil, nil)
	if !ok || len(got) != len(want) {
		t.Fatalf("%d regions, %v", len(got), ok)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("region %d: %+v\nwant %+v", i, got[i], want[i])
		}
	}
	for _, bad := range []string{"x", "1000-", "1000-2000", "2000-1000 rw-p 0 00:00 0\n", "1000-2000 rw-p", "1000-2000 rw-p 0 00:00"} {
		if _, ok := parseMaps([]byte(bad), nil, nil); ok {
			t.Errorf("%q is understood", bad)
		}
	}
}

func FuzzParseMaps(f *testing.F) {
	if b, err := os.ReadFile("/proc/self/maps"); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, _ := parseMaps(b, nil, nil)
		for i := range r {
			if r[i].End <= r[i].Start || i > 0 && r[i].Start < r[i-1].End {
				t.Fatalf("region %d: %+v", i, r[i])
			}
		}
	})
}

func TestUnitOfPath(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for path, want := range map[string]string{
		"/": "", "/user.slice": "",
		"/system.slice/acme.service":                                      "acme.service",
		"/system.slice/acme.service/worker":                               "acme.service",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope": "x.scope",
		"/system.slice/docker-" + id + ".scope":                           "docker-0123456789ab",
		"/docker/" + id:                                                   "0123456789ab",
		"/kubepods/burstable/pod1/" + id + "/nested":                      "0123456789ab",
	} {
		if got := unitOfPath(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestEvents(t *testing.T) {
	event := func(what uint32, data ...uint32) []byte {
		b := make([]byte, netlinkHeader+connectorHeader+16)
		binary.LittleEndian.PutUint32(b[netlinkHeader+connectorHeader:], what)
		binary.LittleEndian.PutUint64(b[netlinkHeader+connectorHeader+8:], 7)
		for _, d := range data {
			b = binary.LittleEndian.AppendUint32(b, d)
		}
		binary.LittleEndian.PutUint32(b, uint32(len(b)))
		return b
	}
	const pid = 5
	for _, c := range []struct {
		name string
		b    []byte
		want []message
		pass bool // by the filter
	}{
		{"exec", event(eventExec, 6, pid), []message{{what: eventExec, pid: pid, at: 7}}, true},
		{"fork", event(eventFork, 2, 1, pid, pid), []message{{what: eventFork, pid: pid, parent: 1, at: 7}}, true},
		{"a thread", event(eventFork, 1, 1, pid, 1), nil, false},
		{"fork cut short", event(eventFork, 1, 1), nil, false},
		{"exit", event(eventExit, pid, pid, 0x8b, 17), []message{{what: eventExit, pid: pid, status: 0x8b, at: 7}}, true},
		{"exit of a thread", event(eventExit, 6, pid, 0, 17), nil, false},
		{"answer", event(eventNone, 1), []message{{what: eventNone, status: 1, at: 7}}, true},
		{"another user", event(4, pid, pid, 0, 0), nil, false},
		{"no process", event(eventExec, 0, 0), nil, true},
		{"two", append(event(eventExit, pid, pid, 0, 0), event(eventExec, pid, pid)...),
			[]message{{what: eventExit, pid: pid, at: 7}, {what: eventExec, pid: pid, at: 7}}, true},
		{"nothing", nil, nil, false},
		{"zeros", make([]byte, 100), nil, true},
		{"cut short", event(eventExec, pid, pid)[:30], nil, false},
	} {
		var got []message
		parseEvents(c.b, func(m message) { got = append(got, m) })
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
		// The filter drops what tells of nothing, and no more.
		if pass := filtered(t, c.b); pass != c.pass {
			t.Errorf("%s: the filter says %v", c.name, pass)
		}
	}
}

// filtered runs the filter of the socket on a datagram (Documentation/networking/filter.rst).
func filtered(t *testing.T, b []byte) (pass bool) {
	t.Helper()
	var acc, kept uint32
	program := eventFilter()
	for at := 0; at < len(program); at++ {
		switch i := program[at]; i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			if int(i.K)+4 > len(b) {
				return false
			}
			acc = binary.BigEndian.Uint32(b[i.K:])
		case unix.BPF_MISC | unix.BPF_TAX:
			kept = acc
		case unix.BPF_JMP | unix.BPF_JA:
			at += int(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_X:
			other := i.K
			if i.Code&unix.BPF_X != 0 {
				other = kept
			}
			if acc == other {
				at += int(i.Jt)
			} else {
				at += int(i.Jf)
			}
		case unix.BPF_RET | unix.BPF_K:
			return i.K != 0
		default:
			t.Fatalf("instruction %d is not known: %+v", at, i)
		}
	}
	t.Fatal("the filter runs over its end")
	return false
}
