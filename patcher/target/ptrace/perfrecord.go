//go:build linux && amd64

package ptrace

import (
	"bytes"
	"encoding/binary"
)

// Records of perf events (linux/perf_event.h, perf_event_open(2)): struct
// perf_event_header {type, misc, size}, the record, and, as we ask for it, the
// time at the end.
const (
	perfHeader = 8
	perfTime   = 8

	perfRecordLost  = 2
	perfRecordMmap2 = 10

	perfBuildID = 1 << 14 // PERF_RECORD_MISC_MMAP_BUILD_ID: no device and inode

	// Of struct perf_record_mmap2.
	mmap2PID      = perfHeader
	mmap2Major    = perfHeader + 32
	mmap2Minor    = perfHeader + 36
	mmap2Inode    = perfHeader + 40
	mmap2Filename = perfHeader + 64
)

// newCode is executable memory that came to a process, as a record tells: it was
// mapped, or became executable.
type newCode struct {
	pid  int
	file inode  // no ino: of no file
	at   uint64 // CLOCK_MONOTONIC, nanoseconds
	own  bool   // the kernel's: [vdso], [vsyscall]
}

// perfRecordSize is the size of the record that begins with head, 0 if that is none.
func perfRecordSize(head []byte) int {
	if len(head) < perfHeader {
		return 0
	}
	size := int(binary.LittleEndian.Uint16(head[6:]))
	if size < perfHeader || size%8 != 0 {
		return 0
	}
	return size
}

// parsePerf reads one whole record: a mapping, or that some were lost. Others,
// and what is too short, are neither.
func parsePerf(b []byte) (m newCode, ok, lost bool) {
	le := binary.LittleEndian
	if len(b) == 0 || perfRecordSize(b) != len(b) {
		return m, false, false
	}
	switch le.Uint32(b) {
	case perfRecordLost:
		return m, false, true
	case perfRecordMmap2:
	default:
		return m, false, false
	}
	if len(b) < mmap2Filename+8+perfTime {
		return m, false, false
	}
	m.pid = int(int32(le.Uint32(b[mmap2PID:])))
	m.at = le.Uint64(b[len(b)-perfTime:])
	if le.Uint16(b[4:])&perfBuildID == 0 {
		m.file = inode{makeDevice(uint64(le.Uint32(b[mmap2Major:])), uint64(le.Uint32(b[mmap2Minor:]))), le.Uint64(b[mmap2Inode:])}
		m.own = m.file.ino == 0 && bytes.HasPrefix(b[mmap2Filename:], special)
	}
	return m, m.pid > 0, false
}
