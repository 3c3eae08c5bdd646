package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target/ptrace/hosttest"
	"hotpatchd/pe"
)

const (
	// benchStarts hosts are started, one every benchEvery: twenty a second. Each
	// maps the image at some moment within benchWithin of its start.
	benchStarts = 240
	benchEvery  = 50 * time.Millisecond
	benchWithin = 250 * time.Millisecond
	// benchLate hosts map the image when they have been there for long.
	benchLate = 60
	// benchProcesses do nothing while a hundred others start each second: eight
	// of ten end at once, the others after some seconds.
	benchProcesses = 2000
	benchChurn     = 10 * time.Millisecond
	benchLives     = 5 // every fifth lives on
	// benchLook is how often it is looked whether an entry has changed.
	benchLook = time.Millisecond
	// benchPatience bounds the wait for that.
	benchPatience = 20 * time.Second
)

// plainDevice is a device with the intervals that a daemon has by default. It
// leaves alone what is root's, such as the hosts of other tests: processes are
// told of in the first namespace only, so benchmarks have none of their own.
func plainDevice(b *testing.B) *device {
	b.Helper()
	if os.Geteuid() != 0 {
		need(b, "root: the kernel tells nobody else of process starts")
	}
	d := newDevice(b, appFix)
	d.policy("deny = [\"user:root\"]\ncanary = \"0s\"\n")
	text, err := os.ReadFile(d.config)
	if err != nil {
		b.Fatal(err)
	}
	plain := strings.Replace(strings.Replace(string(text), "check_every = \"1s\"\n", "", 1), "[backend]\nscan_every = \"100ms\"\n", "", 1)
	d.write("config.toml", plain)
	d.start()
	time.Sleep(5 * time.Second) // the first passes are nobody's start
	return d
}

// entry is where in app.dll a function begins, and its bytes in the file.
func entry(b *testing.B) (rva uint32, old []byte) {
	b.Helper()
	file, err := os.ReadFile(hosttest.Fixture(b, "mingw/app.dll"))
	if err != nil {
		b.Fatal(err)
	}
	im, err := pe.Parse(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		b.Fatal(err)
	}
	exports, err := im.Exports()
	if err != nil {
		b.Fatal(err)
	}
	for _, e := range exports {
		if e.Name == "vuln" {
			old = make([]byte, 8)
			if err := im.Canonical(old, e.RVA); err != nil {
				b.Fatal(err)
			}
			return e.RVA, old
		}
	}
	b.Fatal("no vuln in app.dll")
	return 0, nil
}

// mapAndWait has a host map the image now and tells how long it was there
// before its function was another one, measured from before the host was asked.
func mapAndWait(h *hosttest.Host, dll string, rva uint32, old []byte) (time.Duration, error) {
	began := time.Now()
	answer, err := h.Ask("load " + dll)
	if err != nil {
		return 0, err
	}
	var base, size uint64
	if _, err := fmt.Sscanf(answer, "load %x %x", &base, &size); err != nil {
		return 0, fmt.Errorf("%q: %v", answer, err)
	}
	now := make([]byte, len(old))
	for time.Since(began) < benchPatience {
		local := []unix.Iovec{{Base: &now[0], Len: uint64(len(now))}}
		remote := []unix.RemoteIovec{{Base: uintptr(base) + uintptr(rva), Len: len(now)}}
		if _, err := unix.ProcessVMReadv(h.PID, local, remote, 0); err != nil {
			return 0, err
		}
		if !bytes.Equal(now, old) {
			return time.Since(began), nil
		}
		time.Sleep(benchLook)
	}
	return 0, fmt.Errorf("process %d was not patched within %v", h.PID, benchPatience)
}

// quantiles reports the middle, the 99th of a hundred and the longest.
func quantiles(b *testing.B, name string, took []time.Duration, failed []error) {
	for _, err := range failed {
		b.Error(err)
	}
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	at := func(percent int) float64 {
		return took[(len(took)*percent+99)/100-1].Seconds() * 1000
	}
	report(name+"_p50", at(50), "ms")
	report(name+"_p99", at(99), "ms")
	report(name+"_longest", at(100), "ms")
	report(name+"_count", float64(len(took)), "images")
}

