package win32

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"hotpatchd/patcher/target"
)

// fakeETW is a system with one session name.
type fakeETW struct {
	mu      sync.Mutex
	session *fakeSession // nil: there is none
	begun   []*fakeSession
	stopErr error
	refuses error // begin
}

type fakeSession struct {
	etw     *fakeETW
	deliver func(record)
	lost    uint64
	ended   chan struct{}
	closed  bool
	hangs   bool // run does not return
}

func (f *fakeETW) stop() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopErr != nil {
		return f.stopErr
	}
	f.endLocked()
	return nil
}

func (f *fakeETW) endLocked() {
	if s := f.session; s != nil {
		f.session = nil
		close(s.ended)
	}
}

func (f *fakeETW) begin(deliver func(record)) (traceReader, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.refuses != nil:
		return nil, f.refuses
	case f.session != nil:
		return nil, errors.New("a session of this name is there")
	}
	f.session = &fakeSession{etw: f, deliver: deliver, ended: make(chan struct{})}
	f.begun = append(f.begun, f.session)
	return f.session, nil
}

// sessions is how many there have been.
func (f *fakeETW) sessions() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.begun)
}

func (f *fakeETW) lost() (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.session == nil {
		return 0, errors.New("no session")
	}
	return f.session.lost, nil
}

func (s *fakeSession) run() error {
	<-s.ended
	if s.hangs {
		time.Sleep(time.Hour)
	}
	return nil
}

func (s *fakeSession) close() {
	s.etw.mu.Lock()
	defer s.etw.mu.Unlock()
	s.closed = true
}

// play runs a watch in a time of its own.
func play(t *testing.T, f *fakeETW, do func(c <-chan target.Event, end func())) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c, err := watchTrace(ctx, f)
		if err != nil {
			t.Fatal(err)
		}
		do(c, func() {
			t.Helper()
			cancel()
			from := time.Now()
			for range c {
			}
			if took := time.Since(from); took > traceClose {
				t.Errorf("the end took %v", took)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.session != nil {
				t.Error("a session is left")
			}
			for _, s := range f.begun {
				if !s.closed {
					t.Error("a session is not closed")
				}
			}
		})
	})
}

// heardOn are the kinds of all events that are there.
func heardOn(c <-chan target.Event) (kinds []target.EventKind) {
	synctest.Wait()
	for {
		select {
		case e := <-c:
			kinds = append(kinds, e.Kind)
		default:
			return kinds
		}
	}
}

func same(got []target.EventKind, want ...target.EventKind) bool {
	if len(got) != len(want) {
		return false
	}
	for i := range got {
		if got[i] != want[i] {
			return false
		}
	}
	return true
}

var aStart = record{provider: kernelProcess, id: processStart, data: fields(uint32(8), uint64(9), uint32(4))}

func TestTraceTells(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		s := f.session
		s.deliver(aStart)
		s.deliver(record{provider: guid{1}})
		if got := heardOn(c); !same(got, target.Started) {
			t.Errorf("told: %v", got)
		}
		end()
		s.deliver(aStart) // a callback after the end
	})
}

// A daemon before us left a session: it is ended.
func TestTraceStale(t *testing.T) {
	f := &fakeETW{}
	stale := &fakeSession{etw: f, ended: make(chan struct{}), closed: true}
	f.session = stale
	play(t, f, func(c <-chan target.Event, end func()) {
		select {
		case <-stale.ended:
		default:
			t.Error("the old session goes on")
		}
		f.session.deliver(aStart)
		if got := heardOn(c); !same(got, target.Started) {
			t.Errorf("told: %v", got)
		}
		end()
	})
}

