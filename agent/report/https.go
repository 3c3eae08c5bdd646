package report

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
	"strconv"
	"strings"
	"time"
	"unicode"

	"hotpatchd/agent/regular"
)

// Bounds of one delivery: a collector that hangs costs one goroutine for so long.
const (
	connectWait = 15 * time.Second // name lookup and TCP, then TLS, each
	headerWait  = 30 * time.Second // from the document to the first line of the answer
	carryWait   = 2 * time.Minute  // all of it
	// maxAnswer is what is read of an answer: enough to say why.
	maxAnswer = 4 << 10
	// maxWords is what is repeated of an answer in a sentence, in bytes.
	maxWords     = 160
	maxHeader    = 64 << 10
	maxRedirects = 3
)

// IDHeader carries the id of a document, as the draft "The Idempotency-Key HTTP
// Header Field" has it: who has seen the id need not look at the document.
const IDHeader = "Idempotency-Key"

// Collector is where HTTPS takes documents to.
type Collector struct {
	URL        string // https://…; http:// for this machine's own addresses
	Proxy      string // URL of a proxy; "" = none, whatever the environment says
	CAFile     string // PEM; trusted besides the system's roots; "" = those only
	ClientCert string // PEM with certificate and key; "" = none
	Version    string // of the program, for User-Agent
	Now        func() time.Time
}

// HTTPS is the Carrier that posts documents to a collector.
type HTTPS struct {
	url    string
	agent  string
	client *http.Client
	now    func() time.Time
}

// NewHTTPS makes a carrier. It reads the files it is given and asks no network.
func NewHTTPS(c Collector) (*HTTPS, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, errors.New("cannot report: the collector's url is no address of the web")
	}
	rt := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: connectWait}).DialContext,
		TLSHandshakeTimeout:    connectWait,
		ResponseHeaderTimeout:  headerWait,
		IdleConnTimeout:        headerWait,
		MaxIdleConns:           1,
		MaxResponseHeaderBytes: maxHeader,
		DisableCompression:     true,
		ForceAttemptHTTP2:      true,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, Time: c.Now},
	}
	if c.Proxy != "" {
		p, err := url.Parse(c.Proxy)
		if err != nil || p.Host == "" { // it may hold a password: it is not repeated
			return nil, errors.New("cannot report: proxy is not an address like http://proxy.example.com:8080")
		}
		rt.Proxy = http.ProxyURL(p)
	}
	if err := regular.Certificates(rt.TLSClientConfig, c.CAFile, c.ClientCert); err != nil {
		return nil, err
	}
	return &HTTPS{
		url: c.URL, agent: strings.TrimSpace("hotpatchd " + c.Version), now: c.Now,
		client: &http.Client{Transport: rt, CheckRedirect: redirect, Timeout: carryWait},
	}, nil
}

// redirect follows what keeps the document a document and encrypted; any other
// redirect is the answer, which is no delivery. A POST that became a GET would
// be answered 200 by every web page.
func redirect(req *http.Request, via []*http.Request) error {
	was := via[0].URL
	same := req.URL.Scheme == was.Scheme && req.URL.Host == was.Host
	if len(via) > maxRedirects || req.Method != http.MethodPost || req.URL.Scheme != "https" && !same {
		return http.ErrUseLastResponse
	}
	return nil
}

// Carry posts a document once.
func (h *HTTPS) Carry(ctx context.Context, e Entry) Outcome {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(e.Document))
	if err != nil {
		return Outcome{Kind: Failed, Err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", h.agent)
	req.Header.Set(IDHeader, strconv.Quote(e.ID))
	res, err := h.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the address, which the configuration holds
		}
		return Outcome{Kind: Failed, Err: fmt.Errorf("the collector cannot be reached: %s", words(err.Error()))}
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	code := res.StatusCode
	switch {
	case code >= 200 && code < 300:
		return Outcome{Kind: Delivered}
	case code >= 300 && code < 400:
		return Outcome{Kind: Failed, Err: fmt.Errorf("the collector answers %d: it redirects to where a report is not sent", code)}
	}
	why := fmt.Errorf("the collector answers %d", code)
	if w := words(string(answer)); w != "" && err == nil {
		why = fmt.Errorf("%w: %s", why, w)
	}
	if code >= 400 && code < 500 && code != http.StatusRequestTimeout && code != http.StatusTooManyRequests {
		return Outcome{Kind: Refused, Err: why}
	}
	return Outcome{Kind: Failed, Err: why, After: h.after(res.Header.Get("Retry-After"))}
}

// after reads a Retry-After (RFC 9110, 10.2.3): seconds, or a date.
func (h *HTTPS) after(s string) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, t.Sub(h.now()))
	}
	return 0
}

// words makes one short line of what somebody else wrote.
func words(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxWords {
		s = strings.ToValidUTF8(s[:maxWords], "") + "…"
	}
	return s
}
