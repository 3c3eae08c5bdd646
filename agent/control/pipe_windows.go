package control

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/windows"
)

const (
	// pending is how many instances of the pipe wait for a client: as many may
	// connect at one moment without being told that the pipe is busy.
	pending = 4
	// pipeBuffer is what the system keeps of either direction, in bytes.
	pipeBuffer = 64 << 10
	// maxNameless bounds the connections that have to send something before the
	// system tells who they are; headerWait bounds each.
	maxNameless = 64
	// firstRead is how much of what such a connection sends is kept for later, in bytes.
	firstRead = 4 << 10
	// instanceWait is the longest pause before another instance is tried where
	// the system could not make one.
	instanceWait = time.Second
)

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return string(a) }

// pipeListener is a net.Listener over instances of one named pipe. It hands
// out connections whose callers are known.
type pipeListener struct {
	name     string
	security *windows.SecurityAttributes
	accepted chan *pipeConn
	nameless chan struct{} // a token each for connections that are not known yet
	done     chan struct{} // closed by Close
	stop     windows.Handle
	once     sync.Once
	work     sync.WaitGroup
}

// newPipeListener makes the pipe, which nobody else may have.
func newPipeListener(name string, security *windows.SecurityAttributes) (*pipeListener, error) {
	l := &pipeListener{name: name, security: security, accepted: make(chan *pipeConn),
		nameless: make(chan struct{}, maxNameless), done: make(chan struct{})}
	first, err := l.instance(windows.FILE_FLAG_FIRST_PIPE_INSTANCE)
	if err != nil {
		return nil, err
	}
	if l.stop, err = windows.CreateEvent(nil, 1, 0, nil); err != nil {
		windows.CloseHandle(first)
		return nil, err
	}
	instances := []windows.Handle{first}
	for len(instances) < pending {
		h, err := l.instance(0)
		if err != nil {
			for _, h := range instances {
				windows.CloseHandle(h)
			}
			windows.CloseHandle(l.stop)
			return nil, err
		}
		instances = append(instances, h)
	}
	for _, h := range instances {
		l.work.Go(func() { l.serve(h) })
	}
	return l, nil
}

// instance makes one end of the pipe that one client can connect to.
func (l *pipeListener) instance(flags uint32) (windows.Handle, error) {
	name, err := windows.UTF16PtrFromString(l.name)
	if err != nil {
		return 0, err
	}
	const mode = windows.PIPE_TYPE_BYTE | windows.PIPE_READMODE_BYTE | windows.PIPE_WAIT | windows.PIPE_REJECT_REMOTE_CLIENTS
	return windows.CreateNamedPipe(name, windows.PIPE_ACCESS_DUPLEX|windows.FILE_FLAG_OVERLAPPED|flags, mode,
		windows.PIPE_UNLIMITED_INSTANCES, pipeBuffer, pipeBuffer, 0, l.security)
}

// serve waits on an instance for a client, and then on a new one.
func (l *pipeListener) serve(h windows.Handle) {
	for {
		if err := l.connect(h); err != nil {
			windows.CloseHandle(h)
			if errors.Is(err, net.ErrClosed) {
				return
			}
		} else {
			connected := h
			l.work.Go(func() { l.admit(connected) })
		}
		for wait := 5 * time.Millisecond; ; wait = min(2*wait, instanceWait) {
			var err error
			if h, err = l.instance(0); err == nil {
				break
			}
			select { // the system is short of something; the other instances still serve
			case <-l.done:
				return
			case <-time.After(wait):
			}
		}
	}
}

