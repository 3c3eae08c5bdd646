package e2e

import (
	"archive/zip"
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// From a device that is not enrolled to one that is hotpatched, by what status,
// eligibility, list, processes and wait say and end with.
func TestCommandsOnTheWay(t *testing.T) {
	d := newDevice(t, appFix)
	d.write("policy.toml", "format = \"hotpatchd-policy/1\"\nallow_hotpatch = true\n")
	h := app(t, hosttest.Options{Spin: 1})
	d.launch()
	d.hotpatch(0, "wait", "--for", "settled", "--timeout", "30s") // also for the daemon itself
	d.hotpatch(0, "check")

	says(t, "status", d.hotpatch(3, "status", "--check").out, "INELIGIBLE", "managed", "hotpatch eligibility")
	d.hotpatch(0, "status")
	var e control.Eligibility
	d.document(&e, 3, "eligibility")
	if i := slices.IndexFunc(e.Checks, func(c control.Check) bool { return c.ID == "managed" }); i < 0 ||
		e.Eligible || e.Checks[i].Result != control.Fail || e.Checks[i].Remedy == "" || e.Checks[i].Source != d.set.policy {
		t.Errorf("eligibility: %+v", e)
	}
	d.hotpatch(3, "install", "ACME-1")
	d.hotpatch(4, "processes", "--vulnerable")
	d.hotpatch(4, "wait", "--for", "hotpatched", "--timeout", "100ms")

	d.policy("mode = \"manual\"\n")
	d.hotpatch(0, "wait", "--for", "settled", "--timeout", "60s")
	d.until("the device is eligible", func() bool { return d.status().Eligible })
	d.hotpatch(0, "eligibility")
	says(t, "status", d.hotpatch(4, "status", "--check").out, "hotpatch install ACME-1")
	var offers control.Offers
	d.document(&offers, 0, "list")
	if len(offers.Releases) != 1 || offers.Releases[0].Fits || offers.Releases[0].InForce || offers.Releases[0].ReasonCode != "manual" {
		t.Errorf("list: %+v", offers.Releases)
	}
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d before the word is given", v)
	}

	says(t, "install", d.hotpatch(0, "install").out, "INSTALLED", "ACME-1, sequence 1", "No restart needed")
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	d.hotpatch(0, "wait", "--for", "hotpatched", "--timeout", "60s")
	d.hotpatch(0, "wait", "--pid", strconv.Itoa(h.PID), "--timeout", "60s")
	says(t, "status", d.hotpatch(0, "status", "--check").out, "HOTPATCHED", "1 of 1 image", "CVE-2026-0001")
	d.hotpatch(0, "processes", "--vulnerable")
	says(t, "processes", d.hotpatch(0, "processes").out, strconv.Itoa(h.PID), "app.dll", "patched")
	says(t, "list", d.hotpatch(0, "list").out, "ACME-1", "in force")
	h.Healthy()
}

// Everything that changes something says whether it did, and may be said twice.
func TestCommandsTwice(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Patched)
	for _, c := range []struct {
		args    string
		changed bool
		value   int
		state   control.State
	}{
		{"install ACME-1", false, 43, control.Hotpatched}, // in force by itself
		{"apply", false, 43, control.Hotpatched},
		{"rollback ACME-1", true, 42, control.Held},
		{"hold ACME-1", false, 42, control.Held},
		{"install ACME-1", true, 43, control.Hotpatched},
		{"hold ACME-1 --reason slow", true, 42, control.Held},
		{"hold ACME-1", false, 42, control.Held},
		{"pause", true, 42, control.Held},
		{"pause", false, 42, control.Held},
		{"release-hold ACME-1", true, 42, ""},
		{"release-hold ACME-1", false, 42, ""},
		{"resume", true, 43, control.Hotpatched},
		{"resume", false, 43, control.Hotpatched},
		{"install ACME-1", false, 43, control.Hotpatched},
	} {
		var ch control.Change
		d.document(&ch, 0, strings.Fields(c.args)...)
		if ch.Changed != c.changed || c.state != "" && ch.State != c.state {
			t.Errorf("%s: changed %v, state %s, %q", c.args, ch.Changed, ch.State, ch.Text)
		}
		if c.args == "resume" || c.args == "pause" || strings.HasPrefix(c.args, "release") {
			d.hotpatch(0, "wait", "--for", "settled", "--timeout", "60s")
		}
		if v := h.Value(); v != c.value {
			t.Errorf("after %s it answers %d, want %d", c.args, v, c.value)
		}
	}
	h.Healthy()
}

