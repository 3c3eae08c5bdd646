package repository

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// impatient makes a client give up soon: for servers that never get on.
func impatient(c *Client) *Client {
	c.transport.limits.window, c.transport.limits.least = 200*time.Millisecond, 64<<10
	c.transport.limits.attempts, c.transport.limits.pause = 2, time.Millisecond
	return c
}

// brisk makes a client try again at once: for servers that get on in the end.
func brisk(c *Client) *Client {
	c.transport.limits.pause = time.Millisecond
	return c
}

// trickle sends a byte each 20 ms until the client hangs up.
func trickle(w http.ResponseWriter, r *http.Request, head string) {
	fmt.Fprint(w, head)
	for {
		select {
		case <-r.Context().Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
		if _, err := w.Write([]byte(" ")); err != nil {
			return
		}
		w.(http.Flusher).Flush()
	}
}

func TestSlowBody(t *testing.T) {
	f := newFixture(t)
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/metadata/timestamp.json" {
			trickle(w, r, "{")
			return true
		}
		return false
	})
	if e := refused(t, impatient(f.client(s.URL)), CodeTooSlow); !strings.Contains(e.Text, "timestamp.json comes slower than 65536 bytes in 200ms") {
		t.Error(e)
	}
}

func TestStalled(t *testing.T) {
	f := newFixture(t)
	for _, where := range []string{"before the head", "after the head", "in the body"} {
		s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/metadata/timestamp.json" {
				return false
			}
			if where != "before the head" {
				w.WriteHeader(http.StatusOK)
			}
			if where == "in the body" {
				fmt.Fprint(w, `{"signed":`)
			}
			if where != "before the head" {
				w.(http.Flusher).Flush()
			}
			<-r.Context().Done()
			return true
		})
		c := f.client(s.URL)
		limits := sane
		limits.header, limits.window = 300*time.Millisecond, 300*time.Millisecond
		t1, err := newTransport(&c.cfg, limits)
		if err != nil {
			t.Fatal(err)
		}
		c.transport = t1
		refused(t, c, CodeTooSlow)
	}
}

// A document that is fast enough at each moment still has to end.
func TestDocumentDeadline(t *testing.T) {
	f := newFixture(t)
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/metadata/timestamp.json" {
			trickle(w, r, "{")
			return true
		}
		return false
	})
	c := f.client(s.URL)
	c.transport.limits.document = 300 * time.Millisecond
	if e := refused(t, c, CodeTooSlow); !strings.Contains(e.Text, "did not answer in time") {
		t.Error(e)
	}
}

// A server that hangs keeps nobody from what is known.
func TestKnownWhileWaiting(t *testing.T) {
	f := newFixture(t)
	hang := false
	asked := make(chan string, 4)
	ctx, cancel := context.WithCancel(t.Context())
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if hang {
			asked <- r.URL.Path
			<-r.Context().Done() // the client has gone: no answer overtakes the end of ctx
		}
		return hang
	})
	dir := t.TempDir()
	o := mustRefresh(t, f.clientIn(s.URL, dir, Floors{})).Offers[0]
	c := f.clientIn(s.URL, dir, Floors{})
	hang = true
	done := make(chan error, 2)
	go func() { _, err := c.Refresh(ctx); done <- err }()
	go func() { _, err := c.Fetch(ctx, o); done <- err }()
	<-asked
	<-asked
	if catalog, err := c.Cached(); err != nil || len(catalog.Offers) != 1 || c.Floors().Timestamp != 1 {
		t.Errorf("%+v %v", catalog, err)
	}
	if _, err := c.VerifyFile(container(t, "ACME-1", 1, 5000)); err != nil {
		t.Error(err)
	}
	cancel()
	for range 2 {
		if err := <-done; CodeOf(err) != CodeUnreachable {
			t.Errorf("%v", err)
		}
	}
}

