package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"hotpatchd/agent/control"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher/target/sim"
)

func init() {
	commands["times"] = (*script).wantTimes // N ACTION [KEY=VALUE…]: so many entries of the history, exactly
	commands["waits"] = (*script).wantWaits // PID CODE
	commands["mirror"] = (*script).doMirror // save | old | new: what the repository's web server shows
}

// TestWakesByItself: no scan and no event comes between; the loop knows when the
// deferral ends.
func TestWakesByItself(t *testing.T) {
	scene, err := sim.ParseScene([]byte("format = \"hotpatchd-scene/1\"\n[[processes]]\npid = 100\nmodules = [{ file = \"kernel32.dll\" }, { file = \"mingw/app.dll\" }]\n"))
	if err != nil {
		t.Fatal(err)
	}
	s := &script{rig: newRig(t, scene)}
	s.cfg.Backend.ScanEvery = maxScanEvery
	s.write("policy.toml", goodPolicy+"defer = \"7s\"\n")
	for _, line := range []string{
		"publish R1 app 1 mingw/app-ref-1.dll", "start", "check", "list R1 fits=false reason_code=deferred", "runs 100 app.dll!vuln R1", "stop",
	} {
		if err := s.line(line); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
}

// TestPlaces: a device's place is its own for ever, and devices are spread evenly.
func TestPlaces(t *testing.T) {
	var count [100]int
	const devices = 20000
	for i := range devices {
		sum := sha256.Sum256(fmt.Append(nil, "device", i))
		a := &Agent{device: probe.Device{ID: hex.EncodeToString(sum[:16])}}
		at := a.place()
		if at != a.place() {
			t.Fatal("it moved")
		}
		count[at]++
	}
	for at, n := range count { // 200 on average, 14 the standard deviation
		if n < 120 || n > 280 {
			t.Errorf("%d of %d devices are at %d", n, devices, at)
		}
	}
	a := &Agent{device: probe.Device{ID: "00000000000000050000000000000000"}}
	if a.place() != 5 {
		t.Errorf("the place is %d, and every device's has changed with this", a.place())
	}
	if a.policy = (&Policy{Ring: 7}); a.place() != 7 {
		t.Errorf("ring 7 is at %d", a.place())
	}
}

// wantTimes counts entries of the history. What must not happen has had its
// time: a whole pass is done before.
func (s *script) wantTimes(words []string) error {
	n, err := strconv.Atoi(arg(words, 0))
	if err != nil || len(words) < 2 {
		return errors.Join(err, errors.New("times N ACTION [KEY=VALUE…]"))
	}
	if err := s.pass(); err != nil {
		return err
	}
	return s.ask(func(ctx context.Context, c *control.Client) error {
		h, err := c.History(ctx, 10000)
		if err != nil {
			return err
		}
		found := 0
		for _, e := range h.Entries {
			if e.Action != words[1] {
				continue
			}
			keys := fields(e)
			for _, k := range []string{"product", "release", "pid", "exe", "image", "text"} { // left out where empty
				if keys[k] == nil {
					keys[k] = ""
				}
			}
			if differ(keys, words[2:]) == "" {
				found++
			}
		}
		if found != n {
			return fmt.Errorf("%d times", found)
		}
		return nil
	})
}

// wantWaits: a plan tells why it is not carried out by itself, "" if it is.
func (s *script) wantWaits(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.ask(func(ctx context.Context, c *control.Client) error {
		doc, err := c.Plan(ctx, control.PlanQuery{PID: pid})
		if err != nil {
			return err
		}
		found := ""
		if doc.Waits != nil {
			found = doc.Waits.Code
		}
		if found != arg(words, 1) {
			return fmt.Errorf("it waits for %q", found)
		}
		return nil
	})
}

// doMirror lets one of two web servers answer that differ in what they have
// got: the state that was saved, or the newest.
func (s *script) doMirror(words []string) error {
	repo, old, away := s.path("repo"), s.path("repo-old"), s.path("repo-new")
	switch arg(words, 0) {
	case "save":
		return os.CopyFS(old, os.DirFS(repo))
	case "old":
		return errors.Join(os.Rename(repo, away), os.CopyFS(repo, os.DirFS(old)))
	case "new":
		return errors.Join(os.RemoveAll(repo), os.Rename(away, repo))
	}
	return errors.New("mirror save|old|new, not " + filepath.Base(arg(words, 0)))
}
