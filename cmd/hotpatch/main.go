// Command hotpatch is the operator's view of hotpatchd: it asks the daemon
// over its local socket and shows the answer, as a screen for a person or, with
// --json, as one document for a program.
//
// The first line of every screen is the verdict, the last lines say what to do
// next. Exit codes are a contract:
//
//	0  done, answered, or already so
//	1  failed
//	2  usage
//	3  the device is not eligible
//	4  something is open
//	5  the daemon is not reachable
//	6  not permitted
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
)

// version is set by the linker (-X main.version=…); otherwise the module's.
var version string

func main() { os.Exit(run()) }

// programVersion is what --version and documents of our own call this program.
func programVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return command(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Getenv)
}

// command runs one command line. It is main without the process around it.
func command(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	out := &printer{w: stdout}
	s := &session{out: out, started: false}
	s.screen = newScreen(terminal(stdout) && getenv("NO_COLOR") == "" && getenv("TERM") != "dumb", time.Local)
	s.live = terminal(stdout)
	s.screen.wide = !s.live
	root := s.root(getenv("HOTPATCH_SOCKET"))
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(stderr)
	completion(root)
	err := root.ExecuteContext(ctx)
	if s.unattend != nil {
		s.unattend()
	}
	if s.client != nil {
		s.client.Close()
	}
	if out.err != nil && (err == nil || errors.Is(err, out.err)) { // cobra does not look whether its help was printed
		err, s.started = fmt.Errorf("cannot print: %w", out.err), true
	}
	if err != nil && !s.started { // cobra's own complaints come before any command has started
		err = usageError{err}
	}
	var verdict exit
	if errors.As(err, &verdict) {
		return int(verdict)
	}
	return complain(stderr, err, s.screen, s.jsonOut)
}

// terminal tells whether a person is looking.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// printer remembers that what was to be printed was not.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err != nil && p.err == nil {
		p.err = err
	}
	return n, err
}

// session is one run of the command.
type session struct {
	out      io.Writer
	screen   *screen
	live     bool // a person is looking: rows may be redrawn
	client   *control.Client
	socket   string
	jsonOut  bool
	started  bool        // a command runs: what fails now is not usage
	heard    atomic.Bool // the daemon has told of its progress
	unattend func()      // ends what looks after the daemon; may be nil
}

// root builds the tree of commands.
func (s *session) root(socket string) *cobra.Command {
	if socket == "" {
		socket = control.DefaultSocket
	}
	root := &cobra.Command{
		Use:   "hotpatch",
		Short: "Security fixes inside running programs: see them, apply them, take them back",
		Long: `hotpatch asks the daemon hotpatchd on this machine.

Exit codes: 0 done, answered or already so; 1 failed; 2 usage; 3 the device is not eligible;
4 something is open; 5 the daemon is not reachable; 6 not permitted.`,
		Version:       programVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          knownCommand,
		RunE: func(*cobra.Command, []string) error {
			return usagef("no command is given; hotpatch --help lists them")
		},
		PersistentPreRun: func(c *cobra.Command, _ []string) {
			s.started = true
			s.client = control.Dial(s.socket)
			if c.Annotations[ownWait] == "" {
				ctx, stop := s.attend(c.Context(), c.ErrOrStderr(), patient)
				s.unattend = stop
				c.SetContext(ctx)
			}
		},
	}
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{flagError(c, err)} })
	root.SetVersionTemplate(fmt.Sprintf("hotpatch {{.Version}}, %s, %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH))
	root.PersistentFlags().StringVar(&s.socket, "socket", socket, "`address` of the daemon's socket; HOTPATCH_SOCKET sets another default")
	root.PersistentFlags().BoolVar(&s.jsonOut, "json", false, "print one JSON document instead of a screen")
	root.AddCommand(
		s.statusCommand(), s.eligibilityCommand(), s.checkCommand(), s.listCommand(), s.planCommand(), s.installCommand(),
		s.rollbackCommand(), s.holdCommand(), s.releaseHoldCommand(), s.pauseCommand(), s.resumeCommand(), s.processesCommand(),
		s.verifyCommand(), s.historyCommand(), s.policyCommand(), s.calendarCommand(), s.watchCommand(), s.waitCommand(), s.diagnoseCommand(), s.explainCommand())
	return root
}

// wrongValue is how pflag tells of a value: with the words of package strconv.
var wrongValue = regexp.MustCompile(`^invalid argument "(.*)" for "(?:-\w, )?--([a-z-]+)" flag: `)

// flagError says what a flag wants instead.
func flagError(c *cobra.Command, err error) error {
	m := wrongValue.FindStringSubmatch(err.Error())
	if m == nil {
		return err
	}
	wants := "another value"
	if f := c.Flags().Lookup(m[2]); f != nil {
		switch f.Value.Type() {
		case "int":
			wants = "a whole number"
		case "duration":
			wants = "a time such as 90s, 5m or 1h30m"
		case "bool":
			wants = "true or false"
		}
	}
	return fmt.Errorf("--%s wants %s, not %q", m[2], wants, m[1])
}

// knownCommand refuses words that are no command, and says which may be meant.
func knownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		return usagef("there is no command %q; is %s meant?", args[0], strings.Join(near, " or "))
	}
	return usagef("there is no command %q", args[0])
}

// completion adds cobra's command of that name, whose output is the root's at
// this moment, and refuses a shell that it does not know: cobra shows its help
// and calls it a success.
func completion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	c, _, err := root.Find([]string{"completion"})
	if err != nil || c == root {
		return
	}
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(*cobra.Command, []string) error {
		return usagef("completion needs a shell: bash, zsh, fish or powershell")
	}
}
