package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestDocumentsArriveAsSent(t *testing.T) {
	r := start(t, nil)
	ctx := context.Background()
	// Process.UID and Scope do not travel: the documents come back without them.
	for name, call := range map[string]func() (any, error){
		"status":       func() (any, error) { return r.client.Status(ctx) },
		"eligibility":  func() (any, error) { return r.client.Eligibility(ctx) },
		"offers":       func() (any, error) { return r.client.Offers(ctx) },
		"processes":    func() (any, error) { return r.client.Processes(ctx, ProcessQuery{}) },
		"check":        func() (any, error) { return r.client.Check(ctx) },
		"plan":         func() (any, error) { return r.client.Plan(ctx, PlanQuery{}) },
		"hold":         func() (any, error) { return r.client.Hold(ctx, "R-1", "") },
		"release-hold": func() (any, error) { return r.client.ReleaseHold(ctx, "R-1", "") },
		"pause":        func() (any, error) { return r.client.Pause(ctx) },
		"resume":       func() (any, error) { return r.client.Resume(ctx) },
		"install":      func() (any, error) { return r.client.Install(ctx, InstallRequest{ID: "R-1"}, nil) },
		"rollback":     func() (any, error) { return r.client.Rollback(ctx, RollbackRequest{}, nil) },
		"verify":       func() (any, error) { return r.client.Verify(ctx) },
		"history":      func() (any, error) { return r.client.History(ctx, 5) },
		"explain":      func() (any, error) { return r.client.Explain(ctx, 1, 2) },
		"policy":       func() (any, error) { return r.client.Policy(ctx) },
	} {
		got, err := call()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := reflect.New(reflect.TypeOf(got).Elem())
		fill(want.Elem(), name)
		h := got.(interface{ header() *Header }).header()
		if h.Format != formatOf(got) || h.Version != "1.2" || !h.Generated.Equal(testNow) {
			t.Errorf("%s: header %+v", name, h)
		}
		*h = Header{}
		a, _ := json.Marshal(got)
		b, _ := json.Marshal(want.Interface())
		if string(a) != string(b) {
			t.Errorf("%s:\n got %s\nwant %s", name, a, b)
		}
	}
	if b, err := r.client.Metrics(ctx); err != nil || !strings.Contains(string(b), "4711") {
		t.Errorf("metrics: %s, %v", b, err)
	}
	if b, err := r.client.Diagnose(ctx); err != nil || string(b) != "zip" {
		t.Errorf("diagnose: %s, %v", b, err)
	}
}

func TestErrorsArriveAsSent(t *testing.T) {
	r := start(t, nil)
	for code := range httpStatus {
		r.fake.err = &Error{Code: code, Text: "what failed", Hint: "what to do"}
		_, err := r.client.Status(context.Background())
		var e *Error
		if !errors.As(err, &e) || *e != *r.fake.err.(*Error) {
			t.Errorf("%s arrived as %v", code, err)
		}
		r.fake.progress = []Event{{Type: EventProgress, Text: "one"}}
		n := 0
		_, err = r.client.Install(context.Background(), InstallRequest{ID: "R-1"}, func(Event) { n++ })
		if !errors.As(err, &e) || *e != *r.fake.err.(*Error) || n != 1 {
			t.Errorf("after a line, %s arrived as %v", code, err)
		}
	}
}

func TestProgressComesLineByLine(t *testing.T) {
	r := start(t, nil)
	for i := range 5 {
		r.fake.progress = append(r.fake.progress, Event{Type: EventProgress, Done: i + 1, Total: 5, Text: fmt.Sprint("process ", i)})
	}
	var got []string
	c, err := r.client.Install(context.Background(), InstallRequest{File: []byte("zip"), Metadata: map[string][]byte{"1.root.json": []byte("{}"), "a.json": nil}},
		func(e Event) { got = append(got, e.Text) })
	if err != nil || strings.Join(got, ",") != "process 0,process 1,process 2,process 3,process 4" {
		t.Errorf("%v, %v", got, err)
	}
	if c == nil || c.Format != FormatChange || !c.Changed {
		t.Errorf("the outcome is %+v", c)
	}
	if string(r.fake.install.File) != "zip" || string(r.fake.install.Metadata["1.root.json"]) != "{}" || len(r.fake.install.Metadata) != 2 {
		t.Errorf("it arrived as %+v", r.fake.install)
	}
}

func TestShutdownEndsStreams(t *testing.T) {
	r := start(t, nil)
	ready := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- r.client.Events(context.Background(), func() { close(ready) }, func(Event) error { return nil })
	}()
	select {
	case <-ready:
	case <-time.After(deadline):
		t.Fatal("no stream")
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	if err := r.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, ErrNotReachable) {
			t.Errorf("the stream ended with %v", err)
		}
	case <-time.After(deadline):
		t.Fatal("the stream did not end")
	}
	if _, err := r.client.Status(context.Background()); !errors.Is(err, ErrNotReachable) {
		t.Errorf("after Shutdown: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	socket := address(t)
	c := Dial(socket)
	_, err := c.Status(context.Background())
	if !errors.Is(err, ErrNotReachable) || !strings.Contains(err.Error(), socket) {
		t.Errorf("got %v", err)
	}
	if err := c.Events(context.Background(), nil, nil); !errors.Is(err, ErrNotReachable) {
		t.Errorf("got %v", err)
	}
}

func TestNewerDaemon(t *testing.T) {
	for in, want := range map[string]string{
		`{"format":"hotpatch-status/1","state":"hotpatched","new_key":1}`: "",
		`{"format":"hotpatch-status/2","state":"hotpatched"}`:             `format "hotpatch-status/2"`,
		`{"state":"hotpatched"}`:                                          `format ""`,
		`<html>`:                                                          "invalid",
	} {
		err := decodeDoc([]byte(in), &Status{})
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestCoverageAddsUp(t *testing.T) {
	var c Coverage
	for i, s := range append(ImageStates, "nonsense") {
		for range i + 1 {
			c.Add(s)
		}
	}
	sum := 0
	for _, s := range ImageStates {
		sum += c.Count(s)
	}
	if sum != c.Images || c.Images != 66 {
		t.Errorf("%d images, %d in states", c.Images, sum)
	}
}

func TestTimeAndAddr(t *testing.T) {
	b, err := json.Marshal(map[string]any{"t": At(time.Date(2026, 11, 3, 4, 5, 6, 7, time.FixedZone("x", 3600))), "n": Time{}, "a": Addr(0x7ffb2a3c149b), "z": Addr(0)})
	if want := `{"a":"7ffb2a3c149b","n":null,"t":"2026-11-03T03:05:06Z","z":""}`; err != nil || string(b) != want {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
	var v struct {
		T, N Time
		A, Z Addr
	}
	if err := json.Unmarshal(b, &v); err != nil || v.A != 0x7ffb2a3c149b || v.Z != 0 || !v.N.IsZero() || v.T.Unix() != 1793675106 {
		t.Errorf("%+v, %v", v, err)
	}
}
