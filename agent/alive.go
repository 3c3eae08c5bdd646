package agent

import "context"

// Alive returns nil once the loop has answered, which it does between passes.
func (a *Agent) Alive(ctx context.Context) error { return a.call(ctx, func() {}) }
