package report

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// collector is a real HTTPS server with a certificate of its own; ca is the
// file that makes it trusted.
func collector(t *testing.T, h http.HandlerFunc) (s *httptest.Server, ca string) {
	t.Helper()
	s = httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s, ca
}

func carrier(t *testing.T, c Collector) *HTTPS {
	t.Helper()
	if c.Now == nil {
		c.Now = time.Now
	}
	h, err := NewHTTPS(c)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func entry(doc string) Entry { return Entry{ID: IDOf([]byte(doc)), Document: []byte(doc)} }

func TestCarryOverHTTPS(t *testing.T) {
	var seen atomic.Pointer[string]
	s, ca := collector(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		names := []string{}
		for _, c := range r.TLS.PeerCertificates {
			names = append(names, c.Subject.CommonName)
		}
		got := fmt.Sprintf("%s %s %s %s %s %s %v", r.Method, r.URL.Path, r.Header.Get("Content-Type"), r.Header.Get(IDHeader), r.Header.Get("User-Agent"), b, names)
		seen.Store(&got)
		w.WriteHeader(http.StatusAccepted)
	})
	e := entry(`{"a":1}`)
	h := carrier(t, Collector{URL: s.URL + "/in", CAFile: ca, ClientCert: clientCert(t, "device-7"), Version: "1.2"})
	if o := h.Carry(context.Background(), e); o.Kind != Delivered || o.Err != nil {
		t.Fatalf("%+v", o)
	}
	if want := `POST /in application/json ` + strconv.Quote(e.ID) + ` hotpatchd 1.2 {"a":1} [device-7]`; *seen.Load() != want {
		t.Errorf("got  %s\nwant %s", *seen.Load(), want)
	}
}

// Nobody but the collector that was meant gets a report, and nothing but its
// word for it counts as delivered.
func TestCarryTrustsNobodyElse(t *testing.T) {
	var asked atomic.Int64
	s, ca := collector(t, func(w http.ResponseWriter, r *http.Request) { asked.Add(1) })
	if o := carrier(t, Collector{URL: s.URL}).Carry(context.Background(), entry("x")); o.Kind != Failed || !strings.Contains(o.Err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %+v", o)
	}
	late := func() time.Time { return time.Now().AddDate(200, 0, 0) }
	if o := carrier(t, Collector{URL: s.URL, CAFile: ca, Now: late}).Carry(context.Background(), entry("x")); o.Kind != Failed {
		t.Errorf("an expired certificate: %+v", o)
	}
	name := strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
	if o := carrier(t, Collector{URL: name, CAFile: ca}).Carry(context.Background(), entry("x")); o.Kind != Failed {
		t.Errorf("a certificate of another name: %+v", o)
	}
	if asked.Load() != 0 {
		t.Errorf("%d requests came through", asked.Load())
	}
	known := carrier(t, Collector{URL: s.URL, CAFile: ca})
	if o := known.Carry(context.Background(), entry("x")); o.Kind != Delivered {
		t.Errorf("%+v", o)
	}
	// Go asks no proxy of the environment for this machine's own addresses, so that a request shows nothing.
	if known.client.Transport.(*http.Transport).Proxy != nil {
		t.Error("a proxy that nobody configured is asked")
	}
	proxied := atomic.Int64{}
	p := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { proxied.Add(1); w.WriteHeader(407) }))
	defer p.Close()
	o := carrier(t, Collector{URL: s.URL, CAFile: ca, Proxy: strings.Replace(p.URL, "http://", "http://bob:secret@", 1)}).Carry(context.Background(), entry("x"))
	if o.Kind != Failed || proxied.Load() != 1 || strings.Contains(o.Err.Error(), "secret") || asked.Load() != 1 {
		t.Errorf("a proxy that wants a login: %+v, asked %d times", o, proxied.Load())
	}
}

