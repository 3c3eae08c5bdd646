package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/sim"
)

// Who has set no repository is told what to set where, and who has one without
// a readable root of trust is told of that.
func TestNobodyToAsk(t *testing.T) {
	for _, c := range []struct {
		name       string
		change     func(*rig)
		text, hint string // of check
		attention  string // its code
		remedy     string
	}{
		{"no url", func(r *rig) { r.cfg.Repository.URL, r.cfg.File = "", "/etc/x/config.toml" },
			"no repository is configured", "set [repository] url and root in /etc/x/config.toml", "no-repository", "or hotpatch install FILE"},
		{"no root", func(r *rig) { os.Remove(r.cfg.Repository.Root) },
			"cannot read the root of trust", "", "repository", "hotpatchd check-config"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 5})
			c.change(r)
			must(t, r.start())
			t.Cleanup(func() { must(t, r.stop()) })
			_, err := r.life.client.Check(context.Background())
			var e *control.Error
			if !errors.As(err, &e) || !strings.Contains(e.Text, c.text) || !strings.Contains(e.Hint, c.hint) || strings.Contains(e.Text, "or its root") {
				t.Errorf("check: %v", err)
			}
			st, err := r.life.client.Status(context.Background())
			must(t, err)
			i := slices.IndexFunc(st.Attention, func(a control.Attention) bool { return a.Code == c.attention })
			if i < 0 || !strings.Contains(st.Attention[i].Remedy, c.remedy) {
				t.Errorf("attention: %+v", st.Attention)
			}
		})
	}
}
