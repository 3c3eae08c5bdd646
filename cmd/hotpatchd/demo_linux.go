package main

import (
	"errors"
	"net"
	"os/exec"
	"syscall"
)

// endWithUs has the kernel stop a child when we are gone, however we went. The
// thread that starts it is the main program's for as long as that lives.
func endWithUs(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} }

// alone makes sure that no other demonstration runs: each would patch the
// other's processes. The name lies in no folder and is gone with us.
func alone() (release func(), err error) {
	l, err := net.Listen("unix", "@hotpatchd-demo")
	if err != nil {
		return nil, errors.New("another demonstration is running on this machine: wait for its end")
	}
	return func() { l.Close() }, nil
}
