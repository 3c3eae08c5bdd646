package main

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"hotpatchd/agent/release"
)

func releaseCommand() *cobra.Command {
	var (
		manifest, output string
		asJSON           bool
	)
	cmd := &cobra.Command{
		Use:   "release --manifest release.toml -o ID.hotpatch",
		Short: "pack a manifest and hotpatch images into a release",
		Long: `Packs what release.toml names into one file. The keys are those of release.json; id, sequence and
images are needed. Left out, format is "` + release.Format + `", kind "hotpatch", product "default",
consistency "entry", and unwind what the builder found; release.json always has them.
An image needs name (of the base image) and file (the hotpatch image, relative to release.toml), made
with the release's own sequence. Its base is taken from FILE.base.json, which the image command
writes beside FILE, unless it is given. A whole file ([[files]], kind "baseline", or what is on disk
after a hotpatch) needs destination, file, and replaces: hashes, or the older files themselves; none
for a new file. severity is ` + strings.Join(release.Severities, ", ") + ` or nothing;
cves are like CVE-2026-0001. The same input gives the same bytes, always.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := readInput(manifest)
			if err != nil {
				return fmt.Errorf("cannot read manifest: %w", err)
			}
			m, files, err := release.FromTOML(text, folder(filepath.Dir(manifest)))
			if err != nil {
				return fmt.Errorf("%s: %w", manifest, err)
			}
			b, err := release.Write(m, files)
			if err != nil {
				return err
			}
			if err := checkRelease(b); err != nil {
				return fmt.Errorf("%s: %w", manifest, err)
			}
			warned := warnRelease(m)
			if output == "" {
				output = m.ID + ".hotpatch"
				if !filepath.IsLocal(output) {
					return fmt.Errorf("cannot write %s: on this system the name is that of a device; name a file with -o", output)
				}
			}
			if err := writeOutput(output, b); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					File     string            `json:"file"`
					Size     int               `json:"size"`
					SHA256   string            `json:"sha256"`
					Manifest *release.Manifest `json:"manifest"`
					Warnings []string          `json:"warnings"`
				}{newDocument("hotpatch-built/1"), output, len(b), fmt.Sprintf("%x", sha256.Sum256(b)), m, warned})
			}
			for _, w := range warned {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", w)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "wrote %s: %s, %s, %d bytes\n", output, m.ID, contents(m), len(b))
			return nil
		},
	}
	cmd.Flags().StringVar(&manifest, "manifest", "", "the release.toml to pack")
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write (default ID.hotpatch)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.MarkFlagRequired("manifest")
	return cmd
}

// contents is what a release brings: a baseline has a month, or a sequence, and files.
func contents(m *release.Manifest) string {
	var words []string
	if m.Sequence > 0 {
		words = append(words, fmt.Sprintf("sequence %d", m.Sequence))
	}
	if m.Month != "" {
		words = append(words, "month "+m.Month)
	}
	if len(m.Images) > 0 {
		words = append(words, plural(len(m.Images), "image", "images"))
	}
	if len(m.Files) > 0 {
		words = append(words, plural(len(m.Files), "file", "files"))
	}
	return strings.Join(words, ", ")
}

// checkRelease refuses what devices would not take, or people not understand.
func checkRelease(b []byte) error {
	r, err := release.Open(b)
	if err != nil {
		return err
	}
	if err := r.CheckTables(); err != nil {
		return err
	}
	if err := checkFiles(&r.Manifest); err != nil {
		return err
	}
	return r.CheckLabels()
}

// warnRelease is what an author should know of a sound release.
func warnRelease(m *release.Manifest) []string {
	w := append([]string{}, warnFiles(m)...)
	if m.Consistency == release.ConsistencyQuiescent {
		w = append(w, fmt.Sprintf("consistency %q: no device of this version reaches it, each will block the release by name; only %q is reached",
			release.ConsistencyQuiescent, release.ConsistencyEntry))
	}
	return w
}

// folder opens files relative to a folder, also above it and by absolute
// path: the author names his own files.
type folder string

// Open implements fs.FS, without the restriction to names below the folder.
func (f folder) Open(name string) (fs.File, error) {
	path := filepath.FromSlash(name)
	if !filepath.IsAbs(path) {
		path = filepath.Join(string(f), path)
	}
	return openInput(path)
}
