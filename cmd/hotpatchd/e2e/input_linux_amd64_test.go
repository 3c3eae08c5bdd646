package e2e

import (
	"context"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// A policy that cannot be used is refused loudly; the last good one stays in
// force, and so does what is applied.
func TestPolicyRefused(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	replace := func(text string) {
		t.Helper()
		d.write("policy.new", text)
		if err := os.Rename(d.path("policy.new"), d.path("policy.toml")); err != nil {
			t.Fatal(err)
		}
	}
	newcomer := func() {
		t.Helper()
		h := app(t, hosttest.Options{Spin: 1})
		d.becomes(h.PID, control.Patched) // the last good policy allows it
		if v := h.Value(); v != 43 {
			t.Errorf("a new process answers %d", v)
		}
	}
	for _, c := range []struct{ name, text, where string }{
		{"no TOML", "format = \"hotpatchd-policy/1\"\nenrolled = maybe\n", "policy.toml:2"},
		{"unknown key", "format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpach = true\n", "policy.toml:3"},
		{"unknown format", "format = \"hotpatchd-policy/2\"\n", "policy.toml:1"},
		{"cut off", "format = \"hotpatchd-pol", "policy.toml:1"},
		{"empty", "", "policy.toml"},
		{"not text", "\x00\xff\xfe", "policy.toml"},
		{"wrong value", "format = \"hotpatchd-policy/1\"\nmode = \"sometimes\"\n", "policy.toml:2"},
	} {
		replace(c.text)
		a := d.attention("policy")
		if a.Severity != control.SeverityError {
			t.Errorf("%s: %+v", c.name, a)
		}
		says(t, c.name+": status", d.hotpatch(0, "status").out, "policy", "last good one, in force since", "stays", "check-config")
		says(t, c.name+": check-config", d.run(nil, "hotpatchd", "check-config", "--config", d.config).out, "WRONG", c.where)
		d.until(c.name+" is in the history", func() bool {
			h, err := d.client.History(context.Background(), 5)
			return err == nil && slices.ContainsFunc(h.Entries, func(e control.HistoryEntry) bool {
				return e.Action == "policy-refused" && strings.Contains(e.Text, c.where)
			})
		})
		o.well(d)
	}
	newcomer()

	// Not readable at all: a folder in its place.
	if err := os.Remove(d.path("policy.toml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.path("policy.toml"), 0o700); err != nil {
		t.Fatal(err)
	}
	d.attention("policy")
	newcomer()
	if err := os.Remove(d.path("policy.toml")); err != nil {
		t.Fatal(err)
	}

	// No policy at all is another matter: the device is not enrolled.
	d.until("the device is not eligible any more", func() bool { return d.status().State == control.Ineligible })
	d.hotpatch(3, "status", "--check")
	says(t, "eligibility", d.hotpatch(3, "eligibility").out, "no policy file", "enrolled = true")
	h := app(t, hosttest.Options{Spin: 1})
	if im := d.becomes(h.PID, control.Unpatched); im.ReasonCode != "not-eligible" || im.Remedy == "" {
		t.Errorf("%+v", im)
	}
	d.hotpatch(3, "install", "ACME-1")
	o.well(d) // what is applied stays
	d.policy("")
	d.becomes(h.PID, control.Patched)
	d.until("all is well again", func() bool { st := d.status(); return st.State == control.Hotpatched && len(st.Attention) == 0 })
	o.well(d)
}

// A daemon that starts with a policy it cannot use applies nothing and says so.
func TestPolicyWrongAtStart(t *testing.T) {
	d := newDevice(t, appFix)
	d.write("policy.toml", "format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = \"yes\"\n")
	h := app(t, hosttest.Options{Spin: 1})
	d.launch()
	if im := d.becomes(h.PID, control.Unpatched); im.ReasonCode != "not-eligible" {
		t.Errorf("%+v", im)
	}
	d.attention("policy")
	says(t, "eligibility", d.hotpatch(3, "eligibility").out, "could not be read", "policy.toml:3")
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}
	d.policy("")
	d.becomes(h.PID, control.Patched)
}

// A wrong configuration is refused by check-config and run alike, with the place.
func TestConfigRefused(t *testing.T) {
	d := newDevice(t, appFix)
	good := string(read(t, d.config))
	h := app(t, hosttest.Options{Spin: 1})
	for _, c := range []struct {
		name, old, new string
		words          []string
	}{
		{"no TOML", "[control]", "[control", []string{"config.toml:3"}},
		{"unknown key", "[control]", "[control]\ncolour = \"red\"", []string{"config.toml:4", "colour"}},
		{"unknown format", "hotpatchd-config/1", "hotpatchd-config/7", []string{"config.toml:1", "hotpatchd-config/7"}},
		{"path of a socket", `socket = "/`, `socket = "/` + strings.Repeat("x", 200), []string{"config.toml:4", "socket", "longer than"}},
		{"http to others", `url = "file://`, `url = "http://192.0.2.1`, []string{"config.toml:7", "https"}},
		{"backend of another system", "[backend]", "[backend]\nname = \"win32\"", []string{"config.toml:11", "Windows"}},
		{"time span", `check_every = "1s"`, `check_every = "soon"`, []string{"config.toml:9", "check_every"}},
		{"no root of trust", `root = "`, `root = "" # `, []string{"config.toml:8", "root"}},
	} {
		if !strings.Contains(good, c.old) {
			t.Fatalf("%s: the configuration has no %q:\n%s", c.name, c.old, good)
		}
		d.write("config.toml", strings.Replace(good, c.old, c.new, 1))
		a := d.run(nil, "hotpatchd", "check-config", "--config", d.config)
		if a.code == 0 {
			t.Errorf("%s: check-config says\n%s", c.name, a.out)
		}
		says(t, c.name+": check-config", a.out+a.err, c.words...)
		a = d.run(nil, "hotpatchd", "run", "--config", d.config)
		if a.code == 0 {
			t.Errorf("%s: run ends well", c.name)
		}
		says(t, c.name+": run", a.err, append(c.words, "check-config")...)
	}
	// Things that the file alone does not tell.
	for _, c := range []struct {
		name, old, new string
		words          []string
	}{
		{"root that is none", "repo/root.json", "policy.toml", []string{"root"}},
		{"state in a file", d.path("state"), d.config, []string{"not a folder"}},
	} {
		d.write("config.toml", strings.Replace(good, c.old, c.new, 1))
		a := d.run(nil, "hotpatchd", "check-config", "--config", d.config)
		if a.code != 1 {
			t.Errorf("%s: check-config ends with %d", c.name, a.code)
		}
		says(t, c.name, a.out, append(c.words, "WRONG", "wrong")...)
	}
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}
	if _, err := os.Stat(d.path("state")); err == nil {
		t.Error("a refused configuration made a state folder")
	}
	d.write("config.toml", good)
	if a := d.run(nil, "hotpatchd", "check-config", "--config", d.config); a.code != 0 || !strings.Contains(a.out, "WELL") {
		t.Errorf("the good one: %+v", a)
	}
}

