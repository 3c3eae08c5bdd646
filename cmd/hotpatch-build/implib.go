package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"hotpatchd/patcher/build"
)

func implibCommand() *cobra.Command {
	var base, name, out string
	var symbols []string
	var asJSON bool
	c := &cobra.Command{
		Use:   "implib --base app.dll -o libapp.a",
		Short: "write an import library for everything the base has a symbol for",
		Long: `Writes an import library, for GNU ld and lld-link alike, with every function and
variable the base has a symbol for, exported or not. A fix linked against it
imports them from the base's own name; "image" turns those imports into
addresses in the base. Declare variables with __declspec(dllimport).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := build.ImportLibraryOptions{BaseName: name}
			var err error
			if o.Base, err = readInput(base); err != nil {
				return err
			}
			if o.Symbols, err = readSymbols(symbols); err != nil {
				return err
			}
			if o.BaseName == "" {
				o.BaseName = filepath.Base(base)
			}
			b, n, ambiguous, err := build.ImportLibrary(o)
			if err != nil {
				return err
			}
			if err := writeOutput(out, b); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					File    string   `json:"file"`
					DLL     string   `json:"dll"`
					Names   int      `json:"names"`
					LeftOut []string `json:"left_out"` // the base has them more than once
				}{newDocument("hotpatch-implib/1"), out, o.BaseName, n, append([]string{}, ambiguous...)})
			}
			for _, a := range ambiguous {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s is left out: the base has it more than once\n", a)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "wrote     %s (%s of %s)\n", out, plural(n, "name", "names"), o.BaseName)
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&base, "base", "", "the image to be fixed, as shipped")
	f.StringVar(&name, "name", "", "DLL name of the base, where it differs from the file's")
	f.StringArrayVar(&symbols, "symbols", nil, "unstripped twin of the base (may be repeated)")
	f.StringVarP(&out, "output", "o", "", "library to write")
	f.BoolVar(&asJSON, "json", false, "print one JSON document")
	for _, required := range []string{"base", "output"} {
		_ = c.MarkFlagRequired(required) // fails for unknown names only
	}
	return c
}
