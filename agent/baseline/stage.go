package baseline

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Set is what a release brings.
type Set struct {
	Product string // also the name of its journal: a plain name
	Release string
	Info    json.RawMessage // kept with the record
	Files   []File
}

// File is one whole file.
type File struct {
	Destination string
	SHA256      string   // of Content, lower-case hex
	Replaces    []string // contents that it may take the place of, as Destination's New; none: nothing may be there
	Content     []byte
}

// Stage writes a set beside its destinations, so that it takes effect at the
// next restart. boot names the present one. Where every destination has its
// content already nothing is done: ErrInPlace. The same release staged again
// changes nothing. Any other error leaves everything as it was.
func (x *Area) Stage(s Set, boot string, now time.Time) (Record, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old, ok := x.records[s.Product]; ok {
		if old.Release == s.Release && old.Phase == Staged {
			return old, nil
		}
		return old, fmt.Errorf("%s is %s: %w", old.Release, old.Phase, ErrOccupied)
	}
	if s.Product == "" || filepath.Base(s.Product) != s.Product || len(s.Files) == 0 {
		return Record{}, fmt.Errorf("cannot stage %d files for the product %q", len(s.Files), s.Product)
	}
	r := Record{Product: s.Product, Release: s.Release, Info: s.Info}
	contents := map[string][]byte{}
	for _, f := range s.Files {
		e, err := x.weigh(f)
		if err != nil {
			return Record{}, err
		}
		// Also what is there already: another set that put it there may take it back.
		if err := x.unclaimed(s.Product, e.Destination); err != nil {
			return Record{}, err
		}
		if e.Old == e.New {
			continue
		}
		if slices.ContainsFunc(r.Files, func(o Entry) bool { return SamePlace(o.Destination, e.Destination) }) {
			return Record{}, refuse(CodePath, e.Destination, "it is named twice")
		}
		if e.Stem, err = stemFor(e.Destination); err != nil {
			return Record{}, err
		}
		r.Files = append(r.Files, e)
		contents[e.Destination] = f.Content
	}
	if len(r.Files) == 0 {
		return Record{}, ErrInPlace
	}
	r, err := x.reached(r, Staging, boot, now)
	if err != nil {
		return Record{}, err
	}
	back := func(err error) (Record, error) {
		return Record{}, nameless{errors.Join(err, x.clear(r, now)), r.Files}
	}
	for _, e := range r.Files {
		if err := x.place(e, contents[e.Destination]); err != nil {
			return back(err)
		}
	}
	if err := x.syncFolders(r); err != nil {
		return back(refuse(CodeIO, r.Files[0].Destination, "%w", err))
	}
	if x.mover != nil {
		if r, err = x.schedule(r, boot, now); err != nil {
			return back(err)
		}
	}
	staged, err := x.reached(r, Staged, boot, now)
	if err != nil {
		return back(err)
	}
	return staged, nil
}

// nameless is an error without the random part of our names: the same trouble
// reads the same each time, and can be told once.
type nameless struct {
	error
	files []Entry
}

func (n nameless) Unwrap() error { return n.error }

func (n nameless) Error() string {
	text := n.error.Error()
	for _, e := range n.files {
		text = strings.ReplaceAll(text, filepath.Base(e.Stem), ".*")
	}
	return text
}

// Weigh tells what Stage would say of a set, writing nothing: nil if it would
// stage it, ErrInPlace, or a Refusal.
func (x *Area) Weigh(s Set) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	there := true
	for _, f := range s.Files {
		e, err := x.weigh(f)
		if err != nil {
			return err
		}
		if err := x.unclaimed(s.Product, f.Destination); err != nil {
			return err
		}
		there = there && e.Old == e.New
	}
	if there {
		return ErrInPlace
	}
	return nil
}

// weigh looks at one destination and what is there.
func (x *Area) weigh(f File) (Entry, error) {
	e := Entry{Destination: f.Destination, New: f.SHA256, Size: int64(len(f.Content))}
	if sum := sha256.Sum256(f.Content); hex.EncodeToString(sum[:]) != f.SHA256 {
		return e, refuse(CodeContent, f.Destination, "the new content is not the one that the release names")
	}
	if err := checkPlace(f.Destination); err != nil {
		return e, err
	}
	old, like, err := present(f.Destination)
	if err != nil {
		return e, err
	}
	e.Old, e.Like = old, like
	switch {
	case old == e.New:
	case old == absent && len(f.Replaces) > 0:
		return e, refuse(CodeContent, f.Destination, "there is no file that could be replaced")
	case old != absent && len(f.Replaces) == 0:
		return e, refuse(CodeContent, f.Destination, "there is a file already (sha256 %s), and the release brings a new one", old)
	case old != absent && !slices.Contains(f.Replaces, old):
		return e, refuse(CodeContent, f.Destination, "the file there (sha256 %s) is none of the %d that the release replaces", old, len(f.Replaces))
	}
	return e, nil
}

// present is the hash and the attributes of what lies at a destination.
func present(destination string) (string, Attributes, error) {
	like, err := inspect(destination)
	if errors.Is(err, fs.ErrNotExist) {
		like, err = newFile(destination)
		if err != nil {
			return "", like, refuse(CodeIO, destination, "%w", err)
		}
		return absent, like, nil
	}
	var r *Refusal
	if errors.As(err, &r) {
		return "", like, err
	}
	if err != nil {
		return "", like, refuse(CodeIO, destination, "%w", err)
	}
	sum, err := hashOf(destination)
	if err != nil {
		return "", like, refuse(CodeIO, destination, "%w", err)
	}
	return sum, like, nil
}

