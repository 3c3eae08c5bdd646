package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"go.etcd.io/bbolt"
)

// keyLost marks a file that was begun anew after a damage which took the
// operator's word with it.
const keyLost = "lost"

// Lost tells whether what the operator had said went with a damaged file, and
// nobody has looked at it since. why is the damage, in one sentence.
func (t *Tx) Lost() (why string, lost bool) {
	b, lost := t.get(bucketMeta, keyLost)
	return string(b), lost
}

// AcceptLoss: the operator has looked at it.
func (t *Tx) AcceptLoss() error { return t.delete(bucketMeta, keyLost) }

// salvaged is what could be read of a damaged file: by bucket, keys and values.
// A bucket that is not there could not be read as a whole.
type salvaged map[string]map[string][]byte

// word tells whether all of the operator's word was read: holds and pause.
func (s salvaged) word() bool { return s[string(bucketHolds)] != nil && s[string(bucketMeta)] != nil }

func (s salvaged) String() string {
	var kept []string
	for _, b := range [][]byte{bucketHolds, bucketInstalled, bucketFloors, bucketSettings} {
		if s[string(b)] != nil {
			kept = append(kept, string(b))
		}
	}
	if len(kept) == 0 {
		return "nothing of it could be read"
	}
	return "kept of it: " + strings.Join(kept, ", ")
}

// salvage reads of a damaged file what is whole. It believes nothing: every
// bucket is walked by our own reader, in time bounded by the size of the file.
func salvage(path string) salvaged {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil
	}
	out := salvaged{}
	for name, read := range map[string]func(map[string][]byte) bool{
		string(bucketMeta):      func(all map[string][]byte) bool { return checkFormat(string(all[string(keyFormat)])) == nil },
		string(bucketHolds):     func(all map[string][]byte) bool { return decodes[Hold](all, func(h Hold) string { return h.ID }) },
		string(bucketInstalled): func(all map[string][]byte) bool { return decodes[Install](all, func(i Install) string { return i.ID }) },
		string(bucketFloors):    floors,
		string(bucketSettings):  func(map[string][]byte) bool { return true },
	} {
		if all, err := readBucket(f, info.Size(), name); err == nil && read(all) {
			out[name] = all
		}
	}
	if !out.word() { // what was chosen stands against what was held: not one without the other
		delete(out, string(bucketInstalled))
	}
	return out
}

func decodes[T any](all map[string][]byte, id func(T) string) bool {
	for k, v := range all {
		var x T
		if json.Unmarshal(v, &x) != nil || id(x) != k {
			return false
		}
	}
	return true
}

func floors(all map[string][]byte) bool {
	for _, v := range all {
		if _, err := floorValue(v); err != nil {
			return false
		}
	}
	return true
}

// readBucket reads one bucket of a file, all of it or an error.
func readBucket(r io.ReaderAt, size int64, name string) (map[string][]byte, error) {
	m, _, err := newestMeta(r)
	if err != nil {
		return nil, err
	}
	if err := m.fits(size); err != nil {
		return nil, err
	}
	var root []byte
	top := &pages{r: r, size: m.pageSize, high: m.high, seen: map[uint64]bool{}, entry: func(k, v []byte, bucket bool) bool {
		if bucket && string(k) == name {
			root = slices.Clone(v)
		}
		return false
	}}
	if err := top.tree(m.root, nil, nil, 0); root == nil {
		return nil, errors.Join(err, fmt.Errorf("bucket %q is missing", name))
	}
	all := map[string][]byte{}
	nested := false
	c := &pages{r: r, size: m.pageSize, high: m.high, seen: map[uint64]bool{}, entry: func(k, v []byte, bucket bool) bool {
		nested = nested || bucket
		all[string(k)] = slices.Clone(v)
		return false
	}}
	if err := c.bucket(m.root, root, 0); err != nil {
		return nil, err
	}
	if nested {
		return nil, fmt.Errorf("bucket %q holds buckets", name)
	}
	return all, nil
}

// replace puts a new file in the place of a damaged one, with what could be
// salvaged, and keeps the damaged one beside it: in one step, so that a crash
// leaves one of the two under the name, and never a new file that does not know of the loss.
func replace(path string, cause error) (*Damage, error) {
	kept := salvage(path)
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	d := &Damage{Path: path, Err: cause, Kept: kept.String(), Word: kept.word()}
	s, _, err := open(fresh)
	if err != nil {
		return nil, err
	}
	d.Moved = asideName(path)
	err = s.update(func(tx *bbolt.Tx) error { return refill(&Tx{tx}, kept, d) })
	if err = errors.Join(err, s.Close()); err != nil {
		os.Remove(fresh)
		return nil, err
	}
	if err := setAside(path, d.Moved); err != nil {
		os.Remove(fresh)
		return nil, err
	}
	return d, moveFile(fresh, path)
}

func refill(t *Tx, kept salvaged, d *Damage) error {
	for _, b := range [][]byte{bucketHolds, bucketInstalled, bucketFloors, bucketSettings} {
		for k, v := range kept[string(b)] {
			if err := t.put(b, k, v); err != nil {
				return err
			}
		}
	}
	if _, paused := kept[string(bucketMeta)][keyPaused]; paused {
		if err := t.SetPaused(true); err != nil {
			return err
		}
	}
	why, before := kept[string(bucketMeta)][keyLost]
	switch {
	case before: // nobody has looked at the damage before this one
		return t.put(bucketMeta, keyLost, why)
	case !d.Word:
		return t.put(bucketMeta, keyLost, []byte(d.String()))
	}
	return nil
}

// asideName is the first free name for a damaged file; the last one is used again.
func asideName(path string) (moved string) {
	for n := 1; n <= maxDamaged; n++ {
		moved = fmt.Sprintf("%s.damaged-%d", path, n)
		if _, err := os.Lstat(moved); errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return moved
}

// setAside gives a damaged file its second name; where the file system has no
// links it is renamed.
func setAside(path, moved string) error {
	if err := os.Remove(moved); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if os.Link(path, moved) == nil {
		return nil
	}
	return moveFile(path, moved)
}
