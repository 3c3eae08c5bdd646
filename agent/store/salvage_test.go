package store

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// word is a store full of the operator's word, and of records on pages of their own.
func word(t *testing.T, path string) []byte {
	t.Helper()
	s, damage, err := Open(path)
	if err != nil || damage != nil {
		t.Fatal(damage, err)
	}
	err = s.Update(func(tx *Tx) error {
		for n := range 40 {
			if err := tx.PutRecord(fmt.Sprintf("record-%02d", n), bytes.Repeat([]byte{'x'}, 3000)); err != nil {
				return err
			}
			if err := tx.PutHold(Hold{ID: fmt.Sprintf("R%02d", n), By: "alice", Reason: strings.Repeat("because ", 40), Since: time.Unix(1, 0).UTC()}); err != nil {
				return err
			}
		}
		if err := tx.PutInstalled(Install{ID: "R99", By: "bob"}); err != nil {
			return err
		}
		if err := tx.RaiseFloor("sequence/app/", 7); err != nil {
			return err
		}
		return tx.SetPaused(true)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// told is what a file says of the operator's word.
type told struct {
	holds     map[string]Hold
	installed map[string]Install
	floors    map[string]int64
	paused    bool
	lost      bool
}

func tell(t *testing.T, s *Store) (x told) {
	t.Helper()
	err := s.View(func(tx *Tx) (err error) {
		if x.holds, err = tx.Holds(); err != nil {
			return err
		}
		if x.installed, err = tx.Installed(); err != nil {
			return err
		}
		x.floors, err = tx.Floors()
		x.paused = tx.Paused()
		_, x.lost = tx.Lost()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestTheOperatorsWordIsSalvaged damages one page after the other. Either all
// of the operator's word is in the new file, or the file says that it was lost.
func TestTheOperatorsWordIsSalvaged(t *testing.T) {
	good := word(t, filepath.Join(t.TempDir(), "state.db"))
	page := os.Getpagesize()
	kept, lost := 0, 0
	for at := 2 * page; at+page <= len(good); at += page {
		b := bytes.Clone(good)
		b[at+8] ^= 0x13 // neither branch nor leaf
		path := filepath.Join(t.TempDir(), "state.db")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, damage, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		x := tell(t, s)
		all := len(x.holds) == 40 && x.paused && len(x.installed) == 1 && x.floors["sequence/app/"] == 7
		switch {
		case damage == nil: // a page that is not in use
			if !all || x.lost {
				t.Errorf("page %d: undamaged, and yet %+v", at/page, x)
			}
		case damage.Word:
			kept++
			if !all || x.lost {
				t.Errorf("page %d: called kept, but it says %+v", at/page, x)
			}
		default:
			lost++
			if !x.lost || len(x.installed) != 0 {
				t.Errorf("page %d: called lost, but it says lost %v, installed %v", at/page, x.lost, x.installed)
			}
		}
		if aside, err := os.ReadFile(path + ".damaged-1"); damage != nil && (err != nil || !bytes.Equal(aside, b)) {
			t.Errorf("page %d: the damaged file is not kept as it was: %v", at/page, err)
		}
		if _, err := os.Lstat(path + ".new"); err == nil {
			t.Errorf("page %d: a half-made file is left", at/page)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		again, damage, err := Open(path)
		if err != nil || damage != nil {
			t.Fatal(damage, err)
		}
		if y := tell(t, again); !reflect.DeepEqual(x, y) {
			t.Errorf("page %d: another start says %+v, was %+v", at/page, y, x)
		}
		again.Close()
	}
	if kept < 2 || lost < 1 {
		t.Errorf("%d kept, %d lost: this proves little", kept, lost)
	}
}

// TestALossStandsUntilItIsAccepted, over another damage too.
func TestALossStandsUntilItIsAccepted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	word(t, path)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, damage, err := Open(path)
	if err != nil || damage == nil || damage.Word || !tell(t, s).lost {
		t.Fatal(damage, err)
	}
	s.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The second time all is read but the list of free pages: the word of a file without word.
	m, _, err := newestMeta(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	b[m.freelist*m.pageSize+8] ^= 0x13
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s, damage, err = Open(path)
	if err != nil || damage == nil || !damage.Word || !tell(t, s).lost {
		t.Fatal(damage, err)
	}
	if err := s.Update((*Tx).AcceptLoss); err != nil || tell(t, s).lost {
		t.Fatal(err)
	}
	s.Close()
	if s, damage, err = Open(path); err != nil || damage != nil || tell(t, s).lost {
		t.Fatal(damage, err)
	}
	s.Close()
}