// unclaimed: no destination belongs to two sets, or one would undo the other.
func (x *Area) unclaimed(product, destination string) error {
	for _, r := range x.records {
		for _, e := range r.Files {
			if r.Product != product && SamePlace(e.Destination, destination) {
				return refuse(CodeClaimed, destination, "%s of product %s is %s there", r.Release, r.Product, r.Phase)
			}
		}
	}
	return nil
}

// SamePlace tells whether two paths are one: by spelling, by the file that is
// there, or, where none is, by the folder that a new one would appear in. Short
// names of Windows and links, which are allowed on the way, spell one place in
// several ways.
func SamePlace(a, b string) bool {
	same := func(a, b string) bool {
		x, err := os.Stat(a)
		if err != nil {
			return false
		}
		y, err := os.Stat(b)
		return err == nil && os.SameFile(x, y)
	}
	if strings.EqualFold(filepath.Clean(a), filepath.Clean(b)) || same(a, b) {
		return true
	}
	return strings.EqualFold(filepath.Base(a), filepath.Base(b)) && same(filepath.Dir(a), filepath.Dir(b))
}

// stemFor makes names of ours beside a destination: on the same file system,
// and used by nobody else.
func stemFor(destination string) (string, error) {
	b := make([]byte, 8)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(destination), "."+hex.EncodeToString(b)), nil
}

// place writes one new file beside its destination, whole and durable, and
// tries whether the old one can be given a second name.
func (x *Area) place(e Entry, content []byte) error {
	if err := x.step("create " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	f, err := os.OpenFile(e.staged(), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return refuse(CodeIO, e.Destination, "cannot write beside it: %w", err)
	}
	defer f.Close()
	if err := x.step("write " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if _, err := io.Copy(f, bytes.NewReader(content)); err != nil {
		return refuse(CodeIO, e.Destination, "cannot write beside it: %w", err)
	}
	old := e.Destination
	if e.Old == absent {
		old = ""
	}
	if err := dress(f, e.Like, old); err != nil {
		return refuse(CodeAttributes, e.Destination, "%w", err)
	}
	if err := x.step("sync " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if err := f.Sync(); err != nil {
		return refuse(CodeIO, e.Destination, "cannot write beside it: %w", err)
	}
	if sum, err := hashOf(e.staged()); err != nil || sum != e.New {
		return refuse(CodeIO, e.Destination, "what was written beside it reads otherwise (sha256 %s, %v)", sum, err)
	}
	if e.Old == absent {
		return nil
	}
	// Where this fails, so would the rename at the restart: immutable files, file
	// systems without hard links.
	if err := x.step("keep " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	if err := keepName(e.Destination, e.kept()); err != nil {
		return refuse(CodeIO, e.Destination, "the old file cannot be kept: %w", err)
	}
	if x.mover != nil {
		return nil // the system replaces the first name, and the file stays
	}
	if err := x.step("let go " + e.Destination); err != nil {
		return refuse(CodeIO, e.Destination, "%w", err)
	}
	return remove(e.kept())
}

// schedule asks the system to move the files of a set.
func (x *Area) schedule(r Record, boot string, now time.Time) (Record, error) {
	r, err := x.reached(r, Scheduling, boot, now)
	if err != nil {
		return r, err
	}
	for _, e := range r.Files {
		err := x.step("schedule " + e.Destination)
		if err == nil {
			err = x.mover.AtRestart(e.staged(), e.Destination)
		}
		if err != nil {
			return r, refuse(CodeIO, e.Destination, "the system does not take it for its restart: %w", err)
		}
	}
	return r, nil
}

// Unstage takes a staged set back before it took effect.
func (x *Area) Unstage(product string, now time.Time) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Staged {
		return ErrNoSet
	}
	return x.clear(r, now)
}

// Tidy tries again to remove what could not be removed when a set was over.
func (x *Area) Tidy(product string, now time.Time) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	r, ok := x.records[product]
	if !ok || r.Phase != Staging && r.Phase != Clearing {
		return ErrNoSet
	}
	return x.clear(r, now)
}

// clear removes every name of ours and ends the set's story. The destinations
// stay as they are.
func (x *Area) clear(r Record, now time.Time) error {
	// What is half staged needs no word more, and a full disk may have none to spare.
	if r.Phase != Staging {
		var err error
		if r, err = x.reached(r, Clearing, r.Boot, now); err != nil {
			return err
		}
	}
	for _, e := range r.Files {
		for _, name := range []string{e.staged(), e.back(), e.kept()} {
			if err := x.step("remove " + filepath.Ext(name) + " " + e.Destination); err != nil {
				return refuse(CodeIO, e.Destination, "%w", err)
			}
			if err := remove(name); err != nil {
				return refuse(CodeIO, e.Destination, "cannot remove what lies beside it: %w", err)
			}
		}
	}
	if err := x.syncFolders(r); err != nil {
		return refuse(CodeIO, r.Files[0].Destination, "%w", err)
	}
	return x.drop(r.Product)
}

func (x *Area) syncFolders(r Record) error {
	done := map[string]bool{}
	for _, e := range r.Files {
		dir := filepath.Dir(e.Destination)
		if done[dir] {
			continue
		}
		done[dir] = true
		if err := x.step("sync folder " + dir); err != nil {
			return err
		}
		if err := syncFolder(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
