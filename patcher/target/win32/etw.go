//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

var (
	advapi32       = windows.NewLazySystemDLL("advapi32.dll")
	startTrace     = advapi32.NewProc("StartTraceW")
	controlTrace   = advapi32.NewProc("ControlTraceW")
	enableTraceEx2 = advapi32.NewProc("EnableTraceEx2")
	openTrace      = advapi32.NewProc("OpenTraceW")
	processTrace   = advapi32.NewProc("ProcessTrace")
	closeTrace     = advapi32.NewProc("CloseTrace")
)

// sessionName is the name of our session, one for the whole system.
const sessionName = "hotpatchd process starts"

// Buffers of the session: few and bounded. One that is not full is handed to us
// after traceFlush milliseconds.
const (
	traceBufferKB   = 64
	traceBuffersMin = 4
	traceBuffersMax = 32
	traceFlush      = 50
	// traceFlushSeconds is for a Windows that counts it in seconds.
	traceFlushSeconds = 1
	// traceNameMost is the room for each name of a session, words.
	traceNameMost = 1024
)

// As in evntrace.h, wmistr.h and evntcons.h.
const (
	wnodeTracedGUID     = 0x00020000
	traceRealTime       = 0x00000100
	traceFlushMS        = 0x00000010
	traceControlQuery   = 0
	traceControlStop    = 1
	traceEnable         = 1
	traceLevelInfo      = 4
	processTraceRecord  = 0x10000000
	invalidTrace        = ^uint64(0)
	errInstanceNotFound = syscall.Errno(4201) // ERROR_WMI_INSTANCE_NOT_FOUND
	traceClockCounter   = 1
	sessionNameAt       = unsafe.Offsetof(traceProperties{}.name)
	sessionFileAt       = unsafe.Offsetof(traceProperties{}.file)
)

// traceProperties is EVENT_TRACE_PROPERTIES, with the names behind it.
type traceProperties struct {
	size            uint32
	providerID      uint32
	context         uint64
	time            uint64
	guid            guid
	clock           uint32
	flags           uint32
	bufferSize      uint32
	minBuffers      uint32
	maxBuffers      uint32
	maxFile         uint32
	mode            uint32
	flush           uint32
	enable          uint32
	age             int32
	buffers         uint32
	free            uint32
	eventsLost      uint32
	written         uint32
	logBuffersLost  uint32
	liveBuffersLost uint32
	thread          uintptr
	fileOffset      uint32
	nameOffset      uint32
	name, file      [traceNameMost]uint16
}

// traceLogfile is EVENT_TRACE_LOGFILEW.
type traceLogfile struct {
	file, name *uint16
	_          uint64
	_          uint32
	mode       uint32
	_          [376]byte // CurrentEvent, LogfileHeader, BufferCallback
	_          [4]uint32
	callback   uintptr
	_          uint64
	context    uintptr
}

// eventRecord is EVENT_RECORD.
type eventRecord struct {
	_        [16]byte
	at       uint64
	provider guid
	id       uint16
	version  uint8
	_        [43]byte
	length   uint16
	_        uintptr
	data     *byte
	context  uintptr
}

// readers are who hears events. The system calls us with a number: never with what
// a reader was that is closed by now.
var readers struct {
	sync.Mutex
	last uintptr
	open map[uintptr]func(record)
}

// heard is the one callback: the runtime has few of them, and none is ever given back.
var heard = sync.OnceValue(func() uintptr {
	return windows.NewCallback(func(r *eventRecord) uintptr {
		readers.Lock()
		deliver := readers.open[r.context]
		readers.Unlock()
		if deliver != nil {
			x := record{provider: r.provider, id: r.id, version: r.version, at: r.at}
			if r.data != nil {
				x.data = append(x.data, unsafe.Slice(r.data, min(r.length, recordMost))...)
			}
			deliver(x)
		}
		return 0
	})
})

// etw is the system's tracing.
type etw struct{}

// properties is what the calls about a session take, with room for its names.
func properties() *traceProperties {
	return &traceProperties{size: uint32(unsafe.Sizeof(traceProperties{})), flags: wnodeTracedGUID,
		nameOffset: uint32(sessionNameAt), fileOffset: uint32(sessionFileAt)}
}

func sessionNamePtr() *uint16 {
	name, err := windows.UTF16PtrFromString(sessionName)
	if err != nil {
		panic(err) // a constant without a zero
	}
	return name
}

func (etw) control(code uintptr) (*traceProperties, error) {
	p := properties()
	return p, traced(controlTrace, 0, uintptr(unsafe.Pointer(sessionNamePtr())), uintptr(unsafe.Pointer(p)), code)
}