// A plan names every byte, is carried out byte for byte, and changes nothing by itself.
func TestCommandPlan(t *testing.T) {
	d := newDevice(t, appFix)
	d.policy("mode = \"manual\"\n")
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Unpatched)
	before := memory(t, h.PID, h.Entry(), 16)
	var p control.Plan
	d.document(&p, 0, "plan", "--pid", strconv.Itoa(h.PID))
	if len(p.Processes) != 1 || len(p.Processes[0].Images) != 1 || p.Release != "ACME-1" {
		t.Fatalf("%+v", p)
	}
	im := p.Processes[0].Images[0]
	i := slices.IndexFunc(im.Functions, func(f control.PlannedFunc) bool { return f.Name == "vuln" })
	if uint64(im.Base) != h.Base || i < 0 {
		t.Fatalf("%+v", im)
	}
	says(t, "plan --pid", d.hotpatch(0, "plan", "--pid", strconv.Itoa(h.PID)).out, "vuln", "jmp", im.Base.String())
	says(t, "plan", d.hotpatch(0, "plan").out, "ACME-1", "app.dll")
	if now := memory(t, h.PID, h.Entry(), 16); !bytes.Equal(now, before) {
		t.Error("looking at the plan has changed the process")
	}
	d.hotpatch(0, "install")
	now := memory(t, h.PID, h.Entry(), 16)
	if bytes.Equal(now, before) {
		t.Error("nothing was written at the entry")
	}
	d.document(&p, 0, "plan", "--pid", strconv.Itoa(h.PID))
	if s := p.Processes[0].Images[0]; s.ReasonCode != "in-force" {
		t.Errorf("the plan of what is done: %+v", s)
	}
	d.hotpatch(1, "plan", "--pid", "999999")
	d.hotpatch(1, "plan", "NOTHING-1")
	h.Healthy()
}

// memory reads a process's memory.
func memory(t testing.TB, pid int, at uint64, n int) []byte {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, int64(at)); err != nil {
		t.Fatal(err)
	}
	return b
}

// poke writes to a process's memory behind the daemon's back.
func poke(t testing.TB, pid int, at uint64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, int64(at)); err != nil {
		t.Fatal(err)
	}
}

// One byte of an entry changes behind the daemon's back.
func TestCommandVerify(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{}) // nobody calls the function meanwhile
	d.start()
	o := d.others()
	d.becomes(h.PID, control.Patched)
	d.hotpatch(0, "verify")
	was := memory(t, h.PID, h.Entry()+4, 1)
	poke(t, h.PID, h.Entry()+4, []byte{was[0] ^ 1})
	var v control.Verify
	d.document(&v, 4, "verify")
	if v.OK || v.Images != 3 || len(v.Mismatches) != 1 || v.Mismatches[0].PID != h.PID || v.Mismatches[0].Function != "vuln" ||
		uint64(v.Mismatches[0].Address) != h.Entry() || v.Mismatches[0].Expected == v.Mismatches[0].Found {
		t.Errorf("verify: %+v", v)
	}
	says(t, "verify", d.hotpatch(4, "verify").out, strconv.Itoa(h.PID), "vuln")
	poke(t, h.PID, h.Entry()+4, was)
	d.hotpatch(0, "verify")
	o.well(d)
	if got := h.Value(); got != 43 {
		t.Errorf("it answers %d", got)
	}
}

