//go:build windows

package winhosttest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// Patience bounds every wait for a host.
const Patience = 60 * time.Second

// Options say what a host runs.
type Options struct {
	Spin  int // threads that call the code all the time
	Block int // threads that wait for a byte or an event that comes every 50 ms (and one that feeds them)
	Sleep int // threads that sleep 100 ms and check it
	Regs  int // threads that keep their registers full
	Churn int // threads that start others all the time
}

// Host is a running host. Its methods are for one goroutine at a time and fail
// the test on anything unexpected, but for those that return an error.
type Host struct {
	PID int

	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string
	over   chan struct{}
	shared uintptr // the block, mapped for as long as we run: whoever asks late still gets an answer
	stderr strings.Builder
}

// Words of struct block in winhost.h.
const (
	wordEntry = iota
	wordScratch
	wordCalls
	wordValue
	wordWrong
	wordFaults
	wordSleeps
	wordReads
	wordRounds
	words

	blockSize   = 512
	exampleSize = 128
)

// Start starts a host and ends it with the test.
func Start(t testing.TB, o Options) *Host {
	t.Helper()
	for try := 1; ; try++ {
		h, err := Launch(t, o)
		switch {
		case err == nil:
			return h
		case !errors.Is(err, windows.ERROR_INTERNAL_ERROR) || try == starts:
			t.Fatalf("cannot start a host: %v", err)
		}
		t.Logf("try %d: %v", try, err)
	}
}

// starts is how often a host is started: Wine 8 now and then answers
// STATUS_INTERNAL_ERROR to CreateProcess where very many are started.
const starts = 3

// Launch is Start for those who deal with the error themselves.
func Launch(t testing.TB, o Options) (*Host, error) {
	t.Helper()
	path := Build(t)
	file := filepath.Join(t.TempDir(), "shared")
	h := &Host{t: t}
	if err := h.share(file); err != nil {
		return nil, err
	}
	args := []string{"--shared=" + file}
	for _, n := range []struct {
		name string
		n    int
	}{{"spin", o.Spin}, {"block", o.Block}, {"sleep", o.Sleep}, {"regs", o.Regs}, {"churn", o.Churn}} {
		args = append(args, "--"+n.name+"="+strconv.Itoa(n.n))
	}
	h.cmd = exec.Command(path, args...)
	return h, h.start()
}

// Debugger attaches a debugger to a process; it is gone when release returns.
func Debugger(t testing.TB, pid int) (release func(), err error) {
	t.Helper()
	h := &Host{t: t, cmd: exec.Command(Build(t), "--trace="+strconv.Itoa(pid))}
	if err := h.start(); err != nil {
		return nil, err
	}
	return func() {
		h.stdin.Close()
		h.await()
	}, nil
}

func (h *Host) share(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(blockSize); err != nil {
		return err
	}
	m, err := windows.CreateFileMapping(windows.Handle(f.Fd()), nil, windows.PAGE_READWRITE, 0, blockSize, nil)
	if err != nil {
		return err
	}
	defer windows.CloseHandle(m)
	h.shared, err = windows.MapViewOfFile(m, windows.FILE_MAP_WRITE, 0, 0, blockSize)
	if err != nil {
		return err
	}
	// Unmapped when the host is gone, before the folder is removed.
	h.t.Cleanup(func() {
		windows.UnmapViewOfFile(h.shared)
		h.shared = 0
	})
	return nil
}

func (h *Host) start() error {
	var err error
	if h.stdin, err = h.cmd.StdinPipe(); err != nil {
		return err
	}
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	h.cmd.Stderr = &h.stderr
	if err := h.cmd.Start(); err != nil {
		return err
	}
	h.PID = h.cmd.Process.Pid
	h.lines, h.over = make(chan string, 16), make(chan struct{})
	go func() {
		defer close(h.over)
		defer h.cmd.Wait()
		defer close(h.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			h.lines <- strings.TrimSpace(s.Text())
		}
	}()
	h.t.Cleanup(h.Exit)
	line, err := h.line()
	if err == nil && !strings.HasPrefix(line, "ready ") {
		err = fmt.Errorf("the host said %q", line)
	}
	if err != nil {
		h.Exit()
	}
	return err
}