func TestStopped(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		cancel()
		<-r.Context().Done()
		return true
	})
	if _, err := f.client(s.URL).Refresh(ctx); CodeOf(err) != CodeUnreachable || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestUnreachable(t *testing.T) {
	f := newFixture(t)
	s := f.serve(nil)
	c := f.client(s.URL)
	s.Close()
	if e := refused(t, c, CodeUnreachable); !strings.Contains(e.Text, "refused") {
		t.Error(e)
	}
	// Not reached is not rolled back, also where the newest root got lost.
	refused(t, f.clientIn(s.URL, t.TempDir(), Floors{Root: 2}), CodeUnreachable)
	for code, want := range map[int]string{500: CodeServer, 503: CodeServer, 429: CodeServer, 404: CodeNotFound, 403: CodeNotFound, 511: CodeCaptive, 407: CodeProxyAuth} {
		s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(code)
			return true
		})
		refused(t, f.client(s.URL), want)
	}
	empty := filepath.Join(t.TempDir(), "none")
	if e := refused(t, f.client(folderURL(empty)), CodeOffline); !strings.Contains(e.Hint, "on a stick") {
		t.Errorf("%+v", e)
	}
	if e := refused(t, f.client(folderURL(t.TempDir())), CodeNotFound); !strings.Contains(e.Hint, "metadata/") {
		t.Errorf("%+v", e)
	}
}

// Object stores answer 403 for what is not there: no newer root, then.
func TestForbiddenMeansMissing(t *testing.T) {
	f := newFixture(t)
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if _, err := os.Stat(f.file(r.URL.Path)); err == nil {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "<Error><Code>AccessDenied</Code></Error>")
		return true
	})
	mustRefresh(t, f.client(s.URL))
}

func TestCaptivePortal(t *testing.T) {
	const page = "<!DOCTYPE html><html><body>Please log in</body></html>"
	f := newFixture(t)
	portal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, page)
	}))
	defer portal.Close()
	for name, answer := range map[string]http.HandlerFunc{
		"page": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, page) },
		"page, said as JSON": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, "\n"+page)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, portal.URL, http.StatusFound) },
		"roots missing": func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "root.json") {
				http.NotFound(w, r)
				return
			}
			fmt.Fprint(w, page)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := f.serve(func(w http.ResponseWriter, r *http.Request) bool { answer(w, r); return true })
			e := refused(t, f.client(s.URL), CodeCaptive)
			if !strings.Contains(e.Text, "a web page came back instead of") || !strings.Contains(e.Text, "(captive portal or proxy login)") {
				t.Error(e)
			}
		})
	}
	// A portal in the way of a release leaves nothing behind.
	c := f.client(f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/targets") {
			return false
		}
		fmt.Fprint(w, page)
		return true
	}).URL)
	o := mustRefresh(t, c).Offers[0]
	if _, err := c.Fetch(t.Context(), o); CodeOf(err) != CodeCaptive {
		t.Errorf("%v", err)
	}
	nothingIn(t, c.cache.target(""))
}

func nothingIn(t testing.TB, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("%s holds %v (%v)", dir, entries, err)
	}
}

func TestRedirects(t *testing.T) {
	f := newFixture(t)
	files := f.serve(nil)
	moved := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, files.URL+r.URL.Path, http.StatusMovedPermanently)
		return true
	})
	mustRefresh(t, f.client(moved.URL))
	for name, to := range map[string]string{"to a file": folderURL(f.dir), "in circles": ""} {
		s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", to+r.URL.Path)
			w.WriteHeader(http.StatusFound)
			return true
		})
		if e := refused(t, f.client(s.URL), CodeUnreachable); !strings.Contains(e.Text, "redirects") {
			t.Errorf("%s: %v", name, e)
		}
	}
}

