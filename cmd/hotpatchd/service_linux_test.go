package main

import (
	"errors"
	"testing"
)

func TestTheServiceBelongsToRoot(t *testing.T) {
	if err := needRoot(0); err != nil {
		t.Errorf("root is refused: %v", err)
	}
	var h *hintedError
	if err := needRoot(1000); !errors.As(err, &h) || h.hint == "" {
		t.Errorf("a user hears %v", err)
	}
}
