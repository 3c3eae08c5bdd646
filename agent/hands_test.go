package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A policy that strangers may change is a refused one, not read at all; one that
// is not there is only absent.
func TestPolicyInStrangersHands(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.toml")
	var hands error
	a := &Agent{o: Options{Config: &Config{}, Hands: func(path string) error {
		if path != file {
			t.Errorf("asked about %s", path)
		}
		return hands
	}}}
	a.o.Config.Policy.File = file
	hands = fmt.Errorf("nothing: %w", fs.ErrNotExist)
	if p, _, err := a.readPolicy(); err != nil || !p.Absent {
		t.Errorf("absent: %+v, %v", p, err)
	}
	must(t, os.WriteFile(file, []byte(goodPolicy), 0o600))
	hands = nil
	if p, _, err := a.readPolicy(); err != nil || p.Absent {
		t.Errorf("%+v, %v", p, err)
	}
	hands = errors.New("Everyone may write to it")
	p, _, err := a.readPolicy()
	if p != nil || !errors.Is(err, ErrPolicyUnreadable) || !strings.Contains(err.Error(), file+" as the policy: Everyone may write to it") {
		t.Errorf("%+v, %v", p, err)
	}
	if j := p.Judged(file, err); j.Problem == "" {
		t.Errorf("eligibility hears nothing: %+v", j)
	}
}
