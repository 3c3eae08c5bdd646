//go:build unix

package regular

import (
	"crypto/tls"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestPipe: one that is in the place of a file, and that nobody writes to, is
// refused; it is not waited for.
func TestPipe(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "ca.pem")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func() error{
		"Read":        func() error { _, err := Read(pipe, 1); return err },
		"ca_file":     func() error { return Certificates(&tls.Config{}, pipe, "") },
		"client_cert": func() error { return Certificates(&tls.Config{}, "", pipe) },
	} {
		done := make(chan error, 1)
		go func() { done <- read() }()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), "not a regular file") {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s waits for a writer", name)
		}
	}
}
