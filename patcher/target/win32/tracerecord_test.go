package win32

import (
	"encoding/binary"
	"testing"
	"time"

	"hotpatchd/patcher/target"
)

// fields lays values out as ETW does: one behind the other.
func fields(values ...any) (b []byte) {
	for _, v := range values {
		b, _ = binary.Append(b, binary.LittleEndian, v)
	}
	return b
}

func TestRecord(t *testing.T) {
	const unix = 116444736000000000
	now := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	created := uint64(unix + now.UnixNano()/100)
	ended := created + 30*1e7
	start := target.Event{Kind: target.Started, PID: 4242, Start: created, At: now}
	stop := target.Event{Kind: target.Exited, PID: 4242, Start: created, Code: 0xC0000005, Status: true, At: now.Add(30 * time.Second)}
	lost := target.Event{Kind: target.Lost}
	pid, parent, code, seq := uint32(4242), uint32(8), uint32(0xC0000005), uint64(77)
	for name, tc := range map[string]struct {
		r     record
		want  target.Event
		tells bool
	}{
		"start 0":             {record{id: 1, data: fields(pid, created, parent)}, start, true},
		"start 1":             {record{id: 1, version: 1, data: fields(pid, created, parent, make([]byte, 40))}, start, true},
		"start 2":             {record{id: 1, version: 2, data: fields(pid, created, parent, make([]byte, 40))}, start, true},
		"start 3":             {record{id: 1, version: 3, data: fields(pid, seq, created, parent, make([]byte, 40))}, start, true},
		"start 4":             {record{id: 1, version: 4, data: fields(pid, seq, created, parent)}, start, true},
		"start, to come":      {record{id: 1, version: 5, data: fields(pid, seq, created, parent)}, lost, true},
		"start, cut":          {record{id: 1, version: 4, data: fields(pid, seq, created, parent)[:23]}, lost, true},
		"start, nothing":      {record{id: 1, version: 4}, lost, true},
		"start, pid 0":        {record{id: 1, data: fields(uint32(0), created, parent)}, lost, true},
		"start, pid too high": {record{id: 1, data: fields(uint32(1<<31), created, parent)}, lost, true},
		"start, no time":      {record{id: 1, data: fields(pid, uint64(5), parent)}, target.Event{Kind: target.Started, PID: 4242, Start: 5}, true},
		"start, no such time": {record{id: 1, data: fields(pid, ^uint64(0), parent)}, target.Event{Kind: target.Started, PID: 4242, Start: ^uint64(0)}, true},
		"stop 0":              {record{id: 2, data: fields(pid, created, ended, code)}, stop, true},
		"stop 1":              {record{id: 2, version: 1, data: fields(pid, created, ended, code, make([]byte, 30))}, stop, true},
		"stop 2":              {record{id: 2, version: 2, data: fields(pid, seq, created, ended, code)}, stop, true},
		"stop, to come":       {record{id: 2, version: 3, data: make([]byte, 64)}, lost, true},
		"stop, cut":           {record{id: 2, version: 2, data: fields(pid, seq, created, ended, code)[:31]}, lost, true},
		"a rundown":           {record{id: 15, data: fields(pid, created, parent)}, target.Event{}, false},
		"a loss":              {record{provider: lostEvent}, lost, true},
		"somebody else":       {record{provider: guid{1}, id: 1, data: fields(pid, created, parent)}, target.Event{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.r.provider == (guid{}) {
				tc.r.provider = kernelProcess
			}
			got, ok := tc.r.event()
			if ok != tc.tells || !got.At.Equal(tc.want.At) {
				t.Errorf("%v %+v, want %v %+v", ok, got, tc.tells, tc.want)
			}
			got.At, tc.want.At = time.Time{}, time.Time{}
			if got.Faults != nil || got.Kind != tc.want.Kind || got.PID != tc.want.PID || got.Start != tc.want.Start || got.Code != tc.want.Code || got.Status != tc.want.Status {
				t.Errorf("%+v, want %+v", got, tc.want)
			}
		})
	}
}

// FuzzRecord: whatever comes, it is a start or an end of a process with a number,
// a loss or nothing.
func FuzzRecord(f *testing.F) {
	f.Add(uint16(1), uint8(3), uint64(0), make([]byte, 24))
	f.Add(uint16(2), uint8(2), ^uint64(0), make([]byte, 64))
	f.Fuzz(func(t *testing.T, id uint16, version uint8, at uint64, data []byte) {
		e, ok := record{provider: kernelProcess, id: id, version: version, at: at, data: data[:min(len(data), recordMost)]}.event()
		switch {
		case !ok && (id == processStart || id == processStop):
			t.Error("a start or an end tells nothing")
		case ok && e.Kind == target.Lost && e.PID == 0:
		case ok && (e.Kind == target.Started || e.Kind == target.Exited && e.Status) && e.PID > 0:
		case ok:
			t.Errorf("%+v", e)
		}
	})
}
