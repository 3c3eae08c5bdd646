//go:build !linux && !windows

package control

import (
	"context"
	"fmt"
	"net"
)

const defaultSocket = "/var/run/hotpatchd/control.sock"

const rootName = "root"

// errSystem: who calls decides what he may do, and only Linux and Windows are asked for it yet.
var errSystem = Errorf(CodeUnavailable, "the control socket is for Linux")

func listen(address string) (net.Listener, error) {
	return nil, fmt.Errorf("cannot listen on %s: %w", address, errSystem)
}

func dial(_ context.Context, address string) (net.Conn, error) {
	return nil, fmt.Errorf("cannot reach %s: %w", address, errSystem)
}

func peer(net.Conn) (Caller, error) { return Caller{}, errSystem }

func identify(c Caller, _ string) Caller {
	c.Admin = false
	return c
}
