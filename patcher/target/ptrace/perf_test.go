//go:build linux && amd64

package ptrace

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mmap2 is a PERF_RECORD_MMAP2 with a time.
func mmap2(pid int, major, minor uint32, ino uint64, name string, at uint64, misc uint16) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, perfRecordMmap2)
	b = le.AppendUint16(b, misc)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint32(b, uint32(pid))
	b = le.AppendUint32(b, uint32(pid))
	for range 3 { // addr, len, pgoff
		b = le.AppendUint64(b, 0x1000)
	}
	b = le.AppendUint32(b, major)
	b = le.AppendUint32(b, minor)
	b = le.AppendUint64(b, ino)
	b = le.AppendUint64(b, 7) // generation
	b = le.AppendUint64(b, 5) // prot, flags
	b = append(b, name...)
	b = append(b, make([]byte, 8-len(name)%8)...)
	b = le.AppendUint64(b, at)
	le.PutUint16(b[6:], uint16(len(b)))
	return b
}

func TestParsePerf(t *testing.T) {
	lost := make([]byte, 32)
	lost[0], lost[6] = perfRecordLost, 32
	other := mmap2(5, 1, 2, 3, "/a", 9, 0)
	other[0] = 3 // PERF_RECORD_COMM
	short := mmap2(5, 1, 2, 3, "/a", 9, 0)[:72]
	short[6] = 72
	for _, c := range []struct {
		name     string
		record   []byte
		want     newCode
		ok, lost bool
	}{
		{"a file", mmap2(5, 8, 17, 3, "/usr/lib/libc.so.6", 9, 2), newCode{pid: 5, file: inode{makeDevice(8, 17), 3}, at: 9}, true, false},
		{"a name of eight", mmap2(5, 8, 17, 3, "/usr/lib", 9, 2), newCode{pid: 5, file: inode{makeDevice(8, 17), 3}, at: 9}, true, false},
		{"no file", mmap2(5, 0, 0, 0, "//anon", 9, 2), newCode{pid: 5, at: 9}, true, false},
		{"the kernel's", mmap2(5, 0, 0, 0, "[vdso]", 9, 2), newCode{pid: 5, at: 9, own: true}, true, false},
		{"a file of such a name", mmap2(5, 8, 1, 3, "[vdso]", 9, 2), newCode{pid: 5, file: inode{makeDevice(8, 1), 3}, at: 9}, true, false},
		{"a build id is no inode", mmap2(5, 8, 1, 3, "/a", 9, perfBuildID), newCode{pid: 5, at: 9}, true, false},
		{"of another namespace", mmap2(0, 8, 1, 3, "/a", 9, 0), newCode{file: inode{makeDevice(8, 1), 3}, at: 9}, false, false},
		{"no process", mmap2(-1, 8, 1, 3, "/a", 9, 0), newCode{pid: -1, file: inode{makeDevice(8, 1), 3}, at: 9}, false, false},
		{"some were lost", lost, newCode{}, false, true},
		{"another record", other, newCode{}, false, false},
		{"too short", short, newCode{}, false, false},
		{"longer than it says", append(mmap2(5, 8, 1, 3, "/a", 9, 0), make([]byte, 8)...), newCode{}, false, false},
		{"nothing", nil, newCode{}, false, false},
	} {
		if m, ok, lost := parsePerf(c.record); m != c.want || ok != c.ok || lost != c.lost {
			t.Errorf("%s: %+v, %v, %v, want %+v, %v, %v", c.name, m, ok, lost, c.want, c.ok, c.lost)
		}
	}
}

func TestParseCPUs(t *testing.T) {
	for text, want := range map[string][]int{
		"0\n": {0}, "0-1\n": {0, 1}, "0-3,8,10-11\n": {0, 1, 2, 3, 8, 10, 11},
		"": nil, "\n": nil, "3-1": nil, "-1": nil, "0-99999999": nil, "0,x": nil, "0-1023,0-1023": nil,
	} {
		if got, err := parseCPUs(text); !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%q: %v, %v, want %v", text, got, err, want)
		}
	}
}

