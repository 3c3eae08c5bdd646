package win32

import (
	"encoding/binary"
	"math"
	"time"

	"hotpatchd/patcher/target"
)

// guid is a GUID as it lies in memory.
type guid [16]byte

var (
	// kernelProcess is the provider Microsoft-Windows-Kernel-Process,
	// 22fb2cd6-0e7b-422b-a0c7-2fad1fd0e716.
	kernelProcess = guid{0xd6, 0x2c, 0xfb, 0x22, 0x7b, 0x0e, 0x2b, 0x42, 0xa0, 0xc7, 0x2f, 0xad, 0x1f, 0xd0, 0xe7, 0x16}
	// lostEvent is by what a session tells its reader of a loss (RT_LostEvent,
	// 6a399ae0-4bc6-4de9-870b-3657f8947e7e).
	lostEvent = guid{0xe0, 0x9a, 0x39, 0x6a, 0xc6, 0x4b, 0xe9, 0x4d, 0x87, 0x0b, 0x36, 0x57, 0xf8, 0x94, 0x7e, 0x7e}
)

// Events of kernelProcess, and the keyword that both have.
const (
	processStart   = 1
	processStop    = 2
	processKeyword = 0x10 // WINEVENT_KEYWORD_PROCESS
)

// record is what is used of an EVENT_RECORD.
type record struct {
	provider guid
	id       uint16
	version  uint8
	at       uint64 // FILETIME
	data     []byte // the beginning of its user data, at most recordMost bytes
}

// recordMost is how much of an event's data is copied: what is read lies before.
const recordMost = 64

// createdAt is where the versions of the two events have the creation time, by the
// manifest of the provider: the pid is the first field of all, and from version 3
// of the start and 2 of the stop on a sequence number (8 bytes) follows it.
var createdAt = map[uint16]map[uint8]int{
	processStart: {0: 4, 1: 4, 2: 4, 3: 12, 4: 12},
	processStop:  {0: 4, 1: 4, 2: 12},
}

// event reads a record; false if it tells nothing. What cannot be read, of a
// version that is not known or too short, is lost: only a list tells what it was.
func (r record) event() (target.Event, bool) {
	lost := target.Event{Kind: target.Lost, At: fileTime(r.at)}
	switch {
	case r.provider == lostEvent:
		return lost, true
	case r.provider != kernelProcess || createdAt[r.id] == nil:
		return target.Event{}, false
	}
	at, known := createdAt[r.id][r.version]
	need := at + 8 + 4 // of a start the parent's pid follows
	if r.id == processStop {
		need = at + 8 + 8 + 4 // the end's time and the exit code
	}
	if !known || len(r.data) < need {
		return lost, true
	}
	pid, created := binary.LittleEndian.Uint32(r.data), binary.LittleEndian.Uint64(r.data[at:])
	if pid == 0 || pid > math.MaxInt32 {
		return lost, true
	}
	e := target.Event{Kind: target.Started, PID: int(pid), Start: created, At: fileTime(created)}
	if r.id == processStop {
		e.Kind, e.Status, e.At = target.Exited, true, fileTime(binary.LittleEndian.Uint64(r.data[at+8:]))
		e.Code = binary.LittleEndian.Uint32(r.data[at+16:])
	}
	return e, true
}

// fileTime is the time of a FILETIME, units of 100 ns since 1601; zero for what
// lies before 1970 or after 2262, which is none.
func fileTime(t uint64) time.Time {
	const unix = 116444736000000000
	if t < unix || t-unix > math.MaxInt64/100 {
		return time.Time{}
	}
	return time.Unix(0, int64(t-unix)*100)
}
