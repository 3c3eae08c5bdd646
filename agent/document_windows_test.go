package agent

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// alone opens a file as some programs do while they write it: nobody else may.
func alone(t *testing.T, file string) (release func()) {
	t.Helper()
	name, err := syscall.UTF16PtrFromString(file)
	must(t, err)
	h, err := syscall.CreateFile(name, syscall.GENERIC_READ|syscall.GENERIC_WRITE, 0, nil, syscall.OPEN_EXISTING, syscall.FILE_ATTRIBUTE_NORMAL, 0)
	must(t, err)
	return func() { syscall.CloseHandle(h) }
}

// A policy that is just being written is not a wrong one.
func TestPolicyInSomebodysHands(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.toml")
	must(t, os.WriteFile(file, []byte(goodPolicy), 0o600))
	release := alone(t, file)
	time.AfterFunc(50*time.Millisecond, release)
	p, err := LoadPolicy(file)
	if err != nil || p.Enrolled == nil || !*p.Enrolled {
		t.Errorf("%+v, %v", p, err)
	}
	defer alone(t, file)()
	if _, err := LoadPolicy(file); err == nil {
		t.Error("read although nobody may")
	}
}
