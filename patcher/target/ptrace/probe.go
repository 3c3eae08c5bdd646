//go:build linux && amd64

package ptrace

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

const (
	capSysPtrace = 19 // CAP_SYS_PTRACE
	yamaFile     = "/proc/sys/kernel/yama/ptrace_scope"
	// probeLimit bounds the trial on a child of ours.
	probeLimit = 5 * time.Second
)

// rights are what decides whom we may trace.
type rights struct {
	uid     int
	capable bool // CAP_SYS_PTRACE is effective
	yama    int  // kernel.yama.ptrace_scope, 0 where there is no Yama
	seccomp int  // mode we are under
}

func readRights() rights {
	r := rights{uid: os.Geteuid()}
	if b, err := os.ReadFile("/proc/self/status"); err == nil {
		effective, _ := strconv.ParseUint(statusField(b, "CapEff"), 16, 64)
		r.capable = effective>>capSysPtrace&1 != 0
		r.seccomp = max(0, firstNumber(statusField(b, "Seccomp")))
	}
	if b, err := os.ReadFile(yamaFile); err == nil {
		r.yama = max(0, firstNumber(string(b)))
	}
	return r
}

// limits says in one sentence what the rights amount to; ok is false if they
// amount to nothing. The scopes are those of Documentation/admin-guide/LSM/Yama.rst.
func (r rights) limits() (sentence string, ok bool) {
	const scope = "kernel.yama.ptrace_scope = "
	switch {
	case r.yama >= 3:
		return scope + strconv.Itoa(r.yama) + " forbids tracing until the next boot", false
	case r.capable && r.uid == 0:
		return "root, all processes", true
	case r.capable:
		return "CAP_SYS_PTRACE, all processes", true
	case r.yama == 2:
		return scope + "2 forbids tracing without CAP_SYS_PTRACE", false
	case r.yama == 1:
		return scope + "1 forbids tracing of all but our own children: CAP_SYS_PTRACE is missing", false
	default:
		return fmt.Sprintf("only processes of uid %d: CAP_SYS_PTRACE is missing", r.uid), true
	}
}

// guard is what List says of every process if we may trace none.
func (r rights) guard() (target.Guard, bool) {
	sentence, ok := r.limits()
	return target.Guard{Code: target.GuardKernel, Text: sentence}, !ok
}

// Probe tells what the system lets us do, after a trial: a child of ours is
// seized before its first instruction and ended.
func (b *backend) Probe(ctx context.Context) (string, error) {
	r := readRights()
	sentence, ok := r.limits()
	if !ok {
		return sentence, fmt.Errorf("%s: %w", sentence, target.ErrDenied)
	}
	if err := b.trial(ctx); err != nil {
		sentence = "tracing a child of ours fails: " + err.Error()
		if r.seccomp != 0 {
			sentence += ", and we are under seccomp (mode " + strconv.Itoa(r.seccomp) + ")"
		}
		return sentence, fmt.Errorf("%s: %w", sentence, target.ErrDenied)
	}
	return sentence, nil
}

// trial starts ourselves as a traced child, which stands still before its
// first instruction, lets go of it stopped, and seizes it as a freeze does.
func (b *backend) trial(ctx context.Context) error {
	result := make(chan error, 1)
	onThread(func() bool {
		result <- b.seizeChild()
		return false
	})
	limit, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	select {
	case err := <-result:
		return err
	case <-limit.Done():
		return fmt.Errorf("no answer in %v", probeLimit)
	}
}

func (b *backend) seizeChild() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	child, err := os.StartProcess("/proc/self/exe", []string{"hotpatchd-probe"}, &os.ProcAttr{
		Files: []*os.File{null, null, null},
		Env:   []string{},
		Sys:   &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return err
	}
	defer func() {
		child.Kill()
		child.Wait()
	}()
	p := process{b: b, life: life{id: target.ID{PID: child.Pid}}, dir: -1, task: -1, mem: -1, maps: -1}
	p.users.Store(1)
	if p.dir, err = openDir(unix.AT_FDCWD, "/proc/"+strconv.Itoa(child.Pid)); err != nil {
		return err
	}
	defer p.release()
	t := held{tid: child.Pid, attached: true}
	if _, err := p.awaitStop(&t, probeLimit); err != nil { // the SIGTRAP of its exec
		return err
	}
	// Still at the exec, it goes from our hold into a stop of its own.
	if e := detach(t.tid, int(unix.SIGSTOP)); e != 0 {
		return fmt.Errorf("detach: %w", e)
	}
	if e := seize(t.tid, 0); e != 0 {
		return fmt.Errorf("seize: %w", e)
	}
	interrupt(t.tid)
	if _, err := p.awaitStop(&t, probeLimit); err != nil {
		return err
	}
	var regs unix.PtraceRegs
	if e := getRegs(t.tid, &regs); e != 0 {
		return fmt.Errorf("registers: %w", e)
	}
	return nil
}
