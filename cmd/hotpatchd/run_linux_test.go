package main

import (
	"os"
	"syscall"
	"testing"
)

func TestHangupReloads(t *testing.T) {
	h := newFakeHeart()
	served(t, "", h, notifier{})
	// Were the handler not in place before serve is ready, this would end the test.
	until(t, "the policy is read anew", func() bool {
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		return h.reloads.Load() > 0
	})
}
