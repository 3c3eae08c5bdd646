package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// prompt is far more than any call needs that does not wait for a lock that nobody gives back.
const prompt = 30 * time.Second

// within runs fn and fails where it does not come back.
func within(t *testing.T, what string, fn func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-time.After(prompt):
		t.Fatalf("%s hangs", what)
		return nil
	}
}

func putHold(s *Store) error {
	return s.Update(func(tx *Tx) error { return tx.PutHold(Hold{ID: "NEW"}) })
}

func readHolds(s *Store) error {
	return s.View(func(tx *Tx) error { _, err := tx.Holds(); return err })
}

// TestBrokenWhileOpen damages, removes and replaces the file under an open
// Store. The first call says so, everyone after it too, at once, and the file can be
// opened anew.
func TestBrokenWhileOpen(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs a system that lets others cut and remove an open file")
	}
	garble := func(from, to int64) func(string) error {
		return func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			if to == 0 {
				info, err := f.Stat()
				if err != nil {
					return err
				}
				to = info.Size()
			}
			_, err = f.WriteAt([]byte(strings.Repeat("\xff", int(to-from))), from)
			return err
		}
	}
	for _, c := range []struct {
		name   string
		damage func(path string) error
		says   string
		word   bool // the operator's word is lost, and nothing says so: there is no file any more
	}{
		{"cut to its heads", func(p string) error { return os.Truncate(p, 2*int64(os.Getpagesize())) }, "was cut from", false},
		{"cut to nothing", func(p string) error { return os.Truncate(p, 0) }, "was cut from", false},
		{"heads garbled", garble(0, 2*int64(os.Getpagesize())), "damaged", false},
		{"pages garbled", garble(2*int64(os.Getpagesize()), 0), "damaged", false},
		{"file removed", os.Remove, "removed", true},
		{"folder removed", func(p string) error { return os.RemoveAll(filepath.Dir(p)) }, "removed", true},
		{"a file in place of the folder", func(p string) error {
			return errors.Join(os.RemoveAll(filepath.Dir(p)), os.WriteFile(filepath.Dir(p), nil, 0o600))
		}, "removed", true},
		{"replaced", func(p string) error {
			b, err := os.ReadFile(p)
			return errors.Join(err, os.WriteFile(p+".new", b, 0o600), os.Rename(p+".new", p))
		}, "another file", true},
	} {
		for first, call := range map[string]func(*Store) error{"write": putHold, "read": readHolds} {
			t.Run(c.name+", found by a "+first, func(t *testing.T) {
				path := filled(t)
				s := mustOpen(t, path)
				if err := c.damage(path); err != nil {
					t.Fatal(err)
				}
				err := within(t, "the first call", func() error { return call(s) })
				if !errors.Is(err, ErrBroken) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.says) {
					t.Fatalf("the first call: %v", err)
				}
				select {
				case <-s.Broken():
				default:
					t.Error("Broken is not closed")
				}
				if s.Err() == nil || s.Err().Error() != err.Error() {
					t.Errorf("Err: %v", s.Err())
				}
				for n, again := range []func(*Store) error{putHold, readHolds, putHold} {
					ran := false
					err := within(t, fmt.Sprint("call ", n), func() error {
						return errors.Join(again(s), s.Update(func(*Tx) error { ran = true; return nil }))
					})
					if !errors.Is(err, ErrBroken) || ran {
						t.Errorf("call %d: %v, ran %v", n, err, ran)
					}
				}
				if err := within(t, "Close", s.Close); err != nil {
					t.Errorf("Close: %v", err)
				}
				if strings.HasPrefix(c.name, "a file in place") {
					return
				}
				anew, damage, err := Open(path)
				if err != nil {
					t.Fatal(err)
				}
				defer anew.Close()
				if !c.word && damage == nil {
					t.Error("a damaged file was not set aside")
				}
				if err := putHold(anew); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestNobodyWaitsForABrokenStore: bolt keeps its locks when it panics. Those who
// are inside or wait at that moment get their answer, too.
func TestNobodyWaitsForABrokenStore(t *testing.T) {
	for what, call := range map[string]func(*Store, func(*Tx) error) error{"write": (*Store).Update, "read": (*Store).View} {
		t.Run(what, func(t *testing.T) {
			s := mustOpen(t, filled(t))
			others := make(chan error, 20)
			err := within(t, "the call that panics", func() error {
				return call(s, func(tx *Tx) error {
					for n := range cap(others) {
						go func() { others <- []func(*Store) error{putHold, readHolds}[n%2](s) }()
					}
					time.Sleep(20 * time.Millisecond) // some are waiting now; none must be, for the test to hold
					tx.tx = nil
					tx.tx.Bucket(bucketHolds) // as bolt fails on garbage
					return nil
				})
			})
			if !errors.Is(err, ErrBroken) || !errors.Is(err, ErrDamaged) {
				t.Errorf("the call that panics: %v", err)
			}
			for range cap(others) {
				if err := within(t, "another call", func() error { return <-others }); !errors.Is(err, ErrBroken) {
					t.Errorf("another call: %v", err)
				}
			}
		})
	}
}

// TestRefusalsBreakNothing: an error of a transaction's own is nobody else's.
func TestRefusalsBreakNothing(t *testing.T) {
	s := mustOpen(t, filled(t))
	own := errors.New("own")
	if err := s.Update(func(*Tx) error { return own }); err != own {
		t.Errorf("got %v", err)
	}
	if err := putHold(s); err != nil || s.Err() != nil {
		t.Errorf("after a refusal: %v, %v", err, s.Err())
	}
}

// TestCheckSaysWhatOpenSays: and leaves everything as it was.
func TestCheckSaysWhatOpenSays(t *testing.T) {
	link := func(t *testing.T, to, from string) {
		if err := os.Symlink(to, from); err != nil {
			t.Skip("needs symbolic links: ", err) // Windows without developer mode
		}
		if info, err := os.Lstat(from); err != nil || info.Mode().Type() != os.ModeSymlink {
			t.Skip("needs symbolic links: one was made, but is not there ", err) // Wine
		}
	}
	for name, make := range map[string]func(t *testing.T, dir string) (refused bool){
		"missing": func(*testing.T, string) bool { return false },
		"there":   func(t *testing.T, dir string) bool { return os.Mkdir(dir, 0o755) != nil },
		"a link": func(t *testing.T, dir string) bool {
			link(t, t.TempDir(), dir)
			return runtime.GOOS == "windows"
		},
		"a link to nothing": func(t *testing.T, dir string) bool {
			link(t, filepath.Join(t.TempDir(), "x", "y"), dir)
			return true
		},
		"a file": func(t *testing.T, dir string) bool { return os.WriteFile(dir, nil, 0o600) == nil },
		"others may write": func(t *testing.T, dir string) bool {
			if runtime.GOOS == "windows" {
				t.Skip("needs Unix modes")
			}
			return os.Mkdir(dir, 0o700) == nil && os.Chmod(dir, 0o777) == nil
		},
		"of somebody else": func(t *testing.T, dir string) bool {
			if os.Mkdir(dir, 0o700) != nil || os.Chown(dir, 65534, 65534) != nil {
				t.Skip("needs root, to give a folder away")
			}
			return true
		},
		"a folder in place of the file": func(t *testing.T, dir string) bool {
			return os.MkdirAll(filepath.Join(dir, "state.db"), 0o700) == nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			refused := make(t, dir)
			before, _ := os.Lstat(dir)
			err := Check(filepath.Join(dir, "state.db"))
			if after, _ := os.Lstat(dir); (before == nil) != (after == nil) || before != nil && before.Mode() != after.Mode() {
				t.Errorf("Check changed the folder: %v, was %v", after, before)
			}
			if (err != nil) != refused {
				t.Fatalf("Check: %v", err)
			}
			s, _, open := Open(filepath.Join(dir, "state.db"))
			if open == nil {
				s.Close()
			}
			if fmt.Sprint(err) != fmt.Sprint(open) {
				t.Errorf("Check says %v, Open %v", err, open)
			}
		})
	}
}
