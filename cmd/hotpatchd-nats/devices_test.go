package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/zap"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/report"
	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher/target/sim"
)

// patience is how long a condition may take on a machine that is busy with
// other things. Nothing is ever concluded from time passing, except failure.
const patience = 120 * time.Second

const fixtures = "../../testdata/fixtures"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func until(t testing.TB, what string, condition func() string) {
	t.Helper()
	deadline, pause := time.Now().Add(patience), 20*time.Millisecond
	for {
		found := condition()
		if found == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s; last: %s", what, patience, found)
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Second) // asking two hundred devices costs something
	}
}

// folder lies in memory where the system has such a place: every transaction of
// a device's state is synced.
func folder(t testing.TB) string {
	t.Helper()
	parent := ""
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		parent = "/dev/shm"
	}
	dir, err := os.MkdirTemp(parent, "hpfleet")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// fleetRepository is a real TUF repository behind a real web server, that
// remembers when which device asked whether there is anything new.
type fleetRepository struct {
	*httptest.Server
	dir  string
	keys repository.Keys

	mu       sync.Mutex
	arrivals map[string][]time.Time
}

func newRepository(t testing.TB) *fleetRepository {
	t.Helper()
	dir := folder(t)
	keys := filepath.Join(dir, "keys")
	_, err := repository.GenerateKeys(keys)
	must(t, err)
	r := &fleetRepository{dir: filepath.Join(dir, "repo"), arrivals: map[string][]time.Time{}}
	r.keys, err = repository.LoadKeys(keys)
	must(t, err)
	files := http.FileServer(http.Dir(r.dir))
	// Each device has an address of its own: /DEVICE/metadata/timestamp.json.
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		device, path, _ := strings.Cut(strings.TrimPrefix(q.URL.Path, "/"), "/")
		if strings.HasSuffix(path, "timestamp.json") {
			r.mu.Lock()
			r.arrivals[device] = append(r.arrivals[device], time.Now())
			r.mu.Unlock()
		}
		q.URL.Path = "/" + path
		files.ServeHTTP(w, q)
	}))
	t.Cleanup(r.Close)
	return r
}

// publish signs and publishes a release of the demonstration's image.
func (r *fleetRepository) publish(t testing.TB, id string, sequence uint32) {
	t.Helper()
	name := fmt.Sprintf("demo-%d.dll", sequence)
	b, err := os.ReadFile(filepath.Join(fixtures, "demo", name))
	must(t, err)
	side, err := os.ReadFile(filepath.Join(fixtures, "demo", name+".base.json"))
	must(t, err)
	base, err := release.ReadBase(side)
	must(t, err)
	sum := sha256.Sum256(b)
	m := &release.Manifest{Format: release.Format, Kind: release.KindHotpatch, ID: id, Product: "demo", Sequence: sequence}
	m.Images = []release.Image{{Name: "demo.dll", Arch: release.ArchOf(base.Machine), File: "images/" + name, Size: int64(len(b)), SHA256: hex.EncodeToString(sum[:]), Base: base.Identity}}
	c, err := release.Write(m, map[string][]byte{"images/" + name: b})
	must(t, err)
	_, err = repository.Publish(r.dir, r.keys, [][]byte{c}, repository.PublishOptions{Now: time.Now()})
	must(t, err)
}

// counts is how often each device has asked.
func (r *fleetRepository) asked(device string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.arrivals[device])
}

// device is one simulated device with a real agent, its control socket, and the
// bridge that the program runs.
type device struct {
	id     string
	dir    string
	spool  *report.Spool
	client *control.Client
	socket string
	stop   func() error
}

// deviceID is a hash, as real ones are.
func deviceID(n int) string {
	sum := sha256.Sum256([]byte(strconv.Itoa(n)))
	return hex.EncodeToString(sum[:8])
}

