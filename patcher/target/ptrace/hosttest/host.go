//go:build linux && amd64

package hosttest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Patience bounds every wait for a host.
const Patience = 30 * time.Second

// Options say what a host runs. DLL and Call are needed.
type Options struct {
	DLL   string // path of the image
	Call  string // the export the threads call: int f(int)
	Arg   int
	Allow []int // values that are right; none: all are
	// Map is how the headers are mapped: "file" (the default; the path shows, as
	// under Wine) or "anon".
	Map  string
	Base uint64 // 0: random

	Spin     int  // threads that call all the time
	FP       int  // threads that keep all their registers full
	Sleep    int  // threads that sleep 20 ms, by four different calls in turn, and check each
	Block    int  // threads that wait for a byte that comes every 50 ms, by three calls in turn (and one that feeds them)
	Churn    int  // threads that start others all the time
	Wait     bool // threads that wait without a time limit in calls that a stop may end with EINTR
	AltStack bool // a thread that stands on its signal stack, interrupted inside the image

	Static bool // link the host statically
	// Env is its environment besides ours.
	Env []string
	// Credential runs it as somebody else; nil: as the test.
	Credential *syscall.Credential
}

// Host is a running host. Its methods are for one goroutine at a time and fail
// the test on anything unexpected, but for those that return an error.
type Host struct {
	PID  int
	Base uint64 // of the image; of the life that is running

	t      testing.TB
	parent *Host // of a forked child
	child  int
	cmd    *exec.Cmd
	stdin  io.Writer
	lines  chan string
	over   chan struct{} // closed when it has been reaped
	once   sync.Once
	shared []byte
	block  int

	stderr *os.File
}

// blockSize and the word numbers are those of struct block in host.h.
const (
	blockSize = 512
	blocks    = 128

	wordEntry   = 4
	wordScratch = 5
	wordCalls   = 6
	wordWrong   = 7
	wordFaults  = 8
	wordThreads = 9
	wordValue   = 10
	wordAltTID  = 11
	wordAltSP   = 12
	wordAltPC   = 13
	wordSleeps  = 14
	wordReads   = 15
	wordFP      = 16
	wordLates   = 17
	wordSignals = 18
	wordSum     = 19
	exampleAt   = 20 * 8
	exampleSize = 128
	wordWaits   = 36
	wordEINTRs  = 37
	wordHandled = 38
)

// Probe is an address at which every host has a page filled with 0x5a.
const Probe = 0x5a5a0000000

// Start starts a host and ends it with the test.
func Start(t testing.TB, o Options) *Host {
	t.Helper()
	h, err := Launch(t, o)
	if err != nil {
		t.Fatalf("cannot start a host: %v", err)
	}
	return h
}

// Launch is Start for those who deal with the error themselves.
func Launch(t testing.TB, o Options) (*Host, error) {
	t.Helper()
	path := Build(t, o.Static)
	shared, err := os.CreateTemp("", "hotpatchd-host-shared-")
	if err != nil {
		return nil, err
	}
	defer shared.Close()
	t.Cleanup(func() { os.Remove(shared.Name()) })
	if err := shared.Truncate(blockSize * blocks); err != nil {
		return nil, err
	}
	if o.Credential != nil {
		if err := shared.Chown(int(o.Credential.Uid), int(o.Credential.Gid)); err != nil {
			return nil, err
		}
	}
	b, err := unix.Mmap(int(shared.Fd()), 0, blockSize*blocks, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	dll, err := filepath.Abs(o.DLL)
	if err != nil {
		return nil, err
	}
	args := []string{"--dll=" + dll, "--call=" + o.Call, "--arg=" + strconv.Itoa(o.Arg), "--shared=" + shared.Name()}
	for _, n := range []struct {
		name string
		n    int
	}{{"spin", o.Spin}, {"fp", o.FP}, {"sleep", o.Sleep}, {"block", o.Block}, {"churn", o.Churn}} {
		args = append(args, "--"+n.name+"="+strconv.Itoa(n.n))
	}
	if o.Wait {
		args = append(args, "--wait=1")
	}
	if o.AltStack {
		args = append(args, "--altstack=1")
	}
	if o.Map != "" {
		args = append(args, "--map="+o.Map)
	}
	if o.Base != 0 {
		args = append(args, "--base="+strconv.FormatUint(o.Base, 16))
	}
	if len(o.Allow) > 0 {
		var s []string
		for _, v := range o.Allow {
			s = append(s, strconv.Itoa(v))
		}
		args = append(args, "--allow="+strings.Join(s, ","))
	}
	h := &Host{t: t, cmd: exec.Command(path, args...), shared: b}
	// Nothing unmaps the block: whoever asks late, in a cleanup, still gets an answer.
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: o.Credential}
	h.cmd.Env = append(os.Environ(), o.Env...)
	return h, h.start()
}

