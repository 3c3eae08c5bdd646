// Command hotpatch-build is the tool of a fix's author: it makes hotpatch
// images and releases, tests them, and publishes them to a repository.
//
// Results go to standard output, one document with --json. Errors are one line
// on standard error, with a line "hint: …" where something can be done; with
// --json one document, "hotpatch-error/1". Exit
// codes: 0 done or already so, 1 failed, 2 wrong usage; fleet also 3 and 4, by how the fleet stands.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hotpatchd/agent/repository"
	"hotpatchd/patcher/build"
)

// version is set by the linker.
var version = "devel"

// Exit codes, the same for all commands of the project.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main without the process: arguments and streams in, exit code out.
func run(args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	completion(root)
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	var said verdict
	if errors.As(err, &said) {
		return int(said)
	}
	var usage *usageError
	code := exitFailed
	if errors.As(err, &usage) {
		code = exitUsage
	}
	if f := cmd.Flags().Lookup("json"); f != nil && f.Value.String() == "true" || f != nil && slices.Contains(args, "--json") {
		return failJSON(stderr, err, code)
	}
	fmt.Fprintf(stderr, "hotpatch-build: %s\n", oneLine(err.Error()))
	if h := hintOf(err); h != "" {
		fmt.Fprintf(stderr, "hint: %s\n", oneLine(h))
	}
	return code
}

// failJSON writes an error as one document on one line, as the command
// hotpatch does.
func failJSON(w io.Writer, err error, code int) int {
	type failure struct {
		Code string `json:"code"`
		Text string `json:"text"`
		Hint string `json:"hint,omitempty"`
	}
	word := "failed"
	var b *build.Refusal
	switch {
	case code == exitUsage:
		word = "usage"
	case errors.As(err, &b):
		word = string(b.Code)
	case repository.CodeOf(err) != "":
		word = repository.CodeOf(err)
	}
	text, e := json.Marshal(struct {
		document
		Error failure `json:"error"`
	}{newDocument("hotpatch-error/1"), failure{word, oneLine(err.Error()), oneLine(hintOf(err))}})
	if e != nil {
		text = []byte(`{"format":"hotpatch-error/1"}`) // texts and a time: cannot fail
	}
	fmt.Fprintf(w, "%s\n", text)
	return code
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "hotpatch-build",
		Short:         "make, test and publish hotpatch releases",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return &usageError{errors.New("no command is given; hotpatch-build --help lists them"), cmd.CommandPath()}
		},
	}
	root.SetVersionTemplate(fmt.Sprintf("hotpatch-build {{.Version}}, %s, %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH))
	root.AddCommand(
		imageCommand(),
		implibCommand(),
		inspectCommand(),
		diffCommand(),
		releaseCommand(),
		testCommand(),
		keysCommand(),
		publishCommand(),
		rolloutCommand(),
		refreshCommand(),
		exportCommand(),
		rotateCommand(),
		repoCommand(),
		fleetCommand(),
	)
	wrongUsage(root)
	return root
}

// usageError marks wrong arguments: exit code 2, and where to read on.
type usageError struct {
	err     error
	command string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// wrongUsage makes every complaint of cobra about arguments and flags, in this
// command and below, a usageError.
func wrongUsage(cmd *cobra.Command) {
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &usageError{err, c.CommandPath()}
	})
	check := cmd.Args
	if check == nil {
		check = cobra.ArbitraryArgs
	}
	cmd.Args = func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return &usageError{err, c.CommandPath()}
		}
		// Cobra looks at required flags later and does not say whose fault it was.
		if err := c.ValidateRequiredFlags(); err != nil {
			return &usageError{err, c.CommandPath()}
		}
		return nil
	}
	for _, sub := range cmd.Commands() {
		wrongUsage(sub)
	}
}

// hinted adds to an error what to do about it.
type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

func withHint(err error, format string, args ...any) error {
	return &hinted{err, fmt.Sprintf(format, args...)}
}

func hintOf(err error) string {
	var h *hinted
	var r *repository.Error
	var u *usageError
	var b *build.Refusal
	switch {
	case errors.As(err, &h):
		return h.hint
	case errors.As(err, &r):
		return r.Hint
	case errors.As(err, &b):
		return advice[b.Code]
	case errors.As(err, &u):
		return u.command + " --help"
	}
	return ""
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// document is the head of every answer in JSON.
type document struct {
	Format    string    `json:"format"`
	Generated time.Time `json:"generated"`
	Version   string    `json:"version"`
}

func newDocument(format string) document {
	return document{Format: format, Generated: time.Now().UTC().Truncate(time.Second), Version: version}
}

// printJSON writes one document.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// plural is "1 image" or "2 images".
func plural(n int, one, several string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, several)
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
		return &usageError{errors.New("completion needs a shell: bash, zsh, fish or powershell"), c.CommandPath()}
	}
}
