package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"hotpatchd/agent/release"
	"hotpatchd/patcher/build"
	"hotpatchd/pe"
)

// maxInput bounds every file that is read whole: larger images than any release may hold are a mistake.
const maxInput = release.MaxExpanded

func imageCommand() *cobra.Command {
	var base, fix, out, name string
	var symbols, functions []string
	var number sequence
	var asJSON bool
	c := &cobra.Command{
		Use:   "image --base app.dll --fix fix.dll --sequence N -o OUT",
		Short: "make a hotpatch image of a base and a fix",
		Long: `Makes a hotpatch image: the fix with a hot patch table that says which functions
of the base it replaces and what of the base it uses.

Without --function every export of the fix whose name is a function of the base
is a replacement. The fix reaches the base by variables named __ref_NAME, by
imports from the base's own name (see implib), and by imports both have. Beside
OUT goes OUT` + release.BaseSuffix + `, the identity of the base, which "release" reads.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := build.Options{Sequence: uint32(number), BaseName: name}
			var err error
			if o.Base, err = readInput(base); err != nil {
				return err
			}
			for _, input := range append([]string{base, fix}, symbols...) {
				if sameFile(input, out) {
					return fmt.Errorf("--output %s is one of the inputs: name another file", out)
				}
			}
			if o.Fix, err = readInput(fix); err != nil {
				return err
			}
			if o.Symbols, err = readSymbols(symbols); err != nil {
				return err
			}
			if o.BaseName == "" {
				o.BaseName = filepath.Base(base)
			}
			for _, f := range functions {
				name, now, _ := strings.Cut(f, "=")
				if name == "" {
					return fmt.Errorf("--function %q names no function", f)
				}
				o.Functions = append(o.Functions, build.Replacement{Name: name, NewName: now})
			}
			r, err := build.Image(o)
			if err != nil {
				return err
			}
			side, err := json.MarshalIndent(release.Base{Format: release.BaseFormat, Unwind: r.Unwind, Identity: r.Base}, "", "  ")
			if err != nil {
				return err
			}
			// The side file first: an image without one is of no use, the other way round is harmless.
			if err := writeOutput(out+release.BaseSuffix, append(side, '\n')); err != nil {
				return err
			}
			if err := writeOutput(out, r.DLL); err != nil {
				return err
			}
			return printImage(cmd, out, r, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&base, "base", "", "the image to be fixed, as shipped")
	f.StringVar(&fix, "fix", "", "DLL with the new functions, linked without an entry point")
	f.StringVar(&name, "name", "", "DLL name of the base, where it differs from the file's")
	f.StringArrayVar(&symbols, "symbols", nil, "unstripped twin of the base (may be repeated)")
	f.StringArrayVar(&functions, "function", nil, "NAME or NAME=NEWNAME to replace (may be repeated)")
	f.Var(&number, "sequence", "sequence number of the release, from 1")
	f.StringVarP(&out, "output", "o", "", "hotpatch image to write")
	f.BoolVar(&asJSON, "json", false, "print one JSON document")
	for _, required := range []string{"base", "fix", "sequence", "output"} {
		_ = c.MarkFlagRequired(required) // fails for unknown names only
	}
	return c
}

// replacedFunction is one replaced function in the document; its keys are stable.
type replacedFunction struct {
	Name    string `json:"name"`
	NewName string `json:"new_name"`
	RVA     uint32 `json:"rva"`
	Length  uint32 `json:"length"` // bytes
	Ranges  int    `json:"ranges"`
}

func printImage(cmd *cobra.Command, out string, r *build.Result, asJSON bool) error {
	w := cmd.OutOrStdout()
	if asJSON {
		list := []replacedFunction{}
		for _, f := range r.Functions {
			list = append(list, replacedFunction{f.Name, f.NewName, f.Place, f.Extra.Length, len(f.Extra.Ranges)})
		}
		return printJSON(w, struct {
			document
			File      string             `json:"file"`
			Size      int                `json:"size"`
			SHA256    string             `json:"sha256"`
			Unwind    string             `json:"unwind"`
			Base      pe.Identity        `json:"base"`
			Functions []replacedFunction `json:"functions"`
			Warnings  []string           `json:"warnings"`
		}{newDocument("hotpatch-image-made/1"), out, len(r.DLL), fmt.Sprintf("%x", sha256.Sum256(r.DLL)), r.Unwind, r.Base, list, append([]string{}, r.Warnings...)})
	}
	for _, f := range r.Functions {
		arrow := ""
		if f.NewName != f.Name {
			arrow = " by " + f.NewName
		}
		parts := ""
		if n := len(f.Extra.Ranges); n > 0 {
			parts = fmt.Sprintf(" and %d further ranges", n)
		}
		fmt.Fprintf(w, "replaces  %s%s at %x, %d bytes%s\n", f.Name, arrow, f.Place, f.Extra.Length, parts)
	}
	for _, s := range r.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", s)
	}
	_, err := fmt.Fprintf(w, "wrote     %s (%d bytes, unwind %s)\n", out, len(r.DLL), r.Unwind)
	return err
}

func readSymbols(names []string) ([]build.SymbolFile, error) {
	var list []build.SymbolFile
	for _, n := range names {
		b, err := readInput(n)
		if err != nil {
			return nil, err
		}
		list = append(list, build.SymbolFile{Name: n, Data: b})
	}
	return list, nil
}

// sequence is a flag that says what it wants.
type sequence uint32

func (n *sequence) Set(s string) error {
	v, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return errors.New("wanted a number from 1 to 4294967295")
	}
	*n = sequence(v)
	return nil
}

func (n *sequence) String() string { return strconv.FormatUint(uint64(*n), 10) }
func (n *sequence) Type() string   { return "N" }

// sameFile tells whether two names are of one file, however they are written.
func sameFile(a, b string) bool {
	x, errA := os.Stat(a)
	y, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(x, y)
}

// openInput opens a regular file of bounded size. What has no end, or waits for
// somebody at the other end, is refused by name.
func openInput(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err == nil && info.Size() > maxInput {
		err = fmt.Errorf("%s has %d bytes, more than %d", name, info.Size(), int64(maxInput))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// readInput reads a whole file of bounded size.
func readInput(name string) ([]byte, error) {
	f, err := openInput(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxInput+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > maxInput {
		return nil, fmt.Errorf("%s has more than %d bytes", name, int64(maxInput))
	}
	return b, nil
}

// writeOutput replaces a file by way of a temporary one beside it, so that
// nobody sees half of it.
func writeOutput(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".hotpatch-build-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("cannot write %s: %w", name, err)
	}
	return nil
}
