package control

import (
	"errors"
	"net"
	"sync"
)

// DefaultSocket is where the daemon listens unless its configuration says otherwise.
const DefaultSocket = defaultSocket

// ErrInUse: somebody listens there already.
var ErrInUse = errors.New("another hotpatchd listens there")

// Listen makes the local socket that the daemon serves on, and removes a stale
// one that nobody listens on. Everyone may connect: the peer's credentials
// decide what he gets.
func Listen(address string) (net.Listener, error) { return listen(address) }

// Limits on connections at one time. One user who opens many must not keep the
// others out, and all together must not keep root out.
const (
	maxConnsPerUser = 16
	maxConns        = 256 // of all users but root
)

// gate counts the open connections by user.
type gate struct {
	mu     sync.Mutex
	total  int
	byUser map[int]int
}

// enter tells whether uid may open one more connection, and counts it.
func (g *gate) enter(uid int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	limit := maxConnsPerUser
	if uid == 0 {
		limit = maxConns
	} else if g.total >= maxConns {
		return false
	}
	if g.byUser[uid] >= limit {
		return false
	}
	if g.byUser == nil {
		g.byUser = map[int]int{}
	}
	g.byUser[uid]++
	if uid != 0 {
		g.total++
	}
	return true
}

func (g *gate) leave(uid int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byUser[uid]--; g.byUser[uid] <= 0 {
		delete(g.byUser, uid)
	}
	if uid != 0 {
		g.total--
	}
}
