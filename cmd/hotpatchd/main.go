// Command hotpatchd is the daemon: it keeps security fixes inside running
// Windows programs (see package agent). This package is its shell: flags, the
// service, the wiring of configuration, backend, agent and control socket.
//
// It must never decide what is patched, and a stop of any kind leaves what is
// applied where it is.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"

	"hotpatchd/cmd/hotpatchd/pehost"
	"hotpatchd/patcher/target/win32"
)

// Exit codes of every command.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// version is set by the linker (-X main.version=…); otherwise the module's.
var version string

func main() {
	if err := firstOfAll(); err != nil {
		os.Exit(failed(os.Stderr, err))
	}
	win32.Guardian() // is this process one, it does nothing else
	os.Exit(dispatch(os.Args[1:], os.Stdout, os.Stderr))
}

// command is one word of the command line.
type command struct {
	name, usage, text string // no text: not shown
	run               func(c *command, args []string, out, errOut io.Writer) int
}

func commands() []command {
	list := []command{
		{"run", "run --config FILE [--log json|console] [--log-file FILE]", "work in the foreground; also what the service runs", runCommand},
		{"demo", "demo [--backend sim|ptrace]", "show the whole job on this machine; nothing is installed, nothing left behind", demoCommand},
		{"check-config", "check-config --config FILE", "say what is wrong with a configuration and what it names", checkConfigCommand},
		{"service", "service install|uninstall|start|stop|restart [--config FILE]", "", serviceCommand},
		{"version", "version", "print the version", versionCommand},
		{"pe-host", "", "", func(_ *command, args []string, _, _ io.Writer) int { return pehost.Run(args) }},
	}
	for _, action := range serviceActions {
		list = append(list, command{action.name, action.name + " [--config FILE]", "", serviceAlias})
	}
	return list
}

func dispatch(args []string, out, errOut io.Writer) int {
	if len(args) == 0 {
		usage(errOut)
		return exitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		if len(args) > 1 && args[1] != "pe-host" { // help COMMAND
			return dispatch(append(slices.Clone(args[1:]), "--help"), out, out)
		}
		usage(out)
		return exitDone
	case "--version":
		args = append([]string{"version"}, args[1:]...)
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.run(&c, args[1:], out, errOut)
		}
	}
	fmt.Fprintf(errOut, "hotpatchd: there is no command %q\n", args[0])
	usage(errOut)
	return exitUsage
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "usage: hotpatchd COMMAND")
	for _, c := range commands() {
		if c.text != "" {
			fmt.Fprintf(w, "  %s\n        %s\n", c.usage, c.text)
		}
	}
	for _, action := range serviceActions {
		fmt.Fprintf(w, "  service %s\n        %s\n", action.name, action.text)
	}
	fmt.Fprintln(w, "The operator's command is hotpatch, the author's is hotpatch-build.")
}

// flags makes the flag set of c; errors and -h print its usage line.
func (c *command) flags(errOut io.Writer) *flag.FlagSet {
	f := flag.NewFlagSet(c.name, flag.ContinueOnError)
	f.SetOutput(errOut)
	f.Usage = func() {
		fmt.Fprintf(errOut, "usage: hotpatchd %s\n", c.usage)
		if c.text != "" {
			fmt.Fprintf(errOut, "  %s\n", c.text)
		}
	}
	return f
}

// parse reads flags and refuses anything after them. done means: return code.
func (c *command) parse(f *flag.FlagSet, args []string) (code int, done bool) {
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitDone, true
	case err != nil:
		return exitUsage, true
	case f.NArg() > 0:
		fmt.Fprintf(f.Output(), "hotpatchd: %s takes no argument %q\n", c.name, f.Arg(0))
		f.Usage()
		return exitUsage, true
	}
	return 0, false
}

// failed says what went wrong, and on a line of its own what to do.
func failed(errOut io.Writer, err error) int {
	fmt.Fprintln(errOut, "hotpatchd: "+err.Error())
	var h *hintedError
	if errors.As(err, &h) {
		fmt.Fprintln(errOut, "hint: "+h.hint)
	}
	return exitFailed
}

// hintedError is an error and what to do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

func versionCommand(c *command, args []string, out, errOut io.Writer) int {
	if code, done := c.parse(c.flags(errOut), args); done {
		return code
	}
	fmt.Fprintf(out, "hotpatchd %s, %s, %s/%s\n", programVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return exitDone
}

// programVersion is what status documents and logs call this program.
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
