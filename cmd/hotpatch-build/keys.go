package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func keysCommand() *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "keys --dir KEYS",
		Short: "make the signing keys of a new repository",
		Long: `Makes one ed25519 key for each of the four roles: root, targets, snapshot, timestamp.
Keep root and targets offline: they say which keys and which releases devices trust.
Snapshot and timestamp may lie on the machine that runs refresh.
Keys that are there already are never overwritten.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			files, err := repository.GenerateKeys(dir)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					Files []string `json:"files"`
				}{newDocument("hotpatch-keys/1"), files})
			}
			for _, f := range files {
				fmt.Fprintf(cmd.OutOrStdout(), "wrote %s\n", f)
			}
			fmt.Fprintln(cmd.OutOrStdout(), "Keep root.pem and targets.pem offline, with a copy in another place.")
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "folder for the keys")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.MarkFlagRequired("dir")
	return cmd
}
