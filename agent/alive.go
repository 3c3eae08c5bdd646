package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target"
)

// heart tells from outside the loop whether the loop lives: what is published
// looks the same as long as nothing is published. It goes by a clock of its own
// that nobody sets and that stands still while the machine sleeps.
type heart struct {
	beats atomic.Uint64 // steps that were ended: each is progress
	bound time.Duration // a pass that does not end within it is called stalled

	mu     sync.Mutex
	passed time.Time // the last pass ended
	step   string    // what the loop is at, "" while it waits for something to do
	since  time.Time
}

const (
	// stalledFirst and stalledScans make up the bound. A pass takes some seconds
	// at most, an operator's up to half a minute, and between two of them lies a
	// scan interval.
	stalledFirst = 30 * time.Second
	stalledScans = 10
	// heartLook is how often those who wait for the loop look whether it lives.
	heartLook = 100 * time.Millisecond
)

func newHeart(scanEvery time.Duration) *heart {
	return &heart{bound: stalledFirst + stalledScans*scanEvery, passed: time.Now()}
}

// at notes what the loop does now, and that what it did before is done.
func (h *heart) at(step string) {
	h.beats.Add(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.step, h.since = step, time.Now()
}

// atProcess is at for a step on one process.
func (h *heart) atProcess(step string, info target.Info) {
	h.at(fmt.Sprintf("%s %s, process %d", step, lastElement(programOf(info)), info.PID))
}

// pass notes the end of a pass.
func (h *heart) pass() {
	h.at("")
	h.mu.Lock()
	defer h.mu.Unlock()
	h.passed = h.since
}

// stalled tells for how long no pass has ended, and what the loop is at; false
// while that is not too long.
func (h *heart) stalled() (text string, since time.Duration, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if since = now.Sub(h.passed); since <= h.bound {
		return "", 0, false
	}
	text = fmt.Sprintf("the daemon has not ended a pass for %s", since.Round(time.Second))
	if h.step != "" {
		text += fmt.Sprintf("; for %s it has been %s", now.Sub(h.since).Round(time.Second), h.step)
	}
	return text, since, true
}

// errStalled is what a request gets that the loop would have to answer. begun:
// it has the loop's ear already.
func (a *Agent) errStalled(begun bool) error {
	text, _, stalled := a.heart.stalled()
	if !stalled {
		return nil
	}
	e := &control.Error{Code: control.CodeInternal, Text: text, Hint: stalledToDo}
	if begun {
		e.Text += ". What was asked for has begun, and goes on if the daemon does"
	} else {
		e.Text += ". What was asked for has not begun"
	}
	return e
}

// whileAsked tells of progress until over is called: who was told that the loop
// is stalled does not listen any more when it goes on.
func whileAsked(progress progressFunc) (told progressFunc, over func()) {
	if progress == nil {
		return nil, func() {}
	}
	var mu sync.Mutex
	ended := false
	return func(e control.Event) {
			mu.Lock()
			defer mu.Unlock()
			if !ended {
				progress(e)
			}
		}, func() {
			mu.Lock()
			defer mu.Unlock()
			ended = true
		}
}

const stalledToDo = "restart the daemon: what is applied stays; if that process is the reason, end it or leave it out by policy (deny)"

// asOfNow is a published status with what became of the loop since: a loop that
// is dead publishes nothing, and what it said last is not so for ever.
func (a *Agent) asOfNow(s control.Status) control.Status {
	text, since, stalled := a.heart.stalled()
	if !stalled {
		return s
	}
	s.Attention = slices.Insert(slices.Clone(s.Attention), 0, control.Attention{Code: "stalled", Severity: control.SeverityError,
		Text: text + ". What is told here is from before", Remedy: stalledToDo, Since: control.At(a.o.Now().Add(-since)), Scope: control.Scope{Public: true}})
	switch s.State {
	case control.Pending, control.Hotpatched, control.UpToDate:
		s.State = control.Incomplete // the others are worse
	}
	return s
}

// Alive returns nil once the loop has answered, or has ended a step of a longer
// pass meanwhile: work on many processes is no reason to be restarted, a step
// that does not end is.
func (a *Agent) Alive(ctx context.Context) error {
	answered := make(chan error, 1)
	before := a.heart.beats.Load()
	actx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { answered <- a.call(actx, func() {}) }()
	t := time.NewTicker(heartLook)
	defer t.Stop()
	for {
		select {
		case err := <-answered:
			return err
		case <-t.C:
			if a.heart.beats.Load() != before {
				return nil
			}
		}
	}
}

// watchHeart says once in the log and to who watches that the loop stalls, and
// that it goes on.
func (a *Agent) watchHeart(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	was := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		text, _, stalled := a.heart.stalled()
		if stalled == was {
			continue
		}
		was = stalled
		if !stalled {
			text = "the daemon goes on"
			a.log.Info(text)
		} else {
			a.log.Error("the loop is stalled", zap.String("text", text))
		}
		a.hub.send(control.Event{Type: control.EventAttention, Text: text, Scope: control.Scope{Public: true}})
	}
}
