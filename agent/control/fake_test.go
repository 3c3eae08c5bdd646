package control

import (
	"context"
	"fmt"
	"net"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeService answers every call with a document in which every field is set,
// and remembers who called what.
type fakeService struct {
	mu       sync.Mutex
	calls    []string
	callers  []Caller
	err      error
	panics   bool
	install  InstallRequest
	events   []Event    // what a subscriber gets first
	live     chan Event // what he gets then; closed: the stream ends
	left     chan bool  // one for each subscriber that has gone
	progress []Event
	docs     map[string]any // answers by method, instead of filled ones
}

func (f *fakeService) called(c Caller, name string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, strings.TrimSpace(name+" "+strings.Trim(fmt.Sprintln(args...), "\n")))
	f.callers = append(f.callers, c)
	if f.panics {
		panic("boom")
	}
	return f.err
}

// forget begins the list of calls anew.
func (f *fakeService) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.callers = nil, nil
}

func (f *fakeService) firstCaller() Caller {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.callers) == 0 {
		return Caller{}
	}
	return f.callers[0]
}

func (f *fakeService) seen() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.calls, "; ")
}

func answer[T any](f *fakeService, name string) *T {
	if d, ok := f.docs[name]; ok {
		return d.(*T)
	}
	d := new(T)
	fill(reflect.ValueOf(d).Elem(), name)
	return d
}

func (f *fakeService) Status(_ context.Context, c Caller) (*Status, error) {
	return answer[Status](f, "status"), f.called(c, "status")
}
func (f *fakeService) Eligibility(_ context.Context, c Caller) (*Eligibility, error) {
	return answer[Eligibility](f, "eligibility"), f.called(c, "eligibility")
}
func (f *fakeService) Offers(_ context.Context, c Caller) (*Offers, error) {
	return answer[Offers](f, "offers"), f.called(c, "offers")
}
func (f *fakeService) Calendar(_ context.Context, c Caller) (*Calendar, error) {
	return answer[Calendar](f, "calendar"), f.called(c, "calendar")
}
func (f *fakeService) Processes(_ context.Context, c Caller, q ProcessQuery) (*Processes, error) {
	return answer[Processes](f, "processes"), f.called(c, "processes", q.PID, q.Vulnerable)
}
func (f *fakeService) Check(_ context.Context, c Caller) (*Status, error) {
	return answer[Status](f, "check"), f.called(c, "check")
}
func (f *fakeService) Plan(_ context.Context, c Caller, q PlanQuery) (*Plan, error) {
	return answer[Plan](f, "plan"), f.called(c, "plan", q.ID, q.PID)
}
func (f *fakeService) Install(_ context.Context, c Caller, r InstallRequest, progress func(Event)) (*Change, error) {
	f.mu.Lock()
	f.install = r
	f.mu.Unlock()
	for _, e := range f.progress {
		progress(e)
	}
	return answer[Change](f, "install"), f.called(c, "install", r.ID)
}
func (f *fakeService) Rollback(_ context.Context, c Caller, r RollbackRequest, progress func(Event)) (*Change, error) {
	for _, e := range f.progress {
		progress(e)
	}
	return answer[Change](f, "rollback"), f.called(c, "rollback", r.ID)
}
func (f *fakeService) Hold(_ context.Context, c Caller, id, reason string) (*Change, error) {
	return answer[Change](f, "hold"), f.called(c, "hold", id, reason)
}
func (f *fakeService) ReleaseHold(_ context.Context, c Caller, id, reason string) (*Change, error) {
	return answer[Change](f, "release-hold"), f.called(c, "release-hold", id, reason)
}
func (f *fakeService) Pause(_ context.Context, c Caller) (*Change, error) {
	return answer[Change](f, "pause"), f.called(c, "pause")
}
func (f *fakeService) Resume(_ context.Context, c Caller) (*Change, error) {
	return answer[Change](f, "resume"), f.called(c, "resume")
}
func (f *fakeService) Verify(_ context.Context, c Caller) (*Verify, error) {
	return answer[Verify](f, "verify"), f.called(c, "verify")
}
func (f *fakeService) History(_ context.Context, c Caller, limit int) (*History, error) {
	return answer[History](f, "history"), f.called(c, "history", limit)
}
func (f *fakeService) Explain(_ context.Context, c Caller, pid int, address uint64) (*Explain, error) {
	return answer[Explain](f, "explain"), f.called(c, "explain", pid, Addr(address))
}
func (f *fakeService) Policy(_ context.Context, c Caller) (*Settings, error) {
	return answer[Settings](f, "policy"), f.called(c, "policy")
}
func (f *fakeService) Diagnose(_ context.Context, c Caller) ([]byte, error) {
	return []byte("zip"), f.called(c, "diagnose")
}
func (f *fakeService) Subscribe(ctx context.Context, c Caller) (<-chan Event, error) {
	ch := make(chan Event)
	go func() {
		defer func() { close(ch); f.left <- true }()
		for _, e := range f.events {
			select {
			case ch <- e:
			case <-ctx.Done():
				return
			}
		}
		for {
			select {
			case e, ok := <-f.live:
				if !ok {
					return
				}
				select {
				case ch <- e:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return ch, f.called(c, "events")
}
func (f *fakeService) Metrics(context.Context) ([]byte, error) {
	return []byte("# TYPE hotpatch_images gauge\nhotpatch_images{state=\"patched\",product=\"a,b\"} 3\n" +
		"hotpatch_pause{pid=\"4711\"} 1\nhotpatch_up 1\ngarbage 7ffb2a3c149b {\n"), f.called(Caller{}, "metrics")
}

// fill sets every field of a value to something that is not zero.
func fill(v reflect.Value, name string) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(name + " at 7ffb2a3c149b, bytes cc cc cc 48")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(77)
	case reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(78)
	case reflect.Float64:
		v.SetFloat(79.5)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), name)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("key"), reflect.ValueOf("value"))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), name)
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[Time]() {
			v.Set(reflect.ValueOf(At(testNow)))
			return
		}
		if v.Type() == reflect.TypeFor[Scope]() {
			v.Set(reflect.ValueOf(Scope{OfUser: true, UID: strangerUID}))
			return
		}
		if v.Type() == reflect.TypeFor[Header]() {
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i), v.Type().Field(i).Name)
		}
		if f := v.FieldByName("UID"); f.IsValid() && f.CanSet() {
			f.SetInt(strangerUID)
		}
	default:
		panic(v.Kind().String())
	}
}

