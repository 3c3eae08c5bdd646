package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/windows/svc"
)

// pendingHint is what we tell the manager between two signs of life while
// starting or stopping; over it, it takes us for dead.
const pendingHint = 20 * time.Second

// underManager works as a Windows service. The installed command line says that
// it is one: asking the system (session 0) is wrong under Wine.
func underManager(work func(context.Context, func()) error) error {
	h := &serviceHandler{work: work}
	if err := svc.Run(serviceName, h); err != nil {
		return fmt.Errorf("cannot run as a service: %w", err)
	}
	return h.err
}

type serviceHandler struct {
	work func(context.Context, func()) error
	err  error
}

// Execute implements svc.Handler.
func (h *serviceHandler) Execute(_ []string, requests <-chan svc.ChangeRequest, status chan<- svc.Status) (bool, uint32) {
	const accepts = svc.AcceptStop | svc.AcceptShutdown | svc.AcceptPreShutdown
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	started, done := make(chan struct{}), make(chan error, 1)
	ready := started // nil once it is of no interest; work may say so later still
	go func() { done <- bounded(ctx, stopWait, func() error { return h.work(ctx, func() { close(started) }) }) }()

	state, checkpoint := svc.StartPending, uint32(0)
	stopping := false // asked to: an error on the way out is in the log, and must not start us again
	pending := func() {
		checkpoint++
		status <- svc.Status{State: state, CheckPoint: checkpoint, WaitHint: uint32(pendingHint.Milliseconds())}
	}
	pending()
	signs := time.NewTicker(pendingHint / 4)
	defer signs.Stop()
	for {
		select {
		case <-ready:
			ready, state = nil, svc.Running
			status <- svc.Status{State: state, Accepts: accepts}
		case <-signs.C:
			if state != svc.Running {
				pending()
			}
		case r := <-requests:
			switch r.Cmd {
			case svc.Interrogate:
				status <- r.CurrentStatus
			case svc.Stop, svc.Shutdown, svc.PreShutdown:
				cancel()
				stopping = true
				ready, state, checkpoint = nil, svc.StopPending, 0
				pending()
			}
		case h.err = <-done:
			if h.err != nil && !stopping {
				return true, 1 // counts as a failure: the recovery actions start us again
			}
			return false, 0
		}
	}
}
