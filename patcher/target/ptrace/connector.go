//go:build linux && amd64

package ptrace

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The process events connector (linux/cn_proc.h, linux/connector.h,
// linux/netlink.h). Each event is one message: struct nlmsghdr, struct cn_msg,
// struct proc_event {what, cpu, timestamp_ns, data}.
const (
	connectorProc   = 1 // CN_IDX_PROC and its group
	connectorListen = 1 // PROC_CN_MCAST_LISTEN
	netlinkHeader   = 16
	connectorHeader = 20
	eventAt         = netlinkHeader + connectorHeader
	eventData       = 16 // of the data in an event

	eventNone = 0          // PROC_EVENT_NONE: the answer to a request
	eventFork = 0x00000001 // PROC_EVENT_FORK: a thread or a process
	eventExec = 0x00000002 // PROC_EVENT_EXEC
	eventExit = 0x80000000 // PROC_EVENT_EXIT: a thread
)

// message is what of an event is of interest.
type message struct {
	what   uint32
	pid    int
	parent int    // of a fork
	status uint32 // of an exit, as wait(2) has it; of an answer, the error
	at     uint64 // CLOCK_MONOTONIC, nanoseconds
}

// parseEvents reads a datagram: forks whose child is the first thread of its own
// process, execs, exits of main threads, and answers. The rest is passed over.
// The exit of a main thread comes before those of others that run on, with the
// status it alone had; it is the status of the process wherever one thread ends all.
func parseEvents(b []byte, take func(message)) {
	le := binary.LittleEndian
	for len(b) >= netlinkHeader {
		size := int(le.Uint32(b))
		if size < netlinkHeader || size > len(b) {
			return
		}
		if size >= eventAt+eventData+4 {
			e := b[eventAt:size]
			m := message{what: le.Uint32(e), at: le.Uint64(e[8:])}
			word := func(n int) uint32 { // of the data
				if at := eventData + 4*n; at+4 <= len(e) {
					return le.Uint32(e[at:])
				}
				return 0
			}
			ok := false
			switch m.what {
			case eventNone: // err
				m.status, ok = word(0), true
			case eventFork: // parent pid, tgid, child pid, tgid
				m.parent, m.pid = int(word(1)), int(word(3))
				ok = word(2) == word(3)
			case eventExec: // pid, tgid
				m.pid, ok = int(word(1)), true
			case eventExit: // pid, tgid, status, signal to the parent, …
				m.pid, m.status = int(word(1)), word(2)
				ok = word(0) == word(1)
			}
			if ok && (m.pid > 0 || m.what == eventNone) {
				take(m)
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
}

// listen asks for the events, but for those of threads: a filter of the socket
// drops them before they fill its buffer or wake anybody.
func listen(fd int) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: connectorProc}); err != nil {
		return err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer) // losing events costs latency only
	program := eventFilter()
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
		return err
	}
	m := make([]byte, netlinkHeader+connectorHeader+4)
	le := binary.LittleEndian
	le.PutUint32(m, uint32(len(m)))
	le.PutUint16(m[4:], unix.NLMSG_DONE)
	le.PutUint32(m[12:], uint32(unix.Getpid()))
	c := m[netlinkHeader:] // struct cn_msg: idx, val, seq, ack, len, flags
	le.PutUint32(c, connectorProc)
	le.PutUint32(c[4:], connectorProc)
	le.PutUint16(c[16:], 4)
	le.PutUint32(c[connectorHeader:], connectorListen)
	return unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// eventFilter lets through what parseEvents takes. Classic BPF loads words in
// network order (socket(7), Documentation/networking/filter.rst), so constants
// are turned round, and two words of one event are compared as they are.
func eventFilter() []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	equal := func(k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	turned := func(v uint32) uint32 {
		return binary.BigEndian.Uint32(binary.LittleEndian.AppendUint32(nil, v))
	}
	jump := func(over uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: over}
	}
	keep := unix.SockFilter{Code: unix.BPF_MISC | unix.BPF_TAX}
	equalKept := func(yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_X, Jt: yes, Jf: no}
	}
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	pass := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1}
	const data = eventAt + eventData
	return []unix.SockFilter{ // jumps count from the instruction that follows
		0:  load(eventAt),
		1:  equal(turned(eventNone), 13, 0),
		2:  equal(turned(eventExec), 12, 0),
		3:  equal(turned(eventFork), 2, 0),
		4:  equal(turned(eventExit), 5, 0),
		5:  drop,
		6:  load(data + 8), // fork: pid and tgid of the child
		7:  keep,
		8:  load(data + 12),
		9:  jump(3),
		10: load(data), // exit: pid and tgid
		11: keep,
		12: load(data + 4),
		13: equalKept(1, 0),
		14: drop,
		15: pass,
	}
}