func (h *Host) line() (string, error) {
	select {
	case line, ok := <-h.lines:
		if !ok {
			<-h.over
			return "", fmt.Errorf("the host has ended (%v) %s", h.cmd.ProcessState, strings.TrimSpace(h.stderr.String()))
		}
		return line, nil
	case <-time.After(Patience):
		return "", fmt.Errorf("no answer from host %d in %v", h.PID, Patience)
	}
}

// Ask sends a command of winhost.c and returns the answer behind "ok". It does
// not answer while its threads are held.
func (h *Host) Ask(command string) (string, error) {
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

// Stats are a host's own counters. They can be read while it is held.
type Stats struct {
	Calls, Wrong, Faults, Sleeps, Reads, Rounds uint64
	Value                                       int
	Example                                     string // the first thing that was wrong
}

// Stats reads the counters from shared memory.
func (h *Host) Stats() Stats {
	if h.shared == 0 {
		return Stats{}
	}
	b := unsafe.Slice(*(**byte)(unsafe.Pointer(&h.shared)), blockSize)
	text, _, _ := strings.Cut(string(b[8*words:8*words+exampleSize]), "\x00")
	return Stats{
		Calls: h.word(wordCalls), Wrong: h.word(wordWrong), Faults: h.word(wordFaults), Sleeps: h.word(wordSleeps),
		Reads: h.word(wordReads), Rounds: h.word(wordRounds), Value: int(int64(h.word(wordValue))), Example: text,
	}
}

func (h *Host) word(n int) uint64 {
	b := *(**[blockSize / 8]uint64)(unsafe.Pointer(&h.shared))
	return atomic.LoadUint64(&b[n])
}

// Entry is the address of the code, Scratch that of 64 writable bytes nobody uses.
func (h *Host) Entry() uint64   { return h.word(wordEntry) }
func (h *Host) Scratch() uint64 { return h.word(wordScratch) }

// Alive tells whether it has not ended.
func (h *Host) Alive() bool {
	select {
	case <-h.over:
		return false
	default:
		return true
	}
}

// Tell sends a command that is not answered: it ends the host.
func (h *Host) Tell(command string) {
	h.t.Helper()
	if _, err := fmt.Fprintln(h.stdin, command); err != nil {
		h.t.Fatal(err)
	}
}

// Kill begins its end and does not wait for it.
func (h *Host) Kill() { h.cmd.Process.Kill() }

// Exit ends it and waits until it is gone. It may be called again.
func (h *Host) Exit() {
	if h.Alive() {
		h.Kill()
	}
	h.await()
}

func (h *Host) await() {
	select {
	case <-h.over:
	case <-time.After(Patience):
		h.t.Errorf("host %d does not end", h.PID)
	}
}

// Threads counts its threads by a way of its own (Toolhelp32).
func (h *Host) Threads() int { return len(h.ThreadIDs()) }

// ThreadIDs are the ids of its threads.
func (h *Host) ThreadIDs() []uint32 {
	h.t.Helper()
	var ids []uint32
	s, err := windows.CreateToolhelp32Snapshot(windows.TH32CS_SNAPTHREAD, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer windows.CloseHandle(s)
	e := windows.ThreadEntry32{Size: uint32(unsafe.Sizeof(windows.ThreadEntry32{}))}
	for err = windows.Thread32First(s, &e); err == nil; err = windows.Thread32Next(s, &e) {
		if int(e.OwnerProcessID) == h.PID {
			ids = append(ids, e.ThreadID)
		}
	}
	return ids
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

// Runs waits until the code was called more often than now.
func (h *Host) Runs() {
	h.t.Helper()
	from := h.Stats().Calls
	for end := time.Now().Add(Patience); h.Stats().Calls <= from; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("host %d makes no calls any more", h.PID)
		}
	}
}