// A pipe in the folder would block a reader for ever.
func TestFolderOfOddFiles(t *testing.T) {
	f := newFixture(t)
	if err := os.Remove(f.file("metadata/timestamp.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(f.file("metadata/timestamp.json"), 0o755); err != nil {
		t.Fatal(err)
	}
	if e := refused(t, f.client(""), CodeUnreachable); !strings.Contains(e.Text, "not a regular file") || strings.Count(e.Text, "timestamp.json") != 1 {
		t.Error(e)
	}
}

func TestFolderPaths(t *testing.T) {
	for address, want := range map[string]string{
		"file:///srv/repo/":            "/srv/repo",
		"file:///C:/ProgramData/repo":  "C:/ProgramData/repo",
		"file://localhost/srv/a%20b":   "/srv/a b",
		"file:///c:/Users/x/my%20repo": "c:/Users/x/my repo",
	} {
		u, err := url.Parse(address)
		if err != nil || folder(u) != want {
			t.Errorf("%s is %q (%v)", address, folder(u), err)
		}
	}
}

func TestBadSettings(t *testing.T) {
	f := newFixture(t)
	missing := filepath.Join(t.TempDir(), "none.pem")
	for name, cfg := range map[string]Config{
		"scheme": {URL: "ftp://example.com/"}, "no host": {URL: "https:///x"}, "host of a folder": {URL: "file://server/x"},
		"not an address": {URL: "http://[::1"}, "proxy": {URL: "http://example.com", Proxy: "nowhere"},
		"ca_file": {URL: "https://example.com", CAFile: missing}, "client_cert": {URL: "https://example.com", ClientCert: missing},
		"root": {URL: "http://example.com", InitialRoot: []byte("{}")},
	} {
		if cfg.InitialRoot == nil {
			cfg.InitialRoot = f.root()
		}
		cfg.Dir = t.TempDir()
		if _, err := New(cfg); CodeOf(err) != CodeConfig {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// quiet is for servers whose clients are meant to hang up.
var quiet = log.New(io.Discard, "", 0)

// authority makes a certificate authority with one server certificate.
func authority(t *testing.T, name string, from, to time.Time) (pemCA []byte, server tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "127.0.0.1"}, NotBefore: from, NotAfter: to,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: key}
}

func TestTLS(t *testing.T) {
	f := newFixture(t)
	ca, cert := authority(t, "Example Inspection CA", start.Add(-7*24*time.Hour), start.Add(365*24*time.Hour))
	s := httptest.NewUnstartedServer(http.FileServer(http.Dir(f.dir)))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.Config.ErrorLog = quiet
	s.StartTLS()
	defer s.Close()
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	client := func(address, caFile string) *Client {
		c, err := New(Config{URL: address, Dir: t.TempDir(), InitialRoot: f.root(), CAFile: caFile, Now: func() time.Time { return f.now }})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	mustRefresh(t, client(s.URL, caFile))
	if e := refused(t, client(s.URL, ""), CodeInspection); e.Text != `the server's certificate is signed by "Example Inspection CA", which this machine does not trust` || !strings.Contains(e.Hint, "[repository] ca_file") {
		t.Errorf("%+v", e)
	}
	if e := refused(t, client(strings.Replace(s.URL, "127.0.0.1", "localhost", 1), caFile), CodeTLS); !strings.Contains(e.Text, "is not for localhost") {
		t.Errorf("%+v", e)
	}
	f.now = time.Date(2010, 1, 1, 0, 0, 0, 0, time.UTC)
	if e := refused(t, client(s.URL, caFile), CodeClock); e.Text != "certificate is not valid before 3 Nov 2026 12:00 UTC, but this clock says 1 Jan 2010 00:00 UTC" {
		t.Errorf("%+v", e)
	}
	f.now = start.Add(2 * 365 * 24 * time.Hour)
	if e := refused(t, client(s.URL, caFile), CodeTLS); !strings.Contains(e.Text, "ended 10 Nov 2027") {
		t.Errorf("%+v", e)
	}
	f.now = start
	plain := f.serve(nil)
	refused(t, client("https://"+strings.TrimPrefix(plain.URL, "http://"), caFile), CodeTLS)
	// From https to http is a way to listen to what is asked for.
	down := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusFound)
	}))
	down.TLS = s.TLS.Clone()
	down.Config.ErrorLog = quiet
	down.StartTLS()
	defer down.Close()
	if e := refused(t, client(down.URL, caFile), CodeTLS); !strings.Contains(e.Text, "from https to http") {
		t.Errorf("%+v", e)
	}
}

