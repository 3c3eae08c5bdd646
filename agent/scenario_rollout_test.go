package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"hotpatchd/agent/control"
)

func init() {
	commands["times"] = (*script).wantTimes // N ACTION [KEY=VALUE…]: so many entries of the history, exactly
	commands["waits"] = (*script).wantWaits // PID CODE
	commands["mirror"] = (*script).doMirror // save | old | new: what the repository's web server shows
}

// wantTimes counts entries of the history. What must not happen has had its
// time: a whole pass is done before.
func (s *script) wantTimes(words []string) error {
	n, err := strconv.Atoi(arg(words, 0))
	if err != nil || len(words) < 2 {
		return errors.Join(err, errors.New("times N ACTION [KEY=VALUE…]"))
	}
	if err := s.pass(); err != nil {
		return err
	}
	return s.ask(func(ctx context.Context, c *control.Client) error {
		h, err := c.History(ctx, 10000)
		if err != nil {
			return err
		}
		found := 0
		for _, e := range h.Entries {
			if e.Action != words[1] {
				continue
			}
			keys := fields(e)
			for _, k := range []string{"product", "release", "pid", "exe", "image", "text"} { // left out where empty
				if keys[k] == nil {
					keys[k] = ""
				}
			}
			if differ(keys, words[2:]) == "" {
				found++
			}
		}
		if found != n {
			return fmt.Errorf("%d times", found)
		}
		return nil
	})
}

// wantWaits: a plan tells why it is not carried out by itself, "" if it is.
func (s *script) wantWaits(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.ask(func(ctx context.Context, c *control.Client) error {
		doc, err := c.Plan(ctx, control.PlanQuery{PID: pid})
		if err != nil {
			return err
		}
		found := ""
		if doc.Waits != nil {
			found = doc.Waits.Code
		}
		if found != arg(words, 1) {
			return fmt.Errorf("it waits for %q", found)
		}
		return nil
	})
}

// doMirror lets one of two web servers answer that differ in what they have
// got: the state that was saved, or the newest.
func (s *script) doMirror(words []string) error {
	repo, old, away := s.path("repo"), s.path("repo-old"), s.path("repo-new")
	switch arg(words, 0) {
	case "save":
		return os.CopyFS(old, os.DirFS(repo))
	case "old":
		return errors.Join(os.Rename(repo, away), os.CopyFS(repo, os.DirFS(old)))
	case "new":
		return errors.Join(os.RemoveAll(repo), os.Rename(away, repo))
	}
	return errors.New("mirror save|old|new, not " + filepath.Base(arg(words, 0)))
}
