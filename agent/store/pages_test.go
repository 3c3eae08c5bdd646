package store

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// openWithin opens a damaged copy; a check that does not end fails the test.
func openWithin(t *testing.T, name string, b []byte) *Damage {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	type result struct {
		damage *Damage
		err    error
	}
	done := make(chan result, 1)
	go func() {
		s, damage, err := Open(path)
		if err == nil {
			err = s.View(func(tx *Tx) error { return checkValues(tx) })
			s.Close()
		}
		done <- result{damage, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			t.Errorf("%s: %v", name, r.err)
		}
		return r.damage
	case <-time.After(time.Minute):
		t.Fatalf("%s: Open does not end", name)
	}
	return nil
}

// TestPagesThatBoltWouldLoopOn plants what sends bolt's own check round in
// circles: a page that claims half a billion more, and trees that bite their tail.
func TestPagesThatBoltWouldLoopOn(t *testing.T) {
	good, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	size := os.Getpagesize()
	m, _, err := newestMeta(readerAt(good))
	if err != nil {
		t.Fatal(err)
	}
	c := &pages{r: readerAt(good), size: m.pageSize, high: m.high, seen: map[uint64]bool{}}
	if err := c.tree(m.root, nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	branches := 0
	for id := range c.seen {
		at := int(id) * size
		if order.Uint64(good[at:]) != id || order.Uint16(good[at+8:]) > flagLeaf {
			continue // the inside of a larger page
		}
		b := append([]byte{}, good...)
		order.PutUint32(b[at+12:], 0x20000000)
		if openWithin(t, fmt.Sprintf("page %d overflows", id), b) == nil {
			t.Errorf("page %d: half a billion pages were believed", id)
		}
		if order.Uint16(good[at+8:]) != flagBranch {
			continue
		}
		branches++
		for _, to := range []uint64{id, m.root, 0, 1, m.freelist, m.high, 1 << 62} {
			b := append([]byte{}, good...)
			order.PutUint64(b[at+pageHeader+8:], to)
			if openWithin(t, fmt.Sprintf("page %d leads to %d", id, to), b) == nil {
				t.Errorf("page %d leads to %d: that was believed", id, to)
			}
		}
	}
	if branches == 0 {
		t.Error("the file has no branch page: this proves little")
	}
}

type readerAt []byte

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(r)) {
		return 0, fmt.Errorf("past the end")
	}
	return copy(p, r[off:]), nil
}

// TestSmallDamage flips single bits and bytes where they hurt: in the heads
// and tables of pages.
func TestSmallDamage(t *testing.T) {
	good, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	rounds := 150
	if testing.Short() {
		rounds = 40
	}
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	found := 0
	for i := range rounds {
		b := append([]byte{}, good...)
		for range 1 + rng.IntN(4) {
			at := rng.IntN(len(b)/4096) * 4096
			switch rng.IntN(3) {
			case 0:
				b[at+rng.IntN(128)] = byte(rng.IntN(64))
			case 1:
				b[at+rng.IntN(128)] ^= 1 << rng.IntN(8)
			case 2: // a number of a page in an element of a branch
				b[at+pageHeader+elementSize*rng.IntN(8)+8] = byte(rng.IntN(len(b) / 4096))
			}
		}
		if openWithin(t, fmt.Sprintf("seed %d, round %d", seed, i), b) != nil {
			found++
		}
	}
	if found == 0 || found == rounds {
		t.Errorf("%d of %d were found damaged: this proves little", found, rounds)
	}
}

func TestOneHeadDamaged(t *testing.T) {
	good, err := os.ReadFile(filled(t))
	if err != nil {
		t.Fatal(err)
	}
	for page := range 2 {
		b := append([]byte{}, good...)
		b[page*os.Getpagesize()+pageHeader+40] ^= 1
		d := openWithin(t, fmt.Sprintf("head %d", page), b)
		if d == nil || d.Moved != "" {
			t.Errorf("head %d is damaged: %v", page, d)
		}
	}
	b := append([]byte{}, good...)
	b[pageHeader+40] ^= 1
	b[os.Getpagesize()+pageHeader+40] ^= 1
	if d := openWithin(t, "both heads", b); d == nil || d.Moved == "" {
		t.Errorf("both heads are damaged: %v", d)
	}
}
