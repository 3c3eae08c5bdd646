package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"hotpatchd/agent/control"
)

// Two hundred devices, one repository, one broker. All are fixed; they come to
// the repository one after the other; and the stream has everything that any of
// them reported, although the broker is restarted in the middle and away while
// the second release comes.
func TestTwoHundredDevices(t *testing.T) {
	if testing.Short() {
		t.Skip("needs half a minute")
	}
	const devices, every = 200, 8 * time.Second
	repo := newRepository(t)
	repo.publish(t, "R1", 1)
	broker := newBroker(t)
	home := folder(t)
	fleet := make([]*device, devices)
	defer func() {
		var wg sync.WaitGroup
		for _, d := range fleet {
			if d != nil {
				wg.Add(1)
				go func() {
					defer wg.Done()
					if err := d.stop(); err != nil {
						t.Error(err)
					}
				}()
			}
		}
		wg.Wait()
	}()
	for n := range fleet {
		fleet[n] = startDevice(t, n, home, repo, broker, every, nil)
		if n == devices/2 {
			broker.stop() // half of them are in the middle of it
			broker.start()
		}
	}
	runs := func(id string) func() string {
		return func() string {
			for _, d := range fleet {
				st, err := d.client.Status(context.Background())
				if err != nil || st.State != control.Hotpatched || st.Release == nil || st.Release.ID != id {
					return fmt.Sprintf("%s: %+v, %v", d.id, st, err)
				}
			}
			return ""
		}
	}
	reports := t.TempDir()
	told := func(id string) func() string {
		return func() string {
			newest := broker.newest(reports)
			for _, d := range fleet {
				doc := newest[d.id]
				if doc == nil || doc.Status.State != control.Hotpatched || doc.Status.Release == nil || doc.Status.Release.ID != id || len(doc.Eligibility.Checks) == 0 {
					return fmt.Sprintf("%d reports; %s: %+v", len(newest), d.id, doc)
				}
			}
			return ""
		}
	}
	until(t, "all run R1", runs("R1"))
	until(t, "all report R1", told("R1"))

	broker.stop()
	repo.publish(t, "R2", 2)
	published := time.Now()
	until(t, "all run R2, without the broker", runs("R2"))
	waits := func(d *device) (ids []string) {
		files, err := filepath.Glob(filepath.Join(d.dir, "spool", "*.report"))
		must(t, err)
		for _, f := range files {
			_, id, _ := strings.Cut(strings.TrimSuffix(filepath.Base(f), ".report"), "-")
			ids = append(ids, id)
		}
		return ids
	}
	until(t, "all have their report in the spool", func() string {
		for _, d := range fleet {
			if len(waits(d)) == 0 {
				return d.id
			}
		}
		return ""
	})
	waited := map[string]string{}
	for _, d := range fleet {
		for _, id := range waits(d) {
			waited[id] = d.id
		}
	}
	broker.start()
	until(t, "all report R2", told("R2"))
	until(t, "the spools are empty", func() string {
		for _, d := range fleet {
			if st := d.spool.Standing(); st.Waiting > 0 {
				return fmt.Sprintf("%s: %+v", d.id, st)
			}
		}
		return ""
	})

	seen, last, first := map[string]int{}, map[string]time.Time{}, map[string]bool{}
	for _, m := range broker.everything() {
		seen[m.id]++
		if seen[m.id] > 1 {
			t.Errorf("%s is in the stream twice", m.id)
		}
		if m.doc.Generated.Before(last[m.device]) {
			t.Errorf("%s: a report of %s comes after one of %s", m.device, m.doc.Generated, last[m.device])
		}
		last[m.device] = m.doc.Generated.Time
		if r := m.doc.Status.Release; r != nil && r.ID == "R1" {
			first[m.device] = true
		}
		if waited[m.id] != "" && waited[m.id] != m.device {
			t.Errorf("the report %s of %s came as %s", m.id, waited[m.id], m.device)
		}
		delete(waited, m.id)
	}
	if len(waited) != 0 {
		t.Errorf("lost with the broker: %v", waited)
	}
	if len(first) != devices || len(last) != devices {
		t.Errorf("%d devices told of R1, %d of anything", len(first), len(last))
	}
	for _, d := range fleet {
		if st := d.spool.Standing(); st.Dropped != 0 {
			t.Errorf("%s: %+v", d.id, st)
		}
	}
	spread(t, repo, fleet, every, published)
}

