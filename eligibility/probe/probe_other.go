//go:build !linux && !windows

package probe

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"hotpatchd/eligibility"
)

// Collect reports that nothing is known: this build reads no facts of this
// system. A device that nothing is known of is not eligible.
func Collect(ctx context.Context, rights func(context.Context) (string, error)) eligibility.Facts {
	f := eligibility.Facts{eligibility.Rights: askRights(ctx, rights)}
	for _, id := range eligibility.IDs() {
		if id != eligibility.Rights {
			f[id] = eligibility.Fact{Problem: unsupported}
		}
	}
	return f
}

// DeviceID is not told on this system.
func DeviceID() (string, error) {
	return "", fmt.Errorf("cannot tell this device from others: %s", unsupported)
}

const unsupported = "this build of hotpatchd reads no facts on " + runtime.GOOS

// BootID names this boot of the system; "" where it cannot be told.
func BootID() string { return "" }

// Slept is not known here.
func Slept() time.Duration { return 0 }

// SystemImage tells whether the system hotpatches the image of a file itself:
// only Windows does.
func SystemImage(string) bool { return false }
