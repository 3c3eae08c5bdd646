package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// otherUsers skips the test where no process of another user can be started.
func otherUsers(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		need(t, "root, to start processes of other users")
	}
}

// theirs starts a process of another user, with an image he can read.
func (d *device) theirs(who *syscall.Credential) *hosttest.Host {
	d.t.Helper()
	b, err := os.ReadFile(hosttest.Fixture(d.t, "mingw/app.dll"))
	if err == nil {
		err = os.WriteFile(d.path("theirs.dll"), b, 0o644)
	}
	if err != nil {
		d.t.Fatal(err)
	}
	return hosttest.Start(d.t, hosttest.Options{DLL: d.path("theirs.dll"), Call: "vuln", Spin: 1, Allow: []int{42, 43}, Credential: who})
}

// A daemon without rights over others does its work on its own user's
// processes, and says that there are some it cannot look into.
func TestDaemonOfOrdinaryUser(t *testing.T) {
	otherUsers(t)
	d := newDevice(t, appFix)
	roots := app(t, hosttest.Options{Spin: 1})
	own := d.theirs(nobody)
	err := filepath.WalkDir(d.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(nobody.Uid), int(nobody.Gid))
	})
	if err != nil {
		t.Fatal(err)
	}
	d.as = nobody
	d.start()
	d.becomes(own.PID, control.Patched)
	if v := own.Value(); v != 43 {
		t.Errorf("its own process answers %d", v)
	}
	a := d.attention("not-looked-into")
	says(t, "the attention", a.Text+"; "+a.Remedy, "could not be looked into", "CAP_SYS_PTRACE")
	if private() && !strings.HasSuffix(a.Text, ": 1") { // init is nobody's trouble
		t.Errorf("%q does not say that it is one process", a.Text)
	}
	says(t, "status", d.hotpatchAs(nobody, 0, "status").out, "could not be looked into")
	if im := d.image(roots.PID); im != nil && im.State != control.Blocked {
		t.Errorf("root's process: %+v", im)
	}
	if v := roots.Value(); v != 42 {
		t.Errorf("root's process answers %d", v)
	}
	d.hotpatchAs(nobody, 0, "rollback") // his daemon is his to command
	d.becomes(own.PID, control.Unpatched)
	if v := own.Value(); v != 42 {
		t.Errorf("its own process answers %d after rollback", v)
	}
	own.Healthy()
	roots.Healthy()
}

