//go:build !(linux && amd64)

package pehost

import (
	"fmt"
	"os"
	"runtime"
)

// Run says that there is no PE host here.
func Run(args []string) int {
	fmt.Fprintf(os.Stderr, "pe-host: not supported on %s/%s: it calls x86-64 code on Linux\n", runtime.GOOS, runtime.GOARCH)
	return 1
}