// startDevice starts agent and bridge; tune may change both before.
func startDevice(t testing.TB, n int, home string, repo *fleetRepository, broker *broker, checkEvery time.Duration, tune func(*bridge)) *device {
	t.Helper()
	d := &device{id: deviceID(n), dir: filepath.Join(home, strconv.Itoa(n))}
	must(t, os.MkdirAll(d.dir, 0o700))
	policy := filepath.Join(d.dir, "policy.toml")
	must(t, os.WriteFile(policy, []byte("format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true\ncanary = \"0s\"\n"), 0o600))
	cfg := agent.DefaultConfig()
	cfg.StateDir, cfg.Policy.File = filepath.Join(d.dir, "state"), policy
	cfg.Control.Socket = filepath.Join(d.dir, "s")
	if runtime.GOOS == "windows" {
		cfg.Control.Socket = `\\.\pipe\` + filepath.Base(home) + "-" + strconv.Itoa(n)
	}
	cfg.Repository.URL, cfg.Repository.Root = repo.URL+"/"+d.id, filepath.Join(repo.dir, "root.json")
	cfg.Repository.CheckEvery = checkEvery
	cfg.Backend.Name, cfg.Backend.ScanEvery = "sim", 10*time.Minute
	m, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Seed: uint64(n), Processes: []sim.Process{{PID: 100, Exe: "/opt/demo", Modules: []sim.Module{{File: "demo/demo.dll"}}}}}, os.DirFS(fixtures))
	must(t, err)
	a, err := agent.New(agent.Options{
		Config: cfg, Backend: m, Boot: "boot-1", Log: zap.NewNop(), Version: "test",
		Facts: func(context.Context) eligibility.Facts {
			f := eligibility.Facts{}
			for id, v := range map[eligibility.ID]string{eligibility.OS: eligibility.Linux, eligibility.Version: "6.1.0", eligibility.Arch: "amd64", eligibility.Rights: eligibility.Granted} {
				f[id] = eligibility.Fact{Known: true, Value: v, Source: "here"}
			}
			return f
		},
		Device: func(f eligibility.Facts) probe.Device { return probe.Describe(f, d.id) },
	})
	must(t, err)
	ln, err := control.Listen(cfg.Control.Socket)
	must(t, err)
	srv := control.NewServer(control.Config{Service: a, Version: "test", Now: time.Now})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 3)
	go func() { ended <- srv.Serve(ln) }()
	go func() { ended <- a.Run(ctx) }()

	d.spool, err = report.OpenSpool(filepath.Join(d.dir, "spool"), 0, 0)
	must(t, err)
	d.socket = cfg.Control.Socket
	d.client = control.Dial(d.socket)
	log := slog.New(slog.DiscardHandler)
	nc, err := (&settings{server: broker.url}).connect(log, nats.RetryOnFailedConnect(true), nats.CustomReconnectDelay(func(int) time.Duration {
		return 100*time.Millisecond + time.Duration(random()*float64(time.Second))
	}))
	must(t, err)
	b := &bridge{daemon: d.client, broker: nc, spool: d.spool, every: 30 * time.Second, spread: time.Second, lookGap: time.Second, log: log,
		pace: report.Pace{First: 200 * time.Millisecond, Most: 2 * time.Second, Asked: time.Second}}
	if tune != nil {
		tune(b)
	}
	go func() { ended <- b.run(ctx) }()
	d.stop = sync.OnceValue(func() error {
		cancel()
		drain, release := context.WithTimeout(context.Background(), patience)
		defer release()
		err := srv.Shutdown(drain)
		for range 3 {
			err = errors.Join(err, <-ended)
		}
		nc.Close()
		d.client.Close()
		return errors.Join(err, a.Close())
	})
	return d
}

// broker is an embedded JetStream server that keeps its streams on disk.
type broker struct {
	t   testing.TB
	dir string
	url string
	srv *server.Server

	users []*server.User // besides admin; nil: anybody may do anything
}

func newBroker(t testing.TB) *broker { return newBrokerWith(t) }

func newBrokerWith(t testing.TB, users ...*server.User) *broker {
	t.Helper()
	b := &broker{t: t, dir: t.TempDir(), url: "nats://127.0.0.1:-1", users: users}
	b.start()
	t.Cleanup(b.stop)
	nc, js := b.client()
	defer nc.Close()
	must(t, setup(context.Background(), js))
	return b
}

func (b *broker) start() {
	b.t.Helper()
	port, err := strconv.Atoi(b.url[strings.LastIndexByte(b.url, ':')+1:])
	must(b.t, err)
	options := &server.Options{Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: b.dir, NoSigs: true, NoLog: true}
	if b.users != nil {
		options.Users = append([]*server.User{{Username: "admin", Password: "pw"}}, b.users...)
	}
	s, err := server.NewServer(options)
	must(b.t, err)
	s.Start()
	if !s.ReadyForConnections(patience) {
		b.t.Fatal("the broker does not start")
	}
	b.srv, b.url = s, s.ClientURL()
	if b.users != nil {
		b.url = strings.Replace(b.url, "nats://", "nats://admin:pw@", 1)
	}
}

func (b *broker) stop() {
	b.srv.Shutdown()
	b.srv.WaitForShutdown()
}

func (b *broker) client() (*nats.Conn, jetstream.JetStream) {
	b.t.Helper()
	nc, err := nats.Connect(b.url)
	must(b.t, err)
	js, err := jetstream.New(nc)
	must(b.t, err)
	return nc, js
}

// stored is one message of the stream.
type stored struct {
	device, id string
	doc        control.Report
}

// everything reads the whole stream, in its order.
func (b *broker) everything() (all []stored) {
	b.t.Helper()
	nc, js := b.client()
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := js.Stream(ctx, streamName)
	must(b.t, err)
	info, err := s.Info(ctx)
	must(b.t, err)
	for n := info.State.FirstSeq; n <= info.State.LastSeq && info.State.Msgs > 0; n++ {
		m, err := s.GetMsg(ctx, n)
		must(b.t, err)
		x := stored{device: strings.TrimPrefix(m.Subject, statusPrefix), id: m.Header.Get(nats.MsgIdHdr)}
		if x.id != report.IDOf(m.Data) {
			b.t.Errorf("message %d has the id %s", n, x.id)
		}
		must(b.t, json.Unmarshal(m.Data, &x.doc))
		all = append(all, x)
	}
	return all
}

// newest is what pull brings, by device.
func (b *broker) newest(dir string) map[string]*control.Report {
	b.t.Helper()
	nc, js := b.client()
	defer nc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := pull(ctx, js, dir)
	must(b.t, err)
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	must(b.t, err)
	out := map[string]*control.Report{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		must(b.t, err)
		doc := &control.Report{}
		must(b.t, json.NewDecoder(bytes.NewReader(text)).Decode(doc))
		if id := strings.TrimSuffix(filepath.Base(f), ".json"); id != doc.Status.Device.ID {
			b.t.Errorf("%s holds the report of %s", f, doc.Status.Device.ID)
		}
		out[doc.Status.Device.ID] = doc
	}
	return out
}
