package repository

import (
	"errors"
	"runtime"
	"syscall"
	"time"
)

// On Windows a file that somebody has open is neither replaced nor removed,
// and the moment in which it is replaced nobody opens it. Devices that read the
// folder, virus scanners and search indexers have each file open now and then,
// for a moment.
const (
	inUsePause = 10 * time.Millisecond
	inUseTries = 300 // 3 s: a scanner is done with a release of some megabytes
)

// Windows system error codes.
const (
	errorAccessDenied     = syscall.Errno(5) // also what a missing right gives: so the wait is short
	errorSharingViolation = syscall.Errno(32)
)

// patiently does do again while a file is in somebody's use, a bounded number of times.
func patiently(do func() error) error {
	err := do()
	for n := 1; n < inUseTries && inUse(err); n++ {
		time.Sleep(inUsePause)
		err = do()
	}
	return err
}

func inUse(err error) bool {
	return runtime.GOOS == "windows" && (errors.Is(err, errorSharingViolation) || errors.Is(err, errorAccessDenied))
}
