package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"hotpatchd/agent"
)

// inOurHands refuses a file that somebody else commands, or could put another
// one in the place of: on Windows, where the rights say so. who are SIDs to be
// trusted like the system.
func inOurHands(path string, who ...string) error {
	for _, p := range []string{filepath.Dir(path), path} {
		if err := checkHands(p, who...); err != nil {
			return fmt.Errorf("who may change it commands the daemon: %w", err)
		}
	}
	return nil
}

// commandersOf refuses a configuration, or the root of trust that it names, that
// is in other hands. The policy is judged whenever it is read.
func commandersOf(c *agent.Config, who ...string) error {
	if err := inOurHands(c.File, who...); err != nil {
		return inTheirHands("configuration", c.File, err)
	}
	if err := inOurHands(c.Repository.Root, who...); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return inTheirHands("root of trust", c.Repository.Root, err)
	}
	return nil
}

// inTheirHands is the error about a file, with what to do.
func inTheirHands(what, path string, err error) error {
	return &hintedError{fmt.Errorf("cannot use %s as the %s: %w", path, what, err),
		"put it into a folder that only Administrators may write to; or as one of them, for what the error names: " +
			`icacls "..." /setowner *S-1-5-32-544, then icacls "..." /inheritance:r /grant:r *S-1-5-18:F *S-1-5-32-544:F`}
}
