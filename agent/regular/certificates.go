package regular

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// maxPEM bounds a file of certificates, in bytes: the bundle of all public
// authorities has a quarter of that.
const maxPEM = 1 << 20

// Certificates adds what the administrator's files hold: authorities that are
// trusted besides the system's (PEM), and a certificate with its key by which
// this device is known (both in one PEM file). "" is no file. An error is a
// sentence that names the key of the configuration and the file.
func Certificates(c *tls.Config, caFile, clientCert string) error {
	if caFile != "" {
		b, err := Read(caFile, maxPEM)
		if err != nil {
			return fmt.Errorf("cannot read ca_file %s: %w", caFile, innermost(err))
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(b) {
			return fmt.Errorf("ca_file %s holds no certificate in PEM", caFile)
		}
		c.RootCAs = pool
	}
	if clientCert != "" {
		b, err := Read(clientCert, maxPEM)
		if err != nil {
			return fmt.Errorf("cannot read client_cert %s: %w", clientCert, innermost(err))
		}
		cert, err := tls.X509KeyPair(b, b)
		if err != nil {
			return fmt.Errorf("client_cert %s does not hold a certificate and its key in PEM", clientCert)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return nil
}

// innermost is the cause without the call and the path, which the sentence has.
func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
