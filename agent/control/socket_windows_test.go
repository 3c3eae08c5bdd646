package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/windows"
)

var addresses atomic.Int32

// address is where a test may listen: no two tests, nor two runs, share one.
func address(*testing.T) string {
	return fmt.Sprintf(`\\.\pipe\hotpatchd-test-%d-%d`, os.Getpid(), addresses.Add(1))
}

// isWine tells whether Windows is played by Wine, which does not enforce what
// protects a pipe: what it cannot prove is said where it is not asked.
func isWine() bool {
	return windows.NewLazySystemDLL("ntdll.dll").NewProc("wine_get_version").Find() == nil
}

// TestDescriptor holds the pipe's protection against the words that Windows
// enforces. That it does is not provable under Wine, which opens any pipe.
func TestDescriptor(t *testing.T) {
	const me = "S-1-5-21-1-2-3-1001"
	for _, tc := range []struct {
		admin bool
		want  string
	}{
		{true, "O:BAD:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;0x12019b;;;AU)"},
		{false, "O:" + me + "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;" + me + ")(A;;0x12019b;;;AU)"},
	} {
		got := descriptor(me, tc.admin)
		if got != tc.want {
			t.Errorf("%s\nwant %s", got, tc.want)
		}
		if _, err := windows.SecurityDescriptorFromString(got); err != nil {
			t.Errorf("%s: %v", got, err)
		}
	}
	if pipeAccess&windows.FILE_APPEND_DATA != 0 {
		t.Error("users may make instances of the pipe")
	}
	if pipeAccess&(windows.WRITE_DAC|windows.WRITE_OWNER|windows.DELETE) != 0 {
		t.Error("users may change the pipe's protection")
	}
}