func TestClientCertificate(t *testing.T) {
	f := newFixture(t)
	ca, cert := authority(t, "ACME", start.Add(-time.Hour), start.Add(time.Hour))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	s := httptest.NewUnstartedServer(http.FileServer(http.Dir(f.dir)))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, Time: func() time.Time { return start }}
	s.Config.ErrorLog = quiet
	s.StartTLS()
	defer s.Close()
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	caFile, certFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "client.pem")
	if err := errors.Join(os.WriteFile(caFile, ca, 0o600), os.WriteFile(certFile, both, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, with := range []string{certFile, ""} {
		c, err := New(Config{URL: s.URL, Dir: t.TempDir(), InitialRoot: f.root(), CAFile: caFile, ClientCert: with, Now: func() time.Time { return f.now }})
		if err != nil {
			t.Fatal(err)
		}
		if with != "" {
			mustRefresh(t, c)
		} else if _, err := c.Refresh(t.Context()); CodeOf(err) != CodeTLS {
			t.Errorf("without a certificate: %v", err)
		}
	}
}

func TestProxy(t *testing.T) {
	f := newFixture(t)
	target := f.serve(nil)
	var asked atomic.Int64
	login := true
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if login {
			w.Header().Set("Proxy-Authenticate", "Basic")
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		res, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer res.Body.Close()
		w.WriteHeader(res.StatusCode)
		buf := make([]byte, 1<<20)
		for {
			n, err := res.Body.Read(buf)
			w.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}))
	defer proxy.Close()
	client := func(address string) *Client {
		c, err := New(Config{URL: address, Dir: t.TempDir(), InitialRoot: f.root(), Proxy: proxy.URL, Now: func() time.Time { return f.now }})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	host := strings.TrimPrefix(proxy.URL, "http://")
	for _, address := range []string{target.URL, "https://repo.example.com"} {
		if e := refused(t, client(address), CodeProxyAuth); e.Text != "proxy "+host+" answers 407, login required" || e.Hint != "[repository] proxy" {
			t.Errorf("%s: %+v", address, e)
		}
	}
	login = false
	asked.Store(0)
	mustRefresh(t, client(target.URL))
	if asked.Load() == 0 {
		t.Error("the proxy was passed by")
	}
	proxy.Close()
	if e := refused(t, client(target.URL), CodeProxy); !strings.Contains(e.Text, "cannot reach proxy "+host) {
		t.Errorf("%+v", e)
	}
}

// A connection that breaks goes on where it stopped.
func TestResume(t *testing.T) {
	f := newFixture(t)
	var ranges []string
	cuts := 2
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/targets/") {
			return false
		}
		ranges = append(ranges, r.Header.Get("Range"))
		if cuts == 0 {
			return false
		}
		cuts--
		b := f.read(r.URL.Path)
		from := 0
		if v := r.Header.Get("Range"); v != "" {
			fmt.Sscanf(v, "bytes=%d-", &from)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)-from))
			w.WriteHeader(http.StatusPartialContent)
		} else {
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		}
		w.Write(b[from : from+1000])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	c := brisk(f.client(s.URL))
	var last, total int64
	c.cfg.Progress = func(done, all int64) {
		if done < last {
			t.Errorf("progress went back from %d to %d", last, done)
		}
		last, total = done, all
	}
	o := mustRefresh(t, c).Offers[0]
	b, err := c.Fetch(t.Context(), o)
	if err != nil || !matches(o, b) {
		t.Fatal(err)
	}
	if want := []string{"", "bytes=1000-", "bytes=2000-"}; fmt.Sprint(ranges) != fmt.Sprint(want) {
		t.Errorf("asked for %q, want %q", ranges, want)
	}
	if last != o.Length || total != o.Length {
		t.Errorf("progress ended at %d of %d", last, total)
	}
	info, err := os.Stat(c.cache.target(o.SHA256))
	if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 { // there the folder's descriptor decides
		t.Errorf("kept with mode %v (%v)", info.Mode(), err)
	}
	// From now on it comes from the cache, verified again.
	s.Close()
	if _, err := c.Fetch(t.Context(), o); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(c.cache.target(o.SHA256), b[:100], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Fetch(t.Context(), o); CodeOf(err) != CodeUnreachable {
		t.Errorf("damaged bytes came from the cache: %v", err)
	}
}

