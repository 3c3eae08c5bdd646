package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// ErrNotReachable: no daemon listens there.
var ErrNotReachable = errors.New("cannot reach the daemon")

// How long the client waits for an answer.
const (
	askWait  = 30 * time.Second // what the daemon has ready
	workWait = 10 * time.Minute // what it must look up first: the repository, the memory of all processes
	sendWait = 2 * time.Hour    // install and rollback on a machine with very many busy processes
)

const (
	maxAnswer = 256 << 20 // bytes of one document
	maxLine   = 64 << 20  // bytes of one event: the result lists every process
)

// Client calls the daemon. It may be shared between goroutines.
type Client struct {
	socket string
	http   http.Client
}

// Dial makes a client for the daemon at a socket ("" is DefaultSocket). It
// does not connect yet; a call that finds nobody fails with ErrNotReachable.
func Dial(socket string) *Client {
	if socket == "" {
		socket = DefaultSocket
	}
	return &Client{socket: socket, http: http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				c, err := dial(ctx, socket)
				if err != nil {
					return nil, &unreachable{socket, err}
				}
				return c, nil
			},
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxHeader,
			MaxIdleConns:           2,
			IdleConnTimeout:        idleWait,
			// A refused upload is refused before its body is sent.
			ExpectContinueTimeout: headerWait,
		},
	}}
}

// Close gives up idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Socket is where the client looks for the daemon.
func (c *Client) Socket() string { return c.socket }

// unreachable is ErrNotReachable with the place and the reason.
type unreachable struct {
	socket string
	err    error
}

func (u *unreachable) Error() string {
	return fmt.Sprintf("%v at %s: %v", ErrNotReachable, u.socket, u.err)
}
func (u *unreachable) Is(target error) bool { return target == ErrNotReachable }
func (u *unreachable) Unwrap() error        { return u.err }

// Status asks for the verdict.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return ask[Status](ctx, c, "/v1/status", nil, askWait)
}

// Eligibility asks for every check.
func (c *Client) Eligibility(ctx context.Context) (*Eligibility, error) {
	return ask[Eligibility](ctx, c, "/v1/eligibility", nil, askWait)
}

// Offers asks what the repository offers.
func (c *Client) Offers(ctx context.Context) (*Offers, error) {
	return ask[Offers](ctx, c, "/v1/releases", nil, askWait)
}

// Calendar asks what is planned, what was released, and what comes next.
func (c *Client) Calendar(ctx context.Context) (*Calendar, error) {
	return ask[Calendar](ctx, c, "/v1/calendar", nil, askWait)
}

// Processes asks for the processes that q tells and the caller may see.
func (c *Client) Processes(ctx context.Context, q ProcessQuery) (*Processes, error) {
	v := url.Values{}
	if q.PID != 0 {
		v.Set("pid", strconv.Itoa(q.PID))
	}
	if q.Vulnerable {
		v.Set("vulnerable", "true")
	}
	return ask[Processes](ctx, c, "/v1/processes", v, askWait)
}

// Check has the repository refreshed now.
func (c *Client) Check(ctx context.Context) (*Status, error) {
	return order[Status](ctx, c, "/v1/check", struct{}{})
}

// Plan asks what a release would do.
func (c *Client) Plan(ctx context.Context, q PlanQuery) (*Plan, error) {
	v := url.Values{}
	if q.ID != "" {
		v.Set("id", q.ID)
	}
	if q.PID != 0 {
		v.Set("pid", strconv.Itoa(q.PID))
	}
	return ask[Plan](ctx, c, "/v1/plan", v, workWait)
}

// Verify has every site read again.
func (c *Client) Verify(ctx context.Context) (*Verify, error) {
	return ask[Verify](ctx, c, "/v1/verify", nil, workWait)
}

// History asks for at most limit entries, newest first.
func (c *Client) History(ctx context.Context, limit int) (*History, error) {
	return ask[History](ctx, c, "/v1/history", url.Values{"limit": {strconv.Itoa(limit)}}, askWait)
}

// Explain asks what lies at an address of a process.
func (c *Client) Explain(ctx context.Context, pid int, address uint64) (*Explain, error) {
	v := url.Values{"pid": {strconv.Itoa(pid)}, "address": {Addr(address).String()}}
	return ask[Explain](ctx, c, "/v1/explain", v, askWait)
}

// Policy asks for every setting in force and where it comes from.
func (c *Client) Policy(ctx context.Context) (*Settings, error) {
	return ask[Settings](ctx, c, "/v1/policy", nil, askWait)
}

// Hold holds a release.
func (c *Client) Hold(ctx context.Context, id, reason string) (*Change, error) {
	return order[Change](ctx, c, "/v1/hold", holdRequest{id, reason})
}

// ReleaseHold lifts a hold.
func (c *Client) ReleaseHold(ctx context.Context, id, reason string) (*Change, error) {
	return order[Change](ctx, c, "/v1/release-hold", holdRequest{id, reason})
}

// Pause stops all changes until Resume.
func (c *Client) Pause(ctx context.Context) (*Change, error) {
	return order[Change](ctx, c, "/v1/pause", struct{}{})
}

// Resume ends a pause.
func (c *Client) Resume(ctx context.Context) (*Change, error) {
	return order[Change](ctx, c, "/v1/resume", struct{}{})
}

// Rollback takes a release out. progress may be nil.
func (c *Client) Rollback(ctx context.Context, r RollbackRequest, progress func(Event)) (*Change, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return c.change(ctx, "/v1/rollback", "application/json", bytes.NewReader(b), int64(len(b)), progress)
}

