package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/report"
)

// A collector that fails is no alarm: the device is as well as before. After
// this time a person may want to know.
const reportSilence = 3 * 24 * time.Hour

// reporting tells a collector how the device stands, beside the loop: nothing
// of it may slow the loop, and what a collector answers changes nothing here.
type reporting struct {
	reporter *report.Reporter
	spool    *report.Spool

	mu   sync.Mutex
	last error // of the last try, nil if it was good
}

// openReporting prepares what [report] asks for. What fails here is said, and
// is no reason not to patch.
func (a *Agent) openReporting() {
	c := a.o.Config.Report
	if c.URL == "" {
		return
	}
	carrier, err := c.carrier(a.o.Version, a.o.Now)
	var spool *report.Spool
	if err == nil {
		spool, err = report.OpenSpool(filepath.Join(a.o.Config.StateDir, "reports"), 0, 0)
	}
	if err != nil {
		a.notice("report", control.SeverityWarning, "this device does not report: "+err.Error(), "[report]")
		return
	}
	r := &reporting{spool: spool}
	r.reporter = &report.Reporter{
		Device: a.device.ID, Every: c.Every, Spool: spool, Carrier: carrier, Now: a.o.Now, Make: a.makeReport,
		Said: func(o report.Outcome) { a.reported(r, o) },
	}
	a.reporting = r
}

func (c ReportConfig) carrier(version string, now func() time.Time) (*report.HTTPS, error) {
	return report.NewHTTPS(report.Collector{URL: c.URL, Proxy: c.Proxy, CAFile: c.CAFile, ClientCert: c.ClientCert, Version: version, Now: now})
}

// Check tells what is wrong with the files that [report] names. It asks no network.
func (c ReportConfig) Check() error {
	if c.URL == "" {
		return nil
	}
	_, err := c.carrier("", time.Now)
	return err
}

// makeReport is called beside the loop: it reads what was published.
func (a *Agent) makeReport(context.Context) (report.Made, error) {
	s := a.shown.Load()
	status := a.asOfNow(s.status)
	status.Story = a.storyNow(s)
	doc := control.NewReport(&status, &s.eligibility)
	doc.Dropped = a.reporting.spool.Standing().Dropped
	b, err := doc.Encode(a.o.Version, a.o.Now())
	return report.Made{Document: b, Key: doc.Key()}, err
}

// reported takes in how a try ended; it is called beside the loop.
func (a *Agent) reported(r *reporting, o report.Outcome) {
	r.mu.Lock()
	was := r.last
	r.last = o.Err
	r.mu.Unlock()
	waiting := zap.Int("waiting", r.spool.Standing().Waiting)
	switch {
	case o.Kind == report.Refused:
		a.log.Warn("the collector does not take a report, it is dropped", zap.Error(o.Err), waiting)
	case o.Err == nil && was != nil:
		a.log.Info("reports are delivered again", waiting)
	case o.Err != nil && (was == nil || was.Error() != o.Err.Error()):
		a.log.Warn("a report is not delivered, it is tried again", zap.Error(o.Err), waiting)
	}
	if o.Err == nil != (was == nil) || a.reportTrouble(a.o.Now()) != nil {
		a.post(func() { a.dirty = true; a.Wake() }) // it may have become something to tell, or end to be
	}
}

// reportTrouble is what a person should know of reporting, nil mostly.
func (a *Agent) reportTrouble(now time.Time) []control.Attention {
	r := a.reporting
	if r == nil {
		return nil
	}
	since := r.spool.Standing().FailingSince
	if since.IsZero() || now.Sub(since) < reportSilence {
		return nil
	}
	r.mu.Lock()
	last := r.last
	r.mu.Unlock()
	text := fmt.Sprintf("no report was delivered since %s", stamp(since))
	if last != nil {
		text += ": " + last.Error()
	}
	return []control.Attention{{Code: "report", Severity: control.SeverityInfo, Text: text, Since: control.At(since), Scope: control.Scope{Public: true},
		Remedy: "nothing is lost for this device; mend the way to the collector, or [report] in the configuration"}}
}
