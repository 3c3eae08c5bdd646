package win32

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"hotpatchd/patcher/target"
)

// tracing is what a watch asks of ETW. Tests put others in place of the system's.
type tracing interface {
	// stop ends the session of our name, whoever began it, and with it the run
	// of its reader. That there is none is no error.
	stop() error
	// begin makes a session in which the provider tells of processes, and opens it.
	// deliver is called during run, by one thread at a time, and may be called
	// after close. If it fails nothing is left of it.
	begin(deliver func(record)) (traceReader, error)
	// lost is how many events and buffers the session has lost so far. An error
	// tells that there is no session.
	lost() (uint64, error)
}

// traceReader is an open session.
type traceReader interface {
	// run delivers until the session or the reader is closed.
	run() error
	close()
}

const (
	// traceBehind is how many events the reader of the channel may be behind.
	traceBehind = 4096
	// traceCheck is how often a session is asked what it lost, and a loss is told at
	// most: it may cost patching that much more time than the scan does.
	traceCheck = time.Second
	// traceAgain is the wait before a session that somebody ended is begun anew,
	// twice as long each time, up to traceAgainMost: whoever does so may go on. One
	// that has lasted for that long is as the first.
	traceAgain     = time.Minute
	traceAgainMost = time.Hour
	// traceClose bounds the wait for the thread that reads, when its session is
	// stopped and closed: the system hands it the last buffers first.
	traceClose = 10 * time.Second
)

// watchTrace tells of what a session of our own hears until ctx ends. A session of
// our name is one that a daemon before us has left: it is ended.
func watchTrace(ctx context.Context, t tracing) (<-chan target.Event, error) {
	w := &traceWatch{t: t, events: make(chan target.Event, traceBehind)}
	r, err := w.begin()
	if err != nil {
		return nil, fmt.Errorf("cannot watch process starts by an ETW session: %w", err)
	}
	go w.run(ctx, r)
	return w.events, nil
}

type traceWatch struct {
	t tracing

	mu     sync.Mutex
	events chan target.Event // nil when it is closed: then nothing is sent
	lost   bool              // since the last Lost that was told

	unread atomic.Bool // records that could not be read, since the last check
}

func (w *traceWatch) begin() (traceReader, error) {
	if err := w.t.stop(); err != nil {
		return nil, err
	}
	return w.t.begin(w.deliver)
}

func (w *traceWatch) run(ctx context.Context, r traceReader) {
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		close(w.events)
		w.events = nil
	}()
	for pause := traceAgain; ; {
		from := time.Now()
		w.read(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if time.Since(from) >= traceAgainMost {
			pause = traceAgain
		}
		w.tell(target.Event{Kind: target.Lost, At: time.Now()})
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, traceAgainMost)
			var err error
			if r, err = w.begin(); err == nil {
				break
			}
		}
		w.tell(target.Event{Kind: target.Lost, At: time.Now()}) // what was meanwhile
	}
}

// read takes a session to its end.
func (w *traceWatch) read(ctx context.Context, r traceReader) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		r.run()
	}()
	check := time.NewTicker(traceCheck)
	defer check.Stop()
	var told uint64
	for open := true; open; {
		select {
		case <-ctx.Done():
			open = false
		case <-over:
			open = false
		case <-check.C:
			n, err := w.t.lost()
			if unread := w.unread.Swap(false); unread || err == nil && n > told {
				w.tell(target.Event{Kind: target.Lost, At: time.Now()})
			}
			told, open = n, err == nil
		}
	}
	// A session that somebody ended is none of ours any more: of that name another
	// daemon may have one by now. What fails here is left to who begins next.
	if ctx.Err() != nil {
		w.t.stop()
	}
	r.close()
	select {
	case <-over:
	case <-time.After(traceClose):
	}
}

// deliver hands on what a record tells. Losses are told together: of a version of
// Windows that is not known all records are, and each costs a look at all.
func (w *traceWatch) deliver(r record) {
	switch e, ok := r.event(); {
	case ok && e.Kind == target.Lost:
		w.unread.Store(true)
	case ok:
		w.tell(e)
	}
}

// tell never waits: who does not read loses events. After the end it does nothing.
func (w *traceWatch) tell(e target.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lost {
		select {
		case w.events <- target.Event{Kind: target.Lost, At: time.Now()}:
			w.lost = false
		default:
			return
		}
	}
	select {
	case w.events <- e:
	default:
		w.lost = true
	}
}
