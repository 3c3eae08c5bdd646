package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"

	"hotpatchd/agent/control"
)

func mustOpen(t testing.TB, path string) *Store {
	t.Helper()
	s, damage, err := Open(path)
	if err != nil || damage != nil {
		t.Fatalf("Open: %v, damage %v", err, damage)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustUpdate(t testing.TB, s *Store, fn func(*Tx) error) {
	t.Helper()
	if err := s.Update(fn); err != nil {
		t.Fatal(err)
	}
}

func entry(n int) control.HistoryEntry {
	return control.HistoryEntry{
		Time:   control.At(time.Unix(1700000000+int64(n), 0)),
		Caller: control.HistoryCaller{UID: 1000, User: "alice", PID: 42},
		Action: "install", Release: fmt.Sprintf("R-%d", n),
		Detail: map[string]string{"b": "<2>", "a": "1"},
	}
}

// tempDir is a folder for a store that may break: what bolt has mapped then goes
// with the process, and until then Windows keeps the file.
func tempDir(t testing.TB) string {
	if runtime.GOOS != "windows" {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// filled makes a closed state file with something of everything in it.
func filled(t testing.TB) string {
	path := filepath.Join(tempDir(t), "state", "state.db")
	s := mustOpen(t, path)
	for i := range 40 {
		mustUpdate(t, s, func(tx *Tx) error {
			_, err := tx.Append(entry(i))
			return errors.Join(err,
				tx.PutRecord(fmt.Sprintf("rec-%d", i), []byte(strings.Repeat("x", i*50+1))),
				tx.PutHold(Hold{ID: fmt.Sprintf("H-%d", i), Since: time.Unix(int64(i), 0).UTC()}),
				tx.RaiseFloor("snapshot", int64(i)),
				tx.PutInstalled(Install{ID: fmt.Sprintf("I-%d", i)}),
				tx.Set("k", []byte("v")),
				tx.SetPaused(i%2 == 1))
		})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReopenKeepsEverything(t *testing.T) {
	path := filled(t)
	s := mustOpen(t, path)
	err := s.View(func(tx *Tx) error {
		records, err := tx.Records()
		if err != nil || len(records) != 40 || len(records["rec-39"]) != 39*50+1 {
			t.Errorf("records: %d, %v", len(records), err)
		}
		holds, err := tx.Holds()
		if err != nil || len(holds) != 40 || !holds["H-7"].Since.Equal(time.Unix(7, 0)) {
			t.Errorf("holds: %v, %v", holds["H-7"], err)
		}
		floors, err := tx.Floors()
		if err != nil || floors["snapshot"] != 39 {
			t.Errorf("floors: %v, %v", floors, err)
		}
		installed, err := tx.Installed()
		if err != nil || len(installed) != 40 {
			t.Errorf("installed: %d, %v", len(installed), err)
		}
		if v, ok := tx.Get("k"); !ok || string(v) != "v" {
			t.Errorf("setting: %q %v", v, ok)
		}
		if !tx.Paused() {
			t.Error("the pause was forgotten")
		}
		if _, ok := tx.Record("rec-40"); ok {
			t.Error("a record nobody stored")
		}
		h, err := tx.History(3)
		if err != nil || len(h) != 3 || h[0].Release != "R-39" || h[0].Seq != 40 || h[0].Prev != h[1].Hash {
			t.Errorf("history: %+v, %v", h, err)
		}
		return tx.VerifyHistory()
	})
	if err != nil {
		t.Error(err)
	}
	mustUpdate(t, s, func(tx *Tx) error {
		return errors.Join(tx.DeleteRecord("rec-0"), tx.DeleteHold("H-0"), tx.DeleteInstalled("I-0"),
			tx.DeleteHold("never there"), tx.SetPaused(false), tx.Set("k", nil))
	})
	s.View(func(tx *Tx) error {
		records, _ := tx.Records()
		holds, _ := tx.Holds()
		installed, _ := tx.Installed()
		_, set := tx.Get("k")
		if len(records) != 39 || len(holds) != 39 || len(installed) != 39 || tx.Paused() || set {
			t.Error("deleting did not delete")
		}
		return nil
	})
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	boom := errors.New("boom")
	for name, fn := range map[string]func(*Tx) error{
		"error": func(tx *Tx) error { return boom },
		"panic": func(tx *Tx) error { panic(boom) },
	} {
		path := filepath.Join(tempDir(t), "state.db")
		s := mustOpen(t, path)
		err := s.Update(func(tx *Tx) error {
			if _, err := tx.Append(entry(1)); err != nil {
				t.Fatal(err)
			}
			if err := tx.PutRecord("r", []byte("1")); err != nil {
				t.Fatal(err)
			}
			return fn(tx)
		})
		if err == nil || !strings.Contains(err.Error(), "boom") {
			t.Errorf("%s: %v", name, err)
		}
		if name == "panic" { // it may have been bolt's own
			if !errors.Is(err, ErrBroken) || s.Close() != nil {
				t.Errorf("%s: %v", name, err)
			}
			s = mustOpen(t, path)
		}
		err = s.View(func(tx *Tx) error {
			records, _ := tx.Records()
			history, _ := tx.History(10)
			if len(records) != 0 || len(history) != 0 {
				t.Errorf("%s: something of it was kept: %v %v", name, records, history)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		mustUpdate(t, s, func(tx *Tx) error { return tx.PutRecord("r", nil) }) // still usable
	}
}

func TestBounds(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "state.db"))
	big := entry(1)
	big.Text = strings.Repeat("x", MaxEntry)
	for name, fn := range map[string]func(*Tx) error{
		"empty key":      func(tx *Tx) error { return tx.PutRecord("", []byte("x")) },
		"long key":       func(tx *Tx) error { return tx.PutRecord(strings.Repeat("k", MaxKey+1), []byte("x")) },
		"long value":     func(tx *Tx) error { return tx.PutRecord("k", make([]byte, MaxValue+1)) },
		"long entry":     func(tx *Tx) error { _, err := tx.Append(big); return err },
		"negative floor": func(tx *Tx) error { return tx.RaiseFloor("f", -1) },
	} {
		if err := s.Update(fn); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func TestFloorsOnlyRise(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := mustOpen(t, path)
	rapid.Check(t, func(rt *rapid.T) {
		name := rapid.StringN(1, 20, -1).Draw(rt, "name")
		high := int64(-1)
		s.View(func(tx *Tx) error {
			if f, err := tx.Floors(); err == nil {
				if v, ok := f[name]; ok {
					high = v
				}
			}
			return nil
		})
		for _, v := range rapid.SliceOfN(rapid.Int64Range(0, 1<<62), 1, 8).Draw(rt, "values") {
			err := s.Update(func(tx *Tx) error { return tx.RaiseFloor(name, v) })
			var fe *FloorError
			if v < high {
				if !errors.As(err, &fe) || fe.Floor != high || fe.Value != v {
					rt.Fatalf("%d below %d: %v", v, high, err)
				}
			} else if err != nil {
				rt.Fatal(err)
			} else {
				high = v
			}
		}
		s.View(func(tx *Tx) error {
			if f, err := tx.Floors(); err != nil || f[name] != high {
				rt.Fatalf("floor %d, want %d, %v", f[name], high, err)
			}
			return nil
		})
	})
}

func TestSecondDaemonIsToldSo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	mustOpen(t, path)
	_, damage, err := Open(path)
	if !errors.Is(err, ErrInUse) || damage != nil {
		t.Fatalf("got %v, damage %v", err, damage)
	}
	if !strings.Contains(err.Error(), "in use by another hotpatchd") {
		t.Errorf("text: %v", err)
	}
}

func TestNewerFormatIsRefusedAndLeftAlone(t *testing.T) {
	path := filled(t)
	setFormat(t, path, "hotpatchd-state/2")
	before, _ := os.ReadFile(path)
	_, damage, err := Open(path)
	if !errors.Is(err, ErrNewer) || damage != nil {
		t.Fatalf("got %v, damage %v", err, damage)
	}
	after, _ := os.ReadFile(path)
	if !bytes.Equal(before, after) {
		t.Error("the file was touched")
	}
}

func TestUnknownFormatIsSetAside(t *testing.T) {
	path := filled(t)
	setFormat(t, path, "something/1")
	s, damage, err := Open(path)
	if err != nil || damage == nil {
		t.Fatalf("got %v, damage %v", err, damage)
	}
	s.Close()
}

func setFormat(t *testing.T, path, format string) {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyFormat, []byte(format)) })
	if err != nil {
		t.Fatal(err)
	}
}

// TestDamagedFiles damages a good file in many ways. Whatever happens, Open
// either finds everything as it was (the damage hit a free page) or sets the
// file aside and begins an empty one; never an error, never a panic.
func TestDamagedFiles(t *testing.T) {
	good, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	intact, aside := 0, 0
	try := func(name string, b []byte) {
		path := filepath.Join(t.TempDir(), "state.db")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, damage, err := Open(path)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		defer s.Close()
		if damage == nil || damage.Moved == "" {
			intact++
			least := 40
			if damage != nil {
				least-- // the last change went with the damaged head
			}
			err := s.View(func(tx *Tx) error {
				if h, err := tx.Holds(); err != nil || len(h) < least {
					return fmt.Errorf("%d holds, %v", len(h), err)
				}
				return nil
			})
			if err != nil {
				t.Errorf("%s: taken for good, but %v", name, err)
			}
		} else {
			aside++
			kept, err := os.ReadFile(damage.Moved)
			if err != nil || !bytes.Equal(kept, b) {
				t.Errorf("%s: the damaged file was not kept as it was: %v", name, err)
			}
			s.View(func(tx *Tx) error {
				if r, _ := tx.Records(); len(r) != 0 {
					t.Errorf("%s: the new file is not empty", name)
				}
				return nil
			})
		}
		if err := s.Update(func(tx *Tx) error { return tx.PutRecord("after", []byte("1")) }); err != nil {
			t.Errorf("%s: cannot go on: %v", name, err)
		}
	}
	try("empty", nil)
	try("text", []byte("this is no state file"))
	try("zeros", make([]byte, len(good)))
	for i := range 24 {
		n := rng.IntN(len(good))
		try(fmt.Sprintf("truncated to %d", n), append([]byte{}, good[:n]...))
		b := append([]byte{}, good...)
		at := rng.IntN(len(b)/4096) * 4096
		for j := range 4096 {
			b[at+j] = byte(rng.Uint32())
		}
		try(fmt.Sprintf("%d: page at %d is noise", i, at), b)
		b = append([]byte{}, good...)
		at = rng.IntN(len(b)/4096) * 4096
		for range 8 { // page headers and element tables are the dangerous places
			b[at+rng.IntN(64)] = byte(rng.Uint32())
		}
		try(fmt.Sprintf("%d: header of page at %d", i, at), b)
		b = append([]byte{}, good...)
		clear(b[at : at+4096])
		try(fmt.Sprintf("%d: page at %d is zero", i, at), b)
	}
	t.Logf("%d intact, %d set aside", intact, aside)
	if intact == 0 || aside == 0 {
		t.Error("the damage was all of one kind: this proves little")
	}
}

func TestDamagedNamesDoNotCollide(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	for n := 1; n <= maxDamaged+3; n++ {
		if err := os.WriteFile(path, fmt.Append(nil, "garbage ", n), 0o600); err != nil {
			t.Fatal(err)
		}
		s, damage, err := Open(path)
		if err != nil || damage == nil {
			t.Fatalf("%d: %v, damage %v", n, err, damage)
		}
		s.Close()
		if want := fmt.Sprintf("%s.damaged-%d", path, min(n, maxDamaged)); damage.Moved != want {
			t.Errorf("moved to %s, want %s", damage.Moved, want)
		}
	}
	names, _ := filepath.Glob(path + "*")
	if len(names) != maxDamaged+1 {
		t.Errorf("%d files are kept", len(names))
	}
}

func TestTruncatedWhileOpenIsAnError(t *testing.T) {
	path := filled(t)
	s := mustOpen(t, path)
	err := os.Truncate(path, 8192)
	if runtime.GOOS == "windows" {
		if err == nil {
			t.Error("Windows let a mapped file be cut")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	err = s.View(func(tx *Tx) error {
		_, err := tx.Records()
		return err
	})
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("got %v", err)
	}
}

func TestSystemErrorsMoveNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, damage, err := Open(path); err == nil || damage != nil {
		t.Errorf("a folder was opened: %v, damage %v", err, damage)
	}
	target := filled(t)
	link := filepath.Join(t.TempDir(), "state.db")
	if err := os.Symlink(target, link); err != nil {
		t.Skip("needs symbolic links: ", err) // Windows without developer mode
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Skip("needs symbolic links: one was made, but is not there ", err) // Wine
	}
	if _, damage, err := Open(link); err == nil || damage != nil {
		t.Errorf("a link was followed: %v, damage %v", err, damage)
	}
}

func TestHistoryTampering(t *testing.T) {
	change := func(b *bbolt.Bucket, seq uint64, fn func([]byte) []byte) error {
		v := append([]byte{}, b.Get(seqKey(seq))...)
		return b.Put(seqKey(seq), fn(v))
	}
	for name, tc := range map[string]struct {
		tamper func(tx *bbolt.Tx) error
		want   string
	}{
		"text": {func(tx *bbolt.Tx) error {
			return change(tx.Bucket(bucketHistory), 17, func(v []byte) []byte {
				return []byte(strings.Replace(string(v), "alice", "mallo", 1))
			})
		}, "entry 17 was changed"},
		"removed": {func(tx *bbolt.Tx) error { return tx.Bucket(bucketHistory).Delete(seqKey(5)) }, "entry 5 is missing"},
		"cut":     {func(tx *bbolt.Tx) error { return tx.Bucket(bucketHistory).Delete(seqKey(40)) }, "ends at entry 39, but 40"},
		"first":   {func(tx *bbolt.Tx) error { return tx.Bucket(bucketHistory).Delete(seqKey(1)) }, "entry 1 is missing"},
		"swapped": {func(tx *bbolt.Tx) error {
			b := tx.Bucket(bucketHistory)
			v3, v4 := append([]byte{}, b.Get(seqKey(3))...), append([]byte{}, b.Get(seqKey(4))...)
			return errors.Join(b.Put(seqKey(3), v4), b.Put(seqKey(4), v3))
		}, "entry 3 says it is 4"},
		"garbage": {func(tx *bbolt.Tx) error {
			return change(tx.Bucket(bucketHistory), 9, func(v []byte) []byte { return append(v[:32:32], "{"...) })
		}, "entry 9 cannot be read"},
		"rewritten with its own hash": {func(tx *bbolt.Tx) error {
			return change(tx.Bucket(bucketHistory), 20, func(v []byte) []byte {
				body := []byte(strings.Replace(string(v[32:]), "alice", "mallo", 1))
				var e control.HistoryEntry
				if err := json.Unmarshal(body, &e); err != nil {
					panic(err)
				}
				prev := tx.Bucket(bucketHistory).Get(seqKey(19))
				h := chain([32]byte(prev[:32]), body)
				return append(h[:], body...)
			})
		}, "entry 21 does not follow entry 20"},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustOpen(t, filled(t))
			if err := s.View((*Tx).VerifyHistory); err != nil {
				t.Fatal(err)
			}
			if err := s.update(tc.tamper); err != nil {
				t.Fatal(err)
			}
			err := s.View((*Tx).VerifyHistory)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestHistoryIsCapped(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "state.db"))
	mustUpdate(t, s, func(tx *Tx) error {
		for i := range MaxHistory + 25 {
			if _, err := tx.Append(entry(i)); err != nil {
				return err
			}
		}
		return nil
	})
	s.View(func(tx *Tx) error {
		h, err := tx.History(MaxHistory * 2)
		if err != nil || len(h) != MaxHistory || h[0].Seq != MaxHistory+25 || h[len(h)-1].Seq != 26 {
			t.Errorf("%d entries, %v", len(h), err)
		}
		if err := tx.VerifyHistory(); err != nil {
			t.Error(err)
		}
		seq, hash, err := tx.Head()
		if err != nil || seq != h[0].Seq || hash != h[0].Hash {
			t.Errorf("head %d %s, %v", seq, hash, err)
		}
		return nil
	})
	if err := s.update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketHistory).Delete(seqKey(26)) }); err != nil {
		t.Fatal(err)
	}
	if err := s.View((*Tx).VerifyHistory); err == nil || !strings.Contains(err.Error(), "entry 26 is missing") {
		t.Errorf("the oldest entry was cut off unseen: %v", err)
	}
}
