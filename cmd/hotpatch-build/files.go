package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"hotpatchd/agent/baseline"
	"hotpatchd/agent/release"
)

// checkFiles refuses whole files that no device would take, or that would leave
// it no better.
func checkFiles(m *release.Manifest) error {
	if m.Kind == release.KindBaseline && m.Month == "" && m.Sequence == 0 {
		return fmt.Errorf("release %s: a baseline needs month or sequence: devices tell by them which is the newer one", m.ID)
	}
	if len(m.Files) > 0 && len(m.Requires.OS) != 1 {
		return fmt.Errorf("release %s: requires.os names %d systems; a release with files is for one, whose paths its destinations are", m.ID, len(m.Requires.OS))
	}
	for i, f := range m.Files {
		check := baseline.CheckUnix
		if m.Requires.OS[0] == "windows" {
			check = baseline.CheckWindows
		}
		if err := check(f.Destination); err != nil {
			return fmt.Errorf("release %s: files[%d]: %w", m.ID, i, err)
		}
		if f.Identity == nil {
			continue
		}
		for _, image := range m.Images {
			if image.Base == *f.Identity {
				return fmt.Errorf("release %s: files[%d] is the very build of %s that the release patches: on disk, too, it has to be the fixed one", m.ID, i, image.Name)
			}
		}
	}
	return nil
}

// warnFiles is what an author should know of whole files.
func warnFiles(m *release.Manifest) []string {
	var w []string
	for _, f := range m.Files {
		if len(f.Replaces) == 0 {
			w = append(w, fmt.Sprintf("%s replaces nothing: a device that has a file there already refuses the release", f.Destination))
		} else if slices.Contains(f.Replaces, f.SHA256) {
			w = append(w, fmt.Sprintf("%s replaces itself, which says nothing", f.Destination))
		}
	}
	return w
}

// printFiles shows what a release puts on the disk.
func printFiles(w io.Writer, m *release.Manifest) {
	for _, f := range m.Files {
		fmt.Fprintf(w, "\nFile %s, %d bytes\n    sha256 %s\n", f.Destination, f.Size, f.SHA256)
		if len(f.Replaces) == 0 {
			fmt.Fprintf(w, "    new: nothing may be there\n")
		} else {
			fmt.Fprintf(w, "    replaces %s\n", strings.Join(f.Replaces, "\n             "))
		}
		if id := f.Identity; id != nil {
			fmt.Fprintf(w, "    processes that have mapped it are fixed: size %d, stamp %x, rsds %s\n", id.SizeOfImage, id.TimeDateStamp, orNone(id.RSDS))
		}
	}
}
