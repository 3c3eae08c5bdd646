package repository

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"runtime"
	"slices"
	"syscall"
)

// connectError says in words why there was no answer.
func (t *transport) connectError(ctx context.Context, name string, err error) *Error {
	var (
		known     *Error
		unknownCA x509.UnknownAuthorityError
		invalid   x509.CertificateInvalidError
		wrongHost x509.HostnameError
		record    tls.RecordHeaderError
		op        *net.OpError
	)
	host := t.base.Host
	switch {
	case errors.As(err, &known):
		return known
	case errors.As(err, &unknownCA) && selfSigned(unknownCA.Cert):
		return fail(CodeTLS, err, "the server's certificate is signed by itself, %q", issuer(unknownCA.Cert)).
			hint("log in to the network if it asks for that; if the certificate is yours, name it in [repository] ca_file")
	case errors.As(err, &unknownCA):
		return fail(CodeInspection, err, "the server's certificate is signed by %q, which this machine does not trust", issuer(unknownCA.Cert)).
			hint("if that is your own authority, or a firewall of yours that opens TLS, name its certificate in [repository] ca_file; else somebody listens")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		if now := t.now(); now.Before(invalid.Cert.NotBefore) {
			return fail(CodeClock, err, "certificate is not valid before %s, but this clock says %s", moment(invalid.Cert.NotBefore), moment(now)).
				hint("set the clock; %s", hintStays)
		}
		return fail(CodeTLS, err, "the server's certificate ended %s; this clock says %s", moment(invalid.Cert.NotAfter), moment(t.now())).
			hint("compare this clock with another; if it is right, the server needs a new certificate; %s", hintStays)
	case errors.As(err, &wrongHost):
		return fail(CodeTLS, err, "the server's certificate is not for %s", host).
			hint("log in to the network if it asks for that; else compare [repository] url with the server's name")
	case errors.As(err, &invalid), errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch),
		errors.As(err, &op) && op.Op == "remote error": // how crypto/tls reports an alert of the other side
		return fail(CodeTLS, err, "no secure connection to %s", host).hint("[repository] ca_file, client_cert")
	case isOffline(err):
		if t.proxy != "" {
			host = "proxy " + t.proxy
		}
		return fail(CodeOffline, err, "no way to %s: %s", host, reason(err)).hint("connect this device to a network; %s", hintItself)
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return fail(CodeProxy, err, "cannot reach proxy %s: %s", t.proxy, reason(err)).hint("[repository] proxy; %s", hintItself)
	}
	return t.readError(ctx, name, err)
}

// What Windows says where there is no network (Windows Sockets error codes);
// the syscall package gives these names numbers of its own there.
const (
	wsaENetDown     = syscall.Errno(10050)
	wsaENetUnreach  = syscall.Errno(10051)
	wsaEHostUnreach = syscall.Errno(10065)
)

// isOffline tells whether nothing left this device: no route, no address for a name.
func isOffline(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return true
	}
	no := []error{syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTUNREACH}
	if runtime.GOOS == "windows" {
		no = []error{wsaENetDown, wsaENetUnreach, wsaEHostUnreach}
	}
	return slices.ContainsFunc(no, func(e error) bool { return errors.Is(err, e) })
}

func selfSigned(c *x509.Certificate) bool {
	return c != nil && bytes.Equal(c.RawIssuer, c.RawSubject)
}

func issuer(c *x509.Certificate) string {
	if c == nil {
		return "unknown"
	}
	if c.Issuer.CommonName != "" {
		return c.Issuer.CommonName
	}
	return c.Issuer.String()
}

// readError says in words why an answer did not come to its end.
func (t *transport) readError(ctx context.Context, name string, err error) *Error {
	var (
		slow    *Error
		timeout net.Error
	)
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &slow):
		return slow
	case errors.Is(cause, context.Canceled):
		return fail(CodeUnreachable, cause, "the download of %s was stopped", name)
	case errors.Is(cause, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return fail(CodeTooSlow, err, "%s did not answer in time for %s", t.base.Host, name).hint(hintStays)
	}
	return fail(CodeUnreachable, err, "cannot get %s from %s: %s", name, t.place(), reason(err)).hint(hintStays)
}

func (t *transport) place() string {
	if t.client == nil {
		return folder(t.base)
	}
	return t.base.Host
}

// reason is the last link of a chain of errors: what the system said.
func reason(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}