// A ring is read over its end, and what cannot be in it ends the reading.
func TestRing(t *testing.T) {
	r := &ring{page: &unix.PerfEventMmapPage{}, data: make([]byte, perfRing)}
	put := func(b []byte) {
		for _, c := range b {
			r.data[r.page.Data_head%perfRing] = c
			r.page.Data_head++
		}
	}
	record := make([]byte, 1<<16)
	read := func() (pids []int, lost bool, err error) {
		lost, err = r.drain(record, func(c newCode) { pids = append(pids, c.pid) })
		return pids, lost, err
	}
	n := 0
	for range 3 * perfRing / 500 { // several times round
		var want []int
		for range 5 {
			n++
			want = append(want, n)
			put(mmap2(n, 8, 1, 3, "/usr/lib/x86_64-linux-gnu", 9, 0))
		}
		if pids, lost, err := read(); !slices.Equal(pids, want) || lost || err != nil {
			t.Fatalf("%v, %v, %v, want %v", pids, lost, err, want)
		}
		if r.page.Data_tail != r.page.Data_head {
			t.Fatal("what was read stays")
		}
	}
	lost := make([]byte, 32)
	lost[0], lost[6] = perfRecordLost, 32
	put(lost)
	put(mmap2(1, 8, 1, 3, "/a", 9, 0))
	if pids, lost, err := read(); len(pids) != 1 || !lost || err != nil {
		t.Errorf("lost: %v, %v, %v", pids, lost, err)
	}
	// When it is full the kernel keeps what comes, and says so much later.
	for r.page.Data_head-r.page.Data_tail <= perfRing-perfFull {
		put(mmap2(1, 8, 1, 3, "/a", 9, 0))
	}
	if _, lost, err := read(); !lost || err != nil {
		t.Errorf("full: %v, %v", lost, err)
	}
	for name, bad := range map[string][]byte{
		"of no size":           make([]byte, 16),
		"of an odd size":       {perfRecordMmap2, 0, 0, 0, 0, 0, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"longer than there is": {perfRecordMmap2, 0, 0, 0, 0, 0, 64, 0},
	} {
		put(bad)
		if pids, _, err := read(); len(pids) != 0 || !errors.Is(err, errRecords) {
			t.Errorf("a record %s: %v, %v", name, pids, err)
		}
		if r.page.Data_tail != r.page.Data_head {
			t.Errorf("a record %s stays", name)
		}
	}
	r.page.Data_head += perfRing + 8
	if _, lost, err := read(); !lost || !errors.Is(err, errRecords) {
		t.Errorf("overwritten: %v, %v", lost, err)
	}
}

// Where there are other processors than before, or there was a sleep, nobody knows
// what those did that were not watched.
func TestPerfBeginsAnew(t *testing.T) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	must(t, "epoll", err)
	defer unix.Close(epoll)
	p, err := openPerf(epoll)
	if err != nil {
		t.Skipf("needs perf events: %v", err)
	}
	defer p.close()
	now := time.Now()
	for _, c := range []struct {
		name       string
		change     func()
		anew, lost bool
	}{
		{"looked at a moment ago", func() { p.cpus = "0-99\n" }, false, false},
		{"other processors", func() { p.cpus, p.counted = "0-99\n", now.Add(-perfRecount) }, true, true},
		{"after a sleep", func() { p.slept, p.counted = p.slept-time.Minute, now.Add(-perfRecount) }, true, true},
		{"as before", func() { p.counted = now.Add(-perfRecount) }, false, false},
		{"long ago", func() { p.opened, p.counted = now.Add(-perfRenew), now.Add(-perfRecount) }, true, false},
	} {
		cpus, first := p.cpus, p.rings[0]
		c.change()
		lost, err := p.drain(func(newCode) {})
		if anew := p.rings[0] != first; lost != c.lost || err != nil || anew != c.anew {
			t.Errorf("%s: begun anew %v, lost %v, %v, want %v, %v", c.name, anew, lost, err, c.anew, c.lost)
		}
		p.cpus = cpus
	}
}

func TestELFs(t *testing.T) {
	var e elfs
	a, b := inode{1, 2}, inode{1, 3}
	if e.has(a) {
		t.Error("one is known from the start")
	}
	e.add(a)
	if !e.has(a) || e.has(b) {
		t.Error("another one is known")
	}
	for n := range 2 * maxKnownELFs {
		e.add(inode{2, uint64(n)})
	}
	if len(e.known) > maxKnownELFs {
		t.Errorf("%d are known, at most %d may be", len(e.known), maxKnownELFs)
	}
}