// What the session lost is told once for each loss that is noticed, and so is what
// the reader of the channel was too slow for.
func TestTraceLoses(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		for range 3 {
			time.Sleep(traceCheck)
		}
		if got := heardOn(c); len(got) != 0 {
			t.Errorf("nothing was lost, and told is %v", got)
		}
		f.mu.Lock()
		f.session.lost = 7
		f.mu.Unlock()
		time.Sleep(3 * traceCheck)
		if got := heardOn(c); !same(got, target.Lost) {
			t.Errorf("told: %v", got)
		}
		for range traceBehind + 10 {
			f.session.deliver(aStart)
		}
		if got := heardOn(c); len(got) != traceBehind {
			t.Errorf("%d were told of at once", len(got))
		}
		f.session.deliver(aStart)
		if got := heardOn(c); !same(got, target.Lost, target.Started) {
			t.Errorf("told: %v", got)
		}
		end()
	})
}

// Records that cannot be read are told together, however many there are.
func TestTraceUnread(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		for range 3 {
			for range traceBehind {
				f.session.deliver(record{provider: kernelProcess, id: processStart, version: 200})
			}
			f.session.deliver(record{provider: lostEvent})
			f.session.deliver(aStart)
			if got := heardOn(c); !same(got, target.Started) {
				t.Errorf("told at once: %d, %v", len(got), got[:min(len(got), 3)])
			}
			time.Sleep(traceCheck + traceCheck/2)
			if got := heardOn(c); !same(got, target.Lost) {
				t.Errorf("told: %v", got)
			}
		}
		end()
	})
}

// Somebody ends each session as soon as it has begun: he is asked later and later,
// and as at first when one has lasted.
func TestTraceEndedAgain(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		ends := func() time.Duration {
			t.Helper()
			n, at := f.sessions(), time.Now()
			f.stop()
			for again := false; !again; again = f.sessions() > n {
				time.Sleep(time.Second)
				heardOn(c) // waits for all
			}
			return time.Since(at)
		}
		want := traceAgain
		for range 10 {
			if took := ends(); took < want || took > want+2*time.Second {
				t.Errorf("begun anew after %v, want %v", took, want)
			}
			want = min(2*want, traceAgainMost)
		}
		time.Sleep(traceAgainMost)
		if took := ends(); took > traceAgain+2*time.Second {
			t.Errorf("begun anew after %v, though the last one had lasted", took)
		}
		end()
	})
}

// Somebody ends our session: that is a loss, and later there is another one.
func TestTraceEndedByOthers(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		f.stop()
		if got := heardOn(c); !same(got, target.Lost) {
			t.Errorf("told: %v", got)
		}
		f.mu.Lock()
		f.refuses = target.ErrDenied
		f.mu.Unlock()
		time.Sleep(traceAgain + time.Second)
		if got := heardOn(c); len(got) != 0 || len(f.begun) != 1 {
			t.Errorf("told: %v, %d sessions", got, len(f.begun))
		}
		f.mu.Lock()
		f.refuses = nil
		f.mu.Unlock()
		time.Sleep(2 * traceAgain)
		if got := heardOn(c); !same(got, target.Lost) || len(f.begun) != 2 {
			t.Errorf("told: %v, %d sessions", got, len(f.begun))
		}
		f.session.deliver(aStart)
		if got := heardOn(c); !same(got, target.Started) {
			t.Errorf("told: %v", got)
		}
		// Another daemon has taken the name: its session is not ended by our leaving ours.
		f.mu.Lock()
		f.endLocked()
		theirs := &fakeSession{etw: f, ended: make(chan struct{}), closed: true}
		f.session = theirs
		f.mu.Unlock()
		time.Sleep(traceAgain / 2)
		select {
		case <-theirs.ended:
			t.Error("another one's session was ended")
		default:
		}
		f.stop()
		end()
	})
}

// The thread that reads does not come back: the channel is closed nevertheless, and
// what it says then is heard by nobody.
func TestTraceHangs(t *testing.T) {
	f := &fakeETW{}
	play(t, f, func(c <-chan target.Event, end func()) {
		s := f.session
		s.hangs = true
		end()
		s.deliver(aStart)
		time.Sleep(2 * time.Hour)
	})
}

func TestTraceRefused(t *testing.T) {
	for name, f := range map[string]*fakeETW{"begin": {refuses: target.ErrDenied}, "stop": {stopErr: target.ErrDenied}} {
		if _, err := watchTrace(context.Background(), f); !errors.Is(err, target.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
