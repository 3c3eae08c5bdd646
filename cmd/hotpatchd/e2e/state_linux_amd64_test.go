package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// The state file is damaged while the daemon is down: it is set aside, and what
// is in memory is found again.
func TestStateDamaged(t *testing.T) {
	d := newDevice(t, appFix)
	d.start()
	o := d.others()
	state := d.path("state/state.db")
	damages := 0
	for _, c := range []struct {
		name string
		do   func(b []byte) []byte
	}{
		{"cut off", func(b []byte) []byte { return b[:len(b)/2] }},
		{"empty", func(b []byte) []byte { return nil }},
		{"overwritten", func(b []byte) []byte {
			for i := range b {
				b[i] = byte(i)
			}
			return b
		}},
		{"wrong in places", func(b []byte) []byte {
			for i := 8192; i < len(b); i += 512 {
				b[i] ^= 0x55
			}
			return b
		}},
	} {
		d.stop()
		if err := os.WriteFile(state, c.do(read(t, state)), 0o600); err != nil {
			t.Fatal(err)
		}
		damages++
		d.start()
		a := d.attention("state-damaged")
		says(t, c.name, a.Text, "damaged", "set aside")
		o.well(d)
		var v control.Verify
		d.document(&v, 0, "verify")
		if v.Images != len(o) || v.History != "" {
			t.Errorf("%s: verify: %+v", c.name, v)
		}
		aside, err := filepath.Glob(state + ".damaged-*")
		if err != nil || len(aside) != damages {
			t.Errorf("%s: set aside: %v", c.name, aside)
		}
		h, err := d.client.History(context.Background(), 100)
		if err != nil || !strings.Contains(historyText(h), "state-damaged") {
			t.Errorf("%s: the history does not tell of it: %v", c.name, err)
		}
	}
	d.hotpatch(0, "rollback")
	o.answer(d, control.Unpatched, 42)
}

func historyText(h *control.History) string {
	var b strings.Builder
	for _, e := range h.Entries {
		b.WriteString(e.Action + " " + e.Text + "\n")
	}
	return b.String()
}

// No space for the journal: nothing is begun that could not be told after a
// crash, what is applied stays, and all goes on when there is space again.
func TestDiskFull(t *testing.T) {
	d := newDevice(t, appFix)
	small(t, d.path("disk"), 4<<20)
	set := d.set
	set.state = d.path("disk/state")
	d.configure(set)
	d.start()
	o := d.others()
	free := fill(t, d.path("disk"))
	h := app(t, hosttest.Options{Spin: 1})
	d.until("it is said that there is no space", func() bool {
		im := d.image(h.PID)
		return im != nil && im.State == control.Failed && im.Remedy != "" && strings.Contains(im.Reason+im.Detail, "no space left")
	})
	if v := h.Value(); v != 42 {
		t.Errorf("it answers %d without a journal", v)
	}
	d.hotpatch(4, "status", "--check")
	o.well(d)

	// Small changes may still find room in the file. What does not, says so.
	a := d.run(nil, "hotpatch", "--socket", d.set.socket, "rollback")
	if a.code != 0 {
		says(t, "rollback", a.out+a.err, "the state cannot be written")
	}

	// A crash meanwhile, and a start without space.
	d.kill()
	d.launch()
	select {
	case err := <-d.ended: // it may refuse to work without a journal, if it says so
		d.ended <- err
		log := string(read(t, d.path("log")))
		says(t, "the log", log[max(0, len(log)-2000):], "no space left")
	case <-time.After(2 * time.Second):
	}
	for _, h := range o {
		h.Runs()
		if v := h.Value(); v != 42 && v != 43 {
			t.Errorf("process %d answers %d", h.PID, v)
		}
	}
	d.stop()
	free()
	d.start()
	all := append(slices.Clone(o), h)
	if len(d.status().Holds) > 0 {
		all.answer(d, control.Unpatched, 42)
		d.hotpatch(0, "install", "ACME-1")
	}
	all.well(d)
	var v control.Verify
	d.document(&v, 0, "verify")
	if v.Images != len(all) || v.History != "" {
		t.Errorf("verify: %+v", v)
	}
}

// A stop at any moment of the work ends well, in time, and leaves nothing half done.
func TestStoppedInTheMiddle(t *testing.T) {
	d := newDevice(t, appFix)
	var hosts others
	for range 4 {
		hosts = append(hosts, app(t, hosttest.Options{Spin: 1, Sleep: 1}))
	}
	rounds := 10
	if testing.Short() {
		rounds = 5
	}
	for i := range rounds {
		// Each life has something to do at once: what was out goes in, what was in goes out.
		d.policy([]string{"", "hold = [\"ACME-1\"]\n"}[i%2])
		d.launch()
		d.until("it is at work", func() bool { _, err := d.client.Status(context.Background()); return err == nil })
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		d.proc.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-d.ended:
			if err != nil {
				t.Errorf("stop %d: the daemon ends with %v", i, err)
			}
			d.proc = nil
		case <-time.After(patience):
			t.Fatalf("stop %d: the daemon does not end", i)
		}
		for _, h := range hosts {
			if v := h.Value(); v != 42 && v != 43 {
				t.Errorf("stop %d: process %d answers %d", i, h.PID, v)
			}
			h.Runs()
		}
		if _, err := os.Stat(d.set.socket); err == nil {
			t.Errorf("stop %d: the socket is still there", i)
		}
	}
	d.policy("")
	d.start()
	hosts.well(d)
	d.hotpatch(0, "verify")
}
