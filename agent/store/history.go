package store

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"hotpatchd/agent/control"
)

const (
	// MaxHistory is how many entries are kept; the oldest go first.
	MaxHistory = 10000
	// MaxEntry bounds one entry's JSON, bytes.
	MaxEntry = 64 << 10
)

// The history's ends, in the meta bucket: 8 bytes of sequence number,
// big-endian, and the 32 bytes of that entry's hash.
const (
	keyHead   = "history-head"   // the last entry
	keyAnchor = "history-anchor" // the entry before the oldest kept
)

type link struct {
	seq  uint64
	hash [sha256.Size]byte
}

func (t *Tx) link(key string) (link, error) {
	v, ok := t.get(bucketMeta, key)
	if !ok {
		return link{}, nil
	}
	if len(v) != 8+sha256.Size {
		return link{}, fmt.Errorf("%s has %d bytes", key, len(v))
	}
	l := link{seq: binary.BigEndian.Uint64(v)}
	copy(l.hash[:], v[8:])
	return l, nil
}

func (t *Tx) setLink(key string, l link) error {
	return t.put(bucketMeta, key, append(binary.BigEndian.AppendUint64(nil, l.seq), l.hash[:]...))
}

// Append adds an entry at the end. Seq, Prev and Hash are filled in; the
// caller gives the rest, the time too. The hash is SHA-256 over the previous
// entry's hash (32 zero bytes before the first) and the entry's JSON as
// encoding/json writes it, without "hash". Beyond MaxHistory the oldest entry
// goes and its hash is kept as the chain's anchor.
func (t *Tx) Append(e control.HistoryEntry) (control.HistoryEntry, error) {
	head, err := t.link(keyHead)
	if err != nil {
		return e, err
	}
	e.Seq = head.seq + 1
	e.Prev, e.Hash = "", ""
	if head.seq > 0 {
		e.Prev = hex.EncodeToString(head.hash[:])
	}
	body, err := json.Marshal(e)
	if err != nil {
		return e, err
	}
	if len(body) > MaxEntry {
		return e, fmt.Errorf("cannot append to the history: an entry of %d bytes is longer than %d", len(body), MaxEntry)
	}
	next := link{seq: e.Seq, hash: chain(head.hash, body)}
	b := t.tx.Bucket(bucketHistory)
	if err := b.Put(seqKey(e.Seq), append(next.hash[:], body...)); err != nil {
		return e, err
	}
	if err := t.setLink(keyHead, next); err != nil {
		return e, err
	}
	e.Hash = hex.EncodeToString(next.hash[:])
	return e, t.trim(e.Seq)
}

// trim drops what is older than MaxHistory entries before last.
func (t *Tx) trim(last uint64) error {
	if last <= MaxHistory {
		return nil
	}
	c := t.tx.Bucket(bucketHistory).Cursor()
	for k, v := c.First(); k != nil && len(k) == 8 && binary.BigEndian.Uint64(k) <= last-MaxHistory; k, v = c.First() {
		a := link{seq: binary.BigEndian.Uint64(k)}
		copy(a.hash[:], v)
		if err := t.setLink(keyAnchor, a); err != nil {
			return err
		}
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}

// History returns at most limit entries, newest first. An entry that cannot be
// decoded is an error that names it.
func (t *Tx) History(limit int) ([]control.HistoryEntry, error) {
	var out []control.HistoryEntry
	c := t.tx.Bucket(bucketHistory).Cursor()
	for k, v := c.Last(); k != nil && len(out) < limit; k, v = c.Prev() {
		e, _, err := decodeEntry(k, v)
		if err != nil {
			return out, err
		}
		out = append(out, e)
	}
	return out, nil
}

// Head is the sequence number and hash of the last entry; written down
// elsewhere it shows later whether the history was cut or rewritten. Zero and "" when it is empty.
func (t *Tx) Head() (seq uint64, hash string, err error) {
	l, err := t.link(keyHead)
	if err != nil || l.seq == 0 {
		return 0, "", err
	}
	return l.seq, hex.EncodeToString(l.hash[:]), nil
}

// VerifyHistory recomputes the chain from its anchor to its head. The error
// names the first entry that does not fit.
func (t *Tx) VerifyHistory() error {
	prev, err := t.link(keyAnchor)
	if err != nil {
		return err
	}
	head, err := t.link(keyHead)
	if err != nil {
		return err
	}
	err = t.tx.Bucket(bucketHistory).ForEach(func(k, v []byte) error {
		e, hash, err := decodeEntry(k, v)
		if err != nil {
			return err
		}
		seq := binary.BigEndian.Uint64(k)
		switch {
		case seq != prev.seq+1:
			return fmt.Errorf("history entry %d is missing", prev.seq+1)
		case e.Seq != seq:
			return fmt.Errorf("history entry %d says it is %d", seq, e.Seq)
		case prev.seq > 0 && e.Prev != hex.EncodeToString(prev.hash[:]), prev.seq == 0 && e.Prev != "":
			return fmt.Errorf("history entry %d does not follow entry %d", seq, prev.seq)
		case chain(prev.hash, v[sha256.Size:]) != hash:
			return fmt.Errorf("history entry %d was changed: its hash does not match", seq)
		}
		prev = link{seq: seq, hash: hash}
		return nil
	})
	if err != nil {
		return err
	}
	if prev != head {
		return fmt.Errorf("history ends at entry %d, but %d was written", prev.seq, head.seq)
	}
	return nil
}

func chain(prev [sha256.Size]byte, body []byte) (out [sha256.Size]byte) {
	h := sha256.New()
	h.Write(prev[:])
	h.Write(body)
	h.Sum(out[:0])
	return out
}

func seqKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

func decodeEntry(k, v []byte) (e control.HistoryEntry, hash [sha256.Size]byte, err error) {
	if len(k) != 8 {
		return e, hash, fmt.Errorf("history has a key of %d bytes", len(k))
	}
	seq := binary.BigEndian.Uint64(k)
	if len(v) < sha256.Size {
		return e, hash, fmt.Errorf("history entry %d has %d bytes", seq, len(v))
	}
	if err := json.Unmarshal(v[sha256.Size:], &e); err != nil {
		return e, hash, errors.Join(fmt.Errorf("history entry %d cannot be read", seq), err)
	}
	copy(hash[:], v)
	e.Hash = hex.EncodeToString(hash[:])
	return e, hash, nil
}