// Tracer attaches another tracer to every thread of a process; it is gone when
// release returns.
func Tracer(t testing.TB, pid int) (release func(), err error) {
	t.Helper()
	h := &Host{t: t, cmd: exec.Command(Build(t, false), "--trace="+strconv.Itoa(pid))}
	if err := h.start(); err != nil {
		return nil, err
	}
	return h.Exit, nil
}

func (h *Host) start() error {
	// Open until the end of the test: a forked child that outlives its parent
	// ends when nobody holds the other end of its input.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	h.t.Cleanup(func() { w.Close() })
	h.cmd.Stdin = r
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	// A file, since Wait would wait for the children to close a pipe.
	stderr, err := os.CreateTemp("", "hotpatchd-host-stderr-")
	if err != nil {
		return err
	}
	os.Remove(stderr.Name())
	h.t.Cleanup(func() { stderr.Close() })
	h.cmd.Stderr, h.stderr = stderr, stderr
	if err := h.cmd.Start(); err != nil {
		return err
	}
	h.stdin, h.PID = w, h.cmd.Process.Pid
	h.lines, h.over = make(chan string, 16), make(chan struct{})
	go func() {
		defer close(h.over)
		defer h.cmd.Wait()
		defer close(h.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			h.lines <- s.Text()
		}
	}()
	h.t.Cleanup(h.Exit)
	line, err := h.line()
	if err != nil {
		h.Exit()
		return err
	}
	return h.ready(line)
}

// ready reads "ready PID BASE BLOCK".
func (h *Host) ready(line string) error {
	_, err := fmt.Sscanf(line, "ready %d %x %d", &h.PID, &h.Base, &h.block)
	if err != nil && h.shared != nil {
		return fmt.Errorf("the host said %q: %w", line, err)
	}
	return nil
}

func (h *Host) line() (string, error) {
	select {
	case line, ok := <-h.lines:
		if !ok {
			<-h.over
			complaint := make([]byte, 4096)
			n, _ := h.stderr.ReadAt(complaint, 0)
			return "", fmt.Errorf("the host has ended (%v) %s", h.cmd.ProcessState, strings.TrimSpace(string(complaint[:n])))
		}
		return line, nil
	case <-time.After(Patience):
		return "", fmt.Errorf("no answer from host %d in %v", h.PID, Patience)
	}
}

// Ask sends a command of testdata/host/control.c and returns the answer behind
// "ok". It does not answer while its threads are held.
func (h *Host) Ask(command string) (string, error) {
	if h.parent != nil {
		return h.parent.Ask(fmt.Sprintf("child %d %s", h.child, command))
	}
	if _, err := fmt.Fprintln(h.stdin, command); err != nil {
		return "", err
	}
	line, err := h.line()
	if err != nil {
		return "", err
	}
	answer, ok := strings.CutPrefix(line, "ok")
	if !ok {
		return "", fmt.Errorf("%s: the host says %s", command, line)
	}
	return strings.TrimSpace(answer), nil
}

// Do is Ask that fails the test.
func (h *Host) Do(command string) string {
	h.t.Helper()
	answer, err := h.Ask(command)
	if err != nil {
		h.t.Fatal(err)
	}
	return answer
}

// Value has the export called once more.
func (h *Host) Value() int {
	h.t.Helper()
	v, err := strconv.Atoi(strings.TrimPrefix(h.Do("value"), "value "))
	if err != nil {
		h.t.Fatal(err)
	}
	return v
}

// Stats are a host's own counters. They can be read while it is held.
type Stats struct {
	Calls   uint64 // of the export
	Wrong   uint64 // values that were not allowed
	Faults  uint64 // system calls that ended wrongly, registers that had changed
	Threads int    // as it knows them, without those that churn
	Value   int    // of the last call
	Sleeps  uint64 // rounds of the other kinds of threads
	Reads   uint64
	FP      uint64
	Lates   uint64 // sleeps more than a second too long
	Signals uint64 // that came to the receiver
	Sum     uint64 // of the values they carried
	Waits   uint64 // calls without a time limit that ended as they should
	EINTRs  uint64 // those that ended with EINTR
	Handled uint64 // signals sent to end them
	Example string // the first thing that was wrong
}

