package repository

import (
	"net/http"
	"strconv"
	"sync"
	"time"
)

// clockSlack is how far clocks may be apart before one is called wrong: a
// publisher's, a server's and a device's differ by minutes, by hours where one
// has its time zone wrong.
const clockSlack = 24 * time.Hour

// serverTime is what servers said of the time during one refresh. Nobody
// verifies it: it explains a failure, and never makes anything good.
type serverTime struct {
	mu    sync.Mutex
	ahead time.Duration // of the server's clock before this one
	known bool
}

func (s *serverTime) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead, s.known = 0, false
}

// note takes the Date of an answer, with the Age that caches add. Of several
// the latest counts: a stale answer of a cache must not pass for the time.
func (s *serverTime) note(h http.Header, now time.Time) {
	date, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		return
	}
	const longest = 10 * 365 * 24 * 3600 // no cache is older; more would overflow
	if age, err := strconv.ParseInt(h.Get("Age"), 10, 64); err == nil && age > 0 && age < longest {
		date = date.Add(time.Duration(age) * time.Second)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ahead := date.Sub(now); !s.known || ahead > s.ahead {
		s.ahead, s.known = ahead, true
	}
}

// at is the server's time when this clock says now; false if no server told.
func (s *serverTime) at(now time.Time) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return now.Add(s.ahead), s.known
}

// explain turns an expiry into a wrong clock where the server's clock says that
// the metadata still holds. ended is when it does by its own word.
func (s *serverTime) explain(expired *Error, ended, now time.Time) *Error {
	server, known := s.at(now)
	if !known || now.Sub(server) < clockSlack || !server.Before(ended) {
		return expired
	}
	return fail(CodeClock, expired, "this clock says %s, the server's %s: by this clock the metadata ended %s, by the server's it still holds",
		moment(now), moment(server), moment(ended)).hint("set the clock; %s", hintStays)
}

// doubt tells why this clock cannot be right although the catalog verified by
// it; nil if nothing speaks against it. A clock that is behind lets metadata
// pass as fresh that has ended.
func (c *Catalog) doubt(s *serverTime, now time.Time) *Error {
	for _, o := range c.Offers {
		if o.Published.Sub(now) > clockSlack {
			return fail(CodeClock, nil, "%s was signed as published %s, but this clock says %s", o.ID, moment(o.Published), moment(now)).
				hint("set the clock: one that is behind takes old metadata for new")
		}
	}
	if server, known := s.at(now); known && server.Sub(now) > clockSlack && c.Ended(server) {
		return fail(CodeClock, nil, "this clock says %s, the server's %s, and by that the metadata ended %s", moment(now), moment(server), moment(c.Expires)).
			hint("set the clock: one that is behind takes old metadata for new")
	}
	return nil
}
