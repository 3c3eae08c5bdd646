package agent

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// patchedRig is a device with processes 100, 101, … that run R1 of product app.
func patchedRig(t *testing.T, processes int) *rig {
	t.Helper()
	return patchedRigOf(t, processes, sim.Module{File: "mingw/app.dll"})
}

func patchedRigOf(t *testing.T, processes int, modules ...sim.Module) *rig {
	t.Helper()
	scene := &sim.Scene{Format: sim.SceneFormat, Seed: 5}
	for i := range processes {
		scene.Processes = append(scene.Processes, sim.Process{PID: sweepPID + i, Exe: "/opt/acme/acme-server", Modules: modules})
	}
	r := newRig(t, scene)
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1, CVEs: []string{"CVE-2026-0001"}, Severity: "critical"},
		image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	t.Cleanup(func() {
		if r.life == nil {
			return
		}
		if err := errors.Join(r.judge(), r.stop()); err != nil {
			t.Error(err)
		}
	})
	_, err := r.life.client.Check(context.Background())
	must(t, err)
	must(t, r.until(func() string {
		st, err := r.life.client.Status(context.Background())
		if err != nil || st.Coverage.Patched != processes {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	return r
}

// Every address that the records speak of is told for what it is, so that a
// crash can be told from a fix.
func TestExplain(t *testing.T) {
	r := patchedRig(t, 1)
	ctx := context.Background()
	recs := r.life.agent.allRecords()
	if len(recs) != 1 {
		t.Fatalf("%d records", len(recs))
	}
	rec := recs[0]
	ask := func(at target.Addr, kind, function string) {
		t.Helper()
		doc, err := r.life.client.Explain(ctx, sweepPID, uint64(at))
		must(t, err)
		if doc.Kind != kind || doc.Function != function || doc.Text == "" || kind != "elsewhere" && doc.Image != "app.dll" {
			t.Errorf("%s is %s of %s (%s), wanted %s of %s", at, doc.Kind, doc.Function, doc.Text, kind, function)
		}
		if patched := kind != "elsewhere" && kind != "image"; patched != (doc.Release == "R1") {
			t.Errorf("%s, %s, belongs to %q", at, kind, doc.Release)
		}
	}
	for _, s := range rec.Sites {
		ask(s.At, "site", s.Function)
		ask(rec.Base+target.Addr(s.RVA)+target.Addr(s.Length)-1, "old-function", s.Function)
		ask(s.Target, "new-function", s.Function)
		ask(s.Target+1, "new-function", s.Function)
		ask(s.Slot, "slot", s.Function)
		if s.Pad != nil {
			ask(s.Pad.At, "pad", s.Function)
		}
	}
	ask(rec.Annex, "annex", "")
	ask(rec.Base, "image", "")
	ask(rec.Base-1, "elsewhere", "")
	if doc, err := r.life.client.Explain(ctx, sweepPID, uint64(rec.Base+16)); err != nil || !strings.Contains(doc.Text, " 0x10 bytes") {
		t.Errorf("%+v %v", doc, err)
	}
	if _, err := r.life.client.Explain(ctx, 4242, 1); !errors.Is(err, &control.Error{Code: control.CodeNotFound}) {
		t.Errorf("a process that is not there: %v", err)
	}
}

// The counts of the metrics are those of the status, and every state has its line.
func TestMetrics(t *testing.T) {
	r := patchedRig(t, 3)
	b, err := r.life.client.Metrics(context.Background())
	must(t, err)
	values := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^(hotpatchd_\w+(?:\{[^}]*\})?) (\d+)$`).FindAllStringSubmatch(string(b), -1) {
		values[m[1]], _ = strconv.Atoi(m[2])
	}
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if !strings.HasPrefix(line, "# ") && len(strings.Fields(line)) != 2 {
			t.Errorf("not a line of the text exposition: %q", line)
		}
	}
	for _, s := range control.ImageStates {
		want := 0
		if s == control.Patched {
			want = 3
		}
		if n, ok := values[fmt.Sprintf("hotpatchd_images{state=%q}", s)]; !ok || n != want {
			t.Errorf("images %s: %d %v", s, n, ok)
		}
	}
	for _, s := range control.States {
		want := 0
		if s == control.Hotpatched {
			want = 1
		}
		if n, ok := values[fmt.Sprintf("hotpatchd_state{state=%q}", s)]; !ok || n != want {
			t.Errorf("state %s: %d %v", s, n, ok)
		}
	}
	if values[`hotpatchd_release_sequence{product="app",release="R1"}`] != 1 || values["hotpatchd_eligible"] != 1 || values["hotpatchd_processes"] != 3 {
		t.Errorf("%v", values)
	}
}

// A support file has every document, and nothing of any process's memory.
func TestDiagnose(t *testing.T) {
	r := patchedRig(t, 1)
	must(t, r.life.agent.call(context.Background(), func() {
		r.life.agent.o.Settings = []control.Setting{{Key: "repository.url", Value: `"https://x.example"`, Source: "here"}}
	}))
	b, err := r.life.client.Diagnose(context.Background())
	must(t, err)
	z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	must(t, err)
	var names []string
	for _, f := range z.File {
		names = append(names, f.Name)
		in, err := f.Open()
		must(t, err)
		text, err := io.ReadAll(in)
		must(t, err)
		if !json.Valid(text) {
			t.Errorf("%s is no JSON: %.100s", f.Name, text)
		}
		if age := time.Since(f.Modified); age < -time.Hour || age > time.Hour {
			t.Errorf("%s is of %v", f.Name, f.Modified)
		}
		if f.Name == "settings.json" && (!strings.Contains(string(text), "x.example") || !strings.Contains(string(text), "allow_hotpatch")) {
			t.Errorf("not configuration and policy: %s", text)
		}
	}
	for _, want := range []string{"status.json", "eligibility.json", "list.json", "processes.json", "records.json", "history.json", "settings.json"} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is not in it: %v", want, names)
		}
	}
}

// The owner's checks tell that their file is refused, and that what it said before counts.
func TestEligibilityOfARefusedPolicy(t *testing.T) {
	r := patchedRig(t, 1)
	found := func(want bool) func() string {
		return func() string {
			e, err := r.life.client.Eligibility(context.Background())
			if err != nil || !e.Eligible {
				return fmt.Sprintf("%+v %v", e, err)
			}
			told := 0
			for _, c := range e.Checks {
				if strings.Contains(c.Found, "= true; that is its last good state") && strings.Contains(c.Remedy, "mend "+r.cfg.Policy.File) {
					told++
				}
			}
			if (told == 2) != want {
				return fmt.Sprintf("%d checks tell: %+v", told, e.Checks)
			}
			return ""
		}
	}
	r.write("policy.toml", strings.Replace(goodPolicy, "enrolled", "enroled", 1))
	must(t, r.until(found(true)))
	r.write("policy.toml", goodPolicy)
	must(t, r.until(found(false)))
}

// What happens is told as it happens: to subscribers, and as progress to who asked.
func TestEvents(t *testing.T) {
	r := patchedRig(t, 2)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	seen := map[string]int{}
	ready, ended := make(chan struct{}), make(chan error, 1)
	client := control.Dial(r.cfg.Control.Socket)
	defer client.Close()
	go func() {
		ended <- client.Events(ctx, func() { close(ready) }, func(e control.Event) error {
			mu.Lock()
			defer mu.Unlock()
			seen[e.Type]++
			if e.Text == "" || e.Time.IsZero() {
				return fmt.Errorf("an event without text or time: %+v", e)
			}
			return nil
		})
	}()
	<-ready
	progress := map[int]control.Event{}
	ch, err := r.life.client.Rollback(ctx, control.RollbackRequest{}, func(e control.Event) { progress[e.PID] = e })
	must(t, err)
	if len(progress) != 2 || progress[100].Total != 2 || progress[100].State != string(control.Unpatched) || progress[101].Done == progress[100].Done {
		t.Errorf("progress: %+v", progress)
	}
	if ch.State != control.Held || len(ch.Results) != 2 || ch.Coverage.Images != 2 || ch.Coverage.Unpatched != 2 {
		t.Errorf("change: %+v", ch)
	}
	must(t, r.until(func() string {
		mu.Lock()
		defer mu.Unlock()
		for _, want := range []string{control.EventImage, control.EventState, control.EventRelease} {
			if seen[want] == 0 {
				return fmt.Sprintf("no %s event: %v", want, seen)
			}
		}
		return ""
	}))
	cancel()
	must(t, <-ended)
}

// Whoever watches hears of each release that comes into an image, of images
// that nobody has seen before, of pause and resume, and of checks.
func TestWatchMissesNothing(t *testing.T) {
	modules := []sim.Module{{File: "kernel32.dll"}, {File: "mingw/app.dll"}}
	r := patchedRigOf(t, 1, modules...)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	var heard []string
	ready, ended := make(chan struct{}), make(chan error, 1)
	client := control.Dial(r.cfg.Control.Socket)
	defer client.Close()
	go func() {
		ended <- client.Events(ctx, func() { close(ready) }, func(e control.Event) error {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, e.Type+" "+e.Text)
			return nil
		})
	}()
	<-ready
	hears := func(want string) {
		t.Helper()
		must(t, r.until(func() string {
			mu.Lock()
			defer mu.Unlock()
			if !slices.ContainsFunc(heard, func(s string) bool { return strings.HasPrefix(s, want) }) {
				return fmt.Sprintf("not heard: %s; only %q", want, heard)
			}
			return ""
		}))
	}
	c := r.life.client
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R2", Product: "app", Sequence: 2, CVEs: []string{"CVE-2026-0001"}, Severity: "critical"},
		image{"mingw/app-ref-2.dll"}))
	_, err := c.Check(ctx)
	must(t, err)
	hears("repository repository: checked, 2 releases, good until ")
	hears("image app.dll in process 100: patched by R2")
	_, err = c.Rollback(ctx, control.RollbackRequest{}, nil)
	must(t, err)
	hears("image app.dll in process 100: patched by R1")
	_, err = c.Pause(ctx)
	must(t, err)
	hears("state device: paused: nothing new is applied")
	_, err = r.m.Start(sim.Process{PID: 200, Exe: "/opt/acme/acme-server", Modules: modules})
	must(t, err)
	hears("image app.dll in process 200: unpatched")
	ch, err := c.Resume(ctx)
	must(t, err)
	hears("state device: goes on")
	hears("image app.dll in process 200: patched by R1")
	if again, err := c.Resume(ctx); err != nil || again.Changed || !strings.Contains(again.Text, "was not paused") || !ch.Changed {
		t.Errorf("the second resume: %+v %v", again, err)
	}
	_, err = r.m.Start(sim.Process{PID: 201, Exe: "/opt/acme/acme-server", Modules: modules})
	must(t, err)
	hears("image app.dll in process 201: patched by R1")
	cancel()
	must(t, <-ended)
}

// Orders that make no sense are refused with a code and a sentence.
func TestRefusedOrders(t *testing.T) {
	r := patchedRig(t, 1)
	ctx, c := context.Background(), r.life.client
	file, meta, err := (&script{rig: r}).carry("R1")
	must(t, err)
	forged := slices.Clone(file)
	forged[len(forged)/2] ^= 1
	stray := map[string][]byte{"timestamp.json": meta["timestamp.json"]}
	for _, x := range []struct {
		name string
		code control.Code
		do   func() error
	}{
		{"install unknown", control.CodeNotFound, func() error { _, err := c.Install(ctx, control.InstallRequest{ID: "NO"}, nil); return err }},
		{"rollback unknown", control.CodeNotFound, func() error { _, err := c.Rollback(ctx, control.RollbackRequest{ID: "NO"}, nil); return err }},
		{"plan unknown", control.CodeNotFound, func() error { _, err := c.Plan(ctx, control.PlanQuery{ID: "NO"}); return err }},
		{"plan for nobody", control.CodeNotFound, func() error { _, err := c.Plan(ctx, control.PlanQuery{PID: 4242}); return err }},
		{"a forged file", control.CodeConflict, func() error {
			_, err := c.Install(ctx, control.InstallRequest{File: forged, Metadata: meta}, nil)
			return err
		}},
		{"a forged file alone", control.CodeConflict, func() error { _, err := c.Install(ctx, control.InstallRequest{File: forged}, nil); return err }},
		{"a forged file with some metadata", control.CodeConflict, func() error {
			_, err := c.Install(ctx, control.InstallRequest{File: forged, Metadata: stray}, nil)
			return err
		}},
	} {
		var e *control.Error
		if err := x.do(); !errors.As(err, &e) || e.Code != x.code || e.Text == "" {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	if _, err := c.Rollback(ctx, control.RollbackRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	var e *control.Error
	if _, err := c.Rollback(ctx, control.RollbackRequest{}, nil); !errors.As(err, &e) || e.Code != control.CodeNotFound {
		t.Errorf("rollback of nothing: %v", err)
	}
	// The very file that trusted metadata names needs nothing beside it, and lifts the hold.
	ch, err := c.Install(ctx, control.InstallRequest{File: file}, nil)
	if err != nil || !ch.Lifted || ch.Coverage.Patched != 1 {
		t.Errorf("install of the right file: %+v %v", ch, err)
	}
}

// The plan that is shown is the one that is done, and looking changes nothing.
func TestPlanIsWhatIsDone(t *testing.T) {
	scene := &sim.Scene{Format: sim.SceneFormat, Seed: 5, Processes: []sim.Process{{PID: sweepPID, Modules: []sim.Module{{File: "mingw/app.dll"}}}}}
	r := newRig(t, scene)
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	r.write("policy.toml", goodPolicy+"mode = \"manual\"\n")
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	ctx, c := context.Background(), r.life.client
	_, err := c.Check(ctx)
	must(t, err)
	plan, err := c.Plan(ctx, control.PlanQuery{PID: sweepPID})
	must(t, err)
	if r.m.Count(sim.OpWrite)+r.m.Count(sim.OpAlloc)+r.m.Count(sim.OpProtect) > 0 {
		t.Error("looking has changed something")
	}
	if plan.Release != "R1" || len(plan.Processes) != 1 || len(plan.Processes[0].Images) != 1 || plan.Coverage.Images != 1 {
		t.Fatalf("plan: %+v", plan)
	}
	im := plan.Processes[0].Images[0]
	if im.State != control.Patched || len(im.Sites) == 0 {
		t.Fatalf("plan: %+v", im)
	}
	ch, err := c.Install(ctx, control.InstallRequest{}, nil)
	must(t, err)
	if ch.Coverage != plan.Coverage {
		t.Errorf("planned %+v, done %+v", plan.Coverage, ch.Coverage)
	}
	for _, s := range im.Sites {
		have, err := r.m.Fetch(sweepPID, target.Addr(s.Address), len(s.NewBytes)/2)
		if err != nil || fmt.Sprintf("%x", have) != s.NewBytes {
			t.Errorf("%s: planned %s, found %x %v", s.Name, s.NewBytes, have, err)
		}
	}
	// What is done is shown with the same protections and lengths, and none is left out.
	done, err := c.Processes(ctx, control.ProcessQuery{})
	must(t, err)
	annex := done.Processes[0].Images[0].Annex
	if annex == nil || im.Annex == nil || !reflect.DeepEqual(annex.Segments, im.Annex.Segments) || len(annex.Functions) != len(im.Annex.Functions) {
		t.Fatalf("planned %+v, done %+v", im.Annex, annex)
	}
	exec := 0
	for _, g := range annex.Segments {
		if g.Prot == "r-x" {
			exec++
		}
		if g.Prot == "" {
			t.Errorf("a segment without protection: %+v", annex)
		}
	}
	if exec != 2 {
		t.Errorf("%d segments hold code, not the new functions and the slots: %+v", exec, annex.Segments)
	}
	for i, f := range annex.Functions {
		if f.Size == 0 || f.Size != im.Annex.Functions[i].Size {
			t.Errorf("%s has %d bytes, planned %d", f.Name, f.Size, im.Annex.Functions[i].Size)
		}
	}
	plan, err = c.Plan(ctx, control.PlanQuery{ID: "R1"})
	must(t, err)
	if plan.Refused != nil {
		t.Errorf("install would be refused: %+v", plan.Refused)
	}
	if im := plan.Processes[0].Images[0]; im.ReasonCode != "in-force" {
		t.Errorf("plan of what is in force: %+v", im)
	}
}

// Operators, readers and processes that come, fork and go, all at once; in the
// end everything is as the last word says. Meant for the race detector.
func TestManyAtOnce(t *testing.T) {
	r := patchedRig(t, 8)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var readers, actors sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			c := control.Dial(r.cfg.Control.Socket)
			defer c.Close()
			for ctx.Err() == nil {
				st, err := c.Status(ctx)
				if err == nil && st.Coverage.Images < 8 {
					t.Errorf("images were lost: %+v", st.Coverage)
				}
				_, _ = c.Processes(ctx, control.ProcessQuery{})
				_, _ = c.Metrics(ctx)
				_, _ = c.Verify(ctx)
			}
		})
	}
	readers.Go(func() {
		c := control.Dial(r.cfg.Control.Socket)
		defer c.Close()
		_ = c.Events(ctx, nil, func(control.Event) error { return nil })
	})
	for k := range 2 {
		actors.Go(func() { // processes that come and go
			for i := range 15 {
				pid := 300 + 100*k + i
				if _, err := r.m.Start(sim.Process{PID: pid, Modules: []sim.Module{{File: "mingw/app.dll"}}}); err != nil {
					t.Error(err)
					return
				}
				_, _ = r.m.Fork(pid) // it may be held just now
				if i%3 == 0 {
					_ = r.m.Exit(pid)
				}
				r.life.agent.Wake()
			}
		})
	}
	actors.Go(func() { // an operator who changes his mind
		for range 4 {
			_, _ = r.life.client.Rollback(ctx, control.RollbackRequest{ID: "R1"}, nil)
			_, _ = r.life.client.Pause(ctx)
			_, _ = r.life.client.Check(ctx)
			_, _ = r.life.client.Resume(ctx)
			_, _ = r.life.client.Install(ctx, control.InstallRequest{ID: "R1"}, func(control.Event) {})
		}
	})
	actors.Go(func() { // device management
		for i := range 4 {
			r.write("policy.toml", goodPolicy+fmt.Sprintf("ring = %d\n", i))
			r.life.agent.Reload()
		}
	})
	actors.Wait()
	must(t, r.until(func() string {
		if err := r.pass(); err != nil {
			return err.Error()
		}
		st, err := r.life.client.Status(ctx)
		if err != nil || st.State != control.Hotpatched || st.Coverage.Patched != st.Coverage.Images || st.Coverage.Images < 8+20 {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	v, err := r.life.client.Verify(ctx)
	if err != nil || !v.OK {
		t.Errorf("verify: %+v %v", v, err)
	}
	cancel()
	readers.Wait()
}

// A daemon that has stopped has left nothing running.
func TestNothingRunsOn(t *testing.T) {
	r := patchedRig(t, 2)
	must(t, errors.Join(r.judge(), r.stop()))
	must(t, r.until(func() string {
		var b bytes.Buffer
		if err := pprof.Lookup("goroutine").WriteTo(&b, 2); err != nil {
			return err.Error()
		}
		for _, stack := range strings.Split(b.String(), "\n\n") {
			waits := strings.Contains(stack, "testing.(*T).Parallel(") // a test whose turn has not come
			if strings.Contains(stack, "hotpatchd/") && !strings.Contains(stack, "TestNothingRunsOn") && !waits {
				return stack
			}
		}
		return ""
	}))
}

// A second daemon on the same state is told so, and touches nothing.
func TestStateInUse(t *testing.T) {
	r := patchedRig(t, 1)
	first := r.life
	r.life = nil
	ops := r.m.Ops()
	err := r.start()
	r.life = first
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second daemon: %v", err)
	}
	if n := r.m.Count(sim.OpWrite); r.m.Ops() < ops || n == 0 {
		t.Error("the machine was not asked at all")
	}
}
