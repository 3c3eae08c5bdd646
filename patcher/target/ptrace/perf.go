//go:build linux && amd64

package ptrace

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// perfRing is what the kernel keeps of records that we have not read, bytes
	// for each processor: some hundreds of mappings, as many as a processor makes
	// between two readings.
	perfRing = 128 << 10
	// perfCPUs bounds the processors that are watched; on larger machines nothing is.
	perfCPUs = 1024
	// perfFull is how much of it is left when it is called full: the kernel tells
	// that it kept something from us when there is room again, and it has something
	// to tell. No record is longer.
	perfFull = 8 << 10
	// perfRecount is how often it is looked whether there are other processors,
	// perfRenew how often all begin anew: a processor that was away and came back
	// in between tells nothing.
	perfRecount = 30 * time.Second
	perfRenew   = 10 * time.Minute
)

// perf reads from the kernel which processes get executable memory, by a
// software event of each processor that counts nothing (PERF_COUNT_SW_DUMMY).
// The kernel writes a record for each such mapping, and for each protection that
// becomes executable. It belongs to one goroutine.
type perf struct {
	rings   []*ring
	epoll   int
	cpus    string        // those that are watched
	slept   time.Duration // how long the system has, until it was opened
	opened  time.Time
	counted time.Time
	record  []byte
}

// ring is what the kernel writes for one processor.
type ring struct {
	fd   int
	mem  []byte
	page *unix.PerfEventMmapPage
	data []byte
}

// openPerf begins to watch, and has what can be read wake who waits for epoll.
// It needs CAP_PERFMON or kernel.perf_event_paranoid below 1.
func openPerf(epoll int) (*perf, error) {
	p := &perf{epoll: epoll, record: make([]byte, 1<<16)}
	if err := p.open(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// onlineCPUs is a list like 0-3,8 (Documentation/ABI/testing/sysfs-devices-system-cpu).
const onlineCPUs = "/sys/devices/system/cpu/online"

func (p *perf) open() error {
	text, err := os.ReadFile(onlineCPUs)
	if err != nil {
		return err
	}
	list, err := parseCPUs(string(text))
	if err != nil {
		return err
	}
	now := time.Now()
	p.cpus, p.slept, p.opened, p.counted = string(text), slept(), now, now
	for _, cpu := range list {
		r, err := openRing(cpu)
		if err != nil {
			return fmt.Errorf("cannot watch processor %d: %w", cpu, err)
		}
		p.rings = append(p.rings, r)
		e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(r.fd)}
		if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, r.fd, &e); err != nil {
			return err
		}
	}
	return nil
}

// parseCPUs reads a list of numbers and ranges.
func parseCPUs(text string) (list []int, err error) {
	bad := fmt.Errorf("%s: %.80q is no list of processors", onlineCPUs, text)
	for rest := text; ; {
		var from, to, n int
		if n, err = fmt.Sscanf(rest, "%d-%d", &from, &to); n == 0 {
			return nil, bad
		} else if n == 1 {
			to = from
		}
		if from < 0 || to < from || to-from >= perfCPUs-len(list) {
			return nil, bad
		}
		for ; from <= to; from++ {
			list = append(list, from)
		}
		i := 0
		for i < len(rest) && rest[i] != ',' {
			i++
		}
		if i == len(rest) {
			return list, nil
		}
		rest = rest[i+1:]
	}
}

func openRing(cpu int) (*ring, error) {
	attr := unix.PerfEventAttr{
		Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_DUMMY, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
		Sample_type: unix.PERF_SAMPLE_TIME,
		Bits:        unix.PerfBitMmap | unix.PerfBitMmap2 | unix.PerfBitSampleIDAll | unix.PerfBitUseClockID | unix.PerfBitWatermark,
		Wakeup:      1, // byte
		Clockid:     unix.CLOCK_MONOTONIC,
	}
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	size := os.Getpagesize() + perfRing
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r := &ring{fd: fd, mem: mem, page: (*unix.PerfEventMmapPage)(unsafe.Pointer(&mem[0])), data: mem[os.Getpagesize():]}
	return r, nil
}

func (r *ring) close() {
	unix.Munmap(r.mem)
	unix.Close(r.fd)
}

func (p *perf) close() {
	for _, r := range p.rings {
		r.close() // takes it from epoll
	}
	p.rings = nil
}

// errRecords is a ring that holds what the kernel does not write.
var errRecords = errors.New("the kernel's records of mappings cannot be read")

// pending tells whether there is anything to be read.
func (p *perf) pending() bool {
	for _, r := range p.rings {
		if atomic.LoadUint64(&r.page.Data_head) != r.page.Data_tail {
			return true
		}
	}
	return false
}

// drain reads all there is; lost tells that some were not kept for us. After an
// error nothing more is to be had from it.
func (p *perf) drain(take func(newCode)) (lost bool, err error) {
	for _, r := range p.rings {
		l, err := r.drain(p.record, take)
		lost = lost || l
		if err != nil {
			return lost, err
		}
	}
	if time.Since(p.counted) < perfRecount {
		return lost, nil
	}
	p.counted = time.Now()
	text, err := os.ReadFile(onlineCPUs)
	same := err == nil && string(text) == p.cpus && slept()-p.slept < time.Second
	if same && time.Since(p.opened) < perfRenew {
		return lost, nil
	}
	lost = lost || !same // a processor told nothing since it came
	// The new ones first: nothing is lost between them.
	old := p.rings
	p.rings = nil
	err = p.open()
	for _, r := range old {
		l, _ := r.drain(p.record, take)
		lost = lost || l
		r.close()
	}
	return lost, err
}

// slept is how long the system has been asleep since its start.
func slept() time.Duration {
	var all, awake unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &all) != nil || unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake) != nil {
		return 0
	}
	return time.Duration(all.Nano() - awake.Nano())
}

func (r *ring) drain(record []byte, take func(newCode)) (lost bool, err error) {
	head := atomic.LoadUint64(&r.page.Data_head)
	tail := r.page.Data_tail
	if head-tail > perfRing {
		return true, errRecords
	}
	lost = head-tail > perfRing-perfFull
	for tail < head {
		var start [perfHeader]byte
		r.copy(start[:], tail)
		size := perfRecordSize(start[:])
		if size == 0 || uint64(size) > head-tail {
			err = errRecords
			tail = head
			break
		}
		r.copy(record[:size], tail)
		tail += uint64(size)
		m, ok, gone := parsePerf(record[:size])
		if lost = lost || gone; ok {
			take(m)
		}
	}
	atomic.StoreUint64(&r.page.Data_tail, tail)
	return lost, err
}

// copy reads bytes at a place that counts on round the ring.
func (r *ring) copy(b []byte, at uint64) {
	n := copy(b, r.data[at%perfRing:])
	copy(b[n:], r.data)
}