// What an earlier attempt left is never believed: not its bytes, not its length.
func TestResumeOfBadPart(t *testing.T) {
	f := newFixture(t)
	for name, part := range map[string][]byte{"other bytes": make([]byte, 700), "too long": make([]byte, 1<<20), "as long": nil} {
		for via, server := range map[string]string{
			"ranges": f.serve(nil).URL,
			"no ranges": f.serve(func(w http.ResponseWriter, r *http.Request) bool {
				r.Header.Del("Range")
				return false
			}).URL,
			"file": "",
		} {
			c := brisk(f.client(server))
			o := mustRefresh(t, c).Offers[0]
			if part == nil {
				part = make([]byte, o.Length)
			}
			if err := os.WriteFile(c.cache.target(o.SHA256+".part"), part, 0o600); err != nil {
				t.Fatal(err)
			}
			b, err := c.Fetch(t.Context(), o)
			if err != nil || !matches(o, b) {
				t.Errorf("%s, %s: %v", name, via, err)
			}
			if _, err := os.Stat(c.cache.target(o.SHA256 + ".part")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s, %s: the part is left", name, via)
			}
		}
	}
}

func TestBadPayload(t *testing.T) {
	for name, c := range map[string]struct {
		code   string
		cause  error
		spoil  func(b []byte) []byte
		asked  int64
		endles bool
	}{
		"flipped bit": {code: CodeSignature, cause: &metadata.ErrLengthOrHashMismatch{}, asked: 1, spoil: func(b []byte) []byte { b[77] ^= 1; return b }},
		"too long":    {code: CodeTooLarge, cause: &metadata.ErrDownloadLengthMismatch{}, asked: 1, spoil: func(b []byte) []byte { return append(b, 0) }},
		"cut off":     {code: CodeUnreachable, asked: int64(sane.attempts), spoil: func(b []byte) []byte { return b[:len(b)-1] }},
		"endless":     {code: CodeTooLarge, asked: 1, endles: true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			var asked atomic.Int64
			s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasPrefix(r.URL.Path, "/targets/") {
					return false
				}
				asked.Add(1)
				if c.endles {
					endless(w)
					return true
				}
				w.Write(c.spoil(f.read(r.URL.Path)))
				return true
			})
			cl := brisk(f.client(s.URL))
			o := mustRefresh(t, cl).Offers[0]
			_, err := cl.Fetch(t.Context(), o)
			if CodeOf(err) != c.code || c.cause != nil && !errors.Is(err, c.cause) {
				t.Errorf("%v", err)
			}
			if asked.Load() != c.asked {
				t.Errorf("asked %d times, want %d", asked.Load(), c.asked)
			}
			if _, err := os.Stat(cl.cache.target(o.SHA256)); !errors.Is(err, os.ErrNotExist) {
				t.Error("a release was kept")
			}
		})
	}
	// A stalled release ends, too.
	f := newFixture(t)
	s := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/targets/") {
			return false
		}
		trickle(w, r, "PK")
		return true
	})
	c := impatient(f.client(s.URL))
	if _, err := c.Fetch(t.Context(), mustRefresh(t, c).Offers[0]); CodeOf(err) != CodeTooSlow {
		t.Errorf("%v", err)
	}
}
