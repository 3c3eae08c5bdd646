package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/pe"
)

func init() {
	commands["place"] = (*script).doPlace       // NAME FIXTURE | 'text' | none: a file of the device's disk
	commands["file"] = (*script).wantFile       // NAME FIXTURE | 'text' | none
	commands["tidy"] = (*script).wantTidy       // nothing of ours lies on the disk
	commands["baseline"] = (*script).doBaseline // ID PRODUCT MONTH NAME=OLD:NEW…
	commands["publish-for"] = (*script).doPublishFor
	commands["before"] = (*script).wantBefore // ACTION ACTION: the newest entries of history
	commands["proof"] = (*script).doProof     // DURATION: how long new files are on trial
}

// onDisk is where files of the device lie that releases replace.
func (s *script) onDisk(name string) (string, error) {
	path := s.path(filepath.Join("disk", name))
	return path, os.MkdirAll(filepath.Dir(path), 0o755)
}

// contentOf is a fixture, or the word itself where there is none of that name.
func contentOf(word string) []byte {
	if b, err := os.ReadFile(filepath.Join(fixtures, word)); err == nil {
		return b
	}
	return []byte(word)
}

func (s *script) doPlace(words []string) error {
	path, err := s.onDisk(arg(words, 0))
	if err != nil || arg(words, 1) == "none" {
		return errors.Join(err, os.Remove(path))
	}
	return os.WriteFile(path, contentOf(arg(words, 1)), 0o644)
}

func (s *script) wantFile(words []string) error {
	path, err := s.onDisk(arg(words, 0))
	if err != nil {
		return err
	}
	b, err := os.ReadFile(path)
	switch want := arg(words, 1); {
	case want == "none" && errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !bytes.Equal(b, contentOf(want)):
		return fmt.Errorf("it is not %s, but has %d bytes: %.40q", want, len(b), b)
	}
	return nil
}

func (s *script) wantTidy([]string) error {
	return s.until(func() string {
		left := ""
		filepath.WalkDir(s.path("disk"), func(path string, _ os.DirEntry, err error) error {
			if strings.Contains(path, ".hotpatch-") {
				left = path + " is left"
			}
			return err
		})
		return left
	})
}

func (s *script) wantBefore(words []string) error {
	return s.ask(func(ctx context.Context, c *control.Client) error {
		h, err := c.History(ctx, 10000)
		if err != nil {
			return err
		}
		at := map[string]uint64{}
		for _, e := range h.Entries {
			at[e.Action] = max(at[e.Action], uint64(e.Seq))
		}
		first, then := at[arg(words, 0)], at[arg(words, 1)]
		if first == 0 || then == 0 || first > then {
			return fmt.Errorf("%s is entry %d, %s is entry %d", arg(words, 0), first, arg(words, 1), then)
		}
		return nil
	})
}

func (s *script) doProof(words []string) error {
	d, err := time.ParseDuration(arg(words, 0))
	s.tune = func(a *Agent) { a.bases.proveFor = d }
	if s.life != nil {
		a := s.life.agent
		a.post(func() { a.bases.proveFor = d; a.dirty = true })
	}
	return err
}

// wholeFiles turns NAME=OLD:NEW into files of a release; OLD none: a new file.
func (s *script) wholeFiles(m *release.Manifest, contents map[string][]byte, words []string) error {
	for i, w := range words {
		name, what, _ := strings.Cut(w, "=")
		old, now, ok := strings.Cut(what, ":")
		if !ok {
			return fmt.Errorf("%q is not NAME=OLD:NEW", w)
		}
		path, err := s.onDisk(name)
		if err != nil {
			return err
		}
		b := contentOf(now)
		f := release.File{Destination: path, File: fmt.Sprintf("files/%d", i), Size: int64(len(b)), SHA256: sum(b)}
		if old != "none" {
			h := sha256.Sum256(contentOf(old))
			f.Replaces = []string{hex.EncodeToString(h[:])}
		}
		if im, err := pe.Parse(bytes.NewReader(b), int64(len(b))); err == nil {
			id, err := im.Identity()
			if err != nil {
				return err
			}
			f.Identity = &id
		}
		m.Files = append(m.Files, f)
		contents[f.File] = b
	}
	return nil
}

func (s *script) doBaseline(words []string) error {
	if len(words) < 4 {
		return errors.New("baseline ID PRODUCT MONTH NAME=OLD:NEW…")
	}
	m := &release.Manifest{Format: release.Format, Kind: release.KindBaseline, ID: words[0], Product: words[1], Month: words[2], Sequence: 1}
	contents := map[string][]byte{}
	if err := s.wholeFiles(m, contents, words[3:]); err != nil {
		return err
	}
	b, err := release.Write(m, contents)
	if err != nil {
		return err
	}
	return s.publishBytes(b)
}

func (s *script) publishBytes(b []byte) error {
	if _, err := repository.Publish(s.path("repo"), s.keys, [][]byte{b}, repository.PublishOptions{Now: s.now()}); err != nil {
		return err
	}
	return s.trust()
}

// doPublishFor publishes a hotpatch that needs a baseline, or brings successors:
// BASELINE|none ID PRODUCT SEQUENCE IMAGE [NAME=OLD:NEW…]
func (s *script) doPublishFor(words []string) error {
	if len(words) < 5 {
		return errors.New("publish-for BASELINE ID PRODUCT SEQUENCE IMAGE [NAME=OLD:NEW…]")
	}
	seq, err := strconv.ParseUint(words[3], 10, 32)
	if err != nil {
		return err
	}
	m := &release.Manifest{ID: words[1], Product: words[2], Sequence: uint32(seq), Month: "2026-11"}
	if words[0] != "none" {
		m.Baseline = words[0]
	}
	b, err := s.container(m, image{words[4]})
	if err != nil {
		return err
	}
	if len(words) > 5 {
		r, err := release.Open(b)
		if err != nil {
			return err
		}
		contents := map[string][]byte{r.Images[0].File: r.ImageBytes(0)}
		if err := s.wholeFiles(m, contents, words[5:]); err != nil {
			return err
		}
		if b, err = release.Write(m, contents); err != nil {
			return err
		}
	}
	return s.publishBytes(b)
}
