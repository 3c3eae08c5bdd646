package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"
)

func env(m map[string]string) func(string) string { return func(k string) string { return m[k] } }

// manager listens like a service manager.
func manager(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux: sd_notify")
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	return c
}

func TestNotifyReachesPathAndAbstractSockets(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "n"), fmt.Sprintf("@hotpatchd-test-%d", os.Getpid())} {
		c := manager(t, name)
		if err := notifierFrom(env(map[string]string{"NOTIFY_SOCKET": name})).send("READY=1", "STATUS=watching"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err != nil || string(b[:n]) != "READY=1\nSTATUS=watching" {
			t.Errorf("%s: %q, %v", name, b[:n], err)
		}
	}
}

func TestNotifyWithoutManager(t *testing.T) {
	if err := notifierFrom(env(nil)).send("READY=1"); err != nil {
		t.Error(err)
	}
	if runtime.GOOS == "linux" {
		if err := (notifier{filepath.Join(t.TempDir(), "none")}).send("READY=1"); err == nil {
			t.Error("no error although nobody listens")
		}
	}
}

func TestWatchdogEvery(t *testing.T) {
	me := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"", "", 0}, {"30000000", "", 15 * time.Second}, {"30000000", me, 15 * time.Second}, {"30000000", "1", 0},
		{"x", "", 0}, {"-4", "", 0}, {"1", "", 0}, {"99999999999999999", "", 0},
	} {
		if got := watchdogEvery(env(map[string]string{"WATCHDOG_USEC": c.usec, "WATCHDOG_PID": c.pid})); got != c.want {
			t.Errorf("%q %q: %s, want %s", c.usec, c.pid, got, c.want)
		}
	}
}
