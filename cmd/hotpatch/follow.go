package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
)

const (
	// redrawEvery is how often watch looks again when nothing happens: ages grow.
	redrawEvery = 2 * time.Second
	// askEvery is how often wait asks; the answer is a snapshot the daemon has ready.
	askEvery = 300 * time.Millisecond
	// appearWait is how long wait gives a process to be seen, and a daemon that
	// is being started to listen: two scans at the usual interval, and some.
	appearWait = 5 * time.Second
	// firstAnswer is what a daemon that runs gets for its first answer, however
	// short the timeout: the answer is what the command prints.
	firstAnswer = 2 * time.Second
	// defaultWait bounds wait when the caller gives no bound.
	defaultWait = 10 * time.Minute
)

func (s *session) watchCommand() *cobra.Command {
	return &cobra.Command{
		Use: "watch", Short: "What happens, as it happens; one line an event when piped", Args: noArgs,
		Annotations: map[string]string{ownWait: "until the caller ends it"},
		RunE: func(c *cobra.Command, _ []string) error {
			if s.live && !s.jsonOut {
				return s.watchScreen(c.Context())
			}
			return s.client.Events(c.Context(), nil, func(e control.Event) error {
				if s.jsonOut {
					b, err := json.Marshal(e)
					if err != nil {
						return err
					}
					_, err = fmt.Fprintf(s.out, "%s\n", b)
					return err
				}
				_, err := io.WriteString(s.out, s.screen.local(s.screen.event(e))+"\n")
				return err
			})
		},
	}
}

// watchScreen shows the processes, and again whenever something happens.
func (s *session) watchScreen(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wake := make(chan struct{}, 1)
	go func() {
		cancel(s.client.Events(ctx, nil, func(control.Event) error {
			select {
			case wake <- struct{}{}:
			default:
			}
			return nil
		}))
	}()
	for {
		d, err := s.client.Processes(ctx, control.ProcessQuery{})
		if err == nil {
			_, err = io.WriteString(s.out, "\x1b[H\x1b[2J"+s.screen.local(s.screen.processes(d, control.ProcessQuery{}, false)))
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-wake:
		case <-time.After(redrawEvery):
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		}
	}
}

// waiting is what wait waits for.
type waiting struct {
	hotpatched bool // else settled
	pid        int
}

func (s *session) waitCommand() *cobra.Command {
	goal, timeout, pid := "hotpatched", defaultWait, 0
	c := &cobra.Command{
		Use: "wait", Short: "Wait until all is well (hotpatched) or nothing is under way (settled)", Args: noArgs,
		Annotations: map[string]string{ownWait: "--timeout"},
		RunE: func(c *cobra.Command, _ []string) error {
			if goal != "settled" && goal != "hotpatched" {
				return usagef("--for is settled or hotpatched, not %q", goal)
			}
			if timeout <= 0 {
				return usagef("--timeout must be positive, not %v", timeout)
			}
			return s.wait(c.Context(), waiting{goal == "hotpatched", pid}, timeout)
		},
	}
	c.Flags().StringVar(&goal, "for", goal, "`state` to wait for: hotpatched or settled")
	c.Flags().IntVar(&pid, "pid", 0, "look at one process only")
	c.Flags().DurationVar(&timeout, "timeout", timeout, "give up after this time, with exit code 4")
	return c
}

// ownWait marks commands that bound by themselves how long they wait, and says how.
const ownWait = "own-wait"

func (s *session) wait(caller context.Context, w waiting, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(caller, max(timeout, firstAnswer))
	defer cancel()
	begun := time.Now()
	var last func() error // prints the last answer
	var absent error      // nobody listened yet
	for {
		doc, text, done, err := s.reached(ctx, w, time.Since(begun) > appearWait)
		late := time.Since(begun) >= timeout
		if err == nil {
			last = func() error { return s.show(doc, func() string { return text }) }
		}
		switch {
		case err != nil && ctx.Err() != nil && caller.Err() == nil: // cut off in the middle
			if last == nil && absent != nil {
				return absent
			}
			if last == nil {
				return &control.Error{Code: control.CodeIncomplete, Text: fmt.Sprintf("the daemon at %s did not answer within %v", s.socket, max(timeout, firstAnswer)),
					Hint: "is it stopped, or does it hang? " + askService}
			}
			if err := last(); err != nil {
				return err
			}
			return exit(exitIncomplete)
		case errors.Is(err, control.ErrNotReachable) && time.Since(begun) < min(appearWait, timeout):
			absent = err
		case err != nil:
			return err
		case done || late:
			if err := last(); err != nil {
				return err
			}
			return exitIf(!done, exitIncomplete)
		}
		select {
		case <-caller.Done():
			return caller.Err()
		case <-time.After(max(min(askEvery, timeout-time.Since(begun)), time.Millisecond)):
		}
	}
}

// reached asks once. patient means that a process not listed by now has nothing to list.
func (s *session) reached(ctx context.Context, w waiting, patient bool) (doc any, text string, done bool, err error) {
	if w.pid == 0 {
		st, err := s.client.Status(ctx)
		if err != nil {
			return nil, "", false, err
		}
		if w.hotpatched {
			done = st.State == control.Hotpatched || st.State == control.UpToDate
		} else {
			done = st.State != control.Unknown && st.State != control.Pending && st.Coverage.Pending == 0 && !st.Scanned.IsZero()
		}
		return st, s.screen.waited(st, w, done), done, nil
	}
	d, err := s.client.Processes(ctx, control.ProcessQuery{PID: w.pid})
	if err != nil {
		return nil, "", false, err
	}
	done = len(d.Processes) > 0 || patient && !d.Scanned.IsZero()
	for _, p := range d.Processes {
		for _, i := range p.Images {
			if i.State == control.PendingImage || w.hotpatched && !isWell(i.State) {
				done = false
			}
		}
	}
	return d, s.screen.process(d, w.pid), done, nil
}
