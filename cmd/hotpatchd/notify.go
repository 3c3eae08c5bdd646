package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// notifier tells the service manager how the daemon is, by datagrams to the
// socket it names (sd_notify(3)). Without such a socket it does nothing.
type notifier struct{ socket string }

func notifierFrom(getenv func(string) string) notifier { return notifier{getenv("NOTIFY_SOCKET")} }

// send sends variables, for instance "READY=1". A manager that does not listen is
// not worth failing for: the error is for the log.
func (n notifier) send(variables ...string) error {
	if n.socket == "" {
		return nil
	}
	// A name that begins with @ is abstract; package net knows that.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("cannot notify the service manager: %w", err)
	}
	defer c.Close()
	// The queue of a manager that hangs may be full; the daemon must not hang with it.
	c.SetWriteDeadline(time.Now().Add(notifyWait))
	if _, err := c.Write([]byte(strings.Join(variables, "\n"))); err != nil {
		return fmt.Errorf("cannot notify the service manager: %w", err)
	}
	return nil
}

// notifyWait bounds one datagram to a local socket.
const notifyWait = 2 * time.Second

// watchdogEvery is how often the manager wants to hear that the daemon is alive:
// half of the time after which it would restart it (sd_watchdog_enabled(3)).
// 0: it does not want to, or means another process.
func watchdogEvery(getenv func(string) string) time.Duration {
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	us, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || us < 2 || us > int64(24*time.Hour/time.Microsecond) {
		return 0
	}
	return time.Duration(us) * time.Microsecond / 2
}
