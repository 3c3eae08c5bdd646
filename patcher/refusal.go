package patcher

import (
	"fmt"

	"hotpatchd/patcher/target"
)

// Reason classifies why an image is not patched. The values are the image
// states that users see.
type Reason string

const (
	Busy       Reason = "busy"        // a thread is in the way; tried again
	Blocked    Reason = "blocked"     // refused by rule, guard or operating system
	Drifted    Reason = "drifted"     // right identity, other bytes
	OtherBuild Reason = "other-build" // another build than the release names
	Failed     Reason = "failed"      // tried, and the memory is as before
	Torn       Reason = "torn"        // could not be written back
)

// Remedy is what a person can do about it; the values are those users see.
type Remedy string

const (
	Wait           Remedy = "wait"
	RestartProcess Remedy = "restart-process"
	RestartDevice  Remedy = "restart-device"
	Baseline       Remedy = "baseline"
	Policy         Remedy = "policy"
	Author         Remedy = "author"
)

// Refusal is an error that says why a process is left as it is. Nothing was
// changed when one is returned, unless Reason is Torn.
type Refusal struct {
	Reason Reason
	Code   string // stable, short: "tracer", "jump-into-entry", "import"
	Text   string // one sentence with names and numbers, for everybody: no address, no bytes
	Detail string // addresses and bytes, for those who may see them; "" if there are none
	Remedy Remedy
	At     target.Addr // 0 if no place is meant
	Want   []byte      // drifted: what should stand there
	Have   []byte      // drifted: what does
	Err    error       // cause, if the backend named one
}

func (r *Refusal) Error() string {
	s := fmt.Sprintf("%s: %s", r.Reason, r.Text)
	if r.Detail != "" {
		s += " (" + r.Detail + ")"
	}
	return s
}

func (r *Refusal) Unwrap() error { return r.Err }

func blocked(code string, remedy Remedy, format string, a ...any) *Refusal {
	return &Refusal{Reason: Blocked, Code: code, Remedy: remedy, Text: fmt.Sprintf(format, a...)}
}

func busy(at target.Addr, format string, a ...any) *Refusal {
	return &Refusal{Reason: Busy, Code: "thread", Remedy: Wait, At: at, Text: fmt.Sprintf(format, a...), Err: target.ErrBusy}
}

func drifted(at target.Addr, want, have []byte, what string) *Refusal {
	return &Refusal{Reason: Drifted, Code: "bytes", Remedy: RestartProcess, At: at, Want: want, Have: have,
		Text: what + " has other bytes than the release expects", Detail: fmt.Sprintf("at %s: expected % x, found % x", at, want, have)}
}

func otherBuild(format string, a ...any) *Refusal {
	return &Refusal{Reason: OtherBuild, Code: "identity", Remedy: Author, Text: fmt.Sprintf(format, a...)}
}