// spread holds the checks after a time against their phases in the interval.
func spread(t *testing.T, repo *fleetRepository, fleet []*device, every time.Duration, after time.Time) {
	t.Helper()
	until(t, "each device has asked twice", func() string {
		repo.mu.Lock()
		defer repo.mu.Unlock()
		for _, d := range fleet {
			n := 0
			for _, at := range repo.arrivals[d.id] {
				if at.After(after) {
					n++
				}
			}
			if n < 2 {
				return d.id
			}
		}
		return ""
	})
	repo.mu.Lock()
	defer repo.mu.Unlock()
	var tenths [10]int
	sum, most := 0, 0
	for _, d := range fleet {
		for _, at := range repo.arrivals[d.id] {
			if at.After(after) {
				tenths[at.Sub(at.Truncate(every))*10/every]++
				sum++
			}
		}
	}
	for _, n := range tenths {
		most = max(most, n)
	}
	t.Logf("%d checks by tenth of the interval: %v", sum, tenths)
	// All at once would be 10 tenths of them in one; evenly is one.
	if most > sum*3/10 {
		t.Errorf("%d of %d checks came in one tenth of the interval: %v", most, sum, tenths)
	}
}

// A changed key has a device look, whatever it holds, once for many changes;
// and the broker can do no more: what it says is applied nowhere.
func TestLookWakes(t *testing.T) {
	repo := newRepository(t)
	repo.publish(t, "R1", 1)
	broker := newBroker(t)
	d := startDevice(t, 1, folder(t), repo, broker, time.Hour, func(b *bridge) { b.lookGap = time.Hour })
	defer func() { must(t, d.stop()) }()
	runs := func(id string) func() string {
		return func() string {
			st, err := d.client.Status(context.Background())
			if err != nil || st.State != control.Hotpatched || st.Release == nil || st.Release.ID != id {
				return fmt.Sprintf("%+v, %v", st, err)
			}
			return ""
		}
	}
	until(t, "R1 comes by itself", runs("R1"))
	repo.publish(t, "R2", 2)
	asked := repo.asked(d.id)
	nc, js := broker.client()
	defer nc.Close()
	kv, err := js.KeyValue(context.Background(), bucketName)
	must(t, err)
	consumers := func() int {
		s, err := js.Stream(context.Background(), "KV_"+bucketName)
		must(t, err)
		info, err := s.Info(context.Background())
		must(t, err)
		return info.State.Consumers
	}
	until(t, "the key is watched", func() string {
		if consumers() == 0 {
			return "nobody"
		}
		return ""
	})
	for i := range 20 {
		_, err := kv.PutString(context.Background(), lookKey, fmt.Sprintf(`{"pause":true,"url":"http://evil.example.com/","hold":["R2"],"n":%d}`, i))
		must(t, err)
	}
	until(t, "R2 comes by the wake-up", runs("R2"))
	st, err := d.client.Status(context.Background())
	if err != nil || st.Paused || len(st.Holds) != 0 || st.Repository.URL != repo.URL+"/"+d.id {
		t.Errorf("%+v, %v", st, err)
	}
	if n := repo.asked(d.id) - asked; n != 1 {
		t.Errorf("the broker had the device look %d times", n)
	}
}

// A key that changes while the broker restarts is not missed.
func TestLookAfterRestart(t *testing.T) {
	repo := newRepository(t)
	repo.publish(t, "R1", 1)
	broker := newBroker(t)
	d := startDevice(t, 1, folder(t), repo, broker, time.Hour, nil)
	defer func() { must(t, d.stop()) }()
	until(t, "it looks by itself", func() string {
		if repo.asked(d.id) == 0 || d.spool.Standing().Waiting > 0 {
			return "not yet"
		}
		return ""
	})
	broker.stop()
	broker.start()
	asked := repo.asked(d.id)
	until(t, "a look", func() string {
		nc, js := broker.client()
		defer nc.Close()
		must(t, tellToLook(context.Background(), js))
		if repo.asked(d.id) == asked {
			return "not yet"
		}
		return ""
	})
}

