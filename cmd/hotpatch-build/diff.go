package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func diffCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "diff OLD NEW",
		Short: "tell which functions differ (not available yet)",
		Args:  cobra.ExactArgs(2),
		RunE: func(*cobra.Command, []string) error {
			return withHint(errors.New("diff is not available yet"), "compare the two with a disassembler, and name the functions by image --function")
		},
	}
}
