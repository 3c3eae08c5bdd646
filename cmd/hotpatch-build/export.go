package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func exportCommand() *cobra.Command {
	var (
		repo, out string
		asJSON    bool
	)
	cmd := &cobra.Command{
		Use:   "export --repo DIR [ID…] -o FILE",
		Short: "put releases and their metadata into one file, for devices that reach no repository",
		Long: fmt.Sprintf(`Writes FILE: all metadata of the repository, and the releases named (none: all), at most %d and
%d MiB. Carry it to a device: hotpatch install FILE. It needs no key; it is verified before it is written, and
the device verifies it from its own root of trust, as if it had been fetched. It is good until its metadata ends, and
is refused by devices that have seen newer metadata. Unpacked (it is a zip file) it serves as a repository, too.`,
			repository.MaxExported, repository.MaxExport>>20),
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, ids []string) error {
			b, report, err := repository.Export(repo, ids, time.Now())
			if repository.CodeOf(err) == repository.CodeExpired {
				return withHint(err, "hotpatch-build refresh --repo %s --keys KEYS, then export again", repo)
			}
			if err != nil {
				return fmt.Errorf("export: %w", err)
			}
			if err := writeOutput(out, b); err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					File string `json:"file"`
					repository.Report
				}{newDocument("hotpatch-export-result/1"), out, report})
			}
			for _, r := range report.Releases {
				fmt.Fprintf(cmd.OutOrStdout(), "took %s, %d bytes\n", r.ID, r.Length)
			}
			for role, end := range report.Expires {
				at, err := time.Parse(time.RFC3339, end)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %d bytes, to be installed before %s (%s ends)\n", out, len(b), at.Local().Format("2 Jan 2006 15:04 MST"), role)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&repo, "repo", "", "folder of the repository")
	cmd.Flags().StringVarP(&out, "output", "o", "", "the file to write")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.MarkFlagRequired("repo")
	cmd.MarkFlagRequired("output")
	return cmd
}
