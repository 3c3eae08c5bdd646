package patcher

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"hotpatchd/patcher/target"
)

// islands is memory of which only some pages are mapped; the byte at an address
// is made of it. It can refuse its first reads.
type islands struct {
	target.Process
	pages  map[target.Addr]bool
	refuse int
	reads  int
}

func (m *islands) ReadAt(b []byte, at target.Addr) (int, error) {
	m.reads++
	if m.reads <= m.refuse {
		return 0, errors.New("not this time")
	}
	for i := range b {
		a := at + target.Addr(i)
		if !m.pages[a/target.PageSize] {
			return i, fmt.Errorf("%s is not mapped", a)
		}
		b[i] = byteAt(a)
	}
	return len(b), nil
}

func byteAt(a target.Addr) byte { return byte(a*7 ^ a>>12) }

// What is read together is what is read one by one, in the order of the writes;
// nothing that is not mapped is asked for, and nothing asked for twice.
func TestReadPlaces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &islands{pages: map[target.Addr]bool{}, refuse: rapid.IntRange(0, 1).Draw(t, "refuse")}
		var writes []write
		for range rapid.IntRange(0, 40).Draw(t, "n") {
			w := write{
				at:   target.Addr(rapid.IntRange(0x10000, 0x20000).Draw(t, "at")),
				from: make([]byte, rapid.IntRange(1, 16).Draw(t, "length")),
			}
			for a := w.at; a < w.end(); a++ {
				m.pages[a/target.PageSize] = true
			}
			writes = append(writes, w)
		}
		have, err := readPlaces(m, writes)
		if err != nil {
			t.Fatal(err)
		}
		for i, w := range writes {
			want := make([]byte, len(w.from))
			for k := range want {
				want[k] = byteAt(w.at + target.Addr(k))
			}
			if !bytes.Equal(have[i], want) {
				t.Fatalf("%s: % x, want % x", w.at, have[i], want)
			}
		}
		if m.refuse == 0 && m.reads > len(m.pages) {
			t.Errorf("%d reads of places on %d pages", m.reads, len(m.pages))
		}
	})
}

// A place that cannot be read is named; the others do not hide it.
func TestReadPlacesNamesThePlace(t *testing.T) {
	m := &islands{pages: map[target.Addr]bool{0x10: true, 0x12: true}}
	writes := []write{
		{at: 0x12800, from: make([]byte, 2), name: "last"},
		{at: 0x11000, from: make([]byte, 2), name: "middle"},
		{at: 0x10ffe, from: make([]byte, 2), name: "first"},
	}
	_, err := readPlaces(m, writes)
	var u *unreadable
	if !errors.As(err, &u) || u.what != "middle" || u.at != 0x11000 {
		t.Errorf("%v", err)
	}
}
