package repository

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
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
	case errors.As(err, &unknownCA):
		return fail(CodeTLS, err, "the server's certificate is signed by %q, which this machine does not trust", issuer(unknownCA.Cert)).hint("[repository] ca_file")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		if now := t.now(); now.Before(invalid.Cert.NotBefore) {
			return fail(CodeClock, err, "certificate is not valid before %s, but this clock says %s", moment(invalid.Cert.NotBefore), moment(now)).
				hint("set the clock; %s", hintStays)
		}
		return fail(CodeTLS, err, "the server's certificate ended %s; this clock says %s", moment(invalid.Cert.NotAfter), moment(t.now())).hint(hintStays)
	case errors.As(err, &wrongHost):
		return fail(CodeTLS, err, "the server's certificate is not for %s", host)
	case errors.As(err, &invalid), errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch),
		errors.As(err, &op) && op.Op == "remote error": // how crypto/tls reports an alert of the other side
		return fail(CodeTLS, err, "no secure connection to %s", host).hint("[repository] ca_file, client_cert")
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return fail(CodeUnreachable, err, "cannot reach proxy %s", t.proxy).hint("[repository] proxy")
	}
	return t.readError(ctx, name, err)
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
