package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
	"hotpatchd/agent/private"
)

// defaultEntries is how many entries history shows.
const defaultEntries = 50

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no %q", c.CommandPath(), args[0])
	}
	return nil
}

// args checks the number of arguments, and names the one that is missing.
func args(least int, names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < least {
			return usagef("%s needs %s", c.CommandPath(), names[len(args)])
		}
		if len(args) > len(names) {
			return usagef("%s takes no %q", c.CommandPath(), args[len(names)])
		}
		return nil
	}
}

// show prints a document or its screen.
func (s *session) show(doc any, text func() string) error {
	if s.jsonOut {
		b, err := json.MarshalIndent(doc, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.out, "%s\n", b)
		return err
	}
	_, err := io.WriteString(s.out, s.screen.local(text()))
	return err
}

func (s *session) statusCommand() *cobra.Command {
	check := false
	c := &cobra.Command{
		Use: "status", Short: "The verdict, what is open and why, the release in force, what to do", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := s.client.Status(c.Context())
			if err != nil {
				return err
			}
			var open *control.Processes
			if !s.jsonOut && st.Coverage.Open()+st.Coverage.OtherBuild > 0 {
				if open, err = s.client.Processes(c.Context(), control.ProcessQuery{Vulnerable: st.Coverage.OtherBuild == 0}); err != nil {
					return err
				}
			}
			if err := s.show(st, func() string { return s.screen.status(st, open) }); err != nil || !check {
				return err
			}
			return exitIf(true, checkCode(st))
		},
	}
	c.Flags().BoolVar(&check, "check", false, "exit with 0 if all is well, 3 if the device is not eligible, 4 if anything is open or wrong")
	return c
}

// checkCode is the exit code of status --check.
func checkCode(st *control.Status) int {
	// The images may be well, and yet the daemon waits for somebody: a damaged
	// state, a policy that was refused.
	wrong := slices.ContainsFunc(st.Attention, func(a control.Attention) bool { return a.Severity == control.SeverityError })
	switch well := st.State == control.Hotpatched || st.State == control.UpToDate; {
	case well && wrong:
		return exitIncomplete
	case well:
		return exitDone
	case st.State == control.Ineligible, !st.Eligible && (st.State != control.Unknown || len(st.Fails) > 0):
		return exitNotEligible // also before anything was verified, once the device is judged
	}
	return exitIncomplete
}

func (s *session) eligibilityCommand() *cobra.Command {
	all := false
	c := &cobra.Command{
		Use: "eligibility", Short: "Every check: wanted, found, where it was read, what to do", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			e, err := s.client.Eligibility(c.Context())
			if err != nil {
				return err
			}
			if err := s.show(e, func() string { return s.screen.eligibility(e, all) }); err != nil {
				return err
			}
			return exitIf(!e.Eligible, exitNotEligible)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "show checks that do not apply to this device, too")
	return c
}

func (s *session) listCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "What the repository offers, what of it fits this device, and why not", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o, err := s.client.Offers(c.Context())
			if err != nil {
				return err
			}
			return s.show(o, func() string { return s.screen.offers(o) })
		},
	}
}

func (s *session) planCommand() *cobra.Command {
	var q control.PlanQuery
	c := &cobra.Command{
		Use: "plan [ID]", Short: "What would be done to which process; nothing is changed by looking", Args: args(0, "ID"),
		ValidArgsFunction: s.completeID,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				q.ID = args[0]
			}
			p, err := s.client.Plan(c.Context(), q)
			if err != nil {
				return err
			}
			return s.show(p, func() string { return s.screen.plan(p, q.PID) })
		},
	}
	c.Flags().IntVar(&q.PID, "pid", 0, "show one process byte by byte")
	return c
}

func (s *session) processesCommand() *cobra.Command {
	var q control.ProcessQuery
	each := false
	c := &cobra.Command{
		Use: "processes", Short: "State and reason of every image that a release names", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := s.client.Processes(c.Context(), q)
			if err != nil {
				return err
			}
			if err := s.show(p, func() string { return s.screen.processes(p, q, each) }); err != nil {
				return err
			}
			return exitIf(q.Vulnerable && anyOpen(p.Processes), exitIncomplete)
		},
	}
	c.Flags().BoolVar(&q.Vulnerable, "vulnerable", false, "only images that are open; exit with 4 if there are any")
	c.Flags().IntVar(&q.PID, "pid", 0, "one process, with the addresses of its new functions")
	c.Flags().BoolVar(&each, "each", false, "a row for each process, never one for many")
	return c
}

