package repository

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/regular"
)

// limits bound every wait on a server. A device must get on with its work when
// a server, a proxy or an attacker lets it hang.
type limits struct {
	connect  time.Duration // name lookup and TCP, then TLS, each
	header   time.Duration // from request to the first line of the answer
	window   time.Duration // the least speed is judged over this
	least    int64         // bytes a window: fewer is too slow
	document time.Duration // one metadata file, whole
	payload  time.Duration // one release, whole, all attempts
	attempts int           // for one release: cut connections are resumed
	pause    time.Duration // between two attempts
}

// sane are the limits in use. Least speed is 1 KiB a second: below it a full
// release would take days, and nothing but a stalled line is that slow.
var sane = limits{
	connect: 15 * time.Second, header: 30 * time.Second, window: 30 * time.Second, least: 30 << 10,
	document: 2 * time.Minute, payload: 6 * time.Hour, attempts: 5, pause: 2 * time.Second,
}

// transport reads files below one address, of a web server or a folder.
type transport struct {
	base   *url.URL
	client *http.Client // nil for file:
	proxy  string       // host:port for sentences, "" if none
	limits limits
	now    func() time.Time
	time   serverTime
	none   bool // there is no address: everything comes as files

	hanging   atomic.Int32                                     // reads of a folder that do not come back
	openLocal func(path string) (*os.File, os.FileInfo, error) // openRegular, but in tests
}

func newTransport(cfg *Config, limits limits) (*transport, error) {
	if cfg.URL == "" {
		return &transport{base: &url.URL{}, limits: limits, now: cfg.Now, none: true}, nil
	}
	base, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fail(CodeConfig, err, "url %q is not an address", cfg.URL)
	}
	t := &transport{base: base, limits: limits, now: cfg.Now, openLocal: openRegular}
	switch base.Scheme {
	case "file":
		if base.Host != "" && base.Host != "localhost" {
			return nil, fail(CodeConfig, nil, "url %q names a host: a folder is file:/// and its path", cfg.URL)
		}
		return t, nil
	case "http", "https":
		if base.Host == "" {
			return nil, fail(CodeConfig, nil, "url %q has no host", cfg.URL)
		}
	default:
		return nil, fail(CodeConfig, nil, "url %q is neither file, http nor https", cfg.URL)
	}
	rt := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: limits.connect}).DialContext,
		TLSHandshakeTimeout:   limits.connect,
		ResponseHeaderTimeout: limits.header,
		IdleConnTimeout:       limits.window,
		MaxIdleConns:          2,
		ForceAttemptHTTP2:     true,
		DisableCompression:    true, // lengths and ranges count the signed bytes
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12, Time: cfg.Now},
	}
	rt.MaxResponseHeaderBytes = 64 << 10
	if err := t.useProxy(rt, cfg.Proxy); err != nil {
		return nil, err
	}
	if err := regular.Certificates(rt.TLSClientConfig, cfg.CAFile, cfg.ClientCert); err != nil {
		return nil, fail(CodeConfig, err, "%s", err)
	}
	t.client = &http.Client{Transport: rt, CheckRedirect: t.redirect}
	return t, nil
}

func (t *transport) useProxy(rt *http.Transport, proxy string) error {
	if proxy == "" {
		return nil
	}
	u, err := url.Parse(proxy)
	if err != nil || u.Host == "" {
		return fail(CodeConfig, err, "proxy is not an address like http://proxy.example.com:8080")
	}
	t.proxy = u.Host
	rt.Proxy = http.ProxyURL(u)
	rt.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, res *http.Response) error {
		switch {
		case res.StatusCode == http.StatusProxyAuthRequired:
			return t.proxyAuth()
		case res.StatusCode != http.StatusOK:
			return fail(CodeProxy, nil, "proxy %s answers %d when asked for %s", t.proxy, res.StatusCode, t.base.Host).
				hint("let the proxy allow %s, or change [repository] proxy", t.base.Host)
		}
		return nil
	}
	return nil
}

