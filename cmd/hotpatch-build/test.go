package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/release"
)

// trialLimit bounds a whole test; the simulation itself takes milliseconds an image.
const trialLimit = 5 * time.Minute

func testCommand() *cobra.Command {
	var bases []string
	var asJSON bool
	c := &cobra.Command{
		Use:   "test ID.hotpatch --base app.dll…",
		Short: "apply a release and roll it back in simulation, and report every check",
		Long: `Loads each base into simulated processes, at its own address and at another, and does
there what a device does: identify, plan, apply, verify, roll back, and once with a thread in
the way. Further --base files stand in for DLLs that are imported; other imports lead to
stand-ins. The simulation proves the release and the plan; it does not run the new code.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readInput(args[0])
			if err != nil {
				return err
			}
			r, err := release.Open(b)
			if err != nil {
				return err
			}
			if r.Kind != release.KindHotpatch {
				return fmt.Errorf("%s is a %s: whole files, with nothing to apply to a process", r.ID, r.Kind)
			}
			files, err := readBases(bases)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), trialLimit)
			defer cancel()
			checks := []check{}
			for i := range r.Images {
				checks = append(checks, tryImage(ctx, r, i, files)...)
			}
			return printChecks(cmd, r, checks, asJSON)
		},
	}
	c.Flags().StringArrayVar(&bases, "base", nil, "base image the release names, or a DLL it imports (may be repeated)")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return c
}

func printChecks(cmd *cobra.Command, r *release.Release, checks []check, asJSON bool) error {
	bad := 0
	for _, k := range checks {
		if k.Result == failed {
			bad++
		}
	}
	w := cmd.OutOrStdout()
	if asJSON {
		err := printJSON(w, struct {
			document
			ID     string  `json:"id"`
			Passed bool    `json:"passed"`
			Checks []check `json:"checks"`
		}{newDocument("hotpatch-test/1"), r.ID, bad == 0, checks})
		if err != nil {
			return err
		}
	} else {
		verdict := "PASSED"
		if bad > 0 {
			verdict = "FAILED"
		}
		fmt.Fprintf(w, "%s   %s, sequence %d: %d of %d checks in simulation\n\n", verdict, r.ID, r.Sequence, len(checks)-bad, len(checks))
		for _, k := range checks {
			name := k.Check
			if k.Where != "" {
				name += ", " + k.Where
			}
			fmt.Fprintf(w, "%-6s  %-16s  %-22s  %s\n", k.Result, k.Image, name, k.Text)
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d checks failed", bad, len(checks))
	}
	return nil
}
