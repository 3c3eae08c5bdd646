package agent

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

func init() {
	commands["obstruct"] = (*script).doObstruct // folders that are not empty lie where names of ours are removed
	commands["clear-away"] = (*script).doClearAway
}

// What cannot be removed, as on a disk that turned read-only.
func (s *script) doObstruct([]string) error {
	return s.beside(func(path string) error {
		stem := path[:strings.Index(path, ".hotpatch-")]
		return os.MkdirAll(stem+".hotpatch-back/in-the-way", 0o700)
	})
}

func (s *script) doClearAway([]string) error { return s.beside(os.RemoveAll) }

// beside calls fn for everything of ours on the device's disk.
func (s *script) beside(fn func(path string) error) error {
	var all []string
	err := filepath.WalkDir(s.path("disk"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.Contains(path, ".hotpatch-") {
			all = append(all, path)
			if d.IsDir() {
				return fs.SkipDir
			}
		}
		return err
	})
	for _, path := range all {
		if err == nil {
			err = fn(path)
		}
	}
	return err
}
