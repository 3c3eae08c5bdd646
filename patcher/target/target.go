// Package target is the seam between the patcher and whatever reaches into
// processes: a Backend lists and opens processes, a Process reads, writes and
// allocates their memory, a Frozen is a Process whose threads all stand still.
//
// Three backends implement it: sim (a simulated machine), ptrace (Linux) and
// win32 (Windows). All pass the one suite in targettest. A backend knows
// nothing of PE images; what it reports are regions, threads and bytes.
//
// A Process is not safe for concurrent use: it has one owner at a time.
// Nothing here may leave a process stopped: whatever is frozen is released by
// Thaw, by the context's deadline, and by our own death.
package target

import (
	"context"
	"fmt"
	"time"
)

// Addr is an address in a target process; always 64 bits, never a pointer of ours.
type Addr uint64

func (a Addr) String() string { return fmt.Sprintf("%x", uint64(a)) }

// ID names one life of one program. A pid alone does not: pids are reused, and
// execve keeps both pid and start time while it replaces the program.
type ID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // Linux: start time folded with AT_RANDOM; Windows: creation time
}

func (id ID) String() string { return fmt.Sprintf("%d/%x", id.PID, id.Start) }

// Arch is a processor architecture, spelled as Go spells it ("amd64", "arm64").
type Arch string

const (
	AMD64 Arch = "amd64"
	ARM64 Arch = "arm64"
	X86   Arch = "386"
)

// Guard is a reason of the operating system or of the process's set-up not to
// touch it. A guard is a fact; whether it blocks is the patcher's decision.
type Guard struct {
	Code GuardCode
	Text string // one sentence with names and numbers ("traced by strace, pid 31211")
}

// GuardCode classifies a Guard. The values are part of the reason codes that
// users see ("blocked", reason_code "tracer").
type GuardCode string

const (
	GuardTracer    GuardCode = "tracer"       // another tracer or debugger is attached
	GuardSeccomp   GuardCode = "seccomp"      // a seccomp filter could refuse or kill our calls
	GuardMDWE      GuardCode = "mdwe"         // memory deny write execute; harmless to us: annex code is mapped r-x at once
	GuardDispatch  GuardCode = "sud"          // syscall user dispatch: our calls would become signals
	GuardProtected GuardCode = "protected"    // a protected process, or one the OS keeps us out of
	Guard32Bit     GuardCode = "32-bit"       // 32-bit code
	GuardEmulated  GuardCode = "emulated"     // code of another architecture
	GuardSelf      GuardCode = "self"         // this daemon
	GuardSystem    GuardCode = "never-touch"  // init and its kin, security products
	GuardShared    GuardCode = "shared-space" // another process shares this memory (CLONE_VM without CLONE_THREAD)
	GuardKernel    GuardCode = "kernel"       // the kernel refuses tracing; Text says which setting

	GuardDynamicCode GuardCode = "acg" // arbitrary code guard: no new executable memory
	GuardSigned      GuardCode = "cig" // code integrity guard: signed images only
)

// Info describes a process as far as it can be told from outside.
type Info struct {
	ID
	Image  string  // path or name of the program's main PE image; "" when there is none or it is not known
	Host   string  // file name of the native executable that runs it (wine64, a PE host)
	Exe    string  // path of that native executable
	User   string  // owner's name, or the number where there is no name
	UID    int     // owner's number; -1 where the system has none
	SID    string  // owner's security identifier; "" where the system has none
	Unit   string  // systemd unit, container or job, where known
	Arch   Arch    // of the code it runs
	PEB    Addr    // process environment block, 0 where unknown
	Guards []Guard // what speaks against touching it
	Change uint64  // differs when mappings may have changed since the last List; equal means: nothing to look at
	Bare   bool    // nothing is mapped in it that could be the code of a PE image: there is nothing to open it for
}

// Prot is a page protection. Write and Exec never go together in what we ask for.
type Prot uint8

const (
	Read Prot = 1 << iota
	Write
	Exec
)

func (p Prot) String() string {
	b := []byte("---")
	if p&Read != 0 {
		b[0] = 'r'
	}
	if p&Write != 0 {
		b[1] = 'w'
	}
	if p&Exec != 0 {
		b[2] = 'x'
	}
	return string(b)
}

