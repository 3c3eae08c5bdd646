package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
)

func (s *script) doPublish(words []string) error {
	words, opts, err := options(words, "feature", "severity", "cve", "os", "expires")
	if err != nil {
		return err
	}
	if len(words) < 4 {
		return errors.New("publish ID PRODUCT SEQUENCE IMAGE…")
	}
	seq, err := strconv.ParseUint(words[2], 10, 32)
	if err != nil {
		return err
	}
	m := &release.Manifest{ID: words[0], Product: words[1], Sequence: uint32(seq), Month: "2026-11", Title: words[0], Severity: opts["severity"]}
	if v := opts["cve"]; v != "" {
		m.CVEs = strings.Split(v, ",")
	}
	if v := opts["feature"]; v != "" {
		m.Requires.Features = []string{v}
	}
	if v := opts["os"]; v != "" {
		m.Requires.OS = []string{v}
	}
	var images []image
	for _, f := range words[3:] {
		images = append(images, image{f})
	}
	po, err := expires(opts["expires"])
	if err != nil {
		return err
	}
	return s.publish(po, m, images...)
}

func expires(text string) (o repository.PublishOptions, err error) {
	if text != "" {
		o.Expires, err = time.ParseDuration(text)
	}
	return o, err
}

func (s *script) doResign(words []string) error {
	_, opts, err := options(words, "expires")
	if err != nil {
		return err
	}
	po, err := expires(opts["expires"])
	if err != nil {
		return err
	}
	po.Now = s.now()
	_, err = repository.Refresh(s.path("repo"), s.keys, po)
	return err
}

func (s *script) doRollout(words []string) error {
	words, opts, err := options(words, "percent", "not-before", "halt", "undo", "reason")
	if err != nil {
		return err
	}
	var c repository.RolloutChange
	if v, ok := opts["percent"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil {
			return err
		}
		c.Percent = &n
	}
	switch v := opts["not-before"]; v {
	case "":
	case "none":
		c.NotBefore = &time.Time{}
	default:
		d, err := time.ParseDuration(v)
		if err != nil {
			return err
		}
		t := s.now().Add(d)
		c.NotBefore = &t
	}
	for key, to := range map[string]**bool{"halt": &c.Halt, "undo": &c.Undo} {
		if v, ok := opts[key]; ok {
			yes := v == "true"
			*to = &yes
		}
	}
	if v, ok := opts["reason"]; ok {
		c.Reason = &v
	}
	_, err = repository.SetRollout(s.path("repo"), s.keys, arg(words, 0), c, repository.PublishOptions{Now: s.now()})
	return err
}

// doRepo cuts the device off from its repository, or connects it again.
func (s *script) doRepo(words []string) error {
	if arg(words, 0) == "down" {
		return os.Rename(s.path("repo"), s.path("repo-away"))
	}
	return os.Rename(s.path("repo-away"), s.path("repo"))
}

// doPayload loses the file of a release whose metadata stays, or finds it again.
func (s *script) doPayload(words []string) error {
	pattern := "*." + arg(words, 0) + ".hotpatch"
	from, to := filepath.Join(s.path("repo"), "targets", "releases"), s.path("payload")
	if arg(words, 1) == "back" {
		from, to = to, from
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	list, err := filepath.Glob(filepath.Join(from, pattern))
	if err != nil || len(list) != 1 {
		return fmt.Errorf("%d files of %s: %v", len(list), arg(words, 0), err)
	}
	// A device keeps what it has fetched: that would have to be lost, too.
	cached, _ := filepath.Glob(filepath.Join(s.cfg.StateDir, "repository", "*", strings.Split(filepath.Base(list[0]), ".")[0]+"*"))
	for _, f := range cached {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return os.Rename(list[0], filepath.Join(to, filepath.Base(list[0])))
}
