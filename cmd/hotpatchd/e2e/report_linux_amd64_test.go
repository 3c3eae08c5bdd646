package e2e

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"hotpatchd/agent/control"
	reports "hotpatchd/agent/report"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// collector is a web server, with a certificate of its own, that a device reports to.
type collector struct {
	*httptest.Server
	mu      sync.Mutex
	away    bool
	tries   int
	arrived map[string]int // by id
	newest  control.Report
	wrong   string
}

func newCollector(t *testing.T) *collector {
	c := &collector{arrived: map[string]int{}}
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.tries++; c.away || err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		id := strings.Trim(r.Header.Get(reports.IDHeader), `"`)
		c.arrived[id]++
		if json.Unmarshal(b, &c.newest) != nil || id != reports.IDOf(b) || c.newest.Format != control.FormatReport {
			c.wrong = string(b)
		}
	}))
	c.Config.ErrorLog = log.New(io.Discard, "", 0)
	c.StartTLS()
	t.Cleanup(c.Close)
	return c
}

// A collector that is away, and a daemon that is killed meanwhile, cost no
// report; and a collector that nobody vouches for gets none.
func TestReportsOutliveTheDaemon(t *testing.T) {
	d := newDevice(t, appFix)
	c := newCollector(t)
	c.away = true
	text, err := os.ReadFile(d.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(ca string) {
		d.write("config.toml", string(text)+"[report]\nurl = \""+c.URL+"/in\"\nevery = \"1s\"\n"+ca)
	}
	write("")
	d.start()
	h := app(t, hosttest.Options{Spin: 1})
	d.becomes(h.PID, control.Patched)
	waits := func() map[string]bool {
		files, err := filepath.Glob(filepath.Join(d.path("state"), "reports", "*.report"))
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]bool{}
		for _, f := range files {
			_, id, _ := strings.Cut(strings.TrimSuffix(filepath.Base(f), ".report"), "-")
			out[id] = true
		}
		return out
	}
	d.until("reports wait", func() bool { return len(waits()) >= 3 })
	if c.tries != 0 {
		t.Errorf("%d requests of a device that does not know the collector's certificate", c.tries)
	}
	d.kill()

	d.write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})))
	write("ca_file = \"ca.pem\"\n")
	d.start()
	d.until("the collector has been asked in vain", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.tries > 0 })
	full := len(waits())
	d.until("more reports wait", func() bool { return len(waits()) >= full+2 })
	if st := d.status(); st.State != control.Hotpatched || len(st.Attention) != 0 {
		t.Errorf("a collector that is away is an alarm: %+v", st)
	}
	d.kill()
	waited := waits()

	c.mu.Lock()
	c.away = false
	c.mu.Unlock()
	d.start()
	d.until("all that waited has arrived", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for id := range waited {
			if c.arrived[id] == 0 {
				return false
			}
		}
		return true
	})
	d.until("the newest report is of the process", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.newest.Status.State == control.Hotpatched && c.newest.Status.Coverage.Patched == 1
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != "" {
		t.Errorf("not a report, or another id: %s", c.wrong)
	}
	more := 0
	for _, n := range c.arrived {
		more += n - 1
	}
	t.Logf("%d reports waited for the collector over two kills; %d arrived, %d of them twice", len(waited), len(c.arrived), more)
	h.Healthy()
	if v, err := d.client.Verify(context.Background()); err != nil || !v.OK {
		t.Errorf("verify: %+v, %v", v, err)
	}
}