// What an ordinary user may read of a daemon of root's, and that he can change nothing.
func TestOrdinaryUser(t *testing.T) {
	otherUsers(t)
	d := newDevice(t, appFix)
	roots := app(t, hosttest.Options{Spin: 1})
	own := d.theirs(nobody)
	d.start()
	d.becomes(roots.PID, control.Patched)
	d.becomes(own.PID, control.Patched)
	before, err := d.client.History(context.Background(), 100)
	if err != nil {
		t.Fatal(err)
	}
	state := fmt.Sprint(d.status().State, d.status().Coverage, d.status().Holds, d.status().Paused)

	for _, c := range []struct {
		code int
		args string
	}{
		{0, "status"}, {0, "status --check"}, {0, "eligibility"}, {0, "list"}, {0, "processes"}, {0, "processes --vulnerable"},
		{0, "processes --each"}, {0, "wait --for settled --timeout 30s"}, {0, "wait --for hotpatched --timeout 30s"},
		{6, "check"}, {6, "plan"}, {6, "plan ACME-1"}, {6, "plan --pid " + strconv.Itoa(own.PID)}, {6, "install"}, {6, "apply ACME-1"},
		{6, "rollback"}, {6, "rollback ACME-1"}, {6, "hold ACME-1"}, {6, "release-hold ACME-1"}, {6, "pause"}, {6, "resume"},
		{6, "verify"}, {6, "history"}, {6, "explain " + strconv.Itoa(own.PID) + " 1000"}, {6, "diagnose /tmp/never-written.zip"},
	} {
		a := d.hotpatchAs(nobody, c.code, strings.Fields(c.args)...)
		if c.code == 6 {
			says(t, c.args, a.err, "needs root")
		}
		if strings.Contains(a.out, strconv.FormatUint(own.Base, 16)) || strings.Contains(a.out, strconv.FormatUint(roots.Base, 16)) {
			t.Errorf("%s tells addresses:\n%s", c.args, a.out)
		}
	}
	if _, err := os.Stat("/tmp/never-written.zip"); err == nil {
		t.Error("diagnose wrote a file")
	}
	a := d.hotpatchAs(nobody, 6, "install", d.release("ACME-1"))
	says(t, "install FILE", a.err, "needs root")

	var list control.Processes
	document(t, "processes", []byte(d.hotpatchAs(nobody, 0, "--json", "processes").out), &list)
	if len(list.Processes) != 1 || list.Processes[0].PID != own.PID || list.Coverage.Images != 2 || list.Coverage.Patched != 2 {
		t.Errorf("an ordinary user sees %+v", list)
	}
	for _, im := range list.Processes[0].Images {
		if im.Base != 0 || im.Annex != nil || im.Detail != "" || im.Path != "" {
			t.Errorf("with addresses or paths: %+v", im)
		}
	}
	document(t, "processes --pid", []byte(d.hotpatchAs(nobody, 0, "--json", "processes", "--pid", strconv.Itoa(roots.PID)).out), &list)
	if len(list.Processes) != 0 {
		t.Errorf("an ordinary user sees root's process: %+v", list)
	}

	after, err := d.client.History(context.Background(), 100)
	if err != nil || len(after.Entries) != len(before.Entries) {
		t.Errorf("the history has %d entries, had %d (%v)", len(after.Entries), len(before.Entries), err)
	}
	if now := fmt.Sprint(d.status().State, d.status().Coverage, d.status().Holds, d.status().Paused); now != state {
		t.Errorf("now %s, was %s", now, state)
	}
	for _, h := range []*hosttest.Host{roots, own} {
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
		h.Healthy()
	}
}

// Every route, with a bare HTTP request as a curious user would send it.
func TestOrdinaryUserOnTheWire(t *testing.T) {
	otherUsers(t)
	d := newDevice(t, appFix)
	own := d.theirs(nobody)
	d.start()
	d.becomes(own.PID, control.Patched)
	pid := strconv.Itoa(own.PID)
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/status", "", 200}, {"GET", "/v1/eligibility", "", 200}, {"GET", "/v1/releases", "", 200},
		{"GET", "/v1/processes", "", 200}, {"GET", "/v1/processes?pid=" + pid, "", 200}, {"GET", "/metrics", "", 200},
		{"POST", "/v1/check", "{}", 403}, {"GET", "/v1/plan", "", 403}, {"GET", "/v1/plan?pid=" + pid, "", 403},
		{"POST", "/v1/install", `{"id":"ACME-1"}`, 403}, {"POST", "/v1/rollback", `{"id":"ACME-1"}`, 403},
		{"POST", "/v1/hold", `{"id":"ACME-1"}`, 403}, {"POST", "/v1/release-hold", `{"id":"ACME-1"}`, 403},
		{"POST", "/v1/pause", "{}", 403}, {"POST", "/v1/resume", "{}", 403}, {"GET", "/v1/verify", "", 403},
		{"GET", "/v1/history", "", 403}, {"GET", "/v1/explain?pid=" + pid + "&address=1000", "", 403}, {"GET", "/v1/diagnose", "", 403},
		{"DELETE", "/v1/status", "", 400}, {"GET", "/v1/pause", "", 400}, {"GET", "/debug/pprof/", "", 404}, {"GET", "/v1/../v1/history", "", 404},
	} {
		status, body := d.asNobody(c.method, c.path, c.body)
		if status != c.status {
			t.Errorf("%s %s: HTTP status %d, want %d: %s", c.method, c.path, status, c.status, body)
		}
		if c.path != "/metrics" {
			document(t, c.path, body, nil)
		}
		if strings.Contains(string(body), strconv.FormatUint(own.Base, 16)) {
			t.Errorf("%s tells addresses: %s", c.path, body)
		}
	}
	if st := d.status(); st.State != control.Hotpatched || st.Paused || len(st.Holds) != 0 {
		t.Errorf("%+v", st)
	}
}