// pull names files by devices only, and a stream can hold anything.
func TestPullTrustsNoSubject(t *testing.T) {
	broker := newBroker(t)
	nc, js := broker.client()
	defer nc.Close()
	ctx := context.Background()
	for _, device := range []string{"good", "..", "a/b", "x\\y", strings.Repeat("x", 65), "a b"} {
		if _, err := js.Publish(ctx, statusPrefix+device, []byte(`{}`), jetstream.WithRetryAttempts(0)); err != nil && device == "good" {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(t.TempDir(), "in", "here")
	n, err := pull(ctx, js, dir)
	entries, _ := os.ReadDir(dir)
	if err != nil || n != 1 || len(entries) != 1 || entries[0].Name() != "good.json" {
		t.Errorf("%d, %v, %v", n, err, entries)
	}
}

func TestServers(t *testing.T) {
	for server, want := range map[string]string{
		"nats://127.0.0.1:4222": "plain", "nats://localhost": "plain", "nats://[::1]:1,nats://127.0.0.1": "plain",
		"tls://broker.example.com:4222": "tls", "wss://broker.example.com": "tls", "tls://127.0.0.1": "tls", "tls://a,tls://b": "tls",
		"nats://broker.example.com": "no", "ws://broker.example.com": "no", "http://127.0.0.1": "no", "broker": "no", "": "no",
		"nats://127.0.0.1,tls://broker.example.com": "no",
	} {
		got := "no"
		if secure, err := (&settings{server: server}).encrypted(); err == nil && secure {
			got = "tls"
		} else if err == nil {
			got = "plain"
		}
		if got != want {
			t.Errorf("%q: %s, want %s", server, got, want)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for args, want := range map[string]int{
		"": exitUsage, "version": exitDone, "help": exitDone, "dance": exitUsage, "run": exitUsage, "run --server nats://127.0.0.1 extra": exitUsage,
		"run --server nats://127.0.0.1 --every 1ms": exitUsage, "run --server nats://127.0.0.1 --spread 1h": exitUsage, "pull --server nats://127.0.0.1": exitUsage,
		"run --server nats://127.0.0.1 --cert x": exitUsage, "look --server nats://127.0.0.1:1": exitFailed, "setup --server nats://broker.example.com": exitUsage,
		"run -h": exitDone,
	} {
		var out, errOut strings.Builder
		if got := dispatch(context.Background(), strings.Fields(args), &out, &errOut); got != want {
			t.Errorf("%q: %d, want %d: %s", args, got, want, errOut.String())
		}
	}
}

// What the README allows a device at the broker is enough, and no more than
// that: it can speak for no other device, wake nobody and read no reports.
func TestPermissionsOfTheReadme(t *testing.T) {
	id := deviceID(1)
	broker := newBrokerWith(t, &server.User{Username: "device", Password: "pw", Permissions: &server.Permissions{
		Publish: &server.SubjectPermission{Allow: []string{"hotpatch.status." + id, "$JS.API.STREAM.INFO.KV_hotpatch",
			"$JS.API.CONSUMER.CREATE.KV_hotpatch.>", "$JS.API.CONSUMER.DELETE.KV_hotpatch.>"}},
		Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>"}},
	}})
	repo := newRepository(t)
	repo.publish(t, "R1", 1)
	admin := broker.url
	broker.url = strings.Replace(admin, "admin:pw@", "device:pw@", 1)
	d := startDevice(t, 1, folder(t), repo, broker, time.Hour, nil)
	defer func() { must(t, d.stop()) }()
	nc, js := broker.client()
	defer nc.Close()
	broker.url = admin
	adminConn, adminJS := broker.client()
	defer adminConn.Close()
	until(t, "the report comes", func() string {
		if doc := broker.newest(t.TempDir())[id]; doc == nil || doc.Status.State != control.Hotpatched {
			return fmt.Sprintf("%+v", doc)
		}
		return ""
	})
	asked := repo.asked(d.id)
	until(t, "it is woken", func() string {
		must(t, tellToLook(context.Background(), adminJS))
		if repo.asked(d.id) == asked {
			return "not yet"
		}
		return ""
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := js.Publish(ctx, statusPrefix+deviceID(2), []byte("{}")); err == nil {
		t.Error("a device speaks for another one")
	}
	if err := tellToLook(ctx, js); err == nil {
		t.Error("a device wakes the others")
	}
	if _, err := pull(ctx, js, t.TempDir()); err == nil {
		t.Error("a device reads the reports of all")
	}
}

// The program's own words, one after the other, as the README has them.
func TestCommands(t *testing.T) {
	broker := newBroker(t)
	repo := newRepository(t)
	repo.publish(t, "R1", 1)
	d := startDevice(t, 1, folder(t), repo, broker, time.Hour, func(b *bridge) { b.every = 24 * time.Hour })
	defer func() { must(t, d.stop()) }()
	do := func(args ...string) (int, string) {
		var out, errOut strings.Builder
		code := dispatch(context.Background(), append(args, "--server", broker.url), &out, &errOut)
		return code, out.String() + errOut.String()
	}
	if code, said := do("setup"); code != exitDone || !strings.Contains(said, streamName) {
		t.Errorf("%d, %s", code, said)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan int, 1)
	go func() {
		var out, errOut strings.Builder
		ended <- dispatch(ctx, []string{"run", "--server", broker.url, "--socket", d.socket, "--spool", filepath.Join(d.dir, "another"), "--every", "2s", "--spread", "0s"}, &out, &errOut)
	}()
	dir := t.TempDir()
	until(t, "the report of the device is pulled", func() string {
		code, said := do("pull", "--dir", dir)
		if _, err := os.Stat(filepath.Join(dir, d.id+".json")); code != exitDone || err != nil {
			return fmt.Sprintf("%d, %s, %v", code, said, err)
		}
		return ""
	})
	repo.publish(t, "R2", 2)
	until(t, "R2 comes by the order to look", func() string {
		if code, said := do("look"); code != exitDone {
			t.Fatalf("%d, %s", code, said)
		}
		st, err := d.client.Status(context.Background())
		if err != nil || st.Release == nil || st.Release.ID != "R2" {
			return fmt.Sprintf("%+v, %v", st, err)
		}
		return ""
	})
	cancel()
	if code := <-ended; code != exitDone {
		t.Errorf("run ends with %d", code)
	}
}
