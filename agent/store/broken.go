package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"syscall"

	bolterrors "go.etcd.io/bbolt/errors"
)

// brokenError is ErrBroken with the file and the reason.
type brokenError struct {
	path string
	err  error
}

func (b *brokenError) Error() string {
	return fmt.Sprintf("state %s: %v: %v", b.path, ErrBroken, b.err)
}
func (b *brokenError) Unwrap() error        { return b.err }
func (b *brokenError) Is(target error) bool { return target == ErrBroken }

// Broken is closed when the Store breaks; Err then says why.
func (s *Store) Broken() <-chan struct{} { return s.broken }

// Err is nil, or why the Store is broken, an ErrBroken.
func (s *Store) Err() error {
	if why := s.why.Load(); why != nil {
		return why
	}
	return nil
}

// transact runs one transaction of bolt. What it did counts only if the file is
// ours still when it is done.
func (s *Store) transact(run func() error) error {
	s.one.Lock()
	defer s.one.Unlock()
	if err := s.Err(); err != nil {
		return err
	}
	if err := s.intact(); err != nil {
		return err
	}
	err := guard(run)
	switch {
	case isPanic(err), errors.Is(err, bolterrors.ErrInvalidMapping), errors.Is(err, bolterrors.ErrDatabaseNotOpen):
		return s.fail(err)
	case err != nil:
		return err
	}
	return s.intact()
}

// fail breaks the Store.
func (s *Store) fail(err error) error {
	why := &brokenError{s.Path(), err}
	s.why.Store(why)
	close(s.broken)
	return why
}

// intact tells whether the open file is the one that the next Open will find.
// If not, the Store is broken. An error of the system alone breaks nothing.
func (s *Store) intact() error {
	open, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("cannot look at the state: %w", err)
	}
	there, err := os.Lstat(s.Path())
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return s.fail(errors.New("the file was removed while it was open; holds that were in it are lost"))
	case err != nil:
		return fmt.Errorf("cannot look at the state: %w", err)
	case !os.SameFile(there, there): // Windows opens a file for its id: SameFile calls a failure of that a difference
		return errors.New("cannot look at the state: the system does not tell which file lies at its path")
	case !os.SameFile(open, there):
		return s.fail(errors.New("another file was put in its place while it was open"))
	case open.Size() < s.size:
		return s.fail(fmt.Errorf("%w: it was cut from %d to %d bytes while it was open", ErrDamaged, s.size, open.Size()))
	}
	s.size = open.Size()
	return nil
}

// panicked is a panic or a memory fault of bolt as an error.
type panicked struct{ damaged }

func isPanic(err error) bool {
	var p panicked
	return errors.As(err, &p)
}

// guard turns a panic or a memory fault of bolt on a damaged file into an error.
func guard(fn func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		if r := recover(); r != nil {
			err = panicked{damaged{fmt.Errorf("%w: %v", ErrDamaged, r)}}
		}
	}()
	return fn()
}