// asNobody sends one request. Credentials are those of the moment of the
// connection, so a thread of ours becomes nobody for that moment.
func (d *device) asNobody(method, path, body string) (int, []byte) {
	d.t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialAs(nobody, d.set.socket)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequest(method, "http://hotpatchd"+path, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := tr.RoundTrip(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return res.StatusCode, b
}

// Events tell an ordinary user of the device and of his own processes only.
func TestOrdinaryUserWatches(t *testing.T) {
	otherUsers(t)
	d := newDevice(t, appFix)
	roots := app(t, hosttest.Options{Spin: 1})
	own := d.theirs(nobody)
	d.start()
	d.becomes(roots.PID, control.Patched)
	d.becomes(own.PID, control.Patched)
	heard := func(who *syscall.Credential) (pids map[int]bool, types map[string]bool) {
		t.Helper()
		pids, types = map[int]bool{}, map[string]bool{}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		c, err := dialAs(who, d.set.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		stop := context.AfterFunc(ctx, func() { c.Close() })
		defer stop()
		if _, err := io.WriteString(c, "GET /v1/events HTTP/1.1\r\nHost: hotpatchd\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%+v, %v", res, err)
		}
		d.hotpatch(0, "rollback", "ACME-1")
		d.hotpatch(0, "install", "ACME-1")
		for lines := bufio.NewScanner(res.Body); lines.Scan(); {
			var e control.Event
			document(t, "events", lines.Bytes(), &e)
			if strings.Contains(lines.Text(), strconv.FormatUint(roots.Base, 16)) || strings.Contains(lines.Text(), strconv.FormatUint(own.Base, 16)) {
				t.Errorf("an address: %s", lines.Text())
			}
			types[e.Type] = true
			if e.PID != 0 {
				pids[e.PID] = true
			}
			if e.Type == control.EventState && e.State == string(control.Hotpatched) {
				break
			}
		}
		return pids, types
	}
	if pids, types := heard(nobody); pids[roots.PID] || !types[control.EventState] || !types[control.EventRelease] {
		t.Errorf("an ordinary user hears of %v, %v", pids, types)
	}
	if pids, _ := heard(&syscall.Credential{}); !pids[roots.PID] || !pids[own.PID] {
		t.Errorf("root hears of %v only", pids)
	}
}

// A member of the configured group commands the daemon; whoever is in another group does not.
func TestGroupMember(t *testing.T) {
	otherUsers(t)
	const name = "games" // there on every Debian
	g, err := user.LookupGroup(name)
	if err != nil {
		need(t, "a group %s", name)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		t.Fatal(err)
	}
	member := &syscall.Credential{Uid: nobody.Uid, Gid: uint32(gid)}
	d := newDevice(t, appFix)
	set := d.set
	set.group = name
	d.configure(set)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	d.becomes(h.PID, control.Patched)
	a := d.hotpatchAs(nobody, 6, "rollback")
	says(t, "rollback", a.err, "needs root or membership in the group "+name)
	d.hotpatchAs(member, 0, "rollback")
	if v := h.Value(); v != 42 {
		t.Errorf("the process answers %d", v)
	}
	d.hotpatchAs(member, 0, "install", "ACME-1")
	if v := h.Value(); v != 43 {
		t.Errorf("the process answers %d", v)
	}
	var hist control.History
	document(t, "history", []byte(d.hotpatchAs(member, 0, "--json", "history").out), &hist)
	found := false
	for _, e := range hist.Entries {
		if e.Action == "rollback" {
			found = e.Caller.UID == int(nobody.Uid) && e.Caller.GID == gid && e.Caller.PID > 1
		}
	}
	if text, _ := json.Marshal(hist.Entries); !found {
		t.Errorf("the history does not say who rolled back: %s", text)
	}
	h.Healthy()
}