func (t etw) stop() error {
	_, err := t.control(traceControlStop)
	if errors.Is(err, errInstanceNotFound) {
		return nil
	}
	return err
}

func (t etw) lost() (uint64, error) {
	p, err := t.control(traceControlQuery)
	return uint64(p.eventsLost) + uint64(p.liveBuffersLost), err
}

func (t etw) begin(deliver func(record)) (traceReader, error) {
	session, err := t.start()
	if err != nil {
		return nil, err
	}
	r, err := t.open(session, deliver)
	if err != nil {
		t.stop()
		return nil, err
	}
	return r, nil
}

// start makes the session. A Windows that does not flush by milliseconds does so by seconds.
func (etw) start() (session uint64, err error) {
	for _, flush := range []struct{ mode, every uint32 }{{traceFlushMS, traceFlush}, {0, traceFlushSeconds}} {
		p := properties()
		p.fileOffset = 0 // no file
		p.clock, p.mode, p.flush = traceClockCounter, traceRealTime|flush.mode, flush.every
		p.bufferSize, p.minBuffers, p.maxBuffers = traceBufferKB, traceBuffersMin, traceBuffersMax
		err = traced(startTrace, uintptr(unsafe.Pointer(&session)), uintptr(unsafe.Pointer(sessionNamePtr())), uintptr(unsafe.Pointer(p)))
		if !errors.Is(err, windows.ERROR_INVALID_PARAMETER) {
			break
		}
	}
	return session, err
}

func (etw) open(session uint64, deliver func(record)) (*etwReader, error) {
	provider := kernelProcess
	if err := traced(enableTraceEx2, uintptr(session), uintptr(unsafe.Pointer(&provider)), traceEnable, traceLevelInfo, processKeyword, 0, 0, 0); err != nil {
		return nil, err
	}
	if err := openTrace.Find(); err != nil {
		return nil, fmt.Errorf("%s: %w", openTrace.Name, target.ErrUnsupported)
	}
	r := &etwReader{}
	readers.Lock()
	readers.last++
	r.number = readers.last
	if readers.open == nil {
		readers.open = map[uintptr]func(record){}
	}
	readers.open[r.number] = deliver
	readers.Unlock()
	f := &traceLogfile{name: sessionNamePtr(), mode: traceRealTime | processTraceRecord, callback: heard(), context: r.number}
	h, _, err := openTrace.Call(uintptr(unsafe.Pointer(f)))
	if r.h = uint64(h); r.h == invalidTrace {
		r.forget()
		if err == syscall.Errno(0) { // it failed, and must not be taken for a reader
			err = windows.ERROR_INVALID_HANDLE
		}
		return nil, traceError(openTrace, err.(syscall.Errno))
	}
	return r, nil
}

// etwReader is a session that was opened.
type etwReader struct {
	h      uint64
	number uintptr // in readers
}

// run lends the system this thread until the session is stopped or closed.
func (r *etwReader) run() error {
	return traced(processTrace, uintptr(unsafe.Pointer(&r.h)), 1, 0, 0)
}

func (r *etwReader) close() {
	r.forget()
	closeTrace.Call(uintptr(r.h)) // an error tells that run has not returned yet
}

func (r *etwReader) forget() {
	readers.Lock()
	defer readers.Unlock()
	delete(readers.open, r.number)
}

// Watch tells of starts and ends by an ETW session of our own, where the system
// lets us have one: Administrators and the system, not under Wine.
func (b *backend) Watch(ctx context.Context) (<-chan target.Event, error) {
	return watchTrace(ctx, etw{})
}

// traced calls a function that answers an error code.
//
//go:uintptrescapes
func traced(p *windows.LazyProc, args ...uintptr) error {
	if p.Find() != nil {
		return fmt.Errorf("%s: %w", p.Name, target.ErrUnsupported)
	}
	r, _, _ := p.Call(args...)
	return traceError(p, syscall.Errno(uint32(r)))
}

func traceError(p *windows.LazyProc, err syscall.Errno) error {
	switch err {
	case 0:
		return nil
	case windows.ERROR_ACCESS_DENIED:
		return fmt.Errorf("%s: %w", p.Name, target.ErrDenied)
	case windows.ERROR_NOT_SUPPORTED, windows.ERROR_CALL_NOT_IMPLEMENTED:
		return fmt.Errorf("%s: %w", p.Name, target.ErrUnsupported)
	}
	return fmt.Errorf("%s: %w", p.Name, err)
}
