package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func rolloutCommand() *cobra.Command {
	var (
		repo, keys string
		expires    = days(repository.DefaultExpires)
		asJSON     bool
		percent    int
		notBefore  moment
		halt, undo bool
		reason     string
	)
	cmd := &cobra.Command{
		Use:   "rollout ID --repo DIR --keys KEYS [--percent N] [--not-before T] [--halt [--undo] --reason TEXT]",
		Short: "say who may take a release, and when; stop one",
		Long: `Signs the publisher's word on a published release anew; what is not named stays as it is, and so does the
time of publication. KEYS needs targets.pem, snapshot.pem and timestamp.pem.

--percent N     devices at places below N take it: each device has a place from 0 to 99, the same for
                all releases, from its id or its policy's ring. Less than before takes nothing back.
--not-before T  no device takes it before; "none" takes that away
--halt          no device takes it any more; where it is in force it stays, also in new processes.
                With --undo it is taken out everywhere, back to the release before. --halt=false ends it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			usage := func(text string) error { return &usageError{errors.New(text), cmd.CommandPath()} }
			said := cmd.Flags().Changed
			var c repository.RolloutChange
			if said("percent") {
				c.Percent = &percent
			}
			if said("not-before") {
				c.NotBefore = &notBefore.Time
			}
			if said("halt") {
				c.Halt = &halt
			}
			if said("undo") {
				c.Undo = &undo
			}
			if said("reason") {
				c.Reason = &reason
			}
			switch {
			case c == repository.RolloutChange{}:
				return usage("rollout needs something to change: --percent, --not-before or --halt")
			case percent < 0 || percent > 100:
				return usage(fmt.Sprintf("--percent %d is not between 0 and 100", percent))
			case undo && !halt:
				return usage("--undo needs --halt: what is not halted would come back at once")
			case said("reason") && !halt:
				return usage("--reason needs --halt")
			case halt && strings.TrimSpace(reason) == "":
				return usage("--halt needs --reason TEXT: hotpatch list shows it on every device")
			}
			k, err := repository.LoadKeys(keys)
			if err != nil {
				return withHint(err, "give the folder that hotpatch-build keys wrote for this repository: targets.pem, snapshot.pem and timestamp.pem are needed")
			}
			res, err := repository.SetRollout(repo, k, args[0], c, repository.PublishOptions{Expires: time.Duration(expires), Now: time.Now()})
			if errors.Is(err, repository.ErrUnknownRelease) {
				return withHint(fmt.Errorf("rollout: %w", err), "hotpatch-build repo verify --repo %s lists what is there", repo)
			}
			if err != nil {
				return fmt.Errorf("rollout: %w", err)
			}
			return printRollout(cmd, res, asJSON)
		},
	}
	cmd.Flags().IntVar(&percent, "percent", 100, "of devices that may take it, 0 to 100")
	cmd.Flags().Var(&notBefore, "not-before", "time before which no device takes it, "+momentForms)
	cmd.Flags().BoolVar(&halt, "halt", false, "no device takes it any more")
	cmd.Flags().BoolVar(&undo, "undo", false, "with --halt: taken out where it is")
	cmd.Flags().StringVar(&reason, "reason", "", "why it is halted; hotpatch list shows it on every device, hotpatch status where it is in force or missed")
	repoFlags(cmd, &repo, &keys, &expires, &asJSON)
	return cmd
}

func printRollout(cmd *cobra.Command, res repository.RolloutResult, asJSON bool) error {
	out := cmd.OutOrStdout()
	if asJSON {
		return printJSON(out, struct {
			document
			repository.RolloutResult
		}{newDocument("hotpatch-rollout/1"), res})
	}
	if len(res.Changes) == 0 {
		fmt.Fprintf(out, "%s: already so, nothing was signed\n", res.ID)
	}
	for _, c := range res.Changes {
		fmt.Fprintf(out, "%s: %s\n", res.ID, c)
	}
	now := res.After
	if res.Before.Reason != now.Reason { // said with the change
		now.Reason = ""
	}
	fmt.Fprintf(out, "%s is now %s\n", res.ID, rolloutWords(&now))
	for _, w := range res.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", w)
	}
	return nil
}

// rolloutWords is a rollout in a few words.
func rolloutWords(r *repository.Rollout) string {
	if r == nil {
		return ""
	}
	words := []string{"for all devices"}
	if r.Percent < 100 {
		words[0] = fmt.Sprintf("for %d %% of devices", r.Percent)
	}
	if r.NotBefore != nil {
		words = append(words, "not before "+r.NotBefore.UTC().Format(time.RFC3339))
	}
	switch {
	case r.Halt && r.Undo:
		words = append(words, strings.TrimSuffix("HALTED and undone: "+oneLine(r.Reason), ": "))
	case r.Halt:
		words = append(words, strings.TrimSuffix("HALTED: "+oneLine(r.Reason), ": "))
	}
	return strings.Join(words, ", ")
}

// momentForms are the ways to write a moment.
const momentForms = `like 2026-12-08T18:00:00Z, or 2026-12-08 for its first minute in UTC`

// moment is a flag that is a time; the zero time is "none".
type moment struct{ time.Time }

func (m *moment) orNil() *time.Time {
	if m.IsZero() {
		return nil
	}
	at := m.UTC().Truncate(time.Second)
	return &at
}

func (m *moment) String() string {
	if m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339)
}

func (m *moment) Set(s string) error {
	if s == "none" {
		m.Time = time.Time{}
		return nil
	}
	for _, form := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(form, s); err == nil && t.Year() >= 2000 {
			m.Time = t.UTC()
			return nil
		}
	}
	return fmt.Errorf("%q is not a time %s", s, momentForms)
}

func (m *moment) Type() string { return "time" }