// explain tells every place of a patched process from every other.
func TestCommandExplain(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	seen := map[string]bool{}
	ask := func(pid int, at uint64) *control.Explain {
		t.Helper()
		var x control.Explain
		d.document(&x, 0, "explain", strconv.Itoa(pid), fmt.Sprintf("0x%x", at))
		if x.PID != pid || uint64(x.Address) != at || x.Text == "" {
			t.Errorf("%+v", x)
		}
		seen[x.Kind] = true
		return &x
	}
	for _, r := range d.records() {
		for _, s := range r.Sites {
			entry := uint64(r.Base) + uint64(s.RVA)
			for _, c := range []struct {
				at       uint64
				there    bool
				kind     string
				function string
			}{
				{uint64(s.At), true, "site", s.Function},
				{uint64(s.At) + uint64(len(s.New)) - 1, true, "site", s.Function},
				{entry + uint64(s.Length) - 1, s.Length > uint32(len(s.New)), "old-function", s.Function},
				{uint64(s.Slot), s.Slot != 0, "slot", s.Function},
				{uint64(s.Target), s.Target != 0, "new-function", s.Function},
				{uint64(s.Target) + 1, s.Target != 0, "new-function", s.Function},
			} {
				if !c.there {
					continue
				}
				if x := ask(r.ID.PID, c.at); x.Kind != c.kind || x.Function != c.function || x.Release != "ACME-1" || x.Image != "app.dll" {
					t.Errorf("at %x: %+v, want %s of %s", c.at, x, c.kind, c.function)
				}
			}
			if s.Pad != nil {
				if x := ask(r.ID.PID, uint64(s.Pad.At)); x.Kind != "pad" || x.Function != s.Function {
					t.Errorf("pad: %+v", x)
				}
			}
		}
		if x := ask(r.ID.PID, uint64(r.Annex)); x.Kind != "annex" {
			t.Errorf("annex: %+v", x)
		}
		if x := ask(r.ID.PID, uint64(r.Base)); x.Kind != "image" || x.Offset != 0 {
			t.Errorf("image: %+v", x)
		}
		if x := ask(r.ID.PID, 0x1000); x.Kind != "elsewhere" {
			t.Errorf("elsewhere: %+v", x)
		}
	}
	for _, kind := range []string{"site", "pad", "slot", "new-function", "old-function", "annex", "image", "elsewhere"} {
		if !seen[kind] {
			t.Errorf("no place is a %s", kind)
		}
	}
	says(t, "explain", d.hotpatch(0, "explain", strconv.Itoa(o[0].PID), fmt.Sprintf("%x", o[0].Entry())).out, "vuln", "ACME-1")
	d.hotpatch(1, "explain", "999999", "1000")
	d.hotpatch(2, "explain", "self", "1000")
	d.hotpatch(2, "explain", "1", "here")
	d.hotpatch(2, "explain", "1")
}

// records are those of a support file.
func (d *device) records() []patcher.Record {
	d.t.Helper()
	file := d.path("diagnose-" + strconv.FormatInt(time.Now().UnixNano(), 10) + ".zip")
	d.hotpatch(0, "diagnose", file)
	z, err := zip.OpenReader(file)
	if err != nil {
		d.t.Fatal(err)
	}
	defer z.Close()
	f, err := z.Open("records.json")
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	var list []patcher.Record
	if err := json.NewDecoder(f).Decode(&list); err != nil || len(list) == 0 {
		d.t.Fatalf("records.json: %d, %v", len(list), err)
	}
	return list
}

// A support file is for the caller's eyes only and never written over another.
func TestCommandDiagnose(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	d.others()
	file := d.path("support.zip")
	d.hotpatch(0, "diagnose", file)
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	z, err := zip.OpenReader(file)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	for _, name := range []string{"status.json", "eligibility.json", "list.json", "processes.json", "records.json", "history.json"} {
		f, err := z.Open(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var any any
		if err := json.NewDecoder(f).Decode(&any); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		f.Close()
	}
	says(t, "diagnose", d.hotpatch(1, "diagnose", file).err, file, "exists", "hint:")
	if after, err := os.Stat(file); err != nil || after.Size() != info.Size() || !after.ModTime().Equal(info.ModTime()) {
		t.Error("it was written over")
	}
	d.hotpatch(1, "diagnose", d.path("no/such/folder.zip"))
}

// Every entry of the history follows from the one before, and names who asked.
func TestCommandHistory(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Patched)
	d.hotpatch(0, "rollback")
	d.hotpatch(0, "install", "ACME-1")
	d.kill()
	d.start()
	var hist control.History
	d.document(&hist, 0, "history", "--limit", "1000")
	if hist.Broken != "" || len(hist.Entries) < 6 {
		t.Fatalf("%+v", hist)
	}
	for i, e := range hist.Entries[:len(hist.Entries)-1] { // newest first
		if before := hist.Entries[i+1]; e.Prev != before.Hash || e.Seq != before.Seq+1 || e.Hash == "" {
			t.Errorf("entry %d does not follow from %d: %+v, %+v", e.Seq, before.Seq, e, before)
		}
	}
	who := map[string]string{}
	for _, e := range hist.Entries {
		who[e.Action] = e.Caller.User
	}
	if who["rollback"] != "root" || who["install"] != "root" || who["start"] != "hotpatchd" {
		t.Errorf("who asked: %v", who)
	}
	says(t, "history", d.hotpatch(0, "history").out, "rollback", "install", "root", "ACME-1")
	d.document(&hist, 0, "history", "--limit", "2")
	if len(hist.Entries) != 2 {
		t.Errorf("%d entries, want 2", len(hist.Entries))
	}
}

