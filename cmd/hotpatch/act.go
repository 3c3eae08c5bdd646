package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
)

func (s *session) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Ask the repository for new releases now", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := s.client.Check(c.Context())
			if err != nil {
				return err
			}
			return s.show(st, func() string { return s.screen.checked(st) })
		},
	}
}

func (s *session) installCommand() *cobra.Command {
	return &cobra.Command{
		Use: "install [ID|FILE]", Aliases: []string{"apply"},
		Short: "Apply a release now; a hold on it is lifted",
		Long: `Apply a release to every process that needs it, now. ID is a release of the repository, by default the
one that fits; FILE ends with .hotpatch or .export, or has a path in it. A release installs if the trusted metadata
names it, or if a folder metadata/ beside it does, or that of the repository's folder it lies in. An export (hotpatch-build export) brings its metadata along: of each
product the highest release that fits and is not held is installed. Nothing older than what this device has seen is
taken, and nothing that has ended. The release is installed until it is rolled back; a hold on ID is lifted.`,
		Args:              args(0, "ID or FILE"),
		ValidArgsFunction: s.completeInstall,
		RunE: func(c *cobra.Command, args []string) error {
			var r control.InstallRequest
			if len(args) > 0 {
				var err error
				if r, err = installRequest(args[0]); err != nil {
					return err
				}
			}
			return s.change(func(progress func(control.Event)) (*control.Change, error) {
				return s.client.Install(c.Context(), r, progress)
			})
		},
	}
}

func (s *session) completeInstall(c *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if strings.ContainsAny(toComplete, `/\`) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ids, _ := s.completeID(c, args, toComplete)
	return ids, cobra.ShellCompDirectiveDefault
}

func (s *session) rollbackCommand() *cobra.Command {
	return &cobra.Command{
		Use: "rollback [ID]", Short: "Take a release out, back to the one before, and hold it",
		Args: args(0, "ID"), ValidArgsFunction: s.completeID,
		RunE: func(c *cobra.Command, args []string) error {
			var r control.RollbackRequest
			if len(args) > 0 {
				r.ID = args[0]
			}
			return s.change(func(progress func(control.Event)) (*control.Change, error) {
				return s.client.Rollback(c.Context(), r, progress)
			})
		},
	}
}

func (s *session) holdCommand() *cobra.Command {
	reason := ""
	c := &cobra.Command{
		Use: "hold ID", Short: "Say no to a release until release-hold or install; one that is in force is taken out",
		Long: `Say no to a release until release-hold or install. A release that is in force is taken out of all
processes, back to the one before. A hold may be set before its release is published.`,
		Args: args(1, "ID"), ValidArgsFunction: s.completeID,
		RunE: func(c *cobra.Command, args []string) error {
			if !s.jsonOut {
				s.sayTakenOut(c.Context(), args[0])
			}
			return s.change(func(func(control.Event)) (*control.Change, error) {
				return s.client.Hold(c.Context(), args[0], reason)
			})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the history")
	return c
}

// sayTakenOut tells beforehand that a hold takes out what is in force. What
// cannot be asked is not said: the hold itself answers.
func (s *session) sayTakenOut(ctx context.Context, id string) {
	st, err := s.client.Status(ctx)
	if err != nil {
		return
	}
	for _, r := range st.Releases {
		if r.ID == id {
			fmt.Fprintf(s.out, "%s is in force here: the hold takes it out of the processes that run it.\n", clean(id))
		}
	}
}

func (s *session) releaseHoldCommand() *cobra.Command {
	reason := ""
	c := &cobra.Command{
		Use: "release-hold ID", Short: "Lift a hold", Args: args(1, "ID"), ValidArgsFunction: s.completeID,
		RunE: func(c *cobra.Command, args []string) error {
			return s.change(func(func(control.Event)) (*control.Change, error) {
				return s.client.ReleaseHold(c.Context(), args[0], reason)
			})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, for the history")
	return c
}

func (s *session) pauseCommand() *cobra.Command {
	return s.switchCommand("pause", "Apply nothing new until resume; what is applied stays, and rollback and hold work as ever", func(ctx context.Context) (*control.Change, error) {
		return s.client.Pause(ctx)
	})
}

func (s *session) resumeCommand() *cobra.Command {
	return s.switchCommand("resume", "End a pause", func(ctx context.Context) (*control.Change, error) {
		return s.client.Resume(ctx)
	})
}

func (s *session) switchCommand(name, short string, call func(context.Context) (*control.Change, error)) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return s.change(func(func(control.Event)) (*control.Change, error) { return call(c.Context()) })
		},
	}
}

// change runs a change, shows its progress, and ends with what it came to.
func (s *session) change(run func(progress func(control.Event)) (*control.Change, error)) error {
	p := &progress{w: s.out, live: s.live, screen: s.screen}
	show := func(e control.Event) {
		s.heard.Store(true)
		p.event(e)
	}
	if s.jsonOut {
		show = func(control.Event) {}
	}
	c, err := run(show)
	p.end()
	if err != nil {
		return err
	}
	if err := s.show(c, func() string { return s.screen.change(c) }); err != nil {
		return err
	}
	return exitIf(changeOpen(c) > 0, exitIncomplete)
}

// changeOpen counts the images for which a change is not complete.
func changeOpen(c *control.Change) int {
	n := 0
	for _, p := range c.Results {
		for _, i := range p.Images {
			if imageOpen(c, i) {
				n++
			}
		}
	}
	return n
}

// imageOpen tells whether a change has not reached an image: after an install
// whatever is not well, after a rollback or hold whatever still runs the release
// that was to go.
func imageOpen(c *control.Change, i control.Image) bool {
	switch c.Action {
	case "install":
		return i.State.Open()
	case "rollback", "hold":
		switch i.State {
		case control.Torn, control.Failed, control.PendingImage:
			return true
		case control.Unpatched, control.Fixed, control.OtherBuild:
			return false
		}
		return i.Release == c.Release
	}
	return false
}

// progress shows the events of a change while it runs: a line that is redrawn
// for a person, one line an event otherwise.
type progress struct {
	w      io.Writer
	live   bool
	screen *screen
	drawn  bool
}

func (p *progress) event(e control.Event) {
	line := p.screen.progress(e)
	if line == "" {
		return
	}
	if !p.live {
		io.WriteString(p.w, line+"\n")
		return
	}
	if e.Total > 0 && e.Done < e.Total {
		io.WriteString(p.w, "\r\x1b[K"+line)
		p.drawn = true
		return
	}
	io.WriteString(p.w, "\r\x1b[K"+line+"\n")
	p.drawn = false
}

func (p *progress) end() {
	if p.drawn {
		io.WriteString(p.w, "\n")
	}
}