// Install applies a release by its ID, or the one in r.File. progress may be nil.
func (c *Client) Install(ctx context.Context, r InstallRequest, progress func(Event)) (*Change, error) {
	if r.File == nil {
		b, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		return c.change(ctx, "/v1/install", "application/json", bytes.NewReader(b), int64(len(b)), progress)
	}
	// The head and the tail of the upload are small; the release between them is not copied.
	var head, tail bytes.Buffer
	m := multipart.NewWriter(&head)
	for _, name := range slices.Sorted(maps.Keys(r.Metadata)) {
		p, err := m.CreateFormFile(partMetadata, name)
		if err != nil {
			return nil, err
		}
		p.Write(r.Metadata[name])
	}
	if _, err := m.CreateFormFile(partRelease, partRelease); err != nil {
		return nil, err
	}
	fmt.Fprintf(&tail, "\r\n--%s--\r\n", m.Boundary())
	size := int64(head.Len() + len(r.File) + tail.Len())
	body := io.MultiReader(&head, bytes.NewReader(r.File), &tail)
	return c.change(ctx, "/v1/install", m.FormDataContentType(), body, size, progress)
}

// Events calls fn with what happens from now on, until ctx ends (nil), fn
// fails, or the daemon goes. ready, if not nil, is called once when nothing is missed any more.
func (c *Client) Events(ctx context.Context, ready func(), fn func(Event) error) error {
	res, err := c.do(ctx, "GET", "/v1/events", nil, "", nil, 0)
	if err != nil {
		return ended(ctx, err)
	}
	defer res.Body.Close()
	if ready != nil {
		ready()
	}
	if err = eachLine(res.Body, fn); err == nil {
		err = &unreachable{c.socket, errors.New("it has ended the stream")}
	}
	return ended(ctx, err)
}

func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Metrics asks for the counts in Prometheus' text format.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	return c.get(ctx, "/metrics", nil, askWait)
}

// Diagnose asks for a zip file for a support request.
func (c *Client) Diagnose(ctx context.Context) ([]byte, error) {
	return c.get(ctx, "/v1/diagnose", nil, workWait)
}

// do sends one request; an answer that is no 200 becomes its error.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, kind string, body io.Reader, size int64) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: hostName, Path: path, RawQuery: q.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.ContentLength = size
		req.Header.Set("Content-Type", kind)
		if size > maxBody {
			req.Header.Set("Expect", "100-continue")
		}
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.plain(ctx, err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return nil, c.plain(ctx, err)
	}
	var doc errorDoc
	if err := decodeDoc(b, &doc); err != nil || doc.Error == nil {
		return nil, Errorf(CodeInternal, "the daemon at %s answers with HTTP status %d and no reason", c.socket, res.StatusCode)
	}
	return nil, doc.Error
}

// plain takes the wrapping of net/http off an error.
func (c *Client) plain(ctx context.Context, err error) error {
	var u *unreachable
	if errors.As(err, &u) {
		return u
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var w *url.Error
	if errors.As(err, &w) {
		err = w.Err
	}
	return fmt.Errorf("the daemon at %s did not answer: %w", c.socket, err)
}

func (c *Client) get(ctx context.Context, path string, q url.Values, wait time.Duration) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("the daemon at %s did not answer within %v", c.socket, wait))
	defer cancel()
	res, err := c.do(ctx, "GET", path, q, "", nil, 0)
	if err != nil {
		return nil, err
	}
	return c.all(ctx, res)
}

func (c *Client) all(ctx context.Context, res *http.Response) ([]byte, error) {
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, c.plain(ctx, err)
	}
	if len(b) > maxAnswer {
		return nil, fmt.Errorf("the answer of the daemon at %s has more than %d bytes", c.socket, maxAnswer)
	}
	return b, nil
}

func ask[T any](ctx context.Context, c *Client, path string, q url.Values, wait time.Duration) (*T, error) {
	b, err := c.get(ctx, path, q, wait)
	if err != nil {
		return nil, err
	}
	doc := new(T)
	if err := decodeDoc(b, doc); err != nil {
		return nil, fmt.Errorf("cannot read the answer of the daemon at %s: %w", c.socket, err)
	}
	return doc, nil
}

func order[T any](ctx context.Context, c *Client, path string, body any) (*T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, workWait, fmt.Errorf("the daemon at %s did not answer within %v", c.socket, workWait))
	defer cancel()
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	res, err := c.do(ctx, "POST", path, nil, "application/json", bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	if b, err = c.all(ctx, res); err != nil {
		return nil, err
	}
	doc := new(T)
	if err := decodeDoc(b, doc); err != nil {
		return nil, fmt.Errorf("cannot read the answer of the daemon at %s: %w", c.socket, err)
	}
	return doc, nil
}

// change sends a request whose answer is a stream that ends with the outcome.
func (c *Client) change(ctx context.Context, path, kind string, body io.Reader, size int64, progress func(Event)) (*Change, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, sendWait, fmt.Errorf("the daemon at %s did not end within %v", c.socket, sendWait))
	defer cancel()
	res, err := c.do(ctx, "POST", path, nil, kind, body, size)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var out *Change
	var outErr error
	err = eachLine(res.Body, func(e Event) error {
		switch {
		case e.Type == EventResult && e.Change != nil:
			out = e.Change
		case e.Type == EventError && e.Error != nil:
			outErr = e.Error
		case progress != nil:
			progress(e)
		}
		return nil
	})
	switch {
	case outErr != nil:
		return nil, outErr
	case out != nil:
		return out, nil
	case err != nil:
		return nil, c.plain(ctx, err)
	}
	return nil, fmt.Errorf("the daemon at %s went away before it was done; what it has begun it finishes when it is back", c.socket)
}

func eachLine(r io.Reader, fn func(Event) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		var e Event
		if err := decodeDoc(s.Bytes(), &e); err != nil {
			return fmt.Errorf("cannot read an event: %w", err)
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	return s.Err()
}
