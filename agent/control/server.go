package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os/user"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"
)

// Limits on what a peer may send and how slowly. All are generous for a local
// socket and small for the daemon.
const (
	headerWait  = 5 * time.Second  // for the request's head
	bodyWait    = 10 * time.Second // for a small body
	uploadWait  = 2 * time.Minute  // for a release
	writeWait   = 10 * time.Second // for the peer to take one answer or one line
	idleWait    = time.Minute      // between requests
	maxHeader   = 16 << 10         // bytes of a request's head; net/http adds 4096
	maxBody     = 64 << 10         // bytes of a JSON body
	maxReason   = 1024             // bytes of the reason of a hold
	maxQuery    = 1024             // bytes of a query
	hostName    = "hotpatchd"      // the only Host that is served
	maxHistory  = 10000            // entries in one answer
	maxRecovery = 64 << 10         // bytes of a stack that is reported

	defaultHistory = 100
)

// Config is what a Server needs.
type Config struct {
	Service Service
	Group   string           // members may change things; "" is root only
	Version string           // of the daemon, for the documents
	Now     func() time.Time // the daemon's clock

	// Report, if not nil, hears of refused calls and of failures inside, for
	// the log. A stranger can cause refusals at will: bound what you write.
	Report func(Caller, error)
}

// Server answers on the local socket.
type Server struct {
	cfg    Config
	http   *http.Server
	gate   gate
	quit   chan struct{} // closed when streams should end
	once   sync.Once
	upload chan struct{} // holds one token: one release in memory at a time

	bodyWait, writeWait time.Duration // shorter in tests

	peer     func(net.Conn) (Caller, error)  // as the kernel reports it; replaced in tests
	identify func(c Caller, g string) Caller // as the user database says; replaced in tests
}

type callerKey struct{}

// NewServer makes a server; it serves nothing until Serve.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, quit: make(chan struct{}), upload: make(chan struct{}, 1),
		bodyWait: bodyWait, writeWait: writeWait, peer: peer, identify: identify}
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.handle),
		ReadHeaderTimeout:            headerWait,
		IdleTimeout:                  idleWait,
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,                       // the table of routes is all there is
		ErrorLog:                     log.New(io.Discard, "", 0), // it only tells of peers that misbehave
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if g, ok := c.(*guarded); ok {
				ctx = context.WithValue(ctx, callerKey{}, g.caller)
			}
			return ctx
		},
	}
	return s
}

// Serve answers on l until Shutdown, and then returns nil.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(&guardedListener{l, s})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown stops listening, ends the event streams, and waits until ctx for
// calls under way; what is left then is cut off.
func (s *Server) Shutdown(ctx context.Context) error {
	s.once.Do(func() { close(s.quit) })
	err := s.http.Shutdown(ctx)
	if err != nil {
		s.http.Close()
	}
	return err
}

// guardedListener knows who connects before it hands a connection on.
type guardedListener struct {
	net.Listener
	s *Server
}

func (l *guardedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		caller, err := l.s.peer(c)
		if err != nil { // nobody we know: no answer
			c.Close()
			continue
		}
		if !l.s.gate.enter(caller.UID) {
			l.s.turnAway(c)
			continue
		}
		return &guarded{Conn: c, caller: caller, leave: func() { l.s.gate.leave(caller.UID) }}, nil
	}
}

// turnAway answers without reading, and without waiting: the few bytes fit the
// socket's buffer.
func (s *Server) turnAway(c net.Conn) {
	defer c.Close()
	doc := &errorDoc{Error: Errorf(CodeOverloaded, "too many connections of this user")}
	if b, err := encode(doc, s.cfg.Version, s.cfg.Now()); err == nil {
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		fmt.Fprintf(c, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(b), b)
	}
}

// guarded is a connection that is counted.
type guarded struct {
	net.Conn
	caller Caller
	once   sync.Once
	leave  func()
}

func (g *guarded) Close() error {
	g.once.Do(g.leave)
	return g.Conn.Close()
}

