// Package store keeps what the daemon must not forget: the records of what it
// wrote into processes, the operator's holds and choices, the floors below
// which nothing may roll back, and a history that is only ever appended to.
//
// It is one bbolt file. A change and its history entry go into one
// transaction: after a crash both are there or neither. Records are opaque
// bytes here; what they mean is the agent's business.
//
// Memory is the truth about a process, the store a note about it: a damaged
// file is set aside, never repaired and never deleted, and the agent finds its way
// by reading the processes again. The operator's word is nowhere else: of it all
// that can be read is taken over, and where that is not all, Tx.Lost says so.
//
// A file that is damaged, removed or replaced while it is open breaks the Store:
// see ErrBroken.
//
// The package does not log and does not read the clock. A Store may be shared
// between goroutines; a Tx belongs to the function it was given to.
package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Format is the name and version of the file's layout.
const Format = "hotpatchd-state/1"

const formatName = "hotpatchd-state/"

const (
	// lockWait is how long Open waits for another daemon to let go: a restart
	// of the service overlaps by less than this.
	lockWait = 2 * time.Second
	// lockPause is between two tries.
	lockPause = 50 * time.Millisecond
	// maxDamaged bounds how many damaged files are kept; the last is replaced.
	maxDamaged = 16
)

// Errors that callers tell apart.
var (
	// ErrInUse: another process has the file open.
	ErrInUse = errors.New("state is in use by another hotpatchd")
	// ErrNewer: the file was written by a newer version. It is left alone.
	ErrNewer = errors.New("state was written by a newer hotpatchd")
	// ErrDamaged: the file turned out to be damaged after it was opened.
	// Nothing of the failed transaction was kept.
	ErrDamaged = errors.New("state file is damaged")
	// ErrBroken: what is written through this Store does not reach the file that
	// the next Open will find, or bolt has lost its way. Every call fails from
	// now on; only another Open helps.
	ErrBroken = errors.New("the state is broken and must be opened anew")
)

// Damage tells of a file that could not be used and was set aside; or, where
// Moved is empty, of one that could be used except perhaps for its last change.
type Damage struct {
	Path  string // where the file was expected
	Moved string // where it is now
	Err   error  // what was wrong with it
	Kept  string // what of it is in the new file, in words
	Word  bool   // all of the operator's word is: holds and pause. If not, Tx.Lost says so until AcceptLoss
}

func (d *Damage) String() string {
	if d.Moved == "" {
		return fmt.Sprintf("state %s was damaged (%v); its last change may be lost", d.Path, d.Err)
	}
	return fmt.Sprintf("state %s is damaged (%v); set aside as %s, begun anew; %s", d.Path, d.Err, d.Moved, d.Kept)
}

// Store is the open state file.
type Store struct {
	db   *bbolt.DB
	file *os.File // bolt's own

	// one is held by every transaction. A panic leaves bolt's locks taken, for
	// readers too: nobody may be inside or wait there when it comes.
	one    sync.Mutex
	size   int64 // of the file as of the last transaction; it never shrinks
	broken chan struct{}
	why    atomic.Pointer[brokenError]
}

var (
	bucketMeta      = []byte("meta")
	bucketRecords   = []byte("records")
	bucketHolds     = []byte("holds")
	bucketFloors    = []byte("floors")
	bucketInstalled = []byte("installed")
	bucketSettings  = []byte("settings")
	bucketHistory   = []byte("history")

	buckets = [][]byte{bucketMeta, bucketRecords, bucketHolds, bucketFloors, bucketInstalled, bucketSettings, bucketHistory}

	keyFormat = []byte("format")
)

// Open opens the state file, or begins one. A folder that is missing is made;
// it and the file are for the daemon's user only.
//
// A damaged file is renamed to path.damaged-N and a new one begun, with what
// could be read of the operator's word; Damage then says so, with a nil error. So it does where one of the file's two heads was
// damaged and the other is good. A file of a newer format is refused with ErrNewer, one that
// is open elsewhere with ErrInUse; an error of the system (no right, no
// space) is returned as it is and moves nothing.
func Open(path string) (*Store, *Damage, error) {
	if err := secureFolder(filepath.Dir(path)); err != nil {
		return nil, nil, err
	}
	s, both, err := open(path)
	if err == nil && !both {
		return s, &Damage{Path: path, Err: errors.New("one of its two heads is not whole")}, nil
	}
	if err == nil {
		return s, nil, nil
	}
	if !isDamage(err) {
		return nil, nil, err
	}
	damage, replaced := replace(path, err)
	if replaced != nil {
		return nil, nil, fmt.Errorf("state %s is damaged (%v) and cannot be set aside: %w", path, err, replaced)
	}
	s, _, err = open(path)
	if err != nil {
		return nil, damage, err
	}
	return s, damage, nil
}

// Check tells whether Open would refuse path for the folder it lies in or for
// what it is. It makes and changes nothing; a folder that is not there is none to refuse.
func Check(path string) error {
	if _, err := os.Lstat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := secureFolder(filepath.Dir(path)); err != nil {
		return err
	}
	_, err := look(path)
	return err
}

// look finds the file; nil if there is none.
func look(path string) (fs.FileInfo, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("cannot open state: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("cannot open state: %s is not a regular file", path)
	}
	return info, nil
}

// damaged marks an error as one of the file's content.
type damaged struct{ err error }

func (d damaged) Error() string        { return d.err.Error() }
func (d damaged) Unwrap() error        { return d.err }
func (d damaged) Is(target error) bool { return target == ErrDamaged }