var testNow = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

const (
	strangerUID = 1001
	memberUID   = 1002
)

var (
	rootCaller     = Caller{UID: 0, User: "root", Admin: true}
	memberCaller   = Caller{UID: memberUID, GID: 5, User: "bob", Admin: true}
	strangerCaller = Caller{UID: strangerUID, GID: 6, User: "alice"}
)

// running is a server with callers as a test wants them.
type running struct {
	*Server
	fake   *fakeService
	socket string
	client *Client

	mu      sync.Mutex
	caller  Caller
	reports []string
}

func (r *running) as(c Caller) *running {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.caller = c
	r.client.Close() // who connects from now on
	return r
}

func (r *running) reported() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.reports, "\n")
}

// start serves a fake service on a real socket; tweak changes the server before it serves.
func start(t *testing.T, tweak func(*Server)) *running {
	t.Helper()
	r := &running{fake: &fakeService{live: make(chan Event), left: make(chan bool, 100)}, caller: rootCaller}
	r.socket = address(t)
	r.Server = NewServer(Config{Service: r.fake, Group: "hotpatch", Version: "1.2", Now: func() time.Time { return testNow },
		Report: func(c Caller, err error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.reports = append(r.reports, c.User+": "+err.Error())
		}})
	r.Server.peer = func(net.Conn) (Caller, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.caller, nil
	}
	r.Server.identify = func(c Caller, _ string) Caller { return c }
	if tweak != nil {
		tweak(r.Server)
	}
	l, err := Listen(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Serve(l) }()
	r.client = Dial(r.socket)
	t.Cleanup(func() {
		r.client.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		r.Shutdown(ctx)
		if err := <-done; err != nil {
			t.Error("Serve:", err)
		}
	})
	return r
}