// Kind tells what backs a region.
type Kind uint8

const (
	Private Kind = iota // anonymous
	File                // a mapped file
	Heap                // grows upwards, keep away from its end
	Stack               // grows downwards, keep away from its start
	Special             // vdso, vvar and the like: neither readable by rule nor ours
)

// Region is a run of pages with one protection and one backing. End is exclusive.
type Region struct {
	Start, End Addr
	Prot       Prot
	Shared     bool // a write would be seen by other processes
	Kind       Kind
	Path       string // backing file, "" if none
	Offset     uint64 // offset of Start in the file
	Inode      uint64 // 0 if none
}

// Size is the region's length in bytes.
func (r Region) Size() uint64 { return uint64(r.End - r.Start) }

// Span is a run of addresses; End is exclusive.
type Span struct{ Start, End Addr }

// Contains tells whether a lies in the span.
func (s Span) Contains(a Addr) bool { return a >= s.Start && a < s.End }

// Thread is one stopped thread. Regs are the integer registers in the order of
// the architecture's encoding (amd64: rax rcx rdx rbx rsp rbp rsi rdi r8…r15;
// arm64: x0…x30).
type Thread struct {
	ID    int
	PC    Addr
	SP    Addr
	Regs  []uint64
	Stack Span   // from SP to the end of the mapping SP lies in; empty if SP lies in none
	State string // what it was doing: "running", or the system call it waits in ("read"), if known
}

// Backend reaches the processes of one machine. Safe for concurrent use.
type Backend interface {
	// Name is "sim", "ptrace" or "win32".
	Name() string
	// List tells of every process that could host a PE image and that can be seen,
	// those of other users and guarded ones too. Cost follows changes, not the
	// number of processes. A process that ends meanwhile is left out.
	List(ctx context.Context) ([]Info, error)
	// Open takes hold of one life. ErrGone if it is over, ErrDenied if the
	// system refuses us. One handle is kept until Close. Opening stops nothing.
	Open(ctx context.Context, id ID) (Process, error)
}

// Process is one opened life. Not safe for concurrent use.
type Process interface {
	// Info is what List said, as of Open, with Guards read anew.
	Info() Info
	// ReadAt fills p from at. Short reads are errors; n tells how far it got.
	ReadAt(p []byte, at Addr) (n int, err error)
	// WriteAt writes p at at, whatever the page protection. Short writes are
	// errors; n tells how far it got. The caller says what may be written.
	WriteAt(p []byte, at Addr) (n int, err error)
	// Flush makes the instruction cache forget n bytes at at.
	Flush(at Addr, n int) error
	// Regions lists the mappings, sorted by Start, not overlapping.
	Regions() ([]Region, error)
	// Alloc maps size bytes (a multiple of the page size) of zeroed private
	// memory exactly at at with exactly this protection, or fails: ErrTaken if
	// anything is there already. Must not be called while frozen.
	Alloc(at Addr, size uint64, prot Prot) error
	// Protect changes the protection. w and x together are refused.
	// Must not be called while frozen.
	Protect(at Addr, size uint64, prot Prot) error
	// Free unmaps what Alloc mapped. Must not be called while frozen.
	Free(at Addr, size uint64) error
	// Freeze stops every thread, or none: too late by ctx means thawed and
	// ErrBusy naming the thread and what it waits in.
	Freeze(ctx context.Context) (Frozen, error)
	// Close lets go of the handle. Whatever is frozen is thawed.
	Close() error
}

// Frozen is a Process whose threads all stand still.
type Frozen interface {
	// Threads are the stopped threads; their contexts were read and believed.
	Threads() ([]Thread, error)
	// Thaw lets all threads go on. It is idempotent. After a nil error no
	// thread is held by us.
	Thaw() error
}

// Interrupter is optional on a Frozen: the stack pointers to which signal
// frames inside stack bytes b (found at address at) will return. A thread on
// its alternate signal stack still has frames on its normal stack.
type Interrupter interface {
	Interrupted(b []byte, at Addr) []Addr
}

// Pauser is optional on a Frozen: how long threads stood, first stop to last release.
// Valid after Thaw.
type Pauser interface {
	Pause() time.Duration
}