// sleeper is a host whose image no release names.
func sleeper(b *testing.B, dll string) (*hosttest.Host, error) {
	return hosttest.Launch(b, hosttest.Options{DLL: dll, Call: "vuln", Allow: []int{42}, Credential: nobody})
}

// BenchmarkStarts measures how long images lie in memory before they are
// patched: of processes that start, twenty a second, and of such that have been
// there for long.
func BenchmarkStarts(b *testing.B) {
	d := plainDevice(b)
	rva, old := entry(b)
	dll, other := hosttest.Fixture(b, "mingw/app.dll"), hosttest.Unnamed(b, "mingw/app.dll")
	if err := os.Chmod(other, 0o644); err != nil {
		b.Fatal(err)
	}
	openWay(b, other)

	var mu sync.Mutex
	var took []time.Duration
	var failed []error
	var wg sync.WaitGroup
	tick := time.NewTicker(benchEvery)
	began := d.ticks(b)
	start := time.Now()
	for range benchStarts {
		<-tick.C
		wg.Go(func() {
			at := time.Now().Add(time.Duration(rand.Int64N(int64(benchWithin))))
			h, err := sleeper(b, other)
			var one time.Duration
			if err == nil {
				time.Sleep(time.Until(at))
				one, err = mapAndWait(h, dll, rva, old)
				h.Kill()
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, err)
			} else {
				took = append(took, one)
			}
		})
	}
	tick.Stop()
	wg.Wait()
	report("start_to_patched_20_starts", float64(d.ticks(b)-began)/time.Since(start).Seconds(), "%core")
	quantiles(b, "start_to_patched", took, failed)
	l := d.status().Latency
	report("start_to_patched_p50_as_the_daemon_says", l.P50MS, "ms")
	report("start_to_patched_p99_as_the_daemon_says", l.P99MS, "ms")

	hosts := make([]*hosttest.Host, benchLate)
	for i := range hosts {
		var err error
		if hosts[i], err = sleeper(b, other); err != nil {
			b.Fatal(err)
		}
	}
	time.Sleep(10 * time.Second) // they are not young any more
	took, failed = nil, nil
	for _, h := range hosts {
		wg.Go(func() {
			time.Sleep(time.Duration(rand.Int64N(int64(20 * time.Second))))
			one, err := mapAndWait(h, dll, rva, old)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, err)
			} else {
				took = append(took, one)
			}
		})
	}
	wg.Wait()
	quantiles(b, "late_load", took, failed)
	report("late_load_p99_as_the_daemon_says", d.status().Latency.Late.P99MS, "ms")
}

// openWay lets other users come to a file.
func openWay(b *testing.B, path string) {
	for dir := path; len(dir) > len(os.TempDir()); dir = dir[:strings.LastIndexByte(dir, '/')] {
		info, err := os.Stat(dir)
		if err != nil {
			b.Fatal(err)
		}
		if err := os.Chmod(dir, info.Mode()|0o055); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkManyProcesses measures what the daemon costs on a machine where
// nothing is to be patched, but very much starts.
func BenchmarkManyProcesses(b *testing.B) {
	d := plainDevice(b)
	var all sync.WaitGroup
	sleepers := make([]*exec.Cmd, 0, benchProcesses)
	defer func() {
		for _, c := range sleepers {
			c.Process.Kill()
		}
		for _, c := range sleepers {
			c.Wait()
		}
		all.Wait()
	}()
	for range benchProcesses {
		c := exec.Command("sleep", "600")
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		sleepers = append(sleepers, c)
	}
	time.Sleep(10 * time.Second)
	report("scan_2000_processes", 100*d.share(b), "%core")

	stop := make(chan struct{})
	started := 0
	all.Go(func() {
		tick := time.NewTicker(benchChurn)
		defer tick.Stop()
		for ; ; started++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			c := exec.Command("true")
			if started%benchLives == 0 {
				c = exec.Command("sleep", "3")
			}
			if c.Start() == nil {
				all.Go(func() { c.Wait() })
			}
		}
	})
	time.Sleep(5 * time.Second)
	began, before := time.Now(), started
	share := d.share(b)
	rate := float64(started-before) / time.Since(began).Seconds()
	close(stop)
	report("scan_2000_processes_100_starts", 100*share, "%core")
	report("scan_2000_processes_starts_made", rate, "starts/s")
}
