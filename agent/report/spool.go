package report

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds of a spool. A thousand reports are six weeks of an hourly report, and a
// report of ours has some kilobytes.
const (
	MostReports = 1000
	MostBytes   = 16 << 20
	// MaxReport bounds one document, in bytes.
	MaxReport = 1 << 20
	// mostFiles bounds what is read of the folder: it is ours, and holds no more.
	mostFiles = 16 * MostReports
)

const (
	spoolFormat = "hotpatch-spool/1"
	spoolState  = "spool.json"
	suffix      = ".report"
	temporary   = ".tmp-"
	idLength    = 32 // hex digits
)

// IDOf is the id of a document: the first half of its SHA-256, in hex. Who
// receives two documents with one id has received one document twice.
func IDOf(document []byte) string {
	sum := sha256.Sum256(document)
	return hex.EncodeToString(sum[:])[:idLength]
}

// Entry is a document that waits to be delivered.
type Entry struct {
	ID       string
	Document []byte
	number   uint64
}

// waiting is an Entry as the spool knows it without reading it.
type waiting struct {
	number uint64
	id     string
	size   int64
}

func (w waiting) name() string { return fmt.Sprintf("%016x-%s%s", w.number, w.id, suffix) }

// Spool is a folder of documents that wait, each in a file that is written whole
// or not at all. It may be shared between goroutines of one process; the folder
// may not be shared between processes.
type Spool struct {
	dir   string
	count int
	bytes int64

	mu    sync.Mutex
	list  []waiting // by number
	held  int64     // bytes of list
	next  uint64
	state spoolNote
	put   chan struct{} // one when something was put
}

// spoolNote is what a spool keeps besides the documents.
type spoolNote struct {
	Format string `json:"format"`
	// Dropped counts documents that were never delivered: no room, damaged, or
	// refused by the collector.
	Dropped uint64 `json:"dropped"`
	// FailingSince is when the first try failed after the last one that did not.
	FailingSince time.Time `json:"failing_since,omitzero"`
}

// OpenSpool opens the spool in dir, and makes the folder where there is none. A
// zero count or bytes stands for MostReports or MostBytes.
func OpenSpool(dir string, count int, bytes int64) (*Spool, error) {
	s := &Spool{dir: dir, count: count, bytes: bytes, next: 1, put: make(chan struct{}, 1)}
	if count <= 0 {
		s.count = MostReports
	}
	if bytes <= 0 {
		s.bytes = MostBytes
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot open the spool: %w", err)
	}
	if err := s.readNote(); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot open the spool: %w", err)
	}
	defer f.Close()
	entries, err := f.ReadDir(mostFiles)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cannot read the spool: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporary) {
			os.Remove(filepath.Join(dir, e.Name())) // half written when we were killed: worth nothing
			continue
		}
		w, ok := parseName(e.Name())
		info, err := e.Info()
		if !ok || err != nil || !info.Mode().IsRegular() {
			continue
		}
		w.size = info.Size()
		s.list = append(s.list, w)
		s.held += w.size
		s.next = max(s.next, w.number+1)
	}
	slices.SortFunc(s.list, func(x, y waiting) int {
		if x.number < y.number {
			return -1
		}
		return 1
	})
	return s, s.trim()
}

func parseName(name string) (waiting, bool) {
	base, ok := strings.CutSuffix(name, suffix)
	number, id, cut := strings.Cut(base, "-")
	n, err := strconv.ParseUint(number, 16, 63)
	if _, hexErr := hex.DecodeString(id); !ok || !cut || len(number) != 16 || err != nil || len(id) != idLength || hexErr != nil {
		return waiting{}, false
	}
	return waiting{number: n, id: id}, true
}

func (s *Spool) readNote() error {
	b, err := os.ReadFile(filepath.Join(s.dir, spoolState))
	if errors.Is(err, fs.ErrNotExist) {
		s.state.Format = spoolFormat
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the spool: %w", err)
	}
	var n spoolNote
	if json.Unmarshal(b, &n) != nil {
		n = spoolNote{Format: spoolFormat} // a damaged disk; only counts are lost
	}
	if n.Format != spoolFormat {
		return fmt.Errorf("cannot read the spool in %s: its format is %q, this program writes %q", s.dir, n.Format, spoolFormat)
	}
	s.state = n
	return nil
}