func isDamage(err error) bool { return errors.Is(err, ErrDamaged) }

func open(path string) (s *Store, both bool, err error) {
	info, err := look(path)
	switch {
	case err != nil:
		return nil, false, err
	case info == nil:
	case info.Size() == 0:
		// Bolt would take it for a new one; but a file of ours is never empty.
		return nil, false, damaged{errors.New("the file is empty")}
	default:
		if err := secureFile(path); err != nil {
			return nil, false, err
		}
	}
	db, file, both, err := openBolt(path)
	if err != nil {
		return nil, false, err
	}
	s = &Store{db: db, file: file, broken: make(chan struct{})}
	if err := s.begin(); err != nil {
		s.Close()
		return nil, false, err
	}
	if err := secureFile(path); err != nil {
		s.Close()
		return nil, false, err
	}
	return s, both, nil
}

// openBolt opens the file where a damaged page is an error, not our death. Bolt
// does not get to see a damaged file: on Windows it would make a short one
// longer, and one that it fails at while it is mapped could not be moved.
func openBolt(path string) (db *bbolt.DB, file *os.File, both bool, err error) {
	// file is bolt's own, which holds the lock
	err = guard(func() error {
		var err error
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType,
			OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
				f, err := os.OpenFile(name, flag, mode)
				if err != nil {
					return nil, err
				}
				if both, err = checkFile(f); err != nil {
					f.Close()
					return nil, err
				}
				file = f
				return f, nil
			}})
		return err
	})
	if err != nil && file != nil {
		file.Close() // bolt leaves it open where it panics, and with it the lock
	}
	var pathErr *fs.PathError
	var errno syscall.Errno
	switch {
	case err == nil:
		return db, file, both, nil
	case isDamage(err):
		return nil, nil, false, err
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, nil, false, fmt.Errorf("%w: %s", ErrInUse, path)
	case errors.As(err, &pathErr), errors.As(err, &errno):
		return nil, nil, false, fmt.Errorf("cannot open state: %w", err)
	}
	return nil, nil, false, damaged{err}
}

// checkFile looks at every page, while nobody else writes. A new file has none.
func checkFile(f *os.File) (both bool, err error) {
	var release func()
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockPause) {
		if release, err = lockFile(f); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return false, bolterrors.ErrTimeout
		}
	}
	defer release()
	info, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("cannot open state: %w", err)
	}
	if info.Size() == 0 {
		return true, nil
	}
	if both, err = checkPages(f, info.Size()); err != nil {
		return false, damaged{err}
	}
	return both, nil
}

// begin checks the file's format and what the store itself understands, and
// makes what a new file needs.
func (s *Store) begin() error {
	fresh := false
	err := s.view(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if meta == nil {
			fresh = true
			return nil
		}
		if err := checkFormat(string(meta.Get(keyFormat))); err != nil {
			return err
		}
		return checkValues(&Tx{tx})
	})
	if err != nil || !fresh {
		return err
	}
	return s.update(func(tx *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keyFormat, []byte(Format))
	})
}

func checkFormat(found string) error {
	if found == Format {
		return nil
	}
	if v, ok := strings.CutPrefix(found, formatName); ok {
		if n, err := strconv.Atoi(v); err == nil && n > 1 {
			return fmt.Errorf("%w: it has format %q, this one knows %q", ErrNewer, found, Format)
		}
	}
	return damaged{fmt.Errorf("format %q is not %q", found, Format)}
}

// checkValues decodes what the store itself understands.
func checkValues(tx *Tx) error {
	for _, name := range buckets {
		if tx.tx.Bucket(name) == nil {
			return damaged{fmt.Errorf("bucket %q is missing", name)}
		}
	}
	if _, err := tx.Holds(); err != nil {
		return damaged{err}
	}
	if _, err := tx.Floors(); err != nil {
		return damaged{err}
	}
	if _, err := tx.Installed(); err != nil {
		return damaged{err}
	}
	return nil
}

// Close lets go of the file.
func (s *Store) Close() error {
	s.one.Lock()
	defer s.one.Unlock()
	if s.Err() != nil { // bolt would wait for its own locks; what it has mapped goes with the process
		return errors.Join(unlockFile(s.file), s.file.Close())
	}
	return guard(s.db.Close)
}

// Path is where the file lies.
func (s *Store) Path() string { return s.file.Name() }

// Update runs fn in a transaction that is on disk when Update returns nil. If
// fn or the disk fails nothing of it is kept. fn must not call the Store.
func (s *Store) Update(fn func(*Tx) error) error {
	return s.update(func(tx *bbolt.Tx) error { return fn(&Tx{tx}) })
}

// View runs fn on one consistent state. fn must be short (everybody else waits
// for it) and must not call the Store.
func (s *Store) View(fn func(*Tx) error) error {
	return s.view(func(tx *bbolt.Tx) error { return fn(&Tx{tx}) })
}

func (s *Store) update(fn func(*bbolt.Tx) error) error {
	var own error // fn's errors go back as they are
	err := s.transact(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error { own = fn(tx); return own })
	})
	if err != nil && own == nil && !isDamage(err) && !errors.Is(err, ErrBroken) {
		return fmt.Errorf("cannot write state: %w", err)
	}
	return err
}

func (s *Store) view(fn func(*bbolt.Tx) error) error {
	return s.transact(func() error { return s.db.View(fn) })
}
