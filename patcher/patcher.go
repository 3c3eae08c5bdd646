package patcher

import (
	"context"
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

func (x *Patcher) journal(r *Record, s State) error {
	r.State = s
	if x.Now != nil {
		r.At = x.Now()
	}
	if x.Journal == nil {
		return nil
	}
	return x.Journal(*r)
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