// CloseWrite lets net/http end a refused upload so that the peer reads the answer.
func (g *guarded) CloseWrite() error {
	if c, ok := g.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// handle is the one way in: host, path, method, caller, access, query; then the route.
func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(s.bodyWait))
	rc.SetWriteDeadline(time.Now().Add(s.writeWait))
	c := &call{Server: s, ctx: r.Context(), w: w, r: r}
	known, ok := r.Context().Value(callerKey{}).(Caller)
	if !ok {
		c.fail(Errorf(CodeNotPermitted, "the daemon cannot tell who you are"))
		return
	}
	c.caller = s.identify(known, s.cfg.Group)
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler {
				panic(p)
			}
			stack := debug.Stack()
			s.report(c.caller, fmt.Errorf("panic in %s %s: %v\n%s", r.Method, clip(r.URL.Path), p, stack[:min(len(stack), maxRecovery)]))
			if c.wrote { // and what was written is not whole
				panic(http.ErrAbortHandler)
			}
			c.reply(500, &errorDoc{Error: Errorf(CodeInternal, "the daemon failed at this call; its log says how")})
		}
	}()
	if r.Host != hostName {
		c.fail(Errorf(CodeUsage, "this is not the host %q", clip(r.Host)))
		return
	}
	if r.URL.RawPath != "" || r.URL.Opaque != "" || r.URL.Scheme != "" {
		c.fail(Errorf(CodeNotFound, "this daemon has no such path"))
		return
	}
	rt, e := find(r.Method, r.URL.Path)
	if e != nil {
		c.fail(e)
		return
	}
	if rt.access == admin && !c.caller.Admin {
		c.fail(s.notPermitted(c.caller, rt))
		return
	}
	if e := c.readQuery(rt.params); e != nil {
		c.fail(e)
		return
	}
	if rt.stream != nil {
		rt.stream(c)
		return
	}
	doc, err := rt.answer(c)
	if err != nil {
		c.fail(err)
		return
	}
	c.reply(200, filter(c.caller, doc))
}

func (s *Server) notPermitted(c Caller, rt route) *Error {
	action := rt.path[len("/v1/"):]
	e := Errorf(CodeNotPermitted, "%s needs %s; you are %s", action, rootName, c.User)
	if s.cfg.Group != "" {
		e = Errorf(CodeNotPermitted, "%s needs %s or membership in the group %s; you are %s", action, rootName, s.cfg.Group, c.User)
		e.Hint = groupHint(s.cfg.Group, runtime.GOOS)
	}
	s.report(c, e)
	return e
}

// groupHint says how to become somebody who may.
func groupHint(group, goos string) string {
	make, join := "groupadd "+group, "gpasswd -a USER "+group
	if goos == "windows" {
		make, join = "net localgroup "+group+" /add", "net localgroup "+group+" USER /add"
	}
	if _, err := user.LookupGroup(group); err != nil {
		return fmt.Sprintf("there is no group %s on this machine yet: %s, then %s", group, make, join)
	}
	return "an administrator adds you: " + join
}

func (s *Server) report(c Caller, err error) {
	if s.cfg.Report != nil {
		s.cfg.Report(c, err)
	}
}

// readQuery takes each known key once, and nothing else.
func (c *call) readQuery(known []string) *Error {
	if len(c.r.URL.RawQuery) > maxQuery {
		return Errorf(CodeUsage, "a query has at most %d bytes", maxQuery)
	}
	values, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return Errorf(CodeUsage, "the query cannot be read")
	}
	c.query = map[string]string{}
	for _, k := range known {
		if v, ok := values[k]; ok {
			if len(v) != 1 {
				return Errorf(CodeUsage, "%s is given %d times", k, len(v))
			}
			c.query[k] = v[0]
			delete(values, k)
		}
	}
	for k := range values {
		return Errorf(CodeUsage, "%s does not know %q", c.r.URL.Path, clip(k))
	}
	return nil
}

// readJSON reads a body of known keys; an empty body is {}.
func (c *call) readJSON(into any) error {
	kind, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" {
		return Errorf(CodeUsage, "the body must be application/json")
	}
	err = decodeStrict(http.MaxBytesReader(c.w, c.r.Body, maxBody), into)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return Errorf(CodeTooLarge, "the body has more than %d bytes", maxBody)
	case err != nil:
		return Errorf(CodeUsage, "the body cannot be read: %s", clip(err.Error()))
	}
	return nil
}

// reply writes one document; nil means that the filter knows no way to show it.
func (c *call) reply(status int, doc any) {
	if doc == nil {
		c.fail(Errorf(CodeNotPermitted, "this is not for %s", c.caller.User))
		return
	}
	b, err := encode(doc, c.cfg.Version, c.cfg.Now())
	if err != nil {
		c.report(c.caller, err)
		http.Error(c.w, "", 500)
		return
	}
	c.write(status, "application/json", b)
}

func (c *call) write(status int, contentType string, b []byte) {
	http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(c.writeWait))
	c.wrote = true
	h := c.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(b)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	c.w.WriteHeader(status)
	io.Copy(c.w, bytes.NewReader(b))
}

// fail answers with an error.
func (c *call) fail(err error) {
	e := asError(err)
	if e.Code == CodeInternal {
		c.report(c.caller, err)
	}
	c.reply(statusOf(e), &errorDoc{Error: c.errorFor(e)})
}

func statusOf(e *Error) int {
	if n, ok := httpStatus[e.Code]; ok {
		return n
	}
	return 500
}

func (c *call) errorFor(e *Error) *Error {
	if c.caller.Admin {
		return e
	}
	return strangersError(e)
}
