package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"hotpatchd/agent/control"
)

// Exit codes.
const (
	exitDone         = 0
	exitFailed       = 1
	exitUsage        = 2
	exitNotEligible  = 3
	exitIncomplete   = 4
	exitNotReachable = 5
	exitNotPermitted = 6
)

// exit ends a command that has said all there is to say with this code.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// exitIf is the code if cond, else success.
func exitIf(cond bool, code int) error {
	if cond {
		return exit(code)
	}
	return nil
}

// usageError is a command line that makes no sense.
type usageError struct{ err error }

func (u usageError) Error() string { return u.err.Error() }
func (u usageError) Unwrap() error { return u.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// complain is the one place where errors are told: one line what failed and on
// what, one line what to do. It returns the exit code.
func complain(w io.Writer, err error, s *screen, jsonOut bool) int {
	if err == nil {
		return exitDone
	}
	e, code := explainError(err)
	if jsonOut {
		b, _ := json.Marshal(struct {
			control.Header
			Error *control.Error `json:"error"`
		}{ownHeader(control.FormatError), e})
		fmt.Fprintf(w, "%s\n", b)
		return code
	}
	fmt.Fprintf(w, "hotpatch: %s\n", oneLine(s.local(e.Text)))
	if e.Hint != "" {
		fmt.Fprintf(w, "hint: %s\n", oneLine(s.local(e.Hint)))
	}
	return code
}

// ownHeader begins a document that does not come from the daemon.
func ownHeader(format string) control.Header {
	return control.Header{Format: format, Generated: control.At(time.Now()), Version: programVersion()}
}

func explainError(err error) (*control.Error, int) {
	var e *control.Error
	var u usageError
	var silent *silentError
	switch {
	case errors.As(err, &e):
		codes := map[control.Code]int{control.CodeUsage: exitUsage, control.CodeNotPermitted: exitNotPermitted,
			control.CodeNotEligible: exitNotEligible, control.CodeIncomplete: exitIncomplete}
		if code, ok := codes[e.Code]; ok {
			return e, code
		}
		return e, exitFailed
	case errors.As(err, &u):
		return &control.Error{Code: control.CodeUsage, Text: err.Error(), Hint: "hotpatch --help, or --help after a command"}, exitUsage
	case errors.Is(err, control.ErrNotReachable):
		return unreachable(err)
	case errors.As(err, &silent):
		return &control.Error{Code: "not-reachable", Text: err.Error(),
			Hint: "it is stopped, or hangs: " + askService + ". What it has begun it carries through; what is applied stays applied meanwhile"}, exitNotReachable
	case errors.Is(err, context.Canceled):
		return &control.Error{Code: control.CodeInternal, Text: "interrupted; what the daemon has begun it carries through", Hint: "hotpatch status"}, exitFailed
	}
	return &control.Error{Code: control.CodeInternal, Text: err.Error()}, exitFailed
}

// unreachable says in words why nobody answers.
func unreachable(err error) (*control.Error, int) {
	e := &control.Error{Code: "not-reachable", Text: err.Error(), Hint: "is the service running? " + askService}
	where, _, _ := strings.Cut(err.Error(), ": ")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Text = where + ": nothing listens there; there is no such " + listener(runtime.GOOS)
		e.Hint += "; a daemon that listens elsewhere: --socket ADDRESS. What is applied stays applied meanwhile"
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Text = where + ": nothing listens there"
		e.Hint += ". What is applied stays applied meanwhile"
	case errors.Is(err, fs.ErrPermission):
		e.Text = where + ": this user may not open it"
		e.Hint = "the " + listener(runtime.GOOS) + " is open to all users; is it the right one? hotpatch --socket ADDRESS"
	}
	return e, exitNotReachable
}

// listener is what the daemon listens on.
func listener(goos string) string {
	if goos == "windows" {
		return "pipe"
	}
	return "socket"
}

// askService is how to find out about the service on this machine.
var askService = howToAsk(runtime.GOOS, bootedBySystemd())

func howToAsk(goos string, systemd bool) string {
	switch {
	case goos == "windows":
		return "sc query hotpatchd, or hotpatchd service start"
	case systemd:
		return "systemctl status hotpatchd, or hotpatchd service start"
	}
	return "there is no systemd here: ask the supervisor that runs hotpatchd run, or start that yourself"
}

// bootedBySystemd is sd_booted(3).
func bootedBySystemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}