// connect waits for a client; net.ErrClosed tells that the listener ends.
func (l *pipeListener) connect(h windows.Handle) error {
	event, err := windows.CreateEvent(nil, 1, 0, nil)
	if err != nil {
		return err
	}
	defer windows.CloseHandle(event)
	o := &windows.Overlapped{HEvent: event}
	switch err = windows.ConnectNamedPipe(h, o); err {
	case nil, windows.ERROR_PIPE_CONNECTED: // it came before we asked
		return nil
	case windows.ERROR_IO_PENDING:
	default: // ERROR_NO_DATA: it came and went
		return err
	}
	which, err := windows.WaitForMultipleObjects([]windows.Handle{l.stop, event}, false, windows.INFINITE)
	if err != nil || which != windows.WAIT_OBJECT_0+1 {
		// The system writes to o until the call is over.
		windows.CancelIoEx(h, o)
	}
	var n uint32
	got := windows.GetOverlappedResult(h, o, &n, true)
	select {
	case <-l.done:
		return net.ErrClosed
	default:
	}
	return errors.Join(err, got)
}

// admit finds out who has connected and hands the connection on.
func (l *pipeListener) admit(h windows.Handle) {
	c := newPipeConn(h, l.name)
	err := c.identify(h)
	if errors.Is(err, windows.ERROR_CANNOT_IMPERSONATE) {
		// A client that did not fix its identity when it connected has one
		// with the first byte it sends.
		select {
		case l.nameless <- struct{}{}:
			err = c.readFirst(l.done)
			<-l.nameless
		default:
		}
		if err == nil {
			err = c.identify(h)
		}
	}
	if err != nil { // nobody we know: no answer
		c.Close()
		return
	}
	select {
	case l.accepted <- c:
	case <-l.done:
		c.Close()
	}
}

// Accept implements net.Listener.
func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "pipe", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Close implements net.Listener. Connections that were accepted stay.
func (l *pipeListener) Close() error {
	l.once.Do(func() {
		close(l.done)
		windows.SetEvent(l.stop)
		l.work.Wait()
		windows.CloseHandle(l.stop)
	})
	return nil
}

// Addr implements net.Listener.
func (l *pipeListener) Addr() net.Addr { return pipeAddr(l.name) }

// pipeConn is one end of a connected pipe as a net.Conn. The runtime's poller
// drives its overlapped handle, deadlines included.
type pipeConn struct {
	file   *os.File
	name   pipeAddr
	first  []byte // read before it was known who sent it
	caller Caller // at the daemon's end
}

// newPipeConn takes over an overlapped handle.
func newPipeConn(h windows.Handle, name string) *pipeConn {
	return &pipeConn{file: os.NewFile(uintptr(h), name), name: pipeAddr(name)}
}

// readFirst reads until something comes, which must be soon.
func (c *pipeConn) readFirst(done <-chan struct{}) error {
	c.file.SetReadDeadline(time.Now().Add(headerWait))
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-done:
			c.file.SetReadDeadline(time.Unix(1, 0))
		case <-ended:
		}
	}()
	b := make([]byte, firstRead)
	n, err := c.file.Read(b)
	c.first = b[:n]
	if n > 0 {
		return c.file.SetReadDeadline(time.Time{})
	}
	return err
}

func (c *pipeConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	n, err := c.file.Read(b)
	return n, c.wrap("read", err)
}

func (c *pipeConn) Write(b []byte) (int, error) {
	n, err := c.file.Write(b)
	return n, c.wrap("write", err)
}

// wrap makes an error of os one of net: net/http asks it for Timeout.
func (c *pipeConn) wrap(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	var p *os.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	if errors.Is(err, os.ErrClosed) {
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "pipe", Addr: c.name, Err: err}
}

func (c *pipeConn) Close() error                       { return c.wrap("close", c.file.Close()) }
func (c *pipeConn) LocalAddr() net.Addr                { return c.name }
func (c *pipeConn) RemoteAddr() net.Addr               { return c.name }
func (c *pipeConn) SetDeadline(t time.Time) error      { return c.file.SetDeadline(t) }
func (c *pipeConn) SetReadDeadline(t time.Time) error  { return c.file.SetReadDeadline(t) }
func (c *pipeConn) SetWriteDeadline(t time.Time) error { return c.file.SetWriteDeadline(t) }
