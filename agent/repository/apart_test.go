package repository

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// What keeps a device from its repository looks alike on a screen; the codes
// tell it apart. Each case is a real server, or the real lack of one.
func TestToldApart(t *testing.T) {
	f := newFixture(t)
	dates := time.Duration(0) // of the server's clock ahead of the device's
	good := f.serve(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Date", f.now.Add(dates).UTC().Format(http.TimeFormat))
		return false
	})
	answers := func(meddle func(w http.ResponseWriter, r *http.Request)) string {
		return f.serve(func(w http.ResponseWriter, r *http.Request) bool { meddle(w, r); return true }).URL
	}
	login := answers(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(http.StatusNotFound)
	})
	proxy := func(status int) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) }))
		t.Cleanup(s.Close)
		return s.URL
	}
	_, strange := authority(t, "Corporate Firewall CA", start.Add(-time.Hour), start.Add(time.Hour))
	inspector := httptest.NewUnstartedServer(http.FileServer(http.Dir(f.dir)))
	inspector.TLS, inspector.Config.ErrorLog = &tls.Config{Certificates: []tls.Certificate{strange}}, quiet
	inspector.StartTLS()
	t.Cleanup(inspector.Close)
	self := httptest.NewTLSServer(http.FileServer(http.Dir(f.dir)))
	self.Config.ErrorLog = quiet
	t.Cleanup(self.Close)
	closed := httptest.NewServer(nil)
	closed.Close()

	for _, c := range []struct {
		name, url, proxy string
		at               time.Duration // of the device's clock after the start
		server           time.Duration
		code             string
		words            []string
	}{
		{name: "no name", url: "http://repository.example.invalid", code: CodeOffline, words: []string{"no way to repository.example.invalid", "connect this device"}},
		{name: "no route", url: "http://224.0.0.1:9", code: CodeOffline, words: []string{"unreachable"}},
		{name: "nobody there", url: closed.URL, code: CodeUnreachable},
		{name: "server failed", url: answers(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) }), code: CodeServer, words: []string{"502"}},
		{name: "portal", url: answers(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, ".root.json") {
				http.NotFound(w, r)
				return
			}
			http.Redirect(w, r, login, http.StatusFound)
		}), code: CodeCaptive, words: []string{"log in to the network"}},
		{name: "proxy wants a login", url: "https://repository.example.invalid", proxy: proxy(407), code: CodeProxyAuth},
		{name: "proxy forbids", url: "https://repository.example.invalid", proxy: proxy(403), code: CodeProxy, words: []string{"answers 403", "allow repository.example.invalid"}},
		{name: "no proxy", url: good.URL, proxy: closed.URL, code: CodeProxy, words: []string{"cannot reach proxy"}},
		{name: "inspected", url: inspector.URL, code: CodeInspection, words: []string{"Corporate Firewall CA", "ca_file"}},
		{name: "signed by itself", url: self.URL, code: CodeTLS},
		{name: "ended", url: good.URL, at: 40 * 24 * time.Hour, code: CodeExpired},
		{name: "ended by this clock only", url: good.URL, at: 40 * 24 * time.Hour, server: -35 * 24 * time.Hour, code: CodeClock, words: []string{"set the clock", "it still holds"}},
		{name: "a little apart", url: good.URL, at: 30*24*time.Hour + time.Hour, server: -2 * time.Hour, code: CodeExpired},
	} {
		t.Run(c.name, func(t *testing.T) {
			if runtime.GOOS != "linux" && c.name == "no route" {
				t.Skip("needs Linux, which refuses a connection to a group of hosts")
			}
			defer func() { f.now, dates = start, 0 }()
			f.now, dates = start.Add(c.at), c.server
			cl, err := New(Config{URL: c.url, Dir: t.TempDir(), InitialRoot: f.root(), Proxy: c.proxy, Now: func() time.Time { return f.now }})
			if err != nil {
				t.Fatal(err)
			}
			if c.name == "no name" { // a resolver that answers that there is none, on this machine
				cl.transport.client.Transport.(*http.Transport).DialContext = (&net.Dialer{Resolver: noNames(t)}).DialContext
			}
			e := refused(t, cl, c.code)
			if e.Hint == "" {
				t.Errorf("%q says nothing about what to do", e.Text)
			}
			for _, w := range c.words {
				if !strings.Contains(e.Text+"; "+e.Hint, w) {
					t.Errorf("%q (%q) does not say %q", e.Text, e.Hint, w)
				}
			}
		})
	}
}

