package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

const (
	// benchWindow is how long the daemon's processor time is watched.
	benchWindow = 20 * time.Second
	benchHosts  = 200
)

func report(name string, value float64, unit string) {
	fmt.Printf("bench: %s %.4g %s\n", name, value, unit)
}

// BenchmarkIdle measures what the daemon costs while nothing happens, with its
// default intervals: without any PE process, and with 200 that were patched.
func BenchmarkIdle(b *testing.B) {
	d := newDevice(b, appFix)
	text, err := os.ReadFile(d.config)
	if err != nil {
		b.Fatal(err)
	}
	plain := strings.Replace(strings.Replace(string(text), "check_every = \"1s\"\n", "", 1), "[backend]\nscan_every = \"100ms\"\n", "", 1)
	d.write("config.toml", plain)
	d.start()
	time.Sleep(5 * time.Second) // the first passes are no idling
	share := d.share(b)
	report("idle_no_pe_process", 100*share, "%core")
	report("idle_resident", d.resident(b), "MB")

	hosts := make([]*hosttest.Host, benchHosts)
	began := time.Now()
	for i := range hosts {
		hosts[i] = app(b, hosttest.Options{})
	}
	d.until("all are patched", func() bool {
		st, err := d.client.Status(b.Context())
		return err == nil && st.Coverage.Patched == benchHosts
	})
	report("start_to_patched_200_processes", time.Since(began).Seconds(), "s")
	time.Sleep(5 * time.Second)
	report("idle_200_pe_processes", 100*d.share(b), "%core")
	report("resident_200_pe_processes", d.resident(b), "MB")
	if st := d.status(); st.State != control.Hotpatched {
		b.Errorf("state %s", st.State)
	}
}

// share is the part of one core that the daemon used during the window.
func (d *device) share(b *testing.B) float64 {
	before, began := d.used(b), time.Now()
	time.Sleep(benchWindow)
	return (d.used(b) - before).Seconds() / time.Since(began).Seconds()
}

// used is the processor time of the daemon's living threads by the scheduler's own
// clock (sched-stats.rst). The ticks of /proc/PID/stat are samples, and one who
// wakes by timers is awake when they are taken.
func (d *device) used(b *testing.B) time.Duration {
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(d.proc.Process.Pid) + "/task/*/schedstat")
	if err != nil || len(tasks) == 0 {
		b.Fatalf("no schedstat of the daemon: %v", err)
	}
	var sum time.Duration
	for _, t := range tasks {
		var ns int64
		if text, err := os.ReadFile(t); err == nil {
			fmt.Sscan(string(text), &ns)
		}
		sum += time.Duration(ns)
	}
	return sum
}

// ticks is the processor time in /proc/PID/stat (proc(5)), in hundredths of a
// second: coarse, but of threads that have ended, too, as those that patched have.
func (d *device) ticks(b *testing.B) int {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(d.proc.Process.Pid) + "/stat")
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(after) // from field 3, state
	user, _ := strconv.Atoi(f[14-3])
	system, _ := strconv.Atoi(f[15-3])
	return user + system
}

func (d *device) resident(b *testing.B) float64 {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(d.proc.Process.Pid) + "/status")
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	kb, _ := strconv.Atoi(strings.Fields(after)[0])
	return float64(kb) / 1024
}
