package probe

import (
	"context"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hotpatchd/eligibility"
)

// Collect reads the facts of the device it runs on. rights asks the backend
// what the system lets it do (target.Prober's Probe fits); it is bounded by ctx.
// What the owner's policy says is not a fact and not asked here.
func Collect(ctx context.Context, rights func(context.Context) (string, error)) eligibility.Facts {
	return system.collect(ctx, uname(), rights)
}

// DeviceID is a stable name of this device: SHA-256 of a prefix of ours and the
// machine id, as 64 hexadecimal digits.
func DeviceID() (string, error) { return system.deviceID() }

var system = root{os.DirFS("/")}

func uname() name {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return name{err: err}
	}
	return name{
		system:  unix.ByteSliceToString(u.Sysname[:]),
		release: unix.ByteSliceToString(u.Release[:]),
		machine: unix.ByteSliceToString(u.Machine[:]),
	}
}

// BootID names this boot of the system (random(4)); "" where it cannot be read.
func BootID() string {
	text, err := system.read("proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(text)
}

// Slept is how long the system has been asleep since its start (clock_gettime(2):
// CLOCK_MONOTONIC stands still meanwhile, CLOCK_BOOTTIME does not). It is never negative.
func Slept() time.Duration {
	var all, awake unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake) != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &all) != nil {
		return 0
	}
	return time.Duration(max(0, all.Nano()-awake.Nano()))
}

// SystemImage tells whether the system hotpatches the image of a file itself:
// only Windows does.
func SystemImage(string) bool { return false }