func TestListenRefuses(t *testing.T) {
	for address, want := range map[string]string{
		"":                                     "not a pipe of this machine",
		`C:\c.sock`:                            "not a pipe of this machine",
		`\\other\pipe\hotpatchd`:               "not a pipe of this machine",
		`\\.\pipe`:                             "not a pipe of this machine",
		`\\.\pipe\`:                            "has no name",
		`\\.\pipe\` + strings.Repeat("x", 260): "at most 256 characters",
		"\\\\.\\pipe\\a\x00b":                  "holds a zero",
	} {
		l, err := Listen(address)
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("listen on %q: %v, want %q", address, err, want)
		}
		if _, err := Dial(address).Status(t.Context()); address != "" && (!errors.Is(err, ErrNotReachable) || !strings.Contains(err.Error(), want)) {
			t.Errorf("dial %q: %v, want %q", address, err, want)
		}
	}
}

// TestPipeIsTaken: a second daemon, or who took the name first, is told. What
// FILE_FLAG_FIRST_PIPE_INSTANCE does against two that start at one moment, Wine
// does not enforce.
func TestPipeIsTaken(t *testing.T) {
	name := address(t)
	l, err := Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	for range pending + 1 { // asking takes no instance away
		if _, err := Listen(name); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("taken by process %d", os.Getpid())) {
			t.Errorf("a second daemon: %v", err)
		}
	}
	// Busy is taken too.
	var conns []net.Conn
	for range pending {
		c, err := dial(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if _, err := Listen(name); !errors.Is(err, ErrInUse) {
		t.Errorf("while all are busy: %v", err)
	}
	for _, c := range conns {
		c.Close()
	}
	l.Close()
	if l, err = Listen(name); err != nil {
		t.Fatal("after Close: ", err)
	}
	l.Close()
}

// TestCaller asks for real: who calls is known by SID and name, from the token
// of the client. Wine has one user only, who is an administrator.
func TestCaller(t *testing.T) {
	r := start(t, func(s *Server) { s.peer, s.identify = peer, identify })
	if _, err := r.client.Plan(t.Context(), PlanQuery{}); err != nil {
		t.Fatal(err)
	}
	own, err := ownCaller()
	if err != nil {
		t.Fatal(err)
	}
	got := r.fake.firstCaller()
	if got.SID != own.SID || !strings.HasPrefix(got.SID, "S-1-") || got.UID != own.UID || got.GID != -1 || got.PID != os.Getpid() {
		t.Errorf("the service saw %+v, want %+v", got, own)
	}
	if !strings.HasSuffix(got.User, `\`+os.Getenv("USERNAME")) && isWine() {
		t.Errorf("its name is %q, want that of %s", got.User, os.Getenv("USERNAME"))
	}
	if !got.Admin {
		t.Errorf("who runs the daemon is no administrator: %+v", got)
	}
}

func TestIdentify(t *testing.T) {
	own, err := ownCaller()
	if err != nil {
		t.Fatal(err)
	}
	const stranger = "S-1-5-21-9-9-9-1001"
	for name, tc := range map[string]struct {
		c     Caller
		group string
		admin bool
		user  string
	}{
		"system":             {Caller{SID: "S-1-5-18"}, "", true, `NT AUTHORITY\SYSTEM`},
		"stranger":           {Caller{SID: stranger, UID: 7, groups: "S-1-1-0 S-1-5-11"}, "", false, stranger},
		"claims":             {Caller{SID: stranger, UID: 7, Admin: true}, "", false, stranger},
		"no SID is no root":  {Caller{Admin: true}, "", false, ""},
		"member":             {Caller{SID: stranger, UID: 7, groups: "S-1-1-0 S-1-5-32-545"}, "Users", true, stranger},
		"part of a SID":      {Caller{SID: stranger, UID: 7, groups: "S-1-5-32-5451 S-1-5-32-54"}, "Users", false, stranger},
		"no such group":      {Caller{SID: stranger, UID: 7, groups: "S-1-1-0"}, "no-such-group-here", false, stranger},
		"same user, no root": {Caller{SID: own.SID, UID: 7}, "", own.UID != 0, ""},
	} {
		got := identify(tc.c, tc.group)
		if got.Admin != tc.admin {
			t.Errorf("%s: %+v", name, got)
		}
		if tc.user != "" && got.User != tc.user {
			t.Errorf("%s: is called %q, want %q", name, got.User, tc.user)
		}
	}
}

// TestForeignPipe: a client does not talk to a pipe that an ordinary user made
// under the daemon's name.
func TestForeignPipe(t *testing.T) {
	name := address(t)
	sd, err := windows.SecurityDescriptorFromString("O:S-1-5-21-9-9-9-1001D:(A;;GA;;;WD)")
	if err != nil {
		t.Fatal(err)
	}
	l, err := newPipeListener(name, &windows.SecurityAttributes{Length: 24, SecurityDescriptor: sd})
	if err != nil {
		t.Skip("needs the right to make a pipe of somebody else's: ", err) // as on Windows
	}
	defer l.Close()
	_, err = Dial(name).Status(t.Context())
	if !errors.Is(err, ErrNotReachable) || !strings.Contains(err.Error(), "belongs to S-1-5-21-9-9-9-1001") {
		t.Errorf("got %v", err)
	}
}

// TestPipeConn holds a pipe's ends against what net.Conn promises.
func TestPipeConn(t *testing.T) {
	name := address(t)
	l, err := Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := dial(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()

	server.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	var timeout net.Error
	if _, err := server.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("past its deadline a read says %v", err)
	}
	server.SetReadDeadline(time.Time{})

	// Nobody reads: the pipe fills, then a write waits until its deadline.
	client.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	n, err := client.Write(make([]byte, 8*pipeBuffer))
	if !errors.As(err, &timeout) || !timeout.Timeout() || n >= 8*pipeBuffer {
		t.Errorf("past its deadline a write of which %d bytes went says %v", n, err)
	}
	client.Close()

	// What was written before the end is read before the end. A write that ran
	// out of time may have left some of its bytes.
	client, err = dial(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(server, "last words"); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if b, err := io.ReadAll(client); err != nil || string(b) != "last words" {
		t.Errorf("read %q, %v", b, err)
	}
	if _, err := client.Write([]byte("x")); err == nil {
		t.Error("a write to nobody succeeds")
	}
	client.Close()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close a read says %v", err)
	}

	// Close ends a read under way.
	client, err = dial(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ended := make(chan error, 1)
	go func() { _, err := client.Read(make([]byte, 1)); ended <- err }()
	client.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a read of nothing succeeds")
		}
	case <-time.After(deadline):
		t.Fatal("Close does not end a read")
	}
}

// TestListenerCloses: no goroutine and no instance is left behind.
func TestListenerCloses(t *testing.T) {
	name := address(t)
	l, err := Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	// One client was accepted, one was not.
	for range 2 {
		c, err := dial(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	kept, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	waits := make(chan error, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				waits <- err
				return
			}
			c.Close()
		}
	}()
	closed := make(chan struct{})
	go func() { l.Close(); l.Close(); close(closed) }()
	for _, what := range []string{"Accept", "Close"} {
		select {
		case err := <-waits:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept says %v", err)
			}
			waits = nil
		case <-closed:
			closed = nil
		case <-time.After(deadline):
			t.Fatalf("%s or its like does not return", what)
		}
	}
	if _, err := io.WriteString(kept, "still there"); err != nil {
		t.Error("an accepted connection went with the listener: ", err)
	}
	if _, err := dial(t.Context(), name); err == nil {
		t.Error("the pipe is there after Close")
	}
}

// TestManyClientsAtOnce: more than instances wait, each is served, none mixed up.
func TestManyClientsAtOnce(t *testing.T) {
	r := start(t, nil)
	var all sync.WaitGroup
	for i := range 10 * pending {
		all.Go(func() {
			c := Dial(r.socket)
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if _, err := c.Status(ctx); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		})
	}
	all.Wait()
}

// TestNamelessClient sends its first bytes before it is known who it is: the
// way that Windows asks for where the client did not fix its identity. Wine
// always knows at once, so that the waiting is driven by hand.
func TestNamelessClient(t *testing.T) {
	name := address(t)
	security, err := pipeSecurity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := newPipeListener(name, security)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := dial(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server := (<-l.accepted)
	defer server.Close()
	go io.WriteString(client, "GET /v1/status HTTP/1.1\r\nHost: hotpatchd\r\n\r\n")
	if err := server.readFirst(l.done); err != nil || len(server.first) == 0 {
		t.Fatalf("read %q, %v", server.first, err)
	}
	req, err := http.ReadRequest(bufio.NewReader(server))
	if err != nil || req.URL.Path != "/v1/status" {
		t.Errorf("%v, %v", req, err)
	}
	// The end of the listener does not wait for a client that says nothing.
	done := make(chan struct{})
	close(done)
	if err := server.readFirst(done); err == nil {
		t.Error("nothing was read, and no error")
	}
}
