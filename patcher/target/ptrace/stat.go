//go:build linux && amd64

package ptrace

import "bytes"

// Of the flags field of /proc/PID/stat (include/linux/sched.h).
const (
	kernelThread = 0x00200000 // PF_KTHREAD
	exiting      = 0x00000004 // PF_EXITING
)

// stat is what /proc/PID/stat tells of a process or thread (proc_pid_stat(5)).
// Addresses are 0 or 1 where we may not see them.
type stat struct {
	state      byte
	ppid       int
	flags      uint64
	faults     uint64 // page faults of all threads, with and without I/O
	threads    int
	start      uint64 // clock ticks after boot
	vsize      uint64 // bytes mapped
	startCode  uint64
	startStack uint64
}

// parseStat reads the fields by number. The second field is a name that may
// hold blanks and parentheses: the fields begin behind the last ')'.
func parseStat(b []byte, s *stat) bool {
	*s = stat{}
	end := bytes.LastIndexByte(b, ')')
	if end < 0 || end+2 >= len(b) {
		return false
	}
	s.state = b[end+2]
	field := 3
	for i := end + 3; i < len(b) && field < 28; {
		for i < len(b) && b[i] == ' ' {
			i++
		}
		var n uint64
		for ; i < len(b) && b[i] != ' ' && b[i] != '\n'; i++ {
			if d := b[i] - '0'; d <= 9 {
				n = n*10 + uint64(d)
			}
		}
		field++
		switch field {
		case 4:
			s.ppid = int(n)
		case 9:
			s.flags = n
		case 10, 12:
			s.faults += n
		case 20:
			s.threads = int(n)
		case 22:
			s.start = n
		case 23:
			s.vsize = n
		case 26:
			s.startCode = n
		case 28:
			s.startStack = n
		}
	}
	return field == 28
}

// dead tells of a thread that has ended and is not yet reaped.
func (s *stat) dead() bool { return s.state == 'Z' || s.state == 'X' }

// dying tells of one that has ended or is about to: its memory may be gone.
func (s *stat) dying() bool { return s.dead() || s.flags&exiting != 0 }

// statusField finds "Name:\t" in /proc/PID/status and returns the rest of its line.
func statusField(status []byte, name string) string {
	for len(status) > 0 {
		line := status
		if i := bytes.IndexByte(status, '\n'); i >= 0 {
			line, status = status[:i], status[i+1:]
		} else {
			status = nil
		}
		if len(line) > len(name) && line[len(name)] == ':' && string(line[:len(name)]) == name {
			return string(bytes.TrimSpace(line[len(name)+1:]))
		}
	}
	return ""
}
