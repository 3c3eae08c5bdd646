package e2e

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// Two sequences that a process without kernel32.dll can have.
var (
	firstFix = fix{"ACME-1", "acme", 1, []string{"demo/demo-1.dll"}, ""}
	nextFix  = fix{"ACME-2", "acme", 2, []string{"demo/demo-2.dll"}, ""}
)

// demos starts two processes that firstFix and nextFix are for.
func (d *device) demos() others {
	d.t.Helper()
	o := others{}
	for _, mapped := range []string{"file", "anon"} {
		o = append(o, hosttest.Start(d.t, hosttest.Options{DLL: hosttest.Fixture(d.t, "demo/demo.dll"), Map: mapped, Call: "answer", Spin: 1, Sleep: 1, Allow: []int{42, 43, 44}}))
	}
	o.well(d)
	return o
}

// Whatever a server does: a clear word about it, and what is applied stays,
// goes on to be applied to new processes, and is left by no doubt or damage.
func TestRepositoryTrouble(t *testing.T) {
	d := newDevice(t, appFix)
	m := mirrored(t, d)
	d.start()
	o := d.others()
	metadataDir := d.path("repo/metadata")
	old := map[string][]byte{}
	for _, name := range []string{"timestamp.json", "1.snapshot.json", "1.targets.json"} {
		old[name] = read(t, filepath.Join(metadataDir, name))
	}
	d.refresh(time.Now()) // what was saved is old now
	d.hotpatch(0, "check")

	stranger := t.TempDir()
	if _, err := repository.GenerateKeys(filepath.Join(stranger, "keys")); err != nil {
		t.Fatal(err)
	}
	keys, err := repository.LoadKeys(filepath.Join(stranger, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repository.Publish(filepath.Join(stranger, "repo"), keys, [][]byte{makeRelease(t, appFix)}, repository.PublishOptions{Now: time.Now()}); err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		name  string
		cause func()
		code  string // of the error in status
		words []string
	}{
		{"unreachable", m.down, "unreachable", nil},
		{"cut off", func() {
			m.serves("timestamp", func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) })
		}, "unreachable", nil},
		{"server failed", func() {
			m.serves("timestamp", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", 500) })
		}, "server", []string{"500"}},
		{"no such file", func() { m.serves("timestamp", http.NotFound) }, "not-found", []string{"timestamp.json"}},
		{"captive portal", func() { m.serves("/metadata/", content([]byte("<html>log in</html>"))) }, "captive-portal", []string{"web page"}},
		{"not metadata", func() { m.serves("timestamp", content([]byte("{}"))) }, "damaged", []string{"timestamp.json"}},
		{"wrong key", func() {
			m.serves("timestamp", content(read(t, filepath.Join(stranger, "repo/metadata/timestamp.json"))))
		}, "signature", []string{"not signed by the keys"}},
		{"wrong root", func() { m.serves("2.root.json", content(read(t, filepath.Join(stranger, "repo/root.json")))) }, "signature", nil},
		{"rolled back", func() { m.serves("timestamp", content(old["timestamp.json"])) }, "rollback", []string{"version 1", "version 2"}},
		{"mixed", func() {
			d.refresh(time.Now())
			m.serves(".snapshot.json", content(old["1.snapshot.json"]))
		}, "mixed", nil},
		{"endless", func() { m.serves("timestamp", endless) }, "too-large", []string{"timestamp.json"}},
		{"expired", func() { d.refresh(time.Now().Add(-40 * 24 * time.Hour)) }, "expired", []string{"clock"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer func(was testing.TB) { d.t = was }(d.t)
			d.t = t
			c.cause()
			a := d.hotpatch(1, "check")
			says(t, "check", a.err, append(c.words, "repository: ", "hint:")...)
			says(t, "status", d.hotpatch(0, "status").out, c.words...)
			if e := d.status().Repository.Error; e == nil || e.Code != c.code {
				t.Errorf("status has the error %+v, want %s", e, c.code)
			}
			o.well(d)
			h := app(t, hosttest.Options{Spin: 1}) // what is in force goes on
			d.becomes(h.PID, control.Patched)
			if v := h.Value(); v != 43 {
				t.Errorf("a new process answers %d", v)
			}
			h.Healthy()

			m.well()
			switch c.name {
			case "unreachable":
				m.up(d.path("repo"), m.address)
			case "expired":
				d.refresh(time.Now())
			}
			d.hotpatch(0, "check")
			if e := d.status().Repository.Error; e != nil {
				t.Errorf("status has the error %+v, and all is well again", e)
			}
		})
	}
	o.well(d)
	if v, err := d.client.Verify(context.Background()); err != nil || !v.OK {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// A device that starts when the metadata has ended takes nothing new; one that
// had something in force before goes on with it.
func TestRepositoryExpiredAtStart(t *testing.T) {
	d := newDevice(t, firstFix)
	d.start()
	o := d.demos()
	d.stop()
	d.publish(nextFix)
	d.refresh(time.Now().Add(-40 * 24 * time.Hour))
	d.launch()
	d.until("the end of the metadata is noticed", func() bool {
		st, err := d.client.Status(context.Background())
		return err == nil && st.Repository.Error != nil && st.Repository.Error.Code == "expired"
	})
	o.well(d)
	d.hotpatch(1, "install", "ACME-2")
	o.well(d)
	d.refresh(time.Now())
	d.until("the new release is in force", func() bool { return o[0].Value() == 44 && o[1].Value() == 44 })
	o.answer(d, control.Patched, 44)
}

// A server that takes the request and never answers holds up nothing but news.
func TestRepositoryStalled(t *testing.T) {
	d := newDevice(t, appFix)
	m := mirrored(t, d)
	d.start()
	o := d.others()
	m.serves("/", m.stalled)
	time.Sleep(1500 * time.Millisecond) // more than check_every: a check hangs now
	last := d.status().Repository.LastCheck
	h := app(t, hosttest.Options{Spin: 1})
	d.becomes(h.PID, control.Patched)
	d.hotpatch(0, "rollback")
	o.answer(d, control.Unpatched, 42)
	d.hotpatch(0, "install", "ACME-1")
	o.well(d)
	if now := d.status().Repository.LastCheck; now != last {
		t.Errorf("a check ended at %v, although nothing answers", now)
	}
	began := time.Now()
	d.stop()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v to stop", took)
	}
	d.launch()
	d.becomes(h.PID, control.Patched) // without a word of the server
	o.well(d)
	m.down() // the check ends with an error
	d.until("it is said that the server does not answer", func() bool {
		st, err := d.client.Status(context.Background())
		return err == nil && st.Repository.Error != nil && st.Repository.Error.Code == "unreachable"
	})
}

// A release whose bytes are not the signed ones, or signed nonsense, is refused
// and said; the one before stays in force.
func TestReleaseDamaged(t *testing.T) {
	d := newDevice(t, firstFix)
	m := mirrored(t, d)
	d.start()
	o := d.demos()
	refused := func(id, word string) {
		t.Helper()
		d.until("the release is refused", func() bool {
			list, err := d.client.Offers(context.Background())
			return err == nil && slices.ContainsFunc(list.Releases, func(o control.Offer) bool {
				return o.ID == id && !o.Fits && strings.Contains(o.Reason, word)
			})
		})
		says(t, "list", d.hotpatch(0, "list").out, id)
		a := d.hotpatch(1, "install", id)
		says(t, "install", a.err, word)
		o.well(d)
		if st := d.status(); st.Release == nil || st.Release.ID != "ACME-1" {
			t.Errorf("in force: %+v", st.Release)
		}
		left, err := filepath.Glob(filepath.Join(d.set.state, "*", "*"+id+"*"))
		if err != nil || len(left) != 0 {
			t.Errorf("refused, but kept: %v", left)
		}
	}

	next := makeRelease(t, nextFix)
	damaged := slices.Clone(next)
	damaged[len(damaged)/2] ^= 1
	m.serves("ACME-2", content(damaged))
	d.publish(nextFix)
	refused("ACME-2", "is not the file that was signed")

	unknown := fix{"ACME-3", "acme", 3, nextFix.images, ""}
	m.serves("ACME-3", http.NotFound)
	d.publish(unknown)
	d.exchange("ACME-3", retold(t, makeRelease(t, unknown), `"kind"`, `"surprise": 1, "kind"`))
	m.well()
	d.hotpatch(0, "check")
	refused("ACME-3", "surprise")
	d.hotpatch(0, "hold", "ACME-3")

	other := fix{"ACME-4", "acme", 4, nextFix.images, ""}
	m.serves("ACME-4", http.NotFound)
	d.publish(other)
	d.exchange("ACME-4", retold(t, makeRelease(t, other), `"product": "acme"`, `"product": "acmf"`))
	m.well()
	d.hotpatch(0, "check")
	refused("ACME-4", "differ in id, product")

	d.hotpatch(0, "hold", "ACME-4")
	d.hotpatch(0, "install", "ACME-2") // mended
	o.answer(d, control.Patched, 44)
	d.hotpatch(0, "rollback")
	o.well(d) // back to the one before
}

// A release that comes as a file needs metadata that names it: beside it, or trusted before.
func TestLoneFile(t *testing.T) {
	d := newDevice(t, appFix)
	file := d.path("usb/ACME-1.hotpatch")
	copyTo(t, d.release("ACME-1"), file)
	set := d.set
	set.url = ""
	d.configure(set)
	h := app(t, hosttest.Options{Spin: 1})
	d.launch()
	d.until("the daemon answers", func() bool {
		st, err := d.client.Status(context.Background())
		return err == nil && !st.Scanned.IsZero()
	})
	a := d.hotpatch(1, "install", file)
	says(t, "install without metadata", a.err, "refused", "hint:", "metadata")
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d", v)
	}

	for _, name := range []string{"timestamp.json", "1.snapshot.json", "1.targets.json"} {
		copyTo(t, filepath.Join(d.path("repo/metadata"), name), d.path("usb/metadata/"+name))
	}
	if err := os.WriteFile(d.path("usb/forged.hotpatch"), append(read(t, file), 0), 0o600); err != nil {
		t.Fatal(err)
	}
	a = d.hotpatch(1, "install", d.path("usb/forged.hotpatch"))
	says(t, "install of another file", a.err, "refused")

	var ch control.Change
	d.document(&ch, 0, "install", file)
	if !ch.Changed || ch.Release != "ACME-1" || ch.Verified == "" || len(ch.Results) != 1 {
		t.Errorf("%+v", ch)
	}
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	if err := os.RemoveAll(d.path("usb")); err != nil {
		t.Fatal(err)
	}
	d.stop()
	next := app(t, hosttest.Options{Spin: 1})
	d.launch()
	for _, h := range []*hosttest.Host{h, next} { // from what the daemon keeps
		d.becomes(h.PID, control.Patched)
		if v := h.Value(); v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
	}
	d.hotpatch(0, "rollback")
	for _, h := range []*hosttest.Host{h, next} {
		if v := h.Value(); v != 42 {
			t.Errorf("process %d answers %d after rollback", h.PID, v)
		}
		h.Healthy()
	}
}

// The server is gone, the metadata is known: the file may come by hand.
func TestLoneFileOfKnownRelease(t *testing.T) {
	d := newDevice(t, appFix)
	m := mirrored(t, d)
	m.serves("/targets/", http.NotFound)
	h := app(t, hosttest.Options{Spin: 1})
	d.start()
	m.down()
	if im := d.becomes(h.PID, control.Blocked); im.ReasonCode != "fetch" {
		t.Errorf("%+v", im)
	}
	file := d.path("usb/ACME-1.hotpatch")
	copyTo(t, d.release("ACME-1"), file)
	d.hotpatch(0, "install", file)
	if v := h.Value(); v != 43 {
		t.Errorf("it answers %d", v)
	}
	h.Healthy()
}

func copyTo(t testing.TB, from, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, read(t, from), 0o644); err != nil {
		t.Fatal(err)
	}
}