// watch prints one document a line, as things happen.
func TestCommandWatch(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Patched)
	cmd := exec.Command(program(t, "hotpatch"), "--socket", d.set.socket, "--json", "watch")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	seen := map[string]bool{}
	d.until("everything that happens was told", func() bool {
		// Until the command listens, what happens is not for it.
		d.hotpatch(0, "hold", "ACME-1")
		d.hotpatch(0, "install", "ACME-1")
		for {
			select {
			case l, ok := <-lines:
				if !ok {
					t.Fatal("watch has ended")
				}
				var e control.Event
				document(t, "watch", []byte(l), &e)
				if e.Type == "" || e.Text == "" {
					t.Errorf("%s", l)
				}
				seen[e.Type] = true
				continue
			case <-time.After(100 * time.Millisecond):
			}
			return seen[control.EventImage] && seen[control.EventState] && seen[control.EventRelease]
		}
	})
	cmd.Process.Signal(syscall.SIGTERM)
	for range lines {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("watch ends with %v", err)
	}
	h.Healthy()
}

// What every command prints with --json is one document that says what it is.
func TestCommandsJSON(t *testing.T) {
	d := newDevice(t, appFix)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Patched)
	pid := strconv.Itoa(h.PID)
	for _, args := range []string{
		"status", "status --check", "eligibility", "eligibility --all", "check", "list", "plan", "plan ACME-1", "plan --pid " + pid, "install",
		"install ACME-1", "apply", "rollback ACME-1", "release-hold ACME-1", "hold ACME-1", "release-hold ACME-1", "pause", "resume",
		"install ACME-1", "processes", "processes --vulnerable", "processes --each", "processes --pid " + pid, "verify", "history",
		"wait --for settled --timeout 30s", "wait --timeout 30s", "wait --timeout 30s --pid " + pid, fmt.Sprintf("explain %d %x", h.PID, h.Entry()),
	} {
		d.document(nil, 0, strings.Fields(args)...)
	}
	for _, c := range []struct {
		code int
		args string
		word string
	}{
		{1, "install NOTHING-1", "NOTHING-1"}, {1, "rollback NOTHING-1", "NOTHING-1"}, {2, "hold ../../etc", "release"}, {2, "hold", "needs ID"}, {2, "explain 1 x", "address"},
		{2, "status now", "takes no"}, {2, "wait --for ever", "settled"}, {2, "wait --timeout 0s", "positive"}, {2, "no-such-command", "no command"}, {2, "status --no-such-flag", "unknown flag"}, {1, "install /no/such/file.hotpatch", "/no/such/file.hotpatch"},
	} {
		a := d.hotpatch(c.code, append([]string{"--json"}, strings.Fields(c.args)...)...)
		var e struct {
			Format string
			Error  control.Error
		}
		if err := json.Unmarshal([]byte(a.err), &e); err != nil || e.Format != control.FormatError || e.Error.Code == "" || a.out != "" {
			t.Errorf("%s: %v\n%s%s", c.args, err, a.out, a.err)
		}
		says(t, c.args, e.Error.Text, c.word)
		says(t, c.args, d.hotpatch(c.code, strings.Fields(c.args)...).err, "hotpatch: ", c.word)
	}
	d.stop()
	d.hotpatch(5, "status")
	d.hotpatch(5, "--json", "status")
	h.Runs()
	h.Healthy()
}
