package repository

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// cache is the folder in which a client keeps what it has verified:
//
//	root.json                               the newest root ever trusted
//	metadata/N.targets.json, N.snapshot.json, timestamp.json   the last complete set
//	targets/SHA256                          releases; SHA256.part while they come
//
// timestamp.json is written last: a crash leaves the old set or the new one.
type cache struct {
	dir    string
	notice func(string)
}

func openCache(dir string, notice func(string)) (*cache, error) {
	c := &cache{dir: dir, notice: notice}
	for _, d := range []string{dir, c.metadata(""), c.target("")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, storage(err)
		}
		if err := sweep(d); err != nil {
			return nil, storage(err)
		}
	}
	return c, nil
}

func storage(err error) *Error {
	return fail(CodeStorage, err, "cannot keep what was fetched: %s", reason(err)).hint("free space, or check the rights of state_dir; %s", hintStays)
}

func (c *cache) rootPath() string            { return filepath.Join(c.dir, "root.json") }
func (c *cache) metadata(name string) string { return filepath.Join(c.dir, "metadata", name) }
func (c *cache) target(name string) string   { return filepath.Join(c.dir, "targets", name) }

// root returns the newest root ever trusted: the one kept here, unless it is
// missing, damaged, or older than the one given with the config.
func (c *cache) root(initial []byte) ([]byte, error) {
	given, err := readRoot(initial)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(c.rootPath())
	if errors.Is(err, os.ErrNotExist) {
		return initial, nil
	}
	var kept *metadata.Metadata[metadata.RootType]
	if err == nil {
		kept, err = readRoot(b)
	}
	if err != nil {
		return initial, c.aside(c.rootPath(), err)
	}
	if kept.Signed.Version == given.Signed.Version && string(b) != string(initial) {
		return nil, fail(CodeConfig, nil, "root.json of the config is not the one that %s belongs to: both have version %d", c.dir, given.Signed.Version).
			hint("if the repository was changed on purpose, remove %s", c.dir)
	}
	if kept.Signed.Version < given.Signed.Version {
		return initial, nil
	}
	return b, nil
}

// aside moves a bad file out of the way, for people to look at; only the last
// one of each name is kept.
func (c *cache) aside(path string, why error) error {
	if err := patiently(func() error { return os.Rename(path, path+".bad") }); err != nil {
		return storage(fmt.Errorf("cannot set %s aside: %w", path, err))
	}
	c.notice(fmt.Sprintf("%s cannot be used and was set aside as %s.bad: %v", path, filepath.Base(path), why))
	return nil
}

// read is the source of a session over the kept set.
func (c *cache) read(name string, limit int64) ([]byte, error) {
	path := c.metadata(name)
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fail(CodeNotFound, err, "nothing was fetched yet: there is no %s", name)
	}
	if err != nil || !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fail(CodeDamaged, err, "%s is no file of at most %d bytes", path, limit)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fail(CodeDamaged, err, "cannot read %s", path)
	}
	return b, nil
}

// load verifies the kept set by root, whether or not it has ended. A damaged
// file is set aside; what is left is fetched again by the next refresh.
func (c *cache) load(root []byte) (*trustedSet, *session, error) {
	set, s, err := verify(root, c.read, time.Time{})
	if err != nil && CodeOf(err) != CodeNotFound {
		if asideErr := c.asideLast(s.last, err); asideErr != nil {
			return nil, nil, asideErr
		}
	}
	return set, s, err
}

// asideLast sets the file aside at which verification ended.
func (c *cache) asideLast(name string, why error) error {
	path := c.metadata(name)
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	return c.aside(path, why)
}

// keep writes a verified set: the files of s, timestamp.json last, then drops
// what the set no longer names.
func (c *cache) keep(set *trustedSet, s *session) error {
	names := []string{
		versioned(set.targets.Signed.Version, metadata.TARGETS),
		versioned(set.snapshot.Signed.Version, metadata.SNAPSHOT),
		"timestamp.json",
	}
	for _, name := range names {
		b, ok := s.got[name]
		if !ok {
			return fail(CodeDamaged, nil, "verified metadata without %s", name)
		}
		if old, err := os.ReadFile(c.metadata(name)); err == nil && string(old) == string(b) {
			continue
		}
		if err := writeFile(c.metadata(name), b, 0o600); err != nil {
			return storage(err)
		}
	}
	entries, err := os.ReadDir(c.metadata(""))
	if err != nil {
		return storage(err)
	}
	for _, e := range entries {
		if n := e.Name(); n != names[0] && n != names[1] && n != names[2] && !strings.HasSuffix(n, ".bad") {
			if err := patiently(func() error { return os.Remove(c.metadata(n)) }); err != nil {
				return storage(err)
			}
		}
	}
	return nil
}
