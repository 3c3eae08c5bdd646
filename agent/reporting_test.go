package agent

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/report"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/sim"
)

// collected is a collector that a test looks into.
type collected struct {
	*httptest.Server
	mu     sync.Mutex
	code   int // of every answer
	bodies []string
	ids    []string
	raw    strings.Builder
}

func collect(r *rig) *collected {
	r.t.Helper()
	c := &collected{code: 200}
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		b, _ := io.ReadAll(q.Body)
		c.mu.Lock()
		defer c.mu.Unlock()
		w.WriteHeader(c.code)
		if c.code == 200 {
			c.bodies, c.ids = append(c.bodies, string(b)), append(c.ids, q.Header.Get(report.IDHeader))
			c.raw.Write(b)
		}
	}))
	c.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.StartTLS()
	r.t.Cleanup(c.Close)
	r.write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})))
	r.cfg.Report = ReportConfig{URL: c.URL, CAFile: r.path("ca.pem"), Every: time.Second}
	r.tune = func(a *Agent) {
		a.reporting.reporter.Pace = report.Pace{First: 10 * time.Millisecond, Most: 50 * time.Millisecond, Asked: time.Second}
	}
	return c
}

func (c *collected) answer(code int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.code = code
}

// last is the newest report, nil if there is none.
func (c *collected) last() *control.Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.bodies) == 0 {
		return nil
	}
	doc := &control.Report{}
	if json.Unmarshal([]byte(c.bodies[len(c.bodies)-1]), doc) != nil {
		return nil
	}
	return doc
}

func appScene() *sim.Scene {
	return &sim.Scene{Format: sim.SceneFormat, Seed: 5, Processes: []sim.Process{{PID: sweepPID, User: "ivo42", Exe: "/opt/acme/acme-server",
		Modules: []sim.Module{{File: "mingw/app.dll"}}}}}
}

// A device reports by itself how it stands, as everybody on it may read it, and
// each report has an id of its own.
func TestDeviceReports(t *testing.T) {
	r := newRig(t, appScene())
	c := collect(r)
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	defer func() { must(t, r.stop()) }()
	must(t, r.until(func() string {
		doc := c.last()
		if doc == nil || doc.Status.State != control.Hotpatched || doc.Status.Release == nil || doc.Status.Release.ID != "R1" || len(doc.Eligibility.Checks) == 0 ||
			doc.Status.Device.ID != "0123456789abcdef" || doc.Format != control.FormatReport {
			return fmt.Sprintf("%+v", doc)
		}
		return ""
	}))
	_, err := r.life.client.Hold(context.Background(), "R1", "ivo42 says so")
	must(t, err)
	must(t, r.until(func() string {
		if doc := c.last(); len(doc.Status.Holds) != 1 {
			return fmt.Sprintf("%+v", doc.Status)
		}
		return ""
	}))
	c.mu.Lock()
	defer c.mu.Unlock()
	if strings.Contains(c.raw.String(), "ivo42") || strings.Contains(c.raw.String(), "acme-server") {
		t.Errorf("a report names users or programs: %s", c.raw.String())
	}
	for i, b := range c.bodies {
		if c.ids[i] != `"`+report.IDOf([]byte(b))+`"` {
			t.Errorf("id %s of %s", c.ids[i], b)
		}
	}
	// The same over the socket.
	doc, err := r.life.client.Report(context.Background())
	if err != nil || doc.Status.Device.ID != "0123456789abcdef" || len(doc.Eligibility.Checks) == 0 || len(doc.Status.Holds) != 1 || doc.Status.Holds[0].By != "" {
		t.Errorf("%+v, %v", doc, err)
	}
}

// What a collector does not take while it is away, and while the daemon is
// killed, arrives when it is back.
func TestReportsSurviveCollectorAndDaemon(t *testing.T) {
	r := newRig(t, appScene())
	c := collect(r)
	c.answer(503)
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	waiting := func(n int) func() string {
		return func() string {
			if st := r.life.agent.reporting.spool.Standing(); st.Waiting < n {
				return fmt.Sprintf("%+v", st)
			}
			return ""
		}
	}
	must(t, r.until(waiting(3)))
	must(t, r.kill())
	spool, err := report.OpenSpool(r.path("state/reports"), 0, 0)
	must(t, err)
	first, ok, err := spool.Oldest()
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	had := spool.Standing().Waiting
	must(t, r.start())
	defer func() { must(t, r.stop()) }()
	c.answer(200)
	must(t, r.until(func() string {
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.bodies) < had {
			return fmt.Sprint(len(c.bodies), " of ", had)
		}
		return ""
	}))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bodies[0] != string(first.Document) {
		t.Errorf("the oldest is not the first: %s", c.bodies[0])
	}
	if ids := slices.Compact(slices.Sorted(slices.Values(c.ids))); len(ids) != len(c.ids) {
		t.Errorf("%d reports, %d ids", len(c.ids), len(ids))
	}
}

// A collector that hangs, or that cannot even be prepared, holds nothing up and
// is no alarm; after three days it is said, and not before.
func TestReportingNeverHoldsUp(t *testing.T) {
	hang := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer s.Close()
	defer close(hang)
	for name, prepare := range map[string]func(*rig){
		"hangs":   func(r *rig) { r.cfg.Report = ReportConfig{URL: s.URL, Every: time.Second} },
		"no file": func(r *rig) { r.cfg.Report = ReportConfig{URL: s.URL, Every: time.Second, CAFile: r.path("none")} },
		"no spool": func(r *rig) {
			r.cfg.Report = ReportConfig{URL: s.URL, Every: time.Second}
			must(t, os.MkdirAll(r.path("state"), 0o700))
			r.write("state/reports", "in the way")
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, appScene())
			prepare(r)
			must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
			must(t, r.start())
			must(t, r.until(func() string { return said(r.agree("R1")) }))
			must(t, r.stop())
		})
	}

	r := newRig(t, appScene())
	c := collect(r)
	c.answer(500)
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	defer func() { must(t, r.stop()) }()
	told := func() *control.Attention {
		st, err := r.life.client.Status(context.Background())
		must(t, err)
		for _, x := range st.Attention {
			if x.Code == "report" {
				return &x
			}
		}
		return nil
	}
	must(t, r.until(func() string {
		if r.life.agent.reporting.spool.Standing().FailingSince.IsZero() {
			return "nothing has failed yet"
		}
		return ""
	}))
	r.clock.Add(int64(71 * time.Hour))
	must(t, r.pass())
	if x := told(); x != nil {
		t.Errorf("too early: %+v", x)
	}
	r.clock.Add(int64(2 * time.Hour))
	must(t, r.until(func() string {
		x := told()
		if x == nil || x.Severity != control.SeverityInfo || !strings.Contains(x.Text, "the collector answers 500") {
			return fmt.Sprintf("%+v", x)
		}
		return ""
	}))
	c.answer(200)
	must(t, r.until(func() string {
		if x := told(); x != nil {
			return fmt.Sprintf("%+v", x)
		}
		return ""
	}))
}