func (t *transport) proxyAuth() *Error {
	return fail(CodeProxyAuth, nil, "proxy %s answers 407, login required", t.proxy).hint("[repository] proxy")
}

// redirect keeps a server from sending us to a file, to plain text or in circles.
func (t *transport) redirect(req *http.Request, via []*http.Request) error {
	const most = 5
	switch {
	case len(via) > most:
		return fail(CodeUnreachable, nil, "the server redirects more than %d times", most)
	case req.URL.Scheme != "https" && req.URL.Scheme != "http":
		return fail(CodeUnreachable, nil, "the server redirects to %s, which is no web address", req.URL.Redacted())
	case req.URL.Scheme == "http" && via[0].URL.Scheme == "https":
		return fail(CodeTLS, nil, "the server redirects from https to http: %s", req.URL.Redacted())
	}
	return nil
}

// document reads metadata/name, at most limit bytes.
func (t *transport) document(ctx context.Context, name string, limit int64) ([]byte, error) {
	ctx, stop := context.WithTimeout(ctx, t.limits.document)
	defer stop()
	var buf bytes.Buffer
	if err := t.read(ctx, "metadata/"+name, 0, limit, &buf, nil); err != nil {
		return nil, err
	}
	if b := bytes.TrimSpace(buf.Bytes()); len(b) > 0 && b[0] == '<' {
		return nil, captive(name)
	}
	return buf.Bytes(), nil
}

func captive(name string) *Error {
	return fail(CodeCaptive, nil, "a web page came back instead of %s (captive portal or proxy login)", name).
		hint("log in to the network with a browser; %s", hintItself)
}

// read copies the file at rel from byte offset on into w: at most limit bytes
// of the whole file, at no less than the least speed. w is written only when
// the answer is sound; if the server begins at 0 instead of offset, rewind is
// called before.
func (t *transport) read(ctx context.Context, rel string, offset, limit int64, w io.Writer, rewind func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	name := path.Base(rel)
	body, began, err := t.open(ctx, rel, offset, limit)
	if err != nil {
		return err
	}
	defer body.Close()
	if began != offset {
		if err := rewind(); err != nil {
			return err
		}
	}
	watched := &watched{r: body}
	done := make(chan struct{})
	defer close(done)
	go watched.watch(done, t.limits, func() {
		cancel(fail(CodeTooSlow, nil, "%s comes slower than %d bytes in %s", name, t.limits.least, t.limits.window).hint(hintStays))
	})
	n, err := io.Copy(w, io.LimitReader(watched, limit-began+1))
	if began+n > limit {
		return tooLarge(name, limit)
	}
	if err != nil {
		return t.readError(ctx, name, err)
	}
	return nil
}

func tooLarge(name string, limit int64) *Error {
	return fail(CodeTooLarge, &metadata.ErrDownloadLengthMismatch{Msg: name}, "%s is longer than %d bytes", name, limit).hint(hintStays)
}

// open returns the body of rel from byte began on.
func (t *transport) open(ctx context.Context, rel string, offset, limit int64) (body io.ReadCloser, began int64, err error) {
	if t.none {
		return nil, 0, fail(CodeConfig, nil, "no repository is configured that has %s", path.Base(rel)).
			hint("hotpatch install FILE, with an export that holds it; or set [repository] url")
	}
	if t.client == nil {
		return t.openFile(ctx, rel, offset, limit)
	}
	name := path.Base(rel)
	u := t.base.JoinPath(rel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, fail(CodeConfig, err, "%s is not an address", u.Redacted())
	}
	req.Header.Set("User-Agent", "hotpatchd")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	res, err := t.client.Do(req)
	if err != nil {
		return nil, 0, t.connectError(ctx, name, err)
	}
	t.time.note(res.Header, t.now())
	began, err = t.judge(res, name, offset, limit)
	if err != nil {
		res.Body.Close()
		return nil, 0, err
	}
	return res.Body, began, nil
}

