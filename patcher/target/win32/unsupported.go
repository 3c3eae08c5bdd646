//go:build !(windows && (amd64 || arm64))

package win32

import (
	"fmt"
	"runtime"

	"hotpatchd/patcher/target"
)

// New says that this backend is for Windows.
func New() (target.Backend, error) {
	return nil, fmt.Errorf("the win32 backend needs windows/amd64 or windows/arm64, this is %s/%s: %w", runtime.GOOS, runtime.GOARCH, target.ErrUnsupported)
}

// Guardian returns: nothing is to be guarded here.
func Guardian() {}
