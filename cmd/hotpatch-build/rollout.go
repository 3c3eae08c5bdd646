package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func rolloutCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "rollout ID --repo DIR --keys KEYS [--percent N] [--not-before T] [--halt [--undo] --reason TEXT]",
		Short:              "say who may take a release, and when (not available yet)",
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return withHint(errors.New("rollout is not available yet: nothing was changed"),
				"hold a release on a device with: hotpatch hold ID")
		},
	}
}
