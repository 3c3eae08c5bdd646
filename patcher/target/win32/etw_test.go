//go:build windows

package win32

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/win32/winhosttest"
)

// TestTraceLayouts: what the system reads and writes is where its headers say
// (evntrace.h and evntcons.h, 64 bits).
func TestTraceLayouts(t *testing.T) {
	var p traceProperties
	var f traceLogfile
	var r eventRecord
	for name, at := range map[string][2]uintptr{
		"EVENT_TRACE_PROPERTIES":                     {unsafe.Offsetof(p.name), 120},
		"EVENT_TRACE_PROPERTIES.BufferSize":          {unsafe.Offsetof(p.bufferSize), 48},
		"EVENT_TRACE_PROPERTIES.LogFileMode":         {unsafe.Offsetof(p.mode), 64},
		"EVENT_TRACE_PROPERTIES.EventsLost":          {unsafe.Offsetof(p.eventsLost), 88},
		"EVENT_TRACE_PROPERTIES.RealTimeBuffersLost": {unsafe.Offsetof(p.liveBuffersLost), 100},
		"EVENT_TRACE_PROPERTIES.LoggerNameOffset":    {unsafe.Offsetof(p.nameOffset), 116},
		"EVENT_TRACE_LOGFILEW":                       {unsafe.Sizeof(f), 448},
		"EVENT_TRACE_LOGFILEW.LoggerName":            {unsafe.Offsetof(f.name), 8},
		"EVENT_TRACE_LOGFILEW.ProcessTraceMode":      {unsafe.Offsetof(f.mode), 28},
		"EVENT_TRACE_LOGFILEW.EventRecordCallback":   {unsafe.Offsetof(f.callback), 424},
		"EVENT_TRACE_LOGFILEW.Context":               {unsafe.Offsetof(f.context), 440},
		"EVENT_RECORD":                               {unsafe.Sizeof(r), 112},
		"EVENT_RECORD.TimeStamp":                     {unsafe.Offsetof(r.at), 16},
		"EVENT_RECORD.ProviderId":                    {unsafe.Offsetof(r.provider), 24},
		"EVENT_RECORD.EventDescriptor.Id":            {unsafe.Offsetof(r.id), 40},
		"EVENT_RECORD.EventDescriptor.Version":       {unsafe.Offsetof(r.version), 42},
		"EVENT_RECORD.UserDataLength":                {unsafe.Offsetof(r.length), 86},
		"EVENT_RECORD.UserData":                      {unsafe.Offsetof(r.data), 96},
		"EVENT_RECORD.UserContext":                   {unsafe.Offsetof(r.context), 104},
	} {
		if at[0] != at[1] {
			t.Errorf("%s is at %d, want %d", name, at[0], at[1])
		}
	}
}

// TestTraceHere: Wine has no sessions, and says so; elsewhere a session either
// begins and ends, or is refused by name. Nothing of it is left.
func TestTraceHere(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c, err := newTestBackend(t).Watch(ctx)
	if err != nil {
		t.Log(err)
		if !strings.HasPrefix(err.Error(), "cannot watch process starts by an ETW session: ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
		if !errors.Is(err, target.ErrDenied) && !errors.Is(err, target.ErrUnsupported) {
			t.Errorf("neither denied nor unsupported: %v", err)
		}
	} else if winhosttest.Wine() {
		t.Error("Wine has sessions now: the tests of the suite may use them")
	} else {
		cancel()
		for end := time.After(winhosttest.Patience); ; {
			select {
			case _, open := <-c:
				if !open {
					return
				}
			case <-end:
				t.Fatal("the channel is not closed")
			}
		}
	}
	readers.Lock()
	defer readers.Unlock()
	if len(readers.open) != 0 {
		t.Errorf("%d readers are left", len(readers.open))
	}
}

// TestTraceCallback calls the callback as the system does.
func TestTraceCallback(t *testing.T) {
	heard := heard()
	var got []record
	readers.Lock()
	readers.open = map[uintptr]func(record){7: func(r record) { got = append(got, r) }}
	readers.Unlock()
	data := make([]byte, 300)
	for i := range data {
		data[i] = byte(i)
	}
	call := func(r eventRecord) {
		t.Helper()
		callBack(heard, &r)
	}
	call(eventRecord{at: 5, provider: kernelProcess, id: 1, version: 3, length: uint16(len(data)), data: &data[0], context: 7})
	call(eventRecord{length: 3, data: &data[0], context: 7})
	call(eventRecord{length: 9, context: 7})                 // no data, whatever it says
	call(eventRecord{length: 3, data: &data[0], context: 8}) // of a reader that was closed
	if len(got) != 3 || len(got[0].data) != recordMost || got[0].provider != kernelProcess || got[0].id != 1 || got[0].version != 3 || got[0].at != 5 ||
		string(got[1].data) != "\x00\x01\x02" || got[2].data != nil {
		t.Errorf("%+v", got)
	}
	(&etwReader{number: 7}).forget()
	call(eventRecord{length: 3, data: &data[0], context: 7})
	if len(got) != 3 {
		t.Error("a reader that was closed is told")
	}
}

// callBack calls a callback from a call of the system's.
func callBack(f uintptr, r *eventRecord) {
	syscall.SyscallN(f, uintptr(unsafe.Pointer(r)))
}
