package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// After a baseline: its builds are fixed, older files of running processes are
// told, and keep the fix that they have.
func TestDecideOnFiles(t *testing.T) {
	id := func(n uint32) pe.Identity {
		return pe.Identity{Machine: 0x8664, SizeOfImage: 4096 * n, TimeDateStamp: n, RSDS: "x"}
	}
	want := &repository.Offer{ID: "H1", Product: "p", Kind: release.KindHotpatch, Baseline: "B1", Sequence: 1,
		Bases: []repository.Base{{Name: "app.dll", Identity: id(9)}}}
	for name, c := range map[string]struct {
		im     ImageView
		state  control.ImageState
		code   string
		remedy control.Remedy
	}{
		"the build of the baseline": {ImageView{Name: "app.dll", Path: "/opt/app.dll", Identity: id(1)}, control.Fixed, "fixed", ""},
		"the file before it":        {ImageView{Name: "app.dll", Path: "/opt/app.dll (deleted)", Identity: id(2)}, control.Blocked, "older-file", control.RemedyRestartProcess},
		"another file":              {ImageView{Name: "app.dll", Path: "/srv/app.dll", Identity: id(2)}, control.OtherBuild, "identity", control.RemedyAuthor},
		"the file before it, fixed in memory": {ImageView{Name: "app.dll", Path: "/opt/app.dll (deleted)", Identity: id(2),
			Records: map[string]patcher.Record{"p": {Product: "p", Release: "R1", Sequence: 7, State: patcher.Applied}}}, control.Patched, "", ""},
	} {
		v := View{Eligible: true, Choices: map[string]choice{"p": {Product: "p", Want: want, Latest: want}},
			Standing: map[string]standing{"p": {ID: "B1", Places: []string{"/opt/app.dll"}}},
			Builds:   map[string][]fixedBuild{"p": {{"B1", repository.Base{Name: "app.dll", Identity: id(1)}}}},
			Word:     func(string) (reason, bool) { return reason{}, false }, Ready: func(string) bool { return true },
			InScope: func(string) bool { return true }, Deny: func(target.Info, string, string) (reason, bool) { return reason{}, false },
			Procs: []Proc{{Info: target.Info{ID: target.ID{PID: 1}}, Images: []ImageView{c.im}}}}
		got := decide(v)
		if len(got) != 1 || got[0].Kind != DoNothing || got[0].State != c.state || got[0].Reason.Code != c.code || got[0].Remedy != c.remedy {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// No name of the daemon's own files is a destination, also one that is spelled
// otherwise; a hard link stands for the short names of Windows.
func TestOwnFiles(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	c := &Config{File: at("config.toml"), StateDir: at("state")}
	c.Policy.File, c.Repository.Root = at("policy.toml"), at("root.json")
	c.Repository.CAFile, c.Repository.ClientCert, c.Report.CAFile, c.Report.ClientCert = at("ca.pem"), at("client.pem"), at("ca2.pem"), at("client2.pem")
	if err := os.Mkdir(c.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"config.toml", "policy.toml", "root.json", "ca.pem", "ca2.pem", "client2.pem", "app.dll", "state/state.db"} {
		if err := os.WriteFile(at(name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(c.Policy.File, at("POLICY~1.TOM")); err != nil {
		t.Skip("needs hard links:", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{o: Options{Config: c}}
	for path, want := range map[string]string{
		c.File: "configuration", c.Policy.File: "policy", at("POLICY~1.TOM"): "policy", at("Policy.TOML"): "policy", c.Repository.Root: "root of trust",
		at("ca.pem"): "ca_file", at("ca2.pem"): "ca_file", at("client.pem"): "client_cert", at("client2.pem"): "client_cert",
		at("hotpatchd.log"): "log", exe: "program", at("state/state.db"): "state", at("state/new/x"): "state", at("app.dll"): "", at("statement/x"): "",
	} {
		if got, is := a.ownFile(path); got != want || is != (want != "") {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// A release that is made for the baseline in force comes before one for any, and
// a baseline never goes back by itself.
func TestChooseOnBaselines(t *testing.T) {
	any := repository.Offer{ID: "A", Product: "p", Kind: release.KindHotpatch, Sequence: 9, Rollout: repository.Rollout{Percent: 100}}
	own := repository.Offer{ID: "Z", Product: "p", Kind: release.KindHotpatch, Baseline: "B1", Sequence: 1, Rollout: repository.Rollout{Percent: 100}}
	w := wishes{Hold: func(string) (reason, bool) { return reason{}, false }, Mode: Automatic}
	for standing, want := range map[string]string{"": "A", "B1": "Z", "B2": "A"} {
		d := device{OS: "linux", Arch: "amd64", Baselines: map[string]string{"p": standing, "other": "B1"}}
		if c := choose([]repository.Offer{any, own}, d, w, noon, true)["p"]; c.Want == nil || c.Want.ID != want {
			t.Errorf("on the baseline %q: %+v, want %s", standing, c.Want, want)
		}
	}
	in := standing{ID: "B1", Month: "2026-10", Sequence: 1}
	for month, fits := range map[string]bool{"2026-07": false, "2026-10": false, "2027-01": true, "": false} {
		o := repository.Offer{ID: "X", Product: "p", Kind: release.KindBaseline, Month: month, Sequence: 1}
		if _, ok := fitsFiles(o, device{}, in); ok != fits {
			t.Errorf("a baseline of %q over one of 2026-10: %t", month, ok)
		}
	}
}

// What is wrong with files stands since it was first said, not since the last look.
func TestFilesStandSince(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1})
	r.tune = func(a *Agent) { a.bases.area, a.bases.areaErr = nil, errors.New("cannot be read") }
	must(t, r.start())
	t.Cleanup(func() { must(t, errors.Join(r.judge(), r.stop())) })
	since := func() (at control.Time) {
		must(t, r.pass())
		r.inLoop(func(a *Agent) {
			for _, x := range a.shown.Load().status.Attention {
				if x.Code == "baseline" {
					at = x.Since
				}
			}
		})
		return at
	}
	first := since()
	if at := since(); first.IsZero() || !at.Equal(first.Time) {
		t.Errorf("since %v, and then since %v", first, at)
	}
}