// Watcher is optional on a Backend: starts and ends of processes as they happen.
type Watcher interface {
	// Watch tells of events until ctx ends, then the channel is closed. What is
	// told is a hint and never the truth: events may be lost, which is told as
	// Lost where it is known, come late or in another order than they happened,
	// and be of processes that are over. Losing one costs latency, never
	// correctness. An error, ErrDenied or ErrUnsupported among others, says why
	// nothing would ever be told.
	Watch(ctx context.Context) (<-chan Event, error)
	// ListOf is List of these processes only, and costs what they cost. Those
	// that are over are left out; the order is of no meaning.
	ListOf(ctx context.Context, pids []int) ([]Info, error)
}

// Follower is optional on a Backend: the ends of chosen lives, where the system
// tells how a process ended only to those who have hold of it.
type Follower interface {
	// Ends tells of the ends of lives that are followed, each once, until ctx
	// ends; then the channel is closed and nobody is followed. One at a time.
	Ends(ctx context.Context) (<-chan Event, error)
	// Follow has these lives followed from now on, and no others. It returns those
	// that are: not who is over or closed to us, and of very many the first. Nobody
	// else is given the pid of a life before a Follow without it.
	Follow(ids []ID) (followed []ID)
}

// EventKind is what happened to a process.
type EventKind uint8

const (
	Started EventKind = iota + 1 // it executes another program: a new life
	Forked                       // it is the child of a fork, with its parent's images
	Exited                       // it has ended, or its main thread has
	Mapped                       // it got executable memory, by which it may have an image more
	Lost                         // events were lost: only List tells what happened
)

func (k EventKind) String() string {
	switch k {
	case Started:
		return "started"
	case Forked:
		return "forked"
	case Exited:
		return "exited"
	case Mapped:
		return "mapped"
	case Lost:
		return "lost"
	}
	return fmt.Sprintf("event %d", uint8(k))
}

// Event is one of them. PID is a number that may have been given to another
// process since, and says nothing of lives.
type Event struct {
	Kind   EventKind
	PID    int       // 0: Lost
	Start  uint64    // of the life, as in ID; 0 where the system does not tell
	Parent int       // Forked: who forked; 0 where the system does not tell
	At     time.Time // when it happened, with Lost when that was noticed; zero if the system does not tell

	// Told, of Started and Forked: what it maps from now on is told as Mapped, so
	// that nobody need look before.
	Told bool

	// Exited: how. Code is the exit code; with Status that of Windows, which is an
	// NTSTATUS where an exception ended it. Signal is the number of the signal
	// that ended it, 0 if none did or the system has none.
	Code   uint32
	Status bool
	Signal int
	// Faults are the instructions at which threads have faulted lately, of this
	// process or of others; nil where the system does not tell. One that lies in
	// memory which only this process can have there is its.
	Faults []Addr
}

// Prober is optional on a Backend: one clear sentence on what the system lets
// it do, and an error if it can do nothing at all.
type Prober interface {
	Probe(ctx context.Context) (sentence string, err error)
}

// Freezer is optional on a Backend: how it stops the threads of a process, in a
// few words for people.
type Freezer interface {
	FreezeMethod() string
}

// Sparse is optional on a Process: the runs of pages within a span of private
// memory that were ever touched. What lies outside them reads as zeros, so
// that a large mapping that is nearly empty need not be read. May be called
// while frozen.
type Sparse interface {
	Touched(s Span) ([]Span, error)
}

// Unwinder is optional on a Process: makes the table of count RUNTIME_FUNCTIONs
// at table known to the unwinder of the target, by a call of the target's own
// RtlAddFunctionTable, which is at add; base is what the records count from. The
// call is made by a thread of its own, so that our death changes nothing, and
// has a deadline: ErrBusy then, and it may still be made later.
type Unwinder interface {
	Register(add, table Addr, count int, base Addr) error
}

// FreezeLimit is the longest a freeze of n threads may take before it is given
// up (design rule: 50 ms and 1 ms a thread).
func FreezeLimit(n int) time.Duration {
	return 50*time.Millisecond + time.Duration(n)*time.Millisecond
}

// FreezePasses bounds how often the threads of a process are enumerated until
// two enumerations agree.
const FreezePasses = 8

// PageSize is the granularity of Alloc, Protect and Free on every backend.
const PageSize = 4096
