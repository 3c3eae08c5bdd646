//go:build linux && amd64

package ptrace

// FreezeMethod names the requests that stop threads (ptrace(2)).
func (b *backend) FreezeMethod() string { return "PTRACE_SEIZE and PTRACE_INTERRUPT, thread by thread" }
