//go:build linux && amd64

package ptrace

import (
	"bytes"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

const (
	// maxFaults bounds what is remembered of the kernel's log.
	maxFaults = 64
	// faultLife is how long before the end of a process its fault may be: writing
	// its core can take that long.
	faultLife = 10 * time.Second
	// maxRecord is the longest record of the log (printk.c, CONSOLE_EXT_LOG_MAX).
	maxRecord = 8 << 10
	// maxRecords bounds one reading, whoever fills the log.
	maxRecords = 4096
)

// faults reads from the kernel's log at which instructions threads faulted: the
// kernel notes it for each fault that nobody handles (arch/x86/mm/fault.c and
// traps.c, while debug.exception-trace is set). Where the log may not be read
// nothing is known, which is no error.
type faults struct {
	fd   int // -1: it may not be read
	buf  []byte
	last []fault
}

type fault struct {
	seen time.Time
	at   target.Addr
}

// openFaults begins at the end of the log.
func openFaults() *faults {
	f := &faults{fd: -1}
	fd, err := retry(func() (int, error) { return unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) })
	if err != nil {
		return f
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		unix.Close(fd)
		return f
	}
	f.fd, f.buf = fd, make([]byte, maxRecord)
	return f
}

func (f *faults) close() {
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
	}
}

// recent are the addresses of the last seconds, of whatever process: the log
// names a thread that is gone.
func (f *faults) recent(now time.Time) (list []target.Addr) {
	for n := 0; f.fd >= 0 && n < maxRecords; n++ {
		size, err := retry(func() (int, error) { return unix.Read(f.fd, f.buf) })
		if err == unix.EPIPE {
			continue // records were overwritten before they were read
		}
		if err != nil || size <= 0 {
			break
		}
		if at, ok := parseFault(f.buf[:size]); ok {
			f.last = append(f.last, fault{now, at})
		}
	}
	f.last = f.last[max(0, len(f.last)-maxFaults):]
	for _, x := range f.last {
		if now.Sub(x.seen) <= faultLife {
			list = append(list, x.at)
		}
	}
	return list
}

// faultText is what follows the name, which its process chooses, and the thread:
// "app[12]: segfault at 0 ip 00007f… sp …", "traps: app[12] trap invalid opcode ip:7f… sp:…".
var faultText = regexp.MustCompile(`\[[0-9]+\](?:: segfault at [0-9a-f]+ ip |(?: [a-z ]+)? ip:)([0-9a-f]{1,16}) sp[ :][0-9a-f]+ error`)

// parseFault takes a record of the log apart: "prefix;text\n KEY=value…"
// (Documentation/ABI/testing/dev-kmsg). Records of priority user and above are
// of programs: only the kernel's own tell of faults.
func parseFault(record []byte) (target.Addr, bool) {
	prefix, text, ok := bytes.Cut(record, []byte(";"))
	if !ok {
		return 0, false
	}
	number, _, _ := bytes.Cut(prefix, []byte(","))
	priority, err := strconv.ParseUint(string(number), 10, 32)
	if err != nil || priority>>3 != 0 {
		return 0, false
	}
	text, _, _ = bytes.Cut(text, []byte("\n"))
	all := faultText.FindAllSubmatch(text, -1)
	if len(all) == 0 {
		return 0, false
	}
	at, err := strconv.ParseUint(string(all[len(all)-1][1]), 16, 64)
	return target.Addr(at), err == nil
}