func (s *Spool) writeNote() error {
	b, err := json.Marshal(s.state)
	if err != nil {
		return err
	}
	return s.write(spoolState, b)
}

// Put keeps a document until it is delivered. What is in the spool already is
// not put twice. The oldest documents make room, and are counted as dropped.
func (s *Spool) Put(document []byte) (id string, err error) {
	if len(document) == 0 || len(document) > MaxReport {
		return "", fmt.Errorf("cannot keep a report of %d bytes: it has 1 to %d", len(document), MaxReport)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w := waiting{number: s.next, id: IDOf(document), size: int64(len(document))}
	if slices.ContainsFunc(s.list, func(x waiting) bool { return x.id == w.id }) {
		return w.id, nil
	}
	if err := s.write(w.name(), document); err != nil {
		return "", fmt.Errorf("cannot keep a report: %w", err)
	}
	s.next++
	s.list = append(s.list, w)
	s.held += w.size
	select {
	case s.put <- struct{}{}:
	default:
	}
	return w.id, s.trim()
}

// trim drops the oldest documents beyond the bounds; the newest one stays.
func (s *Spool) trim() error {
	for len(s.list) > 1 && (len(s.list) > s.count || s.held > s.bytes) {
		if err := s.drop(0); err != nil {
			return err
		}
	}
	return nil
}

// drop takes out a document that was not delivered. It is counted first: a
// crash in between counts it twice, never not at all.
func (s *Spool) drop(i int) error {
	s.state.Dropped++
	if err := s.writeNote(); err != nil {
		return err
	}
	return s.remove(i)
}

func (s *Spool) remove(i int) error {
	w := s.list[i]
	if err := os.Remove(filepath.Join(s.dir, w.name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot take a report out of the spool: %w", err)
	}
	s.list = slices.Delete(s.list, i, i+1)
	s.held -= w.size
	return nil
}

// Oldest is the document whose turn it is; ok is false for an empty spool. What
// is not as it was written is dropped and counted.
func (s *Spool) Oldest() (e Entry, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.list) > 0 {
		w := s.list[0]
		if w.size <= MaxReport {
			b, err := os.ReadFile(filepath.Join(s.dir, w.name()))
			if err == nil && IDOf(b) == w.id {
				return Entry{ID: w.id, Document: b, number: w.number}, true, nil
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return Entry{}, false, fmt.Errorf("cannot read the spool: %w", err)
			}
		}
		if err := s.drop(0); err != nil {
			return Entry{}, false, err
		}
	}
	return Entry{}, false, nil
}

// Done takes out a document that was delivered. One that has gone meanwhile is no error.
func (s *Spool) Done(e Entry) error { return s.end(e, s.remove) }

// Drop takes out a document that nobody will take, and counts it.
func (s *Spool) Drop(e Entry) error { return s.end(e, s.drop) }

func (s *Spool) end(e Entry, fn func(int) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.list, func(w waiting) bool { return w.number == e.number })
	if i < 0 {
		return nil
	}
	return fn(i)
}

// failing keeps since when nothing is delivered; the zero time: it is.
func (s *Spool) failing(since time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.FailingSince.IsZero() == since.IsZero() {
		return nil // the first failure is what counts
	}
	s.state.FailingSince = since
	return s.writeNote()
}

// Standing is how a spool stands.
type Standing struct {
	Waiting      int
	Bytes        int64
	Dropped      uint64    // documents never delivered, in all lives of the spool
	FailingSince time.Time // zero: the last try was good, or there was none
}

// Standing tells how many documents wait, and since when in vain.
func (s *Spool) Standing() Standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Standing{Waiting: len(s.list), Bytes: s.held, Dropped: s.state.Dropped, FailingSince: s.state.FailingSince}
}

// write puts b at name whole or not at all, also if the power goes.
func (s *Spool) write(name string, b []byte) error {
	f, err := os.CreateTemp(s.dir, temporary)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	if runtime.GOOS == "windows" {
		return nil // has no such call, and keeps renames in its journal
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
