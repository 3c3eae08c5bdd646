package e2e

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"hotpatchd/agent/control"
)

// plan asks the Windows daemon what it would do to one program.
func (w *windows) plan(a *winapp, id string) control.PlannedImage {
	w.t.Helper()
	var p control.Plan
	w.until(fmt.Sprintf("there is a plan for program %d", a.winPID), func() bool {
		out, code := w.try(filepath.Join(w.dir, "hotpatch.exe"), "--socket", w.pipe(), "--json", "plan", id, "--pid", fmt.Sprint(a.winPID))
		p = control.Plan{}
		return code == 0 && json.Unmarshal([]byte(out), &p) == nil && len(p.Processes) == 1 && len(p.Processes[0].Images) == 1
	})
	return p.Processes[0].Images[0]
}

// plan asks the Linux daemon the same.
func (d *device) plan(a *winapp, id string) control.PlannedImage {
	d.t.Helper()
	var p *control.Plan
	d.until(fmt.Sprintf("there is a plan for process %d", a.pid), func() bool {
		var err error
		p, err = d.client.Plan(context.Background(), control.PlanQuery{ID: id, PID: a.pid})
		return err == nil && len(p.Processes) == 1 && len(p.Processes[0].Images) == 1
	})
	return p.Processes[0].Images[0]
}

// written is what of a plan does not hang on where things lie: places by their
// distance from the image, jumps by that of their target from the annex.
type written struct {
	Image     control.PlannedImage // without what follows
	Functions []control.PlannedFunc
	Sites     []control.Site
	Annex     control.Annex
}

// apart takes the addresses out of a plan.
func apart(t testing.TB, p control.PlannedImage) written {
	t.Helper()
	if p.Annex == nil || len(p.Sites) == 0 || len(p.Functions) == 0 {
		t.Fatalf("no plan: %+v", p)
	}
	x := written{Image: p, Functions: p.Functions, Sites: p.Sites, Annex: *p.Annex}
	annex := p.Annex.Address
	for i := range x.Functions {
		f := &x.Functions[i]
		f.Address, f.New = f.Address-p.Base, f.New-annex
	}
	for i := range x.Sites {
		s := &x.Sites[i]
		b, err := hex.DecodeString(s.NewBytes)
		if err != nil {
			t.Fatal(err)
		}
		// The only bytes that hang on addresses: the displacement of a long jump.
		if len(b) >= 5 && b[0] == 0xe9 {
			to := s.Address + 5 + control.Addr(int64(int32(binary.LittleEndian.Uint32(b[1:]))))
			s.NewBytes = fmt.Sprintf("jmp annex+%x %x", uint64(to-annex), b[5:])
		}
		s.Address, s.OldText, s.NewText = s.Address-p.Base, nil, nil
	}
	for i := range x.Annex.Segments {
		x.Annex.Segments[i].Address -= annex
	}
	for i := range x.Annex.Functions {
		x.Annex.Functions[i].Address -= annex
	}
	x.Annex.Address, x.Image.Base = 0, 0
	// A thread that is in the way at this very moment is none of the plan.
	x.Image.Reason, x.Image.ReasonCode, x.Image.Remedy = "", "", ""
	x.Image.Functions, x.Image.Sites, x.Image.Annex = nil, nil, nil
	return x
}

// The same release for the same programs, by the daemon inside of Windows and by
// the one outside: the plans are the same but for where things lie, and so is
// what becomes of the images. Each plans while the release is held, then works.
func TestWineProcessAlike(t *testing.T) {
	fixes := []fix{appFix, {"SETS-1", "sets", 1, []string{"sets/sets-1.dll"}, ""}}
	const held = "hold = [\"ACME-1\", \"SETS-1\"]\n"
	const owner = "waive = [\"vbs\", \"baseline\"]\n"
	w := newWindows(t, fixes...)
	w.eligible()
	w.configure("file:///Z:"+w.fleet.path("repo"), `"vbs", "baseline"`)
	w.fleet.policy(owner + held)
	d := newDevice(t, fixes...)
	d.policy(held)

	images := []string{"mingw/app.dll", "clang/app.dll", "plain/app.dll", "other/app.dll", "sets/sets.dll"}
	group := func() (apps []*winapp) {
		for _, dll := range images {
			apps = append(apps, w.app(dll, 0, 2, 2))
		}
		return apps
	}
	inside, outside := group(), group()

	stop := w.foreground()
	defer stop()
	var plans []written
	for _, a := range inside[:3] {
		plans = append(plans, apart(t, w.plan(a, "ACME-1")))
	}
	stop()
	d.start()
	for i, a := range outside[:3] {
		// Another process of the same program, and the very same one.
		for _, a := range []*winapp{a, inside[i]} {
			if x := apart(t, d.plan(a, "ACME-1")); !reflect.DeepEqual(x, plans[i]) {
				t.Errorf("%s, planned from inside:\n%s\nfrom outside:\n%s", images[i], indented(plans[i]), indented(x))
			}
		}
	}
	if t.Failed() {
		return
	}
	t.Logf("places in %s, both ways:\n%s", images[0], indented(plans[0].Sites))
	// From outside nobody has the map of API sets that a Windows program has.
	if p := d.plan(outside[4], "SETS-1"); p.State != control.Blocked || p.ReasonCode != "import" || !strings.Contains(p.Reason, "API set") {
		t.Errorf("sets.dll from outside: %+v", p)
	}

	d.policy("")
	var states []string
	for _, a := range outside[:4] {
		var im *control.Image
		d.until("the image is settled", func() bool { im = d.image(a.pid); return im != nil && settled(im.State) })
		states = append(states, fmt.Sprintf("%s %s %s", im.State, im.ReasonCode, im.Remedy))
	}
	for _, a := range inside[:3] {
		d.becomes(a.pid, control.Patched)
	}
	if _, err := d.client.Rollback(context.Background(), control.RollbackRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	for _, a := range inside[:3] {
		d.becomes(a.pid, control.Unpatched)
	}
	d.stop()
	w.fleet.policy(owner)
	defer w.foreground()()
	for i, a := range inside[:4] {
		var im *control.Image
		w.until("the image is settled", func() bool { im = imageOf(w.processes(), a); return im != nil && settled(im.State) })
		if s := fmt.Sprintf("%s %s %s", im.State, im.ReasonCode, im.Remedy); s != states[i] {
			t.Errorf("%s: from inside %q, from outside %q", images[i], s, states[i])
		}
	}
	t.Logf("states, both ways: %q", states)
	w.becomes(control.Patched, inside[4])
	for i, a := range inside {
		want := int64(43)
		if images[i] == "other/app.dll" {
			want = 42
		}
		if s := a.state(); s.value != want || s.faults != 0 {
			t.Errorf("%s: %+v, want %d", images[i], s, want)
		}
	}
}

func settled(s control.ImageState) bool {
	return s == control.Patched || s == control.OtherBuild || s == control.Blocked || s == control.Drifted
}

func indented(v any) string {
	b, _ := json.MarshalIndent(v, "", " ")
	return string(b)
}
