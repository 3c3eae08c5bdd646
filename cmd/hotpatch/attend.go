package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"hotpatchd/agent/control"
)

// attention is how long a daemon may be silent. One that is at work answers a
// question for its status at once, whatever else it does: so a long check or
// install is told from a daemon that is stopped or hangs.
type attention struct {
	quiet   time.Duration // until a person is told that we wait
	every   time.Duration // between two questions, and how long each may take
	silence time.Duration // after which a daemon that answers nothing is given up
}

// patient is for people: well below the client's own bounds.
var patient = attention{quiet: 3 * time.Second, every: 4 * time.Second, silence: 20 * time.Second}

// silentError: somebody listens there, and answers nothing.
type silentError struct {
	socket string
	after  time.Duration
}

func (s *silentError) Error() string {
	return fmt.Sprintf("the daemon at %s listens, and has not answered anything for %v", s.socket, s.after)
}

// attend looks after the daemon while a command waits for its answer: it says on
// w that we wait, and ends the context when the daemon answers nothing at
// all. stop ends it.
func (s *session) attend(ctx context.Context, w io.Writer, a attention) (attended context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		heard, said := time.Now(), false
		for wait := a.quiet; ; wait = a.every {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			if !said && !s.jsonOut && !s.heard.Load() {
				fmt.Fprintln(w, "waiting for the daemon…")
			}
			said = true
			err := s.asks(ctx, a.every)
			if !errors.Is(err, context.DeadlineExceeded) { // it answers, or is gone: the command itself learns that
				heard = time.Now()
			}
			if silent := time.Since(heard); silent >= a.silence {
				cancel(&silentError{s.socket, silent.Round(time.Second)})
				return
			}
		}
	}()
	return ctx, func() { cancel(nil); <-done }
}

// asks is one question to the daemon, on a connection of its own.
func (s *session) asks(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := control.Dial(s.socket)
	defer c.Close()
	_, err := c.Status(ctx)
	return err
}
