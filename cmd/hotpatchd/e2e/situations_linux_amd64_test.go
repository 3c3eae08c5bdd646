package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// Whatever befalls one process, all others are patched and well, and what is
// said about it is true.
func TestProcessSituations(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	for _, s := range []struct {
		name string
		run  func(*testing.T, *device)
	}{
		{"exits in the middle", exitsInTheMiddle},
		{"execs in the middle", execsInTheMiddle},
		{"hooked by somebody else", hookedBefore},
		{"hooked after it was patched", hookedAfter},
		{"another tracer", tracerAttached},
		{"seccomp", underSeccomp},
		{"mdwe", underMDWE},
		{"module unloaded", unloaded},
		{"module reloaded at the same base", reloadedInPlace},
		{"another build in its place", anotherBuildInPlace},
		{"stopped", stopped},
		{"frozen control group", frozenGroup},
		{"vfork in progress", func(t *testing.T, d *device) { sharing(t, d, "vfork") }},
		{"shared memory", func(t *testing.T, d *device) { sharing(t, d, "clone-vm") }},
		{"dead main thread", deadLeader},
		{"forks before, during and after", forks},
		{"file replaced while mapped", fileReplaced},
	} {
		t.Run(s.name, func(t *testing.T) {
			defer func(was testing.TB) { d.t = was }(d.t)
			d.t = t
			s.run(t, d)
		})
		// The process is over now; nothing of it is left.
		o.alone(d)
		o.well(d)
	}
	if v, err := d.client.Verify(context.Background()); err != nil || !v.OK || v.Images != len(o) {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// alone waits until the daemon knows these processes and no other.
func (o others) alone(d *device) {
	d.t.Helper()
	d.until("the other processes are gone", func() bool {
		list, err := d.client.Processes(context.Background(), control.ProcessQuery{})
		return err == nil && len(list.Processes) == len(o) && list.Coverage.Images == len(o) && list.Coverage.Open() == 0
	})
}

// paused starts a process and puts it into a situation before the daemon may touch it.
func (d *device) paused(o hosttest.Options, prepare func(h *hosttest.Host)) *hosttest.Host {
	d.t.Helper()
	d.hotpatch(0, "pause")
	h := app(d.t, o)
	d.becomes(h.PID, control.Unpatched)
	prepare(h)
	d.hotpatch(0, "resume")
	return h
}

func exitsInTheMiddle(t *testing.T, d *device) {
	for i := range 15 {
		h := app(t, hosttest.Options{Spin: 1})
		time.Sleep(time.Duration(i) * 12 * time.Millisecond)
		h.Exit()
	}
}

// patchedLife waits until the life that the process is in now is patched. Each
// has its image at an address of its own.
func (d *device) patchedLife(h *hosttest.Host) {
	d.t.Helper()
	d.until("its new life is patched", func() bool {
		im := d.image(h.PID)
		return im != nil && im.State == control.Patched && uint64(im.Base) == h.Base
	})
	if v := h.Value(); v != 43 {
		d.t.Errorf("process %d answers %d", h.PID, v)
	}
}

func execsInTheMiddle(t *testing.T, d *device) {
	h := app(t, hosttest.Options{Spin: 1, Sleep: 1})
	for range 6 { // right when patched
		d.patchedLife(h)
		h.Exec()
	}
	for i := range 15 { // at any moment
		time.Sleep(time.Duration(i) * 12 * time.Millisecond)
		h.Exec()
	}
	d.patchedLife(h)
	h.Healthy()
}

func hookedBefore(t *testing.T, d *device) {
	h := d.paused(hosttest.Options{Spin: 1, Allow: []int{42, 7777}}, func(h *hosttest.Host) { h.Do("hook vuln") })
	im := d.becomes(h.PID, control.Drifted)
	if im.ReasonCode != "hooked" || im.Remedy != control.RemedyRestartProcess {
		t.Errorf("%+v", im)
	}
	says(t, "the reason", im.Reason, "vuln", "somebody else")
	says(t, "the detail", im.Detail, "expected", "found ff 25")
	d.hotpatch(4, "status", "--check")
	a := d.hotpatch(4, "processes", "--vulnerable")
	says(t, "processes", a.out, strconv.Itoa(h.PID), "drifted")
	if v := h.Value(); v != 7777 {
		t.Errorf("the hook is gone: it answers %d", v)
	}
	h.Healthy()
}

func hookedAfter(t *testing.T, d *device) {
	h := app(t, hosttest.Options{Spin: 1, Allow: []int{42, 43, 7777}})
	d.becomes(h.PID, control.Patched)
	h.Do("hook vuln")
	var v control.Verify
	d.document(&v, 4, "verify")
	if v.OK || len(v.Mismatches) == 0 || v.Mismatches[0].PID != h.PID || v.Mismatches[0].Function != "vuln" {
		t.Errorf("verify: %+v", v)
	}
	d.hotpatch(4, "rollback")
	if im := d.becomes(h.PID, control.Drifted); im.Remedy != control.RemedyRestartProcess {
		t.Errorf("%+v", im)
	}
	if got := h.Value(); got != 7777 {
		t.Errorf("the hook is gone: it answers %d", got)
	}
	d.hotpatch(4, "install", "ACME-1")
	if got := h.Value(); got != 7777 {
		t.Errorf("the hook is gone: it answers %d", got)
	}
	h.Healthy()
}

func tracerAttached(t *testing.T, d *device) {
	var release func()
	h := d.paused(hosttest.Options{Spin: 1}, func(h *hosttest.Host) {
		var err error
		if release, err = hosttest.Tracer(t, h.PID); err != nil {
			t.Fatal(err)
		}
	})
	im := d.becomes(h.PID, control.Blocked)
	if im.ReasonCode != "tracer" || im.Remedy != control.RemedyWait {
		t.Errorf("%+v", im)
	}
	says(t, "the reason", im.Reason, "traced by host-", ", pid")
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}
	release()
	d.becomes(h.PID, control.Patched)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func underSeccomp(t *testing.T, d *device) {
	h := d.paused(hosttest.Options{Spin: 1}, func(h *hosttest.Host) { h.Do("seccomp") })
	im := d.becomes(h.PID, control.Blocked)
	if im.ReasonCode != "seccomp" || im.Remedy != control.RemedyRestartProcess {
		t.Errorf("%+v", im)
	}
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func underMDWE(t *testing.T, d *device) {
	h := d.paused(hosttest.Options{Spin: 1}, func(h *hosttest.Host) { h.Do("mdwe") })
	d.becomes(h.PID, control.Patched)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func unloaded(t *testing.T, d *device) {
	h := app(t, hosttest.Options{Spin: 1})
	for range 3 {
		d.becomes(h.PID, control.Patched)
		if v := h.Value(); v != 43 {
			t.Errorf("it answers %d", v)
		}
		h.Do("unload")
		d.until("the image is not listed any more", func() bool { return d.image(h.PID) == nil })
		h.Do("reload")
	}
	d.becomes(h.PID, control.Patched)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

// Between two looks of the daemon the image goes and comes back.
func reloadedInPlace(t *testing.T, d *device) {
	h := app(t, hosttest.Options{Spin: 1})
	d.becomes(h.PID, control.Patched)
	h.Do("reload")
	d.until("the new copy of the image runs the fix", func() bool { return h.Value() == 43 })
	d.becomes(h.PID, control.Patched)
	h.Healthy()
}

func anotherBuildInPlace(t *testing.T, d *device) {
	h := app(t, hosttest.Options{Spin: 1, Allow: []int{}})
	d.becomes(h.PID, control.Patched)
	h.Do("reload " + hosttest.Fixture(t, "other/app.dll"))
	was := h.Value()
	if im := d.becomes(h.PID, control.OtherBuild); im.Remedy != control.RemedyAuthor {
		t.Errorf("%+v", im)
	}
	if v := h.Value(); v != was {
		t.Errorf("the other build answers %d, was %d", v, was)
	}
	h.Do("reload " + hosttest.Fixture(t, "mingw/app.dll"))
	d.becomes(h.PID, control.Patched)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func stopped(t *testing.T, d *device) {
	h := d.paused(hosttest.Options{Spin: 2}, func(h *hosttest.Host) {
		if err := unix.Kill(h.PID, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		d.until("the process is stopped", func() bool { return processState(h.PID) == "T" })
	})
	d.becomes(h.PID, control.Patched)
	d.until("it is stopped again", func() bool { return processState(h.PID) == "T" })
	calls := h.Stats().Calls
	time.Sleep(100 * time.Millisecond)
	if now := h.Stats().Calls; now != calls || processState(h.PID) != "T" {
		t.Errorf("a stopped process made %d calls, its state is %s", now-calls, processState(h.PID))
	}
	if err := unix.Kill(h.PID, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	h.Runs()
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

// processState is the letter of proc(5).
func processState(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	_, after, ok := strings.Cut(string(b), ") ")
	if err != nil || !ok {
		return ""
	}
	return after[:1]
}

func frozenGroup(t *testing.T, d *device) {
	group := ""
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		g := filepath.Join(root, "hotpatchd-e2e-"+filepath.Base(d.dir)+"-"+strconv.Itoa(int(time.Now().UnixNano())))
		if os.Mkdir(g, 0o755) != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(g, "cgroup.freeze")); err != nil {
			os.Remove(g)
			continue
		}
		group = g
		break
	}
	if group == "" {
		need(t, "the right to make a control group of the second version")
	}
	t.Cleanup(func() { os.Remove(group) })
	set := func(file, value string) {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(group, file), os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(value)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	h := d.paused(hosttest.Options{Spin: 1}, func(h *hosttest.Host) {
		t.Cleanup(func() { set("cgroup.freeze", "0"); h.Exit() })
		set("cgroup.procs", strconv.Itoa(h.PID))
		set("cgroup.freeze", "1")
		d.until("the group is frozen", func() bool {
			b, err := os.ReadFile(filepath.Join(group, "cgroup.events"))
			return err == nil && strings.Contains(string(b), "frozen 1")
		})
	})
	// Whether a frozen thread can be stopped is the kernel's affair. It is said either way.
	d.until("it is patched, or busy with a reason", func() bool {
		im := d.image(h.PID)
		return im != nil && (im.State == control.Patched || im.State == control.Busy && im.Reason != "" && im.Remedy == control.RemedyWait)
	})
	set("cgroup.freeze", "0")
	d.becomes(h.PID, control.Patched)
	h.Runs()
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

// A process whose memory another one uses too, for a moment (vfork) or longer,
// is left alone until it has its memory for itself.
func sharing(t *testing.T, d *device, how string) {
	child := ""
	h := d.paused(hosttest.Options{Spin: 1}, func(h *hosttest.Host) {
		child = strings.TrimPrefix(h.Do(how), how+" ")
	})
	d.until("it is busy or blocked, and the sharer is named", func() bool {
		im := d.image(h.PID)
		return im != nil && (im.State == control.Busy || im.State == control.Blocked) && strings.Contains(im.Reason, "pid "+child) && im.Remedy != ""
	})
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}
	h.Do("unshare")
	d.becomes(h.PID, control.Patched)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func deadLeader(t *testing.T, d *device) {
	before := d.paused(hosttest.Options{Spin: 2}, func(h *hosttest.Host) { h.Do("stop-leader") })
	after := app(t, hosttest.Options{Spin: 2, Sleep: 1})
	d.becomes(after.PID, control.Patched)
	after.Do("stop-leader")
	for _, h := range []*hosttest.Host{before, after} {
		d.becomes(h.PID, control.Patched)
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
	}
	d.hotpatch(0, "verify")
	d.hotpatch(0, "rollback")
	for _, h := range []*hosttest.Host{before, after} {
		if v := h.Value(); v != 42 {
			t.Errorf("process %d answers %d after rollback", h.PID, v)
		}
		h.Runs()
		h.Healthy()
	}
	d.hotpatch(0, "install", "ACME-1")
}

func forks(t *testing.T, d *device) {
	var family []*hosttest.Host
	h := d.paused(hosttest.Options{Spin: 1, Sleep: 1}, func(h *hosttest.Host) { family = append(family, h.Fork()) })
	family = append(family, h)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 3 {
			d.run(nil, "hotpatch", "--socket", d.set.socket, "rollback", "ACME-1")
			d.run(nil, "hotpatch", "--socket", d.set.socket, "install", "ACME-1")
		}
	}()
	for under := true; under && len(family) < 10; {
		select {
		case <-done:
			under = false
		case <-time.After(20 * time.Millisecond):
			family = append(family, h.Fork())
		}
	}
	<-done
	family = append(family, h.Fork())
	for _, f := range family {
		d.becomes(f.PID, control.Patched)
		if v := f.Value(); v != 43 {
			t.Errorf("process %d answers %d", f.PID, v)
		}
	}
	d.hotpatch(0, "verify")
	d.hotpatch(0, "rollback")
	for _, f := range family {
		d.becomes(f.PID, control.Unpatched)
		if v := f.Value(); v != 42 {
			t.Errorf("process %d answers %d after rollback", f.PID, v)
		}
		f.Runs()
		f.Healthy()
	}
	d.hotpatch(0, "install", "ACME-1")
	t.Logf("%d processes", len(family))
}

func fileReplaced(t *testing.T, d *device) {
	dll := d.path("app.dll")
	replace := func(by string) {
		t.Helper()
		b, err := os.ReadFile(hosttest.Fixture(t, by))
		if err == nil {
			err = os.WriteFile(dll+".new", b, 0o644)
		}
		if err == nil {
			err = os.Rename(dll+".new", dll)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	start := func(allow ...int) hosttest.Options {
		return hosttest.Options{DLL: dll, Call: "vuln", Spin: 1, Allow: allow}
	}
	replace("mingw/app.dll")
	d.hotpatch(0, "pause")
	h := hosttest.Start(t, start(42, 43))
	d.becomes(h.PID, control.Unpatched)
	replace("other/app.dll")
	d.hotpatch(0, "resume")
	d.becomes(h.PID, control.Patched) // what runs decides, not what lies on disk
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	next := hosttest.Start(t, start())
	d.becomes(next.PID, control.OtherBuild)
	replace("mingw/app.dll")
	last := hosttest.Start(t, start(42, 43))
	d.becomes(last.PID, control.Patched)
	for _, h := range []*hosttest.Host{h, next, last} {
		h.Runs()
		h.Healthy()
	}
}
