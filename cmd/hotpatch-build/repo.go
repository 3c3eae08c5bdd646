package main

import (
	"bytes"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func repoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "repo",
		Short: "look at a repository",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return &usageError{fmt.Errorf("repo needs a command: verify"), cmd.CommandPath()}
		},
	}
	cmd.AddCommand(repoVerifyCommand())
	return cmd
}

func repoVerifyCommand() *cobra.Command {
	var (
		repo   string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "verify --repo DIR",
		Short: "check a repository as a device would that trusts its root.json",
		Long: `Reads all metadata and every release as a device would that trusts root.json. Warns of metadata that
ends within a quarter of its time (root and targets hold for a year, timestamp and snapshot for 30 days
unless refresh --expires says otherwise) and names the command that renews it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := repository.Verify(repo, time.Now())
			if repository.CodeOf(err) == repository.CodeExpired {
				return withHint(err, "hotpatch-build refresh --repo %s --keys KEYS, also with root.pem or targets.pem in KEYS if it is theirs that ended", repo)
			}
			if err != nil {
				return authorsHint(err, repo)
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), struct {
					document
					repository.Report
				}{newDocument("hotpatch-repository/1"), report})
			} else {
				err = printReport(cmd, report)
			}
			if n := report.Problems(); err == nil && n > 0 {
				return fmt.Errorf("%d of %s would be refused by devices", n, plural(len(report.Releases), "release", "releases"))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&repo, "repo", "", "folder of the repository")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.MarkFlagRequired("repo")
	return cmd
}

// authorsHint is for who signs a repository: the client's own hints are for devices.
func authorsHint(err error, repo string) error {
	if repository.CodeOf(err) == "" || repository.CodeOf(err) == repository.CodeConfig {
		return err
	}
	return withHint(err, "restore the file from a copy; timestamp and snapshot are made anew by: hotpatch-build refresh --repo %s --keys KEYS", repo)
}

func printReport(cmd *cobra.Command, r repository.Report) error {
	out := cmd.OutOrStdout()
	n := len(r.Releases)
	if r.Problems() == 0 {
		fmt.Fprintf(out, "SOUND   %d of %s; root %d, timestamp %d, snapshot %d, targets %d\n\n", n, plural(n, "release verifies", "releases verify"), r.Root, r.Timestamp, r.Snapshot, r.Targets)
	} else {
		fmt.Fprintf(out, "NOT SOUND   %d of %s\n\n", r.Problems(), plural(n, "release does not verify", "releases do not verify"))
	}
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, t := range r.Releases {
		word := "good"
		if t.Problem != "" {
			word = "BAD"
		}
		fmt.Fprintf(w, "%s\t%s\t%d bytes\t%s\t%s\n", word, t.Target, t.Length, rolloutWords(t.Rollout), t.Problem)
	}
	for _, role := range []string{"timestamp", "snapshot", "targets", "root"} {
		fmt.Fprintf(w, "ends\t%s\t%s\t\t\n", role, r.Expires[role])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for line := range strings.Lines(table.String()) { // columns that nobody has anything in are blanks
		fmt.Fprintln(out, strings.TrimRight(line, " \n"))
	}
	for _, warning := range r.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", warning)
	}
	return nil
}
