//go:build !(linux && amd64)

package ptrace

import (
	"fmt"
	"runtime"

	"hotpatchd/patcher/target"
)

// New says that this backend is for Linux on amd64.
func New() (target.Backend, error) {
	return nil, fmt.Errorf("the ptrace backend needs linux/amd64, this is %s/%s: %w", runtime.GOOS, runtime.GOARCH, target.ErrUnsupported)
}
