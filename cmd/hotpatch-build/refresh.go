package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func refreshCommand() *cobra.Command {
	var (
		repo, keys string
		expires    = days(repository.DefaultExpires)
		asJSON     bool
	)
	cmd := &cobra.Command{
		Use:   "refresh --repo DIR --keys KEYS [--expires 30d]",
		Short: "sign timestamp and snapshot anew, so that devices know the repository is alive",
		Long: `Signs timestamp and snapshot anew. Run it from a timer, well before they end: KEYS needs only
snapshot.pem and timestamp.pem. If root or targets end within two months and their keys
are in KEYS, these are signed anew as well; else a warning says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := repository.LoadKeys(keys)
			if err != nil {
				return err
			}
			res, err := repository.Refresh(repo, k, repository.PublishOptions{Expires: time.Duration(expires), Now: time.Now()})
			if err != nil {
				return fmt.Errorf("refresh: %w", err)
			}
			return printResult(cmd, "hotpatch-refresh/1", repo, res, asJSON)
		},
	}
	repoFlags(cmd, &repo, &keys, &expires, &asJSON)
	return cmd
}