// A second daemon on the same socket or the same state goes at once, and harms nothing.
func TestSecondDaemon(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	good := string(read(t, d.config))
	for _, c := range []struct{ name, old, new, word string }{
		{"the same", "", "", "in use"},
		{"another socket", d.path("s") + `"`, d.path("s2") + `"`, "state is in use by another hotpatchd"},
		{"another state", d.path("state") + `"`, d.path("state2") + `"`, d.path("s")},
	} {
		if err := os.WriteFile(d.path("second.toml"), []byte(strings.Replace(good, c.old, c.new, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		a := d.run(nil, "hotpatchd", "run", "--config", d.path("second.toml"))
		if a.code == 0 {
			t.Errorf("%s: it ends well", c.name)
		}
		says(t, c.name, a.err, c.word)
		d.hotpatch(0, "status", "--check")
		o.well(d)
	}
	d.hotpatch(0, "verify")
}

// A reload and a lost socket change nothing in any process.
func TestHangUpAndLostSocket(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	for range 50 {
		d.proc.Process.Signal(syscall.SIGHUP)
	}
	d.write("policy.toml", "format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true\npause = true\n")
	d.proc.Process.Signal(syscall.SIGHUP)
	d.until("the policy's pause is in force", func() bool { return d.status().Paused })
	o.well(d)
	d.policy("")
	d.until("it is over", func() bool { return !d.status().Paused })

	if err := os.Remove(d.set.socket); err != nil {
		t.Fatal(err)
	}
	a := d.hotpatch(5, "status")
	says(t, "status", a.err, "nothing listens there", "hint:")
	for _, h := range o {
		h.Runs()
	}
	late := app(t, hosttest.Options{Spin: 1}) // the daemon works on
	d.until("a new process is patched", func() bool { return late.Value() == 43 })
	d.stop()
	d.start()
	d.becomes(late.PID, control.Patched)
	o.well(d)
}
