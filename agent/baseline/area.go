package baseline

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Mover is a system that replaces files while it starts.
type Mover interface {
	// AtRestart has from take the place of to at the next restart; an empty to
	// removes from. A from that is not there then does nothing.
	AtRestart(from, to string) error
}

// Area is all sets of files of one device. Its methods may be called from any
// goroutine; one piece of work is done at a time.
type Area struct {
	dir   string
	mover Mover // nil: we replace the files ourselves, at the first start after a restart

	mu      sync.Mutex
	records map[string]Record // by product

	fault func(step string) error // tests: called before each effect
}

// Open reads the journals in dir, which is made if it is not there, for the
// daemon's user only. damaged names journals that could not be read; they were
// set aside. Recover must be called next.
func Open(dir string) (x *Area, damaged []string, err error) {
	return open(dir, systemMover())
}

func open(dir string, m Mover) (*Area, []string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("cannot make the folder of journals: %w", err)
	}
	records, damaged, err := readJournals(dir)
	if err != nil {
		return nil, nil, err
	}
	return &Area{dir: dir, mover: m, records: records}, damaged, nil
}

// Records lists all sets, by product.
func (x *Area) Records() []Record {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []Record
	for _, r := range x.records {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b Record) int { return strings.Compare(a.Product, b.Product) })
	return out
}

// step tells a test what comes next; an error of its own takes its place.
func (x *Area) step(name string) error {
	if x.fault == nil {
		return nil
	}
	return x.fault(name)
}

// Code says why a set of files is refused.
type Code string

// The codes.
const (
	CodePath       Code = "path"       // no destination that may be written at all
	CodeLink       Code = "link"       // a symbolic link, mount or second name is in the way
	CodeOwner      Code = "owner"      // somebody else may change what lies in the way
	CodeKind       Code = "kind"       // not a regular file, or one with special rights
	CodeContent    Code = "content"    // another content than the author named
	CodeAttributes Code = "attributes" // owner, mode or extended attributes cannot be kept
	CodeSpace      Code = "space"      // the disk is full
	CodeClaimed    Code = "claimed"    // another product's set has the destination
	CodeIO         Code = "io"
)

// Refusal is why a set was not staged, or not activated. Nothing was changed,
// or everything was taken back.
type Refusal struct {
	Code        Code
	Destination string
	Err         error
}

func (r *Refusal) Error() string { return fmt.Sprintf("%s: %v", r.Destination, r.Err) }
func (r *Refusal) Unwrap() error { return r.Err }

func refuse(c Code, destination, format string, a ...any) error {
	err := fmt.Errorf(format, a...)
	if isFull(err) {
		c = CodeSpace
	}
	return &Refusal{c, destination, err}
}

// Errors that are no refusals.
var (
	ErrInPlace  = errors.New("every file is in its place already")
	ErrOccupied = errors.New("another set of this product is there")
	ErrNoSet    = errors.New("no such set is there")
	ErrSameBoot = errors.New("the device was not restarted since")
	ErrNotMoved = errors.New("the system has moved none of the files at its restart; it is asked again")
)

// absent is the hash of a file that is not there.
const absent = ""

// hashOf is the SHA-256 of a regular file, absent if there is none.
func hashOf(path string) (string, error) {
	f, err := openRegular(path)
	if errors.Is(err, fs.ErrNotExist) {
		return absent, nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// reached makes a record durable in a new phase.
func (x *Area) reached(r Record, p Phase, boot string, now time.Time) (Record, error) {
	r.Phase, r.Boot, r.Since = p, boot, now
	return r, x.write(r)
}
