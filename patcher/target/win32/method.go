//go:build windows && (amd64 || arm64)

package win32

import "golang.org/x/sys/windows"

// method is how a process is stopped.
type method uint8

const (
	suspension  method = iota // thread by thread, with a guardian
	stateChange               // a process state change object
)

// chooseMethod tries whether the system makes state change objects, with one
// of ourselves that changes nothing.
func chooseMethod(k kernel) method {
	h, err := k.newChange(windows.CurrentProcess())
	if err != nil {
		return suspension
	}
	k.close(h)
	return stateChange
}

// FreezeMethod names the calls that stop threads.
func (b *backend) FreezeMethod() string {
	if b.method == stateChange {
		return "process state change object, taken back by the system when we end"
	}
	return "SuspendThread, thread by thread, with a guardian process that resumes them if we end"
}
