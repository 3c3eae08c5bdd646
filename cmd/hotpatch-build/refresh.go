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
		Long: `Signs timestamp and snapshot anew, for 30 days or --expires. Run it from a timer, well before they
end: KEYS needs only snapshot.pem and timestamp.pem. Root and targets hold for a year: within its last
quarter refresh signs them anew where KEYS has root.pem and targets.pem, and else warns. What has ended
is renewed in the same way; until then devices take nothing new, and keep what they have.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			k, err := repository.LoadKeys(keys)
			if err != nil {
				return withHint(err, "give the folder that hotpatch-build keys wrote for this repository: snapshot.pem and timestamp.pem are enough")
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
