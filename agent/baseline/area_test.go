package baseline

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// disk is a folder of programs with three files: two to be replaced, one new.
type disk struct {
	t    testing.TB
	root string
	x    *Area
}

func newDisk(t testing.TB) *disk {
	t.Helper()
	d := &disk{t: t, root: t.TempDir()}
	if err := os.MkdirAll(d.path("bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(d.path("lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	d.restore()
	d.reopen()
	return d
}

func (d *disk) path(name string) string { return filepath.Join(d.root, name) }

// destinations are the files of the set: all three, by what they hold before and after.
var destinations = []struct{ name, old, new string }{
	{"bin/app.exe", "old program", "new program, longer than the old one"},
	{"lib/app.dll", "old library", "new library"},
	{"lib/extra.dll", "", "a library that was not there"},
}

func (d *disk) restore() {
	d.t.Helper()
	for _, f := range destinations {
		if f.old == "" {
			os.Remove(d.path(f.name))
			continue
		}
		if err := os.WriteFile(d.path(f.name)+".w", []byte(f.old), 0o755); err != nil {
			d.t.Fatal(err)
		}
		if err := os.Rename(d.path(f.name)+".w", d.path(f.name)); err != nil {
			d.t.Fatal(err)
		}
	}
}

func sum(s string) string { h := sha256.Sum256([]byte(s)); return hex.EncodeToString(h[:]) }

func (d *disk) set() Set {
	s := Set{Product: "acme", Release: "ACME-B1"}
	for _, f := range destinations {
		x := File{Destination: d.path(f.name), SHA256: sum(f.new), Content: []byte(f.new)}
		if f.old != "" {
			x.Replaces = []string{sum("something older"), sum(f.old)}
		}
		s.Files = append(s.Files, x)
	}
	return s
}

// reopen is a new life of the daemon.
func (d *disk) reopen() {
	d.t.Helper()
	x, damaged, err := Open(d.path("journals"))
	if err != nil || len(damaged) > 0 {
		d.t.Fatal(err, damaged)
	}
	x.mover = nil
	d.x = x
}

func (d *disk) recover() {
	d.t.Helper()
	d.reopen()
	for _, r := range d.x.Recover(noon) {
		if r.Err != nil {
			d.t.Errorf("recover %s: %v", r.Was.Phase, r.Err)
		}
	}
}

// state is "old" or "new" if all destinations are, else what each is.
func (d *disk) state() string {
	d.t.Helper()
	all := map[string]int{}
	var detail []string
	for _, f := range destinations {
		b, err := os.ReadFile(d.path(f.name))
		have := string(b)
		word := "other: " + have
		switch {
		case errors.Is(err, os.ErrNotExist) && f.old == "":
			word = "old"
		case err != nil:
			word = err.Error()
		case have == f.old:
			word = "old"
		case have == f.new:
			word = "new"
		}
		all[word]++
		detail = append(detail, f.name+" "+word)
	}
	for _, word := range []string{"old", "new"} {
		if all[word] == len(destinations) {
			return word
		}
	}
	return strings.Join(detail, ", ")
}

func (d *disk) is(want string) {
	d.t.Helper()
	if got := d.state(); got != want {
		d.t.Fatalf("the files are %q, want %q", got, want)
	}
}

// tidy: no name of ours is left.
func (d *disk) tidy() {
	d.t.Helper()
	for _, dir := range []string{"bin", "lib"} {
		list, err := os.ReadDir(d.path(dir))
		if err != nil {
			d.t.Fatal(err)
		}
		for _, e := range list {
			if strings.Contains(e.Name(), "hotpatch") {
				d.t.Errorf("%s/%s is left", dir, e.Name())
			}
		}
	}
}

func (d *disk) phase() Phase {
	for _, r := range d.x.Records() {
		return r.Phase
	}
	return ""
}

func (d *disk) stage() {
	d.t.Helper()
	if _, err := d.x.Stage(d.set(), "boot-1", noon); err != nil {
		d.t.Fatal(err)
	}
	d.is("old")
}

func (d *disk) activate() {
	d.t.Helper()
	d.recover()
	r, err := d.x.Activate("acme", "boot-2", noon)
	if err != nil || r.Phase != Active {
		d.t.Fatalf("%+v, %v", r, err)
	}
	d.is("new")
}

// The whole life: staged, in force after a restart, proved.
func TestStagedActiveProved(t *testing.T) {
	d := newDisk(t)
	if err := os.Chmod(d.path("bin/app.exe"), 0o711); err != nil {
		t.Fatal(err)
	}
	d.stage()
	if _, err := d.x.Stage(d.set(), "boot-1", noon); err != nil {
		t.Errorf("staged again: %v", err)
	}
	if _, err := d.x.Activate("acme", "boot-1", noon); !errors.Is(err, ErrSameBoot) {
		t.Errorf("activated without a restart: %v", err)
	}
	d.is("old")
	d.activate()
	if info, err := os.Stat(d.path("bin/app.exe")); runtime.GOOS != "windows" && (err != nil || info.Mode().Perm() != 0o711) {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := d.x.Prove("acme", noon); err != nil {
		t.Fatal(err)
	}
	d.is("new")
	d.tidy()
	if d.phase() != "" {
		t.Errorf("phase %s", d.phase())
	}
	if _, err := d.x.Stage(d.set(), "boot-2", noon); !errors.Is(err, ErrInPlace) {
		t.Errorf("staged what is there already: %v", err)
	}
}

// Rolled back after the restart: the old files come at the next one, and not
// before; called back, they do not.
func TestLeaving(t *testing.T) {
	d := newDisk(t)
	d.stage()
	d.activate()
	if _, err := d.x.Leave("acme", "boot-2", noon); err != nil {
		t.Fatal(err)
	}
	d.recover()
	if _, err := d.x.Activate("acme", "boot-2", noon); !errors.Is(err, ErrSameBoot) {
		t.Errorf("left without a restart: %v", err)
	}
	d.is("new")
	if r, err := d.x.Stay("acme", "boot-2", noon); err != nil || r.Phase != Active {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := d.x.Leave("acme", "boot-2", noon); err != nil {
		t.Fatal(err)
	}
	if r, err := d.x.Activate("acme", "boot-3", noon); err != nil || r.Phase != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	d.is("old")
	d.tidy()
}

func TestUnstage(t *testing.T) {
	d := newDisk(t)
	d.stage()
	if err := d.x.Unstage("acme", noon); err != nil {
		t.Fatal(err)
	}
	d.is("old")
	d.tidy()
	if _, err := d.x.Activate("acme", "boot-2", noon); !errors.Is(err, ErrNoSet) {
		t.Error(err)
	}
}

// Products whose names differ in case only have a journal each: one name could be
// one file for both.
func TestJournalsOfTwoCases(t *testing.T) {
	d := newDisk(t)
	d.stage()
	s := d.set()
	s.Product, s.Release = "ACME", "ACME-B2"
	s.Files = s.Files[2:]
	s.Files[0].Destination = d.path("lib/more.dll")
	if _, err := d.x.Stage(s, "boot-1", noon); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadDir(d.path("journals"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, e := range list {
		seen[strings.ToLower(e.Name())] = true
	}
	d.reopen()
	if len(seen) != 2 || len(d.x.Records()) != 2 {
		t.Errorf("journals %v of %d records", seen, len(d.x.Records()))
	}
}

// died is what a step that ends our life panics with.
type died struct{}

// works are what can be cut off, with what comes before, and what all may be afterwards.
var works = []struct {
	name   string
	before func(*disk)
	work   func(*disk)
}{
	{"stage", func(*disk) {}, func(d *disk) { d.x.Stage(d.set(), "boot-1", noon) }},
	{"unstage", (*disk).stage, func(d *disk) { d.x.Unstage("acme", noon) }},
	{"activate", (*disk).stage, func(d *disk) { d.x.Activate("acme", "boot-2", noon) }},
	{"prove", func(d *disk) { d.stage(); d.activate() }, func(d *disk) { d.x.Prove("acme", noon) }},
	{"leave", func(d *disk) {
		d.stage()
		d.activate()
		if _, err := d.x.Leave("acme", "boot-2", noon); err != nil {
			d.t.Fatal(err)
		}
	}, func(d *disk) { d.x.Activate("acme", "boot-3", noon) }},
}

// We die before each single step of each work, and again in each step of the
// recovery: afterwards all files are old or all are new, and the story goes on.
func TestDeathAtEveryStep(t *testing.T) {
	for _, w := range works {
		t.Run(w.name, func(t *testing.T) {
			n := 0
			for ; ; n++ {
				d := newDisk(t)
				w.before(d)
				before := d.state()
				if !dies(d, n, func() { w.work(d) }) {
					break
				}
				for m := 0; ; m++ { // the recovery dies, too, later each time
					d.reopen()
					if !dies(d, m, func() { d.x.Recover(noon) }) {
						break
					}
				}
				d.recover()
				after := d.state()
				if after != "old" && after != "new" {
					t.Fatalf("step %d: %s", n, after)
				}
				if (w.name == "stage" || w.name == "unstage" || w.name == "prove") && after != before {
					t.Fatalf("step %d: %s, was %s", n, after, before)
				}
				finish(d)
			}
			if n < 4 {
				t.Errorf("only %d steps", n)
			}
			t.Logf("%d steps", n)
		})
	}
}

// dies runs fn and has it die before step n; false if it came to its end.
func dies(d *disk, n int, fn func()) (dead bool) {
	at := 0
	d.x.fault = func(string) error {
		if at++; at > n {
			panic(died{})
		}
		return nil
	}
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(died); !ok {
				panic(r)
			}
			dead = true
		}
	}()
	fn()
	return false
}

// finish carries whatever is under way to the end that it has: new and proved,
// or staged anew and then that.
func finish(d *disk) {
	d.t.Helper()
	boot := 10
	for range 6 {
		boot++
		d.recover()
		switch d.phase() {
		case "":
			if d.state() == "new" {
				d.tidy()
				return
			}
			if _, err := d.x.Stage(d.set(), fmt.Sprint("boot-", boot), noon); err != nil {
				d.t.Fatalf("it does not go on: %v", err)
			}
		case Staged, Leaving:
			if _, err := d.x.Activate("acme", fmt.Sprint("boot-", boot), noon); err != nil {
				d.t.Fatalf("it does not go on: %v", err)
			}
		case Active:
			if err := d.x.Prove("acme", noon); err != nil {
				d.t.Fatalf("it does not go on: %v", err)
			}
		default:
			d.t.Fatalf("after recovery the phase is %s", d.phase())
		}
	}
	d.t.Fatalf("no end: %s, %s", d.phase(), d.state())
}

// Each single step fails, as on a full disk: an error by name, everything as
// before, and it works when there is room again.
func TestEveryStepFails(t *testing.T) {
	for _, w := range works[:3] {
		t.Run(w.name, func(t *testing.T) {
			for n := 0; ; n++ {
				d := newDisk(t)
				w.before(d)
				at, failed := 0, false
				d.x.fault = func(string) error {
					if at++; at == n+1 {
						failed = true
						return noSpace
					}
					return nil
				}
				w.work(d)
				if !failed {
					return
				}
				if s := d.state(); s != "old" && s != "new" {
					t.Fatalf("step %d: %s", n, s)
				}
				if w.name == "stage" && d.phase() == "" {
					d.tidy()
				}
				d.x.fault = nil
				finish(d)
			}
		})
	}
}

// The disk is full for good while staging: nothing of it is left on the disk.
func TestDiskFull(t *testing.T) {
	for n := 1; n < 12; n++ {
		d := newDisk(t)
		at := 0
		d.x.fault = func(step string) error {
			if at++; at > n && !strings.HasPrefix(step, "remove") && step != "journal removed" && !strings.HasPrefix(step, "sync folder") {
				return noSpace
			}
			return nil
		}
		_, err := d.x.Stage(d.set(), "boot-1", noon)
		if err == nil {
			continue
		}
		var r *Refusal
		if errors.As(err, &r) && r.Code != CodeSpace {
			t.Errorf("step %d: %s, %v", n, r.Code, err)
		}
		if !errors.Is(err, noSpace) {
			t.Errorf("step %d: %v", n, err)
		}
		d.is("old")
		d.x.fault = nil
		d.recover()
		d.tidy()
	}
}

// What was changed behind our back is never overwritten.
func TestChangedBehindOurBack(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*disk) error
		code   Code
	}{
		"content":  {func(d *disk) error { return os.WriteFile(d.path("lib/app.dll"), []byte("theirs"), 0o755) }, CodeContent},
		"removed":  {func(d *disk) error { return os.Remove(d.path("lib/app.dll")) }, CodeContent},
		"appeared": {func(d *disk) error { return os.WriteFile(d.path("lib/extra.dll"), []byte("theirs"), 0o644) }, CodeContent},
		"mode":     {func(d *disk) error { return os.Chmod(d.path("lib/app.dll"), 0o700) }, CodeAttributes},
		"link": {func(d *disk) error {
			if err := os.Rename(d.path("lib/app.dll"), d.path("lib/real.dll")); err != nil {
				return err
			}
			return os.Symlink("real.dll", d.path("lib/app.dll"))
		}, CodeIO},
		"folder": {func(d *disk) error { return os.Chmod(d.path("lib"), 0o777) }, CodeOwner},
		"staged": {func(d *disk) error { return os.WriteFile(d.x.Records()[0].Files[1].staged(), []byte("theirs"), 0o600) }, CodeContent},
	} {
		t.Run(name, func(t *testing.T) {
			if runtime.GOOS == "windows" && (name == "mode" || name == "folder" || name == "link") {
				t.Skip("there are no modes on Windows, and links need a right")
			}
			d := newDisk(t)
			d.stage()
			if err := c.change(d); err != nil {
				t.Fatal(err)
			}
			before := d.state()
			d.recover()
			_, err := d.x.Activate("acme", "boot-2", noon)
			var r *Refusal
			if !errors.As(err, &r) || r.Code != c.code {
				t.Errorf("%v, want code %s", err, c.code)
			}
			d.is(before)
			if d.phase() != "" {
				t.Errorf("phase %s", d.phase())
			}
			d.tidy()
		})
	}
}

// A step of the activation fails, and we die in any step of taking it back: the
// next life ends it, all old or all new.
func TestFailsThenDies(t *testing.T) {
	deaths := 0
	for n := range 14 {
		if testing.Short() && n%4 != 0 {
			continue
		}
		for m := n + 1; ; m++ {
			d := newDisk(t)
			d.stage()
			at := 0
			dead := dies(d, 0, func() {
				d.x.fault = func(string) error {
					switch at++; {
					case at == n+1:
						return noSpace
					case at > m:
						panic(died{})
					}
					return nil
				}
				d.x.Activate("acme", "boot-2", noon)
			})
			if dead {
				deaths++
			}
			d.recover()
			if s := d.state(); s != "old" && s != "new" {
				t.Fatalf("step %d fails, death at %d: %s", n, m, s)
			}
			finish(d)
			if !dead {
				break
			}
		}
	}
	if deaths < 5 {
		t.Errorf("only %d deaths", deaths)
	}
}
