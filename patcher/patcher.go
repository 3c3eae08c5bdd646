package patcher

import (
	"context"
	"fmt"
	"time"
)

// Patcher applies plans. Safe for concurrent use on different processes; the
// caller sees to one writer per process.
type Patcher struct {
	// Journal makes a record durable before it returns. It is called before each
	// effect and after each outcome; its error stops what has not begun.
	Journal func(Record) error
	// Now stamps records.
	Now func() time.Time
	// Attempts bounds the freezes of one Apply or Undo that find a thread in the
	// way; 0 means DefaultAttempts.
	Attempts int
	// Sleep waits between attempts; nil means real time.
	Sleep func(ctx context.Context, d time.Duration) error
}

const (
	// DefaultAttempts with doubling waits from firstWait spends about half a
	// second on one process before it is left for the next pass.
	DefaultAttempts = 10
	firstWait       = time.Millisecond
	longestWait     = 100 * time.Millisecond
)

// intend makes durable that an effect follows. If it cannot, nothing follows
// and the record stays as it was.
func (x *Patcher) intend(r *Record, s State) error {
	was, at := r.State, r.At
	if err := x.journal(r, s); err != nil {
		r.State, r.At = was, at
		return err
	}
	return nil
}

// journal makes the record durable in state s, which it is in, journaled or not.
func (x *Patcher) journal(r *Record, s State) error {
	r.State = s
	if x.Now != nil {
		r.At = x.Now()
	}
	if x.Journal == nil {
		return nil
	}
	if err := x.Journal(*r); err != nil {
		return fmt.Errorf("cannot write the journal: %w", err)
	}
	return nil
}

func (x *Patcher) sleep(ctx context.Context, d time.Duration) error {
	if x.Sleep != nil {
		return x.Sleep(ctx, d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
