package agent

import (
	"sync"
	"time"

	"hotpatchd/agent/control"
)

// hub hands events to subscribers. One that does not keep up loses events and
// never holds up the daemon.
type hub struct {
	mu   sync.Mutex
	subs map[chan control.Event]bool
}

// backlog is how many events a slow subscriber may be behind.
const backlog = 256

func (h *hub) subscribe() chan control.Event {
	ch := make(chan control.Event, backlog)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.subs == nil {
		h.subs = map[chan control.Event]bool{}
	}
	h.subs[ch] = true
	return ch
}

func (h *hub) leave(ch chan control.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.subs[ch] {
		delete(h.subs, ch)
		close(ch)
	}
}

func (h *hub) send(e control.Event) {
	if e.Time.IsZero() {
		e.Time = control.At(time.Now())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for ch := range h.subs {
		select {
		case ch <- e:
		default:
		}
	}
}
