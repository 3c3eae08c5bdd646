package regular

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a")
	if err := os.WriteFile(file, []byte("12345678"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := Read(file, 8); err != nil || string(b) != "12345678" {
		t.Errorf("eight of eight bytes: %q, %v", b, err)
	}
	if _, err := Read(file, 7); err == nil || !strings.Contains(err.Error(), "is longer than 7 bytes") {
		t.Errorf("one byte too long: %v", err)
	}
	if _, err := Read(filepath.Join(dir, "none"), 8); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is missing: %v", err)
	}
	if _, err := Read(dir, 8); err == nil {
		t.Error("a folder is read")
	}
}

// TestCertificates: what the files hold is used, and what is wrong with them is
// said with the key of the configuration and the file.
func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	cert, key := identity(t)
	write := func(name string, b ...byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	ca, both := write("ca.pem", cert...), write("both.pem", append(cert, key...)...)
	empty, long := write("empty.pem"), write("long.pem", make([]byte, maxPEM+1)...)

	var c tls.Config
	if err := Certificates(&c, "", ""); err != nil || c.RootCAs != nil || c.Certificates != nil {
		t.Errorf("no files: %v, %v", c.RootCAs, err)
	}
	if err := Certificates(&c, ca, both); err != nil {
		t.Fatal(err)
	}
	if len(c.Certificates) != 1 {
		t.Errorf("%d certificates, want 1", len(c.Certificates))
	}
	leaf, err := x509.ParseCertificate(c.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: c.RootCAs, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Errorf("the authority is not trusted: %v", err)
	}

	missing := filepath.Join(dir, "missing.pem")
	for _, bad := range []struct{ ca, client, want string }{
		{missing, "", "cannot read ca_file " + missing + ": "},
		{long, "", "is longer than 1048576 bytes"},
		{empty, "", "ca_file " + empty + " holds no certificate"},
		{"", missing, "cannot read client_cert " + missing + ": "},
		{"", ca, "client_cert " + ca + " does not hold a certificate and its key"},
	} {
		err := Certificates(&tls.Config{}, bad.ca, bad.client)
		if err == nil || !strings.Contains(err.Error(), bad.want) || strings.Count(err.Error(), ".pem") != 1 && !strings.Contains(bad.want, "longer") {
			t.Errorf("ca_file %q, client_cert %q: %v, want %q", bad.ca, bad.client, err, bad.want)
		}
	}
}

func identity(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}
