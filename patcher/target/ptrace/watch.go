//go:build linux && amd64

package ptrace

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// The process events connector (linux/cn_proc.h, linux/connector.h).
const (
	connectorProc   = 1 // CN_IDX_PROC and its group
	connectorListen = 1 // PROC_CN_MCAST_LISTEN
	netlinkHeader   = 16
	connectorHeader = 20
	eventFork       = 0x00000001 // PROC_EVENT_FORK: a thread or a process
	eventExec       = 0x00000002 // PROC_EVENT_EXEC

	// watchPoll bounds how long the end of the context goes unnoticed.
	watchPoll = 500 * time.Millisecond
	// watchBuffer holds some ten thousand events between two reads.
	watchBuffer = 1 << 20
)

// Watch wakes when a process forks or executes a program. It needs
// CAP_NET_ADMIN and the first network namespace.
func (b *backend) Watch(ctx context.Context) (<-chan struct{}, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("cannot watch process starts: %w: %v", target.ErrUnsupported, err)
	}
	if err := listen(fd); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot watch process starts (CAP_NET_ADMIN?): %w: %v", target.ErrDenied, err)
	}
	woken := make(chan struct{}, 1)
	go func() {
		defer close(woken)
		defer unix.Close(fd)
		buf := make([]byte, 8<<10)
		for ctx.Err() == nil {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			switch {
			case err == unix.EAGAIN || err == unix.EINTR:
				continue
			case err == unix.ENOBUFS: // events were lost: look
			case err != nil:
				<-ctx.Done() // nothing comes any more; the channel stays open until the end, as promised
				return
			default:
				if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 || !starts(buf[:n]) {
					continue // of the kernel only, and starts only
				}
			}
			select {
			case woken <- struct{}{}:
			default:
			}
		}
	}()
	return woken, nil
}

func listen(fd int) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: connectorProc}); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(int64(watchPoll))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer) // losing events costs latency only
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

// starts tells whether a datagram holds the start of a process: an exec, or a
// fork whose child is the first thread of its own process.
func starts(b []byte) bool {
	le := binary.LittleEndian
	for len(b) >= netlinkHeader {
		size := int(le.Uint32(b))
		if size < netlinkHeader || size > len(b) {
			return false
		}
		if size >= netlinkHeader+connectorHeader+16 {
			e := b[netlinkHeader+connectorHeader : size] // struct proc_event: what, cpu, timestamp, data
			switch le.Uint32(e) {
			case eventExec:
				return true
			case eventFork: // data: parent pid, tgid, child pid, tgid
				if len(e) >= 32 && le.Uint32(e[24:]) == le.Uint32(e[28:]) {
					return true
				}
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return false
}