// noNames is a resolver whose only server, at the other end of a pipe, knows no name.
func noNames(t *testing.T) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { theirs.Close() })
		go func() { // over a stream each message has its length before it (RFC 1035 4.2.2)
			for {
				head := make([]byte, 2)
				if _, err := io.ReadFull(theirs, head); err != nil {
					return
				}
				b := make([]byte, binary.BigEndian.Uint16(head))
				if _, err := io.ReadFull(theirs, b); err != nil || len(b) < 4 {
					return
				}
				b[2], b[3] = 0x81, 0x83 // RFC 1035 4.1.1: an answer, recursion, NXDOMAIN
				if _, err := theirs.Write(append(head, b...)); err != nil {
					return
				}
			}
		}()
		return ours, nil
	}}
}

// A clock that is behind makes no check fail, and would never be noticed: what
// was signed later than now says so.
func TestClockBehind(t *testing.T) {
	f := newFixture(t)
	c := f.client("")
	f.now = start.Add(-20 * 24 * time.Hour)
	if cat := mustRefresh(t, c); cat.Doubt == nil || cat.Doubt.Code != CodeClock || !strings.Contains(cat.Doubt.Text, "ACME-1 was signed as published 10 Nov 2026") {
		t.Errorf("%+v", cat.Doubt)
	}
	f.now = start.Add(-time.Hour)
	if cat := mustRefresh(t, c); cat.Doubt != nil {
		t.Errorf("%+v", cat.Doubt)
	}
	// Frozen with a clock that stands still: the server's clock tells.
	f.now = start.Add(24 * time.Hour)
	s := f.serve(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Date", start.Add(50*24*time.Hour).Format(http.TimeFormat))
		return false
	})
	if cat := mustRefresh(t, f.client(s.URL)); cat.Doubt == nil || cat.Doubt.Code != CodeClock || !strings.Contains(cat.Doubt.Text, "the server's 30 Dec 2026") {
		t.Errorf("%+v", cat.Doubt)
	}
}

// An answer that a cache kept for days tells its age: it is no clock that is behind.
func TestAgeOfCachedAnswer(t *testing.T) {
	f := newFixture(t)
	f.now = start.Add(40 * 24 * time.Hour)
	s := f.serve(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Date", start.Format(http.TimeFormat))
		w.Header().Set("Age", "3456000") // 40 days
		return false
	})
	refused(t, f.client(s.URL), CodeExpired)
}

func TestPassing(t *testing.T) {
	for _, code := range []string{CodeSignature, CodeRollback, CodeMixed, CodeDamaged, CodeClock, CodeExpired, CodeInspection, CodeTLS, CodeConfig, CodeStorage, CodeNotFound, CodeTooLarge, CodeUnknown, CodeProxyAuth, ""} {
		if Passing(code) {
			t.Errorf("%q is taken for being away", code)
		}
	}
	for _, code := range []string{CodeOffline, CodeCaptive, CodeUnreachable, CodeServer, CodeTooSlow, CodeProxy} {
		if !Passing(code) {
			t.Errorf("%q is not taken for being away", code)
		}
	}
}

// Whoever puts a pipe in the place of a certificate, of metadata or of a release
// does not stop the daemon.
func TestPipesInPlaceOfFiles(t *testing.T) {
	f := newFixture(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := mkfifo(pipe); err != nil {
		if os.Getenv("HOTPATCH_TEST_ALL") == "1" && runtime.GOOS != "windows" {
			t.Fatalf("needs mkfifo: %v", err)
		}
		t.Skipf("needs mkfifo: %v", err)
	}
	for _, cfg := range []Config{{CAFile: pipe}, {ClientCert: pipe}} {
		cfg.URL, cfg.Dir, cfg.InitialRoot = "https://repository.example.invalid", t.TempDir(), f.root()
		if _, err := New(cfg); CodeOf(err) != CodeConfig {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	c := f.client("")
	cat := mustRefresh(t, c)
	release := f.file("targets/" + targetFile(cat.Offers[0].Target, cat.Offers[0].SHA256))
	for _, name := range []string{f.file("metadata/timestamp.json"), release} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if err := mkfifo(name); err != nil {
			t.Fatal(err)
		}
	}
	c.transport.limits.pause = time.Millisecond
	refused(t, c, CodeUnreachable)
	if _, err := c.Fetch(t.Context(), cat.Offers[0]); CodeOf(err) != CodeUnreachable {
		t.Error(err)
	}
}

func mkfifo(name string) error { return exec.Command("mkfifo", name).Run() }
