//go:build !windows

package baseline

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// The child's work, and the folder it works in.
const (
	childWork = "HOTPATCH_BASELINE_WORK"
	childRoot = "HOTPATCH_BASELINE_ROOT"
)

// TestMain turns the test binary into a child that works until it is killed.
func TestMain(m *testing.M) {
	if work := os.Getenv(childWork); work != "" {
		if err := child(work, os.Getenv(childRoot)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is one life of a daemon: recovery, then one piece of work.
func child(work, root string) error {
	d := &disk{root: root}
	x, _, err := Open(d.path("journals"))
	if err != nil {
		return err
	}
	fmt.Println("begun")
	for _, r := range x.Recover(noon) {
		if r.Err != nil {
			return r.Err
		}
	}
	switch work {
	case "stage":
		_, err = x.Stage(bigSet(d), "boot-1", noon)
	case "activate":
		_, err = x.Activate("acme", "boot-2", noon)
	}
	fmt.Println("done", err)
	return nil
}

// bigSet is the set with files large enough that a death finds them half written.
func bigSet(d *disk) Set {
	s := d.set()
	for i := range s.Files {
		s.Files[i].Content = big(destinations[i].new)
		s.Files[i].SHA256 = sum(string(s.Files[i].Content))
	}
	return s
}

func big(text string) []byte { return []byte(strings.Repeat(text+"\n", 1<<14)) }

// bigState is state with the big contents as the new ones.
func (d *disk) bigState() string {
	old, now := 0, 0
	for _, f := range destinations {
		b, err := os.ReadFile(d.path(f.name))
		switch {
		case err != nil && f.old == "", string(b) == f.old:
			old++
		case string(b) == string(big(f.new)):
			now++
		}
	}
	switch len(destinations) {
	case old:
		return "old"
	case now:
		return "new"
	}
	return fmt.Sprintf("%d old, %d new of %d", old, now, len(destinations))
}

// A real process is killed at 200 random moments of staging and of activating:
// the next life finds, or makes, all files old or all new, and finishes.
func TestKilledAtAnyMoment(t *testing.T) {
	kills := 200
	if testing.Short() {
		kills = 20
	}
	d := newDisk(t)
	took := map[string]time.Duration{"stage": 50 * time.Millisecond, "activate": 20 * time.Millisecond}
	ends := map[string]int{}
	for i := 0; i < kills; i++ {
		work := "stage"
		d.recover()
		switch d.phase() {
		case "":
			if d.bigState() == "new" {
				t.Fatalf("kill %d: all new, and no journal", i)
			}
		case Staged:
			work = "activate"
		case Active:
			if s := d.bigState(); s != "new" {
				t.Fatalf("kill %d: active, and the files are %s", i, s)
			}
			if err := d.x.Prove("acme", noon); err != nil {
				t.Fatal(err)
			}
			d.tidy()
			os.Remove(d.path("lib/extra.dll"))
			d.restore() // the next round begins anew
			i--
			continue
		default:
			t.Fatalf("kill %d: after recovery the phase is %s", i, d.phase())
		}
		ran, over := runChild(t, work, d.root, time.Duration(rand.Int64N(int64(took[work]*3/2))))
		if over { // it was done before: it takes that long here
			took[work] = (3*took[work] + max(ran, time.Millisecond)) / 4
		}
		ends[fmt.Sprint(work, " ", map[bool]string{true: "done", false: "killed"}[over])]++
		d.recover()
		if s := d.bigState(); s != "old" && s != "new" {
			t.Fatalf("kill %d, while it was to %s: %s, phase %s", i, work, s, d.phase())
		}
	}
	t.Log(ends)
	for _, what := range []string{"stage killed", "activate killed"} {
		if ends[what] == 0 {
			t.Errorf("%s: never", what)
		}
	}
	d.recover()
	if d.phase() == Active {
		return
	}
	if d.phase() == "" {
		if _, err := d.x.Stage(bigSet(d), "boot-1", noon); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.x.Activate("acme", "boot-2", noon); err != nil || d.bigState() != "new" {
		t.Fatalf("it does not finish: %v, %s", err, d.bigState())
	}
}

// runChild runs a child and kills it after a while from its beginning; over: it had ended.
func runChild(t *testing.T, work, root string, after time.Duration) (ran time.Duration, over bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childWork+"="+work, childRoot+"="+root)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 6)
	if _, err := out.Read(b); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	done := make(chan time.Duration, 1)
	go func() {
		b := make([]byte, 256)
		n, _ := out.Read(b)
		if strings.HasPrefix(string(b[:n]), "done") {
			done <- time.Since(began)
		} else {
			done <- 0
		}
	}()
	timer := time.NewTimer(after)
	defer timer.Stop()
	select {
	case ran = <-done:
		over = ran > 0
	case <-timer.C:
		cmd.Process.Kill()
	}
	cmd.Wait()
	return ran, over
}
