package main

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
)

func publishCommand() *cobra.Command {
	var (
		repo, keys string
		expires    = days(repository.DefaultExpires)
		asJSON     bool
		percent    int
		notBefore  moment
	)
	cmd := &cobra.Command{
		Use:   "publish --repo DIR --keys KEYS [--percent N] [--not-before T] [--expires 30d] ID.hotpatch…",
		Short: "sign releases and add them to a repository",
		Long: `Adds releases to the repository in DIR and makes it if there is none. DIR can be served by any
web server or copied to a stick; devices get DIR/root.json with their config.
The same release again changes nothing; an id with other content is refused.
A release is for all devices at once, unless --percent or --not-before say otherwise; the command
rollout changes that later.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			k, err := repository.LoadKeys(keys)
			if err != nil {
				return keysHint(err, keys)
			}
			var releases [][]byte
			for _, f := range files {
				b, err := readInput(f)
				if err != nil {
					return fmt.Errorf("cannot read release: %w", err)
				}
				if err := checkRelease(b); err != nil {
					return fmt.Errorf("%s: %w", f, err)
				}
				releases = append(releases, b)
			}
			rollout := &repository.Rollout{Percent: percent, NotBefore: notBefore.orNil()}
			res, err := repository.Publish(repo, k, releases, repository.PublishOptions{Expires: time.Duration(expires), Now: time.Now(), Rollout: rollout})
			if err != nil {
				return fmt.Errorf("publish: %w", err)
			}
			if cmd.Flags().Changed("percent") || cmd.Flags().Changed("not-before") {
				for _, id := range res.Unchanged {
					res.Warnings = append(res.Warnings, fmt.Sprintf("the rollout of %s stays as it was: hotpatch-build rollout %s changes it", id, id))
				}
			}
			return printResult(cmd, "hotpatch-publish/1", repo, res, asJSON)
		},
	}
	cmd.Flags().IntVar(&percent, "percent", 100, "of devices that may take it, 0 to 100")
	cmd.Flags().Var(&notBefore, "not-before", "time before which no device takes it, "+momentForms)
	repoFlags(cmd, &repo, &keys, &expires, &asJSON)
	return cmd
}

// keysHint says how to come by keys where there are none. Keys that are there
// and wrong are not made anew: devices trust the right ones.
func keysHint(err error, dir string) error {
	if files, e := filepath.Glob(filepath.Join(dir, "*.pem")); e == nil && len(files) > 0 {
		return withHint(err, "give the folder that hotpatch-build keys wrote for this repository, or its copy")
	}
	return withHint(err, "for a new repository: hotpatch-build keys --dir %s", dir)
}

// repoFlags are those of the commands that sign.
func repoFlags(cmd *cobra.Command, repo, keys *string, expires *days, asJSON *bool) {
	cmd.Flags().StringVar(repo, "repo", "", "folder of the repository")
	cmd.Flags().StringVar(keys, "keys", "", "folder of the signing keys")
	cmd.Flags().Var(expires, "expires", "how long timestamp and snapshot hold, like 30d or 12h")
	cmd.Flags().BoolVar(asJSON, "json", false, "print one JSON document")
	cmd.MarkFlagRequired("repo")
	cmd.MarkFlagRequired("keys")
}

func printResult(cmd *cobra.Command, format, repo string, res repository.Result, asJSON bool) error {
	out := cmd.OutOrStdout()
	if asJSON {
		return printJSON(out, struct {
			document
			repository.Result
		}{newDocument(format), res})
	}
	if res.Created {
		fmt.Fprintf(out, "made the repository %s; devices get %s/root.json with their config\n", repo, strings.TrimRight(repo, "/"))
	}
	for _, id := range res.Published {
		fmt.Fprintf(out, "published %s\n", id)
	}
	for _, id := range res.Unchanged {
		fmt.Fprintf(out, "%s was published before, with the same content\n", id)
	}
	if res.Changed && len(res.Published) == 0 {
		fmt.Fprintln(out, "signed anew")
	}
	for _, w := range res.Warnings {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", w)
	}
	word := "good until %s (%s): run refresh before\n"
	if !res.Expires.After(time.Now()) {
		word = "ended %s (%s): run refresh now, devices take nothing new\n"
	}
	fmt.Fprintf(out, word, res.Expires.Local().Format("2 Jan 2006 15:04 MST"), res.ExpiresIn)
	return nil
}

// days is a duration that also takes days, "30d".
type days time.Duration

func (d *days) String() string {
	h := time.Duration(*d).Hours()
	if h >= 24 && h == float64(int(h/24)*24) {
		return fmt.Sprintf("%dd", int(h/24))
	}
	return time.Duration(*d).String()
}

func (d *days) Set(s string) error {
	var v time.Duration
	if n, ok := strings.CutSuffix(s, "d"); ok {
		count, err := strconv.ParseUint(n, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a number of days", n)
		}
		v = time.Duration(count) * 24 * time.Hour
	} else {
		var err error
		if v, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("%q is not a time like 30d or 12h", s)
		}
	}
	const longest = 365 * 24 * time.Hour
	if v <= 0 || v > longest {
		return fmt.Errorf("%q is not above 0 and at most 365d", s)
	}
	*d = days(v)
	return nil
}

func (d *days) Type() string { return "duration" }