func TestCarryRedirects(t *testing.T) {
	var plainAsked, got atomic.Int64
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { plainAsked.Add(1) }))
	defer plain.Close()
	var s *httptest.Server
	s, ca := collector(t, func(w http.ResponseWriter, r *http.Request) {
		code, to, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		n, _ := strconv.Atoi(code)
		switch to {
		case "plain":
			http.Redirect(w, r, plain.URL, n)
		case "here":
			http.Redirect(w, r, s.URL+"/ok", n)
		case "circle":
			http.Redirect(w, r, r.URL.Path, n)
		default:
			if b, _ := io.ReadAll(r.Body); r.Method == "POST" && string(b) == "x" {
				got.Add(1)
			}
		}
	})
	for path, want := range map[string]Kind{"/307/here": Delivered, "/308/here": Delivered, "/302/here": Failed, "/301/here": Failed, "/303/here": Failed,
		"/307/plain": Failed, "/302/plain": Failed, "/307/circle": Failed} {
		before := got.Load()
		o := carrier(t, Collector{URL: s.URL + path, CAFile: ca}).Carry(context.Background(), entry("x"))
		if o.Kind != want || (want == Delivered) != (got.Load() == before+1) {
			t.Errorf("%s: %+v", path, o)
		}
	}
	if plainAsked.Load() != 0 {
		t.Error("a report went out in plain text")
	}
	// Plain text is for this machine only, so that its redirects stay at the same place.
	other := httptest.NewServer(http.RedirectHandler(plain.URL, 307))
	defer other.Close()
	if o := carrier(t, Collector{URL: other.URL}).Carry(context.Background(), entry("x")); o.Kind != Failed || plainAsked.Load() != 0 {
		t.Errorf("%+v", o)
	}
}

func TestCarryAnswers(t *testing.T) {
	s, ca := collector(t, func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
		if after := r.URL.Query().Get("after"); after != "" {
			w.Header().Set("Retry-After", after)
		}
		w.WriteHeader(code)
		w.Write([]byte("not\x1b[31m " + strings.Repeat("so ", 1<<20)))
	})
	h := carrier(t, Collector{URL: s.URL, CAFile: ca})
	date := time.Now().Add(90 * time.Second).UTC().Format(http.TimeFormat)
	for _, x := range []struct {
		path        string
		want        Kind
		least, most time.Duration
	}{
		{"/200", Delivered, 0, 0}, {"/204", Delivered, 0, 0}, {"/400", Refused, 0, 0}, {"/401", Refused, 0, 0}, {"/404", Refused, 0, 0}, {"/413", Refused, 0, 0},
		{"/408", Failed, 0, 0}, {"/429", Failed, 0, 0}, {"/500", Failed, 0, 0}, {"/503", Failed, 0, 0}, {"/304", Failed, 0, 0},
		{"/429?after=120", Failed, 2 * time.Minute, 2 * time.Minute},
		{"/503?after=" + strings.ReplaceAll(strings.ReplaceAll(date, " ", "%20"), ",", "%2C"), Failed, 30 * time.Second, 90 * time.Second},
		{"/503?after=-5", Failed, 0, 0}, {"/503?after=soon", Failed, 0, 0}, {"/503?after=99999999999999999999", Failed, 0, 0},
	} {
		h.url = s.URL + x.path
		o := h.Carry(context.Background(), entry("x"))
		if o.Kind != x.want || o.After < x.least || o.After > x.most {
			t.Errorf("%s: %+v", x.path, o)
		}
		if o.Err != nil && (len(o.Err.Error()) > 300 || strings.ContainsAny(o.Err.Error(), "\x1b\n")) {
			t.Errorf("%s: %q", x.path, o.Err)
		}
	}
}

// An answer without an end is not read to its end.
func TestCarryEndlessAnswer(t *testing.T) {
	const most = 256 << 20
	sent := make(chan int, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(500)
		n, chunk := 0, make([]byte, 1<<20)
		for n < most {
			m, err := w.Write(chunk)
			if n += m; err != nil {
				break
			}
		}
		sent <- n
	}))
	defer s.Close()
	if o := carrier(t, Collector{URL: s.URL}).Carry(context.Background(), entry("x")); o.Kind != Failed {
		t.Errorf("%+v", o)
	}
	if n := <-sent; n > most/4 { // what the system keeps between two programs is far less
		t.Errorf("%d bytes of an answer were taken", n)
	}
}

// A collector that hangs is left when ctx ends.
func TestCarryEnds(t *testing.T) {
	hang := make(chan struct{})
	s, ca := collector(t, func(w http.ResponseWriter, r *http.Request) { <-hang })
	defer close(hang)
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if o := carrier(t, Collector{URL: s.URL, CAFile: ca}).Carry(ctx, entry("x")); o.Kind != Failed {
		t.Errorf("%+v", o)
	}
}

func TestNewHTTPSRefuses(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Collector{
		"scheme": {URL: "ftp://x"}, "host": {URL: "https://"}, "proxy": {URL: "https://x", Proxy: "secret"}, "ca": {URL: "https://x", CAFile: junk},
		"no ca": {URL: "https://x", CAFile: junk + "2"}, "cert": {URL: "https://x", ClientCert: junk},
	} {
		if _, err := NewHTTPS(c); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// clientCert makes a file with a certificate and its key.
func clientCert(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "client.pem")
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})...)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