func anyOpen(ps []control.Process) bool {
	for _, p := range ps {
		for _, i := range p.Images {
			if i.State.Open() {
				return true
			}
		}
	}
	return false
}

func (s *session) verifyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "verify", Short: "Read every site again from memory and compare it with the records", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			v, err := s.client.Verify(c.Context())
			if err != nil {
				return err
			}
			if err := s.show(v, func() string { return s.screen.verify(v) }); err != nil {
				return err
			}
			return exitIf(!v.OK, exitIncomplete)
		},
	}
}

func (s *session) historyCommand() *cobra.Command {
	limit := defaultEntries
	c := &cobra.Command{
		Use: "history", Short: "What was done, when, and who asked for it", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			h, err := s.client.History(c.Context(), limit)
			if err != nil {
				return err
			}
			return s.show(h, func() string { return s.screen.history(h) })
		},
	}
	c.Flags().IntVar(&limit, "limit", limit, "at most this many entries, the newest")
	return c
}

func (s *session) explainCommand() *cobra.Command {
	return &cobra.Command{
		Use: "explain PID ADDRESS", Short: "What lies at an address of a process, for reading a crash", Args: args(2, "PID", "ADDRESS"),
		RunE: func(c *cobra.Command, args []string) error {
			pid, err := strconv.Atoi(args[0])
			if err != nil || pid <= 0 {
				return usagef("%q is no process id", args[0])
			}
			var a control.Addr
			if err := a.UnmarshalText([]byte(args[1])); err != nil || a == 0 {
				return usagef("%q is no address: hexadecimal digits, with or without 0x", args[1])
			}
			e, err := s.client.Explain(c.Context(), pid, uint64(a))
			if err != nil {
				return err
			}
			return s.show(e, func() string { return s.screen.explain(e) })
		},
	}
}

func (s *session) calendarCommand() *cobra.Command {
	return &cobra.Command{
		Use: "calendar", Short: "Baseline and hotpatch months: what was released, and what comes next", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := s.client.Calendar(c.Context())
			if err != nil {
				return err
			}
			return s.show(d, func() string { return s.screen.calendar(d) })
		},
	}
}

// formatDiagnose is the format of what diagnose --json prints.
const formatDiagnose = "hotpatch-diagnose/1"

// diagnosed tells where a support file was written.
type diagnosed struct {
	control.Header
	File  string `json:"file"`
	Bytes int    `json:"bytes"`
}

func (s *session) diagnoseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "diagnose FILE", Short: "Write what a support request needs into a new zip file", Args: args(1, "FILE"),
		RunE: func(c *cobra.Command, args []string) (err error) {
			b, err := s.client.Diagnose(c.Context())
			if err != nil {
				return err
			}
			if len(b) == 0 {
				return &control.Error{Code: control.CodeInternal, Text: "the daemon sent an empty file; nothing is written"}
			}
			// It tells of all users' processes: for this user only, and never over another file.
			f, err := private.Create(args[0])
			if err != nil {
				return plainFileError("write", err)
			}
			_, err = f.Write(b)
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			if err != nil {
				os.Remove(args[0])
				return plainFileError("write", err)
			}
			doc := diagnosed{ownHeader(formatDiagnose), args[0], len(b)}
			return s.show(doc, func() string {
				return fmt.Sprintf("Written to %s, %d bytes. It names programs, users and addresses of this machine: read it before you send it.\n", clean(args[0]), len(b))
			})
		},
	}
}

// completeID offers the ids of releases to the shell.
func (s *session) completeID(c *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	client := control.Dial(s.socket)
	defer client.Close()
	o, err := client.Offers(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, r := range o.Releases {
		if strings.HasPrefix(r.ID, toComplete) {
			ids = append(ids, r.ID+"\t"+clean(r.Title))
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
