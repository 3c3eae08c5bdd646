//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"fmt"

	"hotpatchd/patcher/target"
)

// Watch would tell of starts; nothing here does.
func (b *backend) Watch(context.Context) (<-chan target.Event, error) {
	return nil, fmt.Errorf("cannot watch process starts: %w: an ETW session is not used", target.ErrUnsupported)
}
