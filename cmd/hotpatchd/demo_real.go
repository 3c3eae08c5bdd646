package main

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
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/testdata/fixtures/demo"
)

// realStage plays with real processes: this program again, as host and as daemon.
type realStage struct {
	dir   string
	hosts map[int]*demoHost
	proc  *exec.Cmd
	// release ends our being the only demonstration.
	release func()
}

// demoHost is one running pe-host and the line it is asked over.
type demoHost struct {
	mu    sync.Mutex
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
}

// hostThreads call the function without pause, hostSleepers between sleeps.
const (
	hostThreads  = "2"
	hostSleepers = "4"
)

func (s *realStage) config(d *story) string {
	s.dir = d.dir
	return "[backend]\nname = \"ptrace\"\nscan_every = \"250ms\"\n"
}

func (s *realStage) start() (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	image, err := os.CreateTemp("", "hotpatchd-demo-*.dll")
	if err != nil {
		return 0, err
	}
	defer os.Remove(image.Name())
	defer image.Close()
	if _, err := image.Write(demo.DLL); err != nil {
		return 0, err
	}
	h := &demoHost{cmd: exec.Command(self, "pe-host", "--image", image.Name(), "--export", "answer", "--threads", hostThreads, "--sleepers", hostSleepers,
		"--header", "anonymous", "--allow", fmt.Sprintf("%d,%d", wrongAnswer, rightAnswer))}
	h.cmd.Stderr = os.Stderr
	if h.in, err = h.cmd.StdinPipe(); err != nil {
		return 0, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := h.cmd.Start(); err != nil {
		return 0, err
	}
	h.lines = bufio.NewScanner(out)
	if s.hosts == nil {
		s.hosts = map[int]*demoHost{}
	}
	pid := h.cmd.Process.Pid
	s.hosts[pid] = h
	words, err := h.read()
	if err != nil || words[0] != "ready" {
		return 0, fmt.Errorf("host %d is not ready: %v %v", pid, words, err)
	}
	return pid, nil
}

// read waits for one line, within bounds.
func (h *demoHost) read() ([]string, error) {
	type line struct {
		words []string
		err   error
	}
	got := make(chan line, 1)
	go func() {
		if !h.lines.Scan() {
			got <- line{nil, fmt.Errorf("it has ended: %v", h.lines.Err())}
			return
		}
		words := strings.Fields(h.lines.Text())
		if len(words) == 0 {
			words = []string{""}
		}
		got <- line{words, nil}
	}()
	select {
	case l := <-got:
		return l.words, l.err
	case <-time.After(demoPatience):
		return nil, fmt.Errorf("no answer within %s", demoPatience)
	}
}

func (s *realStage) ask(pid int, question string) ([]string, error) {
	h := s.hosts[pid]
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := fmt.Fprintln(h.in, question); err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	words, err := h.read()
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	if words[0] != question || len(words) < 2 {
		return nil, fmt.Errorf("process %d answers %q to %q", pid, strings.Join(words, " "), question)
	}
	return words[1:], nil
}

func (s *realStage) answers(pid int) (int, error) {
	w, err := s.ask(pid, "value")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(w[0])
}

func (s *realStage) calls(pid int) (n, wrong uint64, err error) {
	w, err := s.ask(pid, "stats")
	if err != nil {
		return 0, 0, err
	}
	if len(w) < 2 {
		return 0, 0, fmt.Errorf("process %d tells no statistics", pid)
	}
	if n, err = strconv.ParseUint(w[0], 10, 64); err != nil {
		return 0, 0, err
	}
	wrong, err = strconv.ParseUint(w[1], 10, 64)
	return n, wrong, err
}

func (s *realStage) daemon(config string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "daemon.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.proc = exec.Command(self, "run", "--config", config)
	s.proc.Stdout, s.proc.Stderr = log, log
	endWithUs(s.proc)
	return s.proc.Start()
}

func (s *realStage) operator(socket string) operator { return control.Dial(socket) }

func (s *realStage) kill() error {
	if err := s.proc.Process.Kill(); err != nil {
		return err
	}
	s.proc.Wait() // "signal: killed" is what we asked for
	s.proc = nil
	return nil
}

func (s *realStage) close() {
	defer s.release()
	if s.proc != nil {
		s.proc.Process.Signal(os.Interrupt)
		done := make(chan struct{})
		go func() { s.proc.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(demoPatience):
			s.proc.Process.Kill()
			<-done
		}
	}
	for _, h := range s.hosts {
		h.in.Close() // a host ends with its input
		h.cmd.Wait()
	}
}