// judge reads an answer's head: where the body begins, or why it is of no use.
func (t *transport) judge(res *http.Response, name string, offset, limit int64) (int64, error) {
	html := strings.HasPrefix(res.Header.Get("Content-Type"), "text/html")
	switch code := res.StatusCode; {
	case code == http.StatusOK && html, code == http.StatusNetworkAuthenticationRequired,
		html && res.Request != nil && res.Request.URL.Host != t.base.Host && !strings.HasSuffix(name, ".root.json"):
		// Sent elsewhere, to a page for people; but that there is no newer root may be said by such a page, too.
		return 0, captive(name)
	case code == http.StatusOK:
		if res.ContentLength > limit {
			return 0, tooLarge(name, limit)
		}
		return 0, nil
	case code == http.StatusPartialContent && offset > 0:
		if !strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)) {
			return 0, fail(CodeUnreachable, nil, "the server gives another part of %s than it was asked for", name)
		}
		if res.ContentLength > limit-offset {
			return 0, tooLarge(name, limit)
		}
		return offset, nil
	case code == http.StatusProxyAuthRequired:
		return 0, t.proxyAuth()
	case code == http.StatusNotFound, code == http.StatusForbidden, code == http.StatusGone:
		// Object stores answer 403 for what is not there.
		return 0, t.missing(name, fmt.Sprintf("the server answers %d", code))
	default:
		return 0, fail(CodeServer, &metadata.ErrDownloadHTTP{StatusCode: code, URL: name}, "the server answers %d for %s", code, name).hint(hintItself)
	}
}

func (t *transport) missing(name, found string) *Error {
	return fail(CodeNotFound, &metadata.ErrDownloadHTTP{StatusCode: http.StatusNotFound, URL: name}, "there is no %s: %s", name, found).
		hint("is %s the folder that holds metadata/ and targets/?", t.base.Redacted())
}

func (t *transport) openFile(ctx context.Context, rel string, offset, limit int64) (io.ReadCloser, int64, error) {
	name := path.Base(rel)
	file := folder(t.base) + "/" + rel
	f, size, err := openBeside(ctx, file, offset, &t.hanging, t.openLocal)
	var known *Error
	switch {
	case errors.As(err, &known):
		return nil, 0, known
	case ctx.Err() != nil && errors.Is(err, context.Cause(ctx)):
		return nil, 0, t.readError(ctx, name, err)
	case errors.Is(err, os.ErrNotExist) && !isFolder(folder(t.base)):
		return nil, 0, fail(CodeOffline, err, "there is no folder %s", folder(t.base)).
			hint("if the repository is on a stick or a share, connect it; else compare [repository] url; %s", hintStays)
	case errors.Is(err, os.ErrNotExist):
		return nil, 0, t.missing(name, "the folder has no such file")
	case err != nil:
		return nil, 0, fail(CodeUnreachable, err, "cannot read %s: %s", file, reason(err)).hint(hintItself)
	case size > limit:
		f.Close()
		return nil, 0, tooLarge(name, limit)
	}
	return f, offset, nil
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// folder is the path of a file: address, with the drive of Windows in front.
func folder(u *url.URL) string {
	p := u.Path
	if len(p) > 2 && p[0] == '/' && p[2] == ':' {
		p = p[1:]
	}
	return strings.TrimRight(p, "/")
}

// watched counts what comes through a reader.
type watched struct {
	r     io.Reader
	moved atomic.Int64 // bytes since the watcher looked
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.moved.Add(int64(n))
	return n, err
}

// watch calls slow once fewer than the least bytes came in a window.
func (w *watched) watch(done <-chan struct{}, l limits, slow func()) {
	tick := time.NewTicker(l.window)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		if w.moved.Swap(0) < l.least {
			slow()
			return
		}
	}
}
