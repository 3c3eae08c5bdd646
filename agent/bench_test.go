package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target/sim"
)

const (
	benchProcesses = 16_000
	benchEvery     = 10 * time.Millisecond // a start
	benchLives     = 5                     // every fifth lives on for benchLife, the others end at once
	benchLife      = 3 * time.Second
	benchWindow    = 20 * time.Second
	// firstPID keeps what starts away from the pids of what is there.
	firstPID = 1 << 20
)

// BenchmarkManyProcesses measures what the daemon costs with its default
// intervals where sixteen thousand processes do nothing and a hundred start each
// second. The machine is simulated; what it costs by itself, with somebody who
// asks for the same lists and does nothing with them, is measured in the same run.
func BenchmarkManyProcesses(b *testing.B) {
	scene := &sim.Scene{Format: sim.SceneFormat, Seed: 1}
	for n := range benchProcesses {
		scene.Processes = append(scene.Processes, sim.Process{PID: 1 + n})
	}
	r := newRig(b, scene)
	r.cfg.Backend.ScanEvery = DefaultConfig().Backend.ScanEvery
	if err := r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}); err != nil {
		b.Fatal(err)
	}
	ask, done := context.WithCancel(b.Context())
	go listOnly(ask, r.m, r.cfg.Backend.ScanEvery)
	alone, made := churn(b, r.m)
	done()
	if err := r.start(); err != nil {
		b.Fatal(err)
	}
	defer r.stop()
	time.Sleep(5 * time.Second) // the first passes
	idle, began := cpuTime(b), time.Now()
	time.Sleep(benchWindow / 2)
	fmt.Printf("bench: scan_16000_sim_idle %.3g %%core\n", 100*(cpuTime(b)-idle).Seconds()/time.Since(began).Seconds())
	both, made2 := churn(b, r.m)
	fmt.Printf("bench: scan_16000_sim_itself %.3g %%core\n", 100*alone)
	fmt.Printf("bench: scan_16000_sim_and_daemon %.3g %%core\n", 100*both)
	fmt.Printf("bench: scan_16000_sim_starts_made %.3g starts/s\n", min(made, made2))
}

// listOnly asks for lists and news.
func listOnly(ctx context.Context, m *sim.Machine, every time.Duration) {
	events, err := m.Watch(ctx)
	if err != nil {
		return
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
		case <-tick.C:
			m.List(ctx)
		}
	}
}

// churn starts and ends processes, and tells what part of a core was used
// meanwhile, and how many started each second.
func churn(b *testing.B, m *sim.Machine) (share, rate float64) {
	b.Helper()
	type life struct {
		pid int
		end time.Time
	}
	var living []life
	before, began := cpuTime(b), time.Now()
	tick := time.NewTicker(benchEvery)
	defer tick.Stop()
	n := 0
	for ; time.Since(began) < benchWindow; n++ {
		<-tick.C
		pid := firstPID + n
		if _, err := m.Start(sim.Process{PID: pid}); err != nil {
			b.Fatal(err)
		}
		if n%benchLives == 0 {
			living = append(living, life{pid, time.Now().Add(benchLife)})
		} else if err := m.Exit(pid); err != nil {
			b.Fatal(err)
		}
		for len(living) > 0 && time.Now().After(living[0].end) {
			if err := m.Exit(living[0].pid); err != nil {
				b.Fatal(err)
			}
			living = living[1:]
		}
	}
	took := time.Since(began).Seconds()
	share, rate = (cpuTime(b)-before).Seconds()/took, float64(n)/took
	for _, l := range living {
		if err := m.Exit(l.pid); err != nil {
			b.Fatal(err)
		}
	}
	return share, rate
}

// cpuTime is the processor time of this process, of all its threads that live.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/schedstat")
	if err != nil || len(tasks) == 0 {
		b.Skip("needs /proc/self/task/*/schedstat")
	}
	var sum time.Duration
	for _, t := range tasks {
		text, err := os.ReadFile(t)
		var ns int64
		if _, scan := fmt.Sscan(string(text), &ns); err == nil && scan == nil {
			sum += time.Duration(ns)
		}
	}
	return sum
}
