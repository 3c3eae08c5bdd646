package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const defaultSocket = "/run/hotpatchd/control.sock"

// rootName is what changing things needs besides the group, in refusals.
const rootName = "root"

// dialWait bounds a connection to a local socket: it is made at once, unless
// the daemon's queue is full.
const dialWait = 5 * time.Second

// maxPath is the longest path of a socket (unix(7): sun_path, with its final zero).
const maxPath = 107

func listen(path string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("cannot listen on %q: not an absolute path", path)
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("cannot listen on %s: a socket's path has at most %d bytes", path, maxPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the socket's folder: %w", err)
	}
	if err := checkFolder(dir); err != nil {
		return nil, err
	}
	unlock, err := lock(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) { // a second daemon was faster
		return nil, fmt.Errorf("cannot listen on %s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	// Between Listen and here it has fewer rights, never more.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("cannot open the socket to all users: %w", err)
	}
	return l, nil
}

// checkFolder refuses a folder in which another user could put his own socket
// in our place.
func checkFolder(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("cannot look at the socket's folder: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("cannot listen in %s: it belongs to uid %d", dir, st.Uid)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("cannot listen in %s: others may write to it (mode %v)", dir, info.Mode().Perm())
	}
	return nil
}

// lock keeps two daemons that start at one time from removing each other's
// socket. It is held while the socket is made, and it is a file of its own because a
// folder that all may read all may lock.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the socket: %w", err)
	}
	for deadline := time.Now().Add(dialWait); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("cannot lock the socket %s: %w", path, err)
		}
	}
}

// removeStale removes a socket that nobody listens on, and nothing else.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look at the socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("cannot listen on %s: there is something else, not a socket", path)
	}
	c, err := net.DialTimeout("unix", path, dialWait)
	if err == nil {
		c.Close()
		return fmt.Errorf("cannot listen on %s: %w", path, ErrInUse)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("cannot listen on %s: cannot tell whether it is in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("cannot remove the stale socket: %w", err)
	}
	return nil
}

func dial(ctx context.Context, path string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialWait}
	return d.DialContext(ctx, "unix", path)
}

// peer is who is at the other end, as of the moment he connected. PID is for
// the history only.
func peer(c net.Conn) (Caller, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return Caller{}, fmt.Errorf("a %T has no peer credentials", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Caller{}, err
	}
	if credErr != nil {
		return Caller{}, fmt.Errorf("cannot read the peer's credentials: %w", credErr)
	}
	return Caller{UID: int(cred.Uid), GID: int(cred.Gid), PID: int(cred.Pid)}, nil
}

// identify adds the caller's name and whether he may change things: uid 0, or
// a member of the group by his primary group or by the system's group list as it is
// now, so that who is taken out of the group is out at once.
func identify(c Caller, group string) Caller {
	c.User = strconv.Itoa(c.UID)
	u, err := user.LookupId(c.User)
	if err == nil {
		c.User = u.Username
	}
	// Who runs the daemon has its files and its memory anyway: an ordinary user
	// who tries it on processes of his own.
	if c.UID == 0 || c.UID == os.Geteuid() {
		c.Admin = true
		return c
	}
	c.Admin = false
	if group == "" {
		return c
	}
	g, gErr := user.LookupGroup(group)
	if gErr != nil {
		return c
	}
	if strconv.Itoa(c.GID) == g.Gid {
		c.Admin = true
		return c
	}
	if err != nil {
		return c
	}
	ids, err := u.GroupIds()
	if err != nil {
		return c
	}
	for _, id := range ids {
		if id == g.Gid {
			c.Admin = true
		}
	}
	return c
}
