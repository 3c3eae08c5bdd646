package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"hotpatchd/agent/control"
)

// A program that does not start is tried again so often, with a rest between.
const (
	startTries = 5
	startPause = 200 * time.Millisecond
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"hotpatch": func() { os.Exit(run()) },
		// hotpatch as somebody uses it who does not wait for long.
		"hasty-hotpatch": func() {
			patient = attention{quiet: 10 * time.Millisecond, every: time.Second, silence: 1200 * time.Millisecond}
			os.Exit(run())
		},
	})
}

// TestScripts runs the real command against a daemon that serves invented
// documents over a real socket. In a script "daemon NAME" starts one, or
// changes the one that runs: see daemons.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/scripts",
		Setup: func(e *testscript.Env) error {
			dir, err := os.MkdirTemp("", "hps") // short: a socket's path is
			if err != nil {
				return err
			}
			d := &daemon{}
			e.Values["daemon"] = d
			socket := filepath.Join(dir, "s")
			if runtime.GOOS == "windows" {
				socket = `\\.\pipe\` + filepath.Base(dir)
			}
			e.Setenv("HOTPATCH_SOCKET", socket)
			e.Setenv("TZ", "UTC")
			e.Defer(func() { d.stop(); os.RemoveAll(dir) })
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"daemon": func(ts *testscript.TestScript, neg bool, args []string) {
				d := ts.Value("daemon").(*daemon)
				if len(args) != 1 {
					ts.Fatalf("usage: daemon NAME")
				}
				if args[0] == "stop" {
					d.stop()
					return
				}
				set, ok := daemons[args[0]]
				if !ok {
					ts.Fatalf("no daemon %q", args[0])
				}
				ts.Check(d.start(ts.Getenv("HOTPATCH_SOCKET"), set))
			},
			// silence: somebody listens and answers nothing, until the script ends.
			"silence": func(ts *testscript.TestScript, neg bool, args []string) {
				l, err := control.Listen(ts.Getenv("HOTPATCH_SOCKET"))
				ts.Check(err)
				ts.Defer(func() { l.Close() })
			},
			// within D COMMAND...: the command ends with an error before D is over.
			"within": func(ts *testscript.TestScript, neg bool, args []string) {
				limit, err := time.ParseDuration(args[0])
				ts.Check(err)
				begun := time.Now()
				if ts.Exec(args[1], args[2:]...) == nil {
					ts.Fatalf("it succeeded")
				}
				if took := time.Since(begun); took > limit {
					ts.Fatalf("it took %v", took)
				}
			},
			// asked REQUEST...: what the daemon was asked since the last time.
			"asked": func(ts *testscript.TestScript, neg bool, args []string) {
				got := strings.Join(strings.Fields(ts.Value("daemon").(*daemon).take()), " ")
				want := strings.Join(args, " ")
				if got != want {
					ts.Fatalf("asked %q, want %q", got, want)
				}
			},
			// code N COMMAND...: the command ends with this exit code.
			"code": func(ts *testscript.TestScript, neg bool, args []string) {
				var e interface{ ExitCode() int }
				err := ts.Exec(args[1], args[2:]...)
				// Under Wine on a busy machine a program may not even start.
				for try := 1; try < startTries && runtime.GOOS == "windows" && err != nil && !errors.As(err, &e); try++ {
					time.Sleep(startPause)
					err = ts.Exec(args[1], args[2:]...)
				}
				code := 0
				if errors.As(err, &e) {
					code = e.ExitCode()
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if fmt.Sprint(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			// mode FILE PERM; on Windows the folder's descriptor decides
			"mode": func(ts *testscript.TestScript, neg bool, args []string) {
				info, err := os.Stat(ts.MkAbs(args[0]))
				ts.Check(err)
				if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[1] && runtime.GOOS != "windows" {
					ts.Fatalf("%s has mode %s", args[0], got)
				}
			},
		},
	})
}

// daemons are the situations that scripts can ask for.
var daemons = map[string]func(*daemon){
	"well": func(d *daemon) {},
	"open": func(d *daemon) {
		d.status, d.processes = openStatus(), openProcesses()
		d.changed = change("install", true, control.Patched, control.Busy)
		d.verified = verifyBad()
	},
	"ineligible": func(d *daemon) {
		d.status.State, d.status.Eligible, d.status.Fails = control.Ineligible, false, []string{"vbs"}
		d.eligible = eligibilityDoc()
	},
	"unknown": func(d *daemon) { d.status = &control.Status{State: control.Unknown} },
	"not-permitted": func(d *daemon) {
		d.err = &control.Error{Code: control.CodeNotPermitted, Text: "rollback needs root or membership in the group hotpatch; you are alice"}
	},
	"slow-check":   func(d *daemon) { d.takes = 3 * time.Second },
	"not-found":    func(d *daemon) { d.err = control.Errorf(control.CodeNotFound, "there is no release X") },
	"not-eligible": func(d *daemon) { d.err = control.Errorf(control.CodeNotEligible, "the device is not eligible") },
	"rolled-back":  func(d *daemon) { d.changed = rolledBack() },
	"already":      func(d *daemon) { d.changed = change("install", false, control.Patched) },
	"pending": func(d *daemon) { // and well after the third question
		well := d.status
		d.status, d.processes = openStatus(), openProcesses()
		d.status.State = control.Pending
		d.status.Coverage = coverage(map[control.ImageState]int{control.PendingImage: 1}, 1)
		d.processes.Processes = d.processes.Processes[:1]
		d.processes.Processes[0].Images[0].State = control.PendingImage
		d.later = func() {
			d.status = well
			d.processes.Processes[0].Images[0].State = control.Patched
		}
	},
	"events": func(d *daemon) {
		d.events = []control.Event{
			{Type: control.EventImage, Time: ago(0), PID: 2216, Text: "app.dll in srv.exe 2216: patched, was busy"},
			{Type: control.EventState, Time: ago(0), From: "pending", State: "hotpatched", Text: "device: hotpatched, was pending"},
		}
	},
}

// daemon is a Service with invented answers on a real socket.
type daemon struct {
	mu        sync.Mutex
	server    *control.Server
	done      chan struct{}
	status    *control.Status
	processes *control.Processes
	eligible  *control.Eligibility
	changed   *control.Change
	verified  *control.Verify
	events    []control.Event
	err       error
	asked     []string
	questions int
	later     func()        // called at the third question
	takes     time.Duration // of a check
}

func (d *daemon) start(socket string, set func(*daemon)) error {
	d.mu.Lock()
	d.status, d.processes, d.eligible, d.changed = wellStatus(), manyProcesses(), eligibleDoc(), change("install", true, control.Patched, control.Patched)
	d.verified = &control.Verify{OK: true, Processes: 38, Images: 41, Sites: 82}
	d.err, d.events, d.later, d.questions, d.takes = nil, nil, nil, 0, 0
	set(d)
	running := d.server != nil
	d.mu.Unlock()
	if running {
		return nil
	}
	l, err := control.Listen(socket)
	if err != nil {
		return err
	}
	d.server = control.NewServer(control.Config{Service: d, Group: "hotpatch", Version: "1.2", Now: func() time.Time { return now }})
	d.done = make(chan struct{})
	go func(l net.Listener) { defer close(d.done); d.server.Serve(l) }(l)
	return nil
}

func (d *daemon) stop() {
	if d.server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d.server.Shutdown(ctx)
	<-d.done
	d.server = nil
}

func (d *daemon) take() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := strings.Join(d.asked, "; ")
	d.asked = nil
	return s
}

func (d *daemon) ask(what ...any) error {
	d.asked = append(d.asked, strings.TrimSpace(fmt.Sprintln(what...)))
	if d.questions++; d.questions == 3 && d.later != nil {
		d.later()
	}
	return d.err
}

// Status and the others give copies: the server keeps what it got while the script goes on.
func (d *daemon) Status(context.Context, control.Caller) (*control.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.ask("status")
	s := *d.status
	return &s, err
}
func (d *daemon) Eligibility(context.Context, control.Caller) (*control.Eligibility, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.eligible, d.ask("eligibility")
}
func (d *daemon) Offers(context.Context, control.Caller) (*control.Offers, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return offersDoc(), d.ask("list")
}
func (d *daemon) Calendar(context.Context, control.Caller) (*control.Calendar, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return calendarDoc(), d.ask("calendar")
}
func (d *daemon) Processes(_ context.Context, _ control.Caller, q control.ProcessQuery) (*control.Processes, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.ask("processes", q.PID, q.Vulnerable)
	p := *d.processes
	p.Processes = nil
	for _, x := range d.processes.Processes {
		if q.PID == 0 || q.PID == x.PID {
			x.Images = append([]control.Image(nil), x.Images...)
			p.Processes = append(p.Processes, x)
		}
	}
	return &p, err
}
func (d *daemon) Check(context.Context, control.Caller) (*control.Status, error) {
	d.mu.Lock()
	takes := d.takes
	d.mu.Unlock()
	time.Sleep(takes)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status, d.ask("check")
}
func (d *daemon) Plan(_ context.Context, _ control.Caller, q control.PlanQuery) (*control.Plan, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q.PID != 0 {
		return planOf(0), d.ask("plan", q.ID, q.PID)
	}
	return planDoc(), d.ask("plan", q.ID)
}
func (d *daemon) Install(_ context.Context, _ control.Caller, r control.InstallRequest, progress func(control.Event)) (*control.Change, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	what := []any{"install", r.ID}
	if r.File != nil {
		what = []any{"install-file", string(r.File)}
		for _, name := range []string{"1.root.json", "timestamp.json", "notes.txt", "link.json"} {
			if b, ok := r.Metadata[name]; ok {
				what = append(what, name+"="+string(b))
			}
		}
	}
	if err := d.ask(what...); err != nil {
		return nil, err
	}
	progress(control.Event{Type: control.EventProgress, Done: 1, Total: 2, State: "patched", Text: "srv.exe 2210"})
	progress(control.Event{Type: control.EventProgress, Done: 2, Total: 2, State: "patched", Text: "srv.exe 2211"})
	return d.changed, nil
}
func (d *daemon) Rollback(_ context.Context, _ control.Caller, r control.RollbackRequest, _ func(control.Event)) (*control.Change, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed, d.ask("rollback", r.ID)
}
func (d *daemon) simple(action string, what ...any) (*control.Change, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &control.Change{Action: action, Changed: true, Text: action + " done"}, d.ask(append([]any{action}, what...)...)
}
func (d *daemon) Hold(_ context.Context, _ control.Caller, id, reason string) (*control.Change, error) {
	return d.simple("hold", id, reason)
}
func (d *daemon) ReleaseHold(_ context.Context, _ control.Caller, id, reason string) (*control.Change, error) {
	return d.simple("release-hold", id, reason)
}
func (d *daemon) Pause(context.Context, control.Caller) (*control.Change, error) {
	return d.simple("pause")
}
func (d *daemon) Resume(context.Context, control.Caller) (*control.Change, error) {
	return d.simple("resume")
}
func (d *daemon) Verify(context.Context, control.Caller) (*control.Verify, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.verified, d.ask("verify")
}
func (d *daemon) History(_ context.Context, _ control.Caller, limit int) (*control.History, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return historyDoc(), d.ask("history", limit)
}
func (d *daemon) Explain(_ context.Context, _ control.Caller, pid int, address uint64) (*control.Explain, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return explainDoc(), d.ask("explain", pid, control.Addr(address))
}
func (d *daemon) Policy(context.Context, control.Caller) (*control.Settings, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return settingsDoc(), d.ask("policy")
}
func (d *daemon) Diagnose(context.Context, control.Caller) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return []byte("zipped"), d.ask("diagnose")
}
func (d *daemon) Subscribe(ctx context.Context, _ control.Caller) (<-chan control.Event, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ch := make(chan control.Event, len(d.events))
	for _, e := range d.events {
		ch <- e
	}
	close(ch)
	return ch, d.ask("events")
}
func (d *daemon) Metrics(context.Context) ([]byte, error) { return nil, nil }