// Stats reads the counters from shared memory.
func (h *Host) Stats() Stats {
	b := h.shared[h.block*blockSize:][:blockSize]
	text, _, _ := strings.Cut(string(b[exampleAt:exampleAt+exampleSize]), "\x00")
	return Stats{
		Calls: h.word(wordCalls), Wrong: h.word(wordWrong), Faults: h.word(wordFaults), Threads: int(h.word(wordThreads)),
		Value: int(int64(h.word(wordValue))), Sleeps: h.word(wordSleeps), Reads: h.word(wordReads), FP: h.word(wordFP),
		Lates: h.word(wordLates), Signals: h.word(wordSignals), Sum: h.word(wordSum), Example: text,
		Waits: h.word(wordWaits), EINTRs: h.word(wordEINTRs), Handled: h.word(wordHandled),
	}
}

func (h *Host) word(n int) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&h.shared[h.block*blockSize+8*n])))
}

// Entry is the address of the export, Scratch that of 64 writable bytes nobody uses.
func (h *Host) Entry() uint64   { return h.word(wordEntry) }
func (h *Host) Scratch() uint64 { return h.word(wordScratch) }

// SignalStack is the thread that stands on its signal stack, and the stack
// pointer and pc it had in the image when the signal came.
func (h *Host) SignalStack() (tid int, sp, pc uint64) {
	return int(h.word(wordAltTID)), h.word(wordAltSP), h.word(wordAltPC)
}

// Fork has it fork. The child is a host of its own with all kinds of threads.
func (h *Host) Fork() *Host {
	h.t.Helper()
	c := &Host{t: h.t, parent: h, shared: h.shared, over: make(chan struct{})}
	number, ready, _ := strings.Cut(strings.TrimPrefix(h.Do("fork"), "fork "), " ")
	var err error
	if c.child, err = strconv.Atoi(number); err == nil {
		err = c.ready(ready)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(c.Exit)
	return c
}

// Exec has it execute its program anew. Base and all counters are of the new life then.
func (h *Host) Exec() {
	h.t.Helper()
	fmt.Fprintln(h.stdin, "exec")
	line, err := h.line()
	if err == nil {
		err = h.ready(line)
	}
	if err != nil {
		h.t.Fatalf("exec: %v", err)
	}
}

// Alive tells whether it has not ended.
func (h *Host) Alive() bool {
	if h.parent != nil {
		return unix.Kill(h.PID, 0) == nil && state(h.PID) != 'Z'
	}
	select {
	case <-h.over:
		return false
	default:
		return true
	}
}

func state(pid int) byte {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if i := strings.LastIndexByte(string(b), ')'); err == nil && i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 'Z'
}

// Kill begins its end and does not wait for it.
func (h *Host) Kill() { unix.Kill(h.PID, unix.SIGKILL) }

// Exit ends it and waits until it has been reaped. It may be called again.
func (h *Host) Exit() {
	h.once.Do(func() {
		if h.Alive() { // else its pid may be somebody else's
			h.Kill()
		}
		if h.parent != nil {
			h.parent.Ask(fmt.Sprintf("child %d quit", h.child)) // reaps it
		}
	})
	if h.parent != nil {
		// Without its parent, whoever inherited it reaps it; that may be us.
		for end := time.Now().Add(Patience); h.Alive() && time.Now().Before(end); time.Sleep(time.Millisecond) {
			unix.Wait4(h.PID, nil, unix.WNOHANG, nil)
		}
		return
	}
	select {
	case <-h.over:
	case <-time.After(Patience):
		h.t.Errorf("host %d does not end", h.PID)
	}
}

// Healthy fails the test if the host found anything wrong with its own calls.
func (h *Host) Healthy() {
	h.t.Helper()
	if !h.Alive() {
		h.t.Errorf("host %d has ended", h.PID)
	}
	if s := h.Stats(); s.Wrong != 0 || s.Faults != 0 {
		h.t.Errorf("host %d: %d wrong values, %d faults, for one: %s", h.PID, s.Wrong, s.Faults, s.Example)
	}
}

// Runs waits until the export was called more often than now.
func (h *Host) Runs() {
	h.t.Helper()
	from := h.Stats().Calls
	for end := time.Now().Add(Patience); h.Stats().Calls <= from; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("host %d makes no calls any more", h.PID)
		}
	}
}
