package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func rotateCommand() *cobra.Command {
	var (
		repo, keys string
		expires    = days(repository.DefaultExpires)
		asJSON     bool
	)
	cmd := &cobra.Command{
		Use:   "rotate ROLE --repo DIR --keys KEYS",
		Short: "replace the key of a role: root, targets, snapshot or timestamp",
		Long: `Makes a new key for ROLE, KEYS/ROLE-2.pem (or the next number that is free), and two new roots, signed
by the root key: under the first both keys count, under the second only the new one. Devices follow by
themselves, at their next check. KEYS needs root.pem, for targets all four, and for snapshot and timestamp
these two. If it is cut off the repository is still good, and the command can be run again.
What a thief has signed with the old key counts no more. A release that was published with a stolen
targets key stays listed, and is signed anew with the rest: look at repo verify first, and take such a
release out of all devices with rollout ID --halt --undo.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			role := args[0]
			if !slices.Contains(repository.Roles, role) {
				return &usageError{fmt.Errorf("%q is not a role: %s", role, strings.Join(repository.Roles, ", ")), cmd.CommandPath()}
			}
			k, err := repository.LoadKeys(keys)
			if err != nil {
				return keysHint(err, keys)
			}
			// Read before a key is made: a wrong folder must not get one.
			if _, err := repository.Verify(repo, time.Now()); err != nil && repository.CodeOf(err) != repository.CodeExpired {
				return err
			}
			fresh, file, err := repository.GenerateNext(keys, role)
			if err != nil {
				return err
			}
			res, err := repository.Rotate(repo, k, role, fresh, repository.PublishOptions{Expires: time.Duration(expires), Now: time.Now()})
			if err != nil {
				return withHint(fmt.Errorf("rotate: %w", err), "keep %s until the command has succeeded once: it may be named already", file)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					Key string `json:"key"`
					repository.Result
				}{newDocument("hotpatch-rotate/1"), file, res})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "wrote %s: it signs for %s from now on; older keys of %s in %s count no more, take them away\n", file, role, role, keys)
			return printResult(cmd, "", repo, res, false)
		},
	}
	repoFlags(cmd, &repo, &keys, &expires, &asJSON)
	return cmd
}
