package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kardianos/service"

	"hotpatchd/agent"
)

const serviceName = "hotpatchd"

// serviceAction is what can be done to the installed service.
type serviceAction struct {
	name, text string
	do         func(installer) (string, error) // says what it did
}

var serviceActions = []serviceAction{
	{"install", "install and enable the service, without starting it", installer.install},
	{"uninstall", "stop and remove the service; configuration and state stay", installer.uninstall},
	{"start", "start the service", installer.start},
	{"stop", "stop the service; what is applied stays", installer.stop},
	{"restart", "stop and start the service", installer.restart},
}

// installer puts the service into this system's service manager.
type installer struct {
	exe    string
	config string
	said   io.Writer
}

func (i installer) say(format string, args ...any) { fmt.Fprintf(i.said, format+"\n", args...) }

func serviceCommand(c *command, args []string, out, errOut io.Writer) int {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		fmt.Fprintf(errOut, "usage: hotpatchd %s\n", c.usage)
		for _, a := range serviceActions {
			fmt.Fprintf(errOut, "  %-9s %s\n", a.name, a.text)
		}
		if len(args) > 0 && (args[0] == "-h" || args[0] == "--help") {
			return exitDone
		}
		return exitUsage
	}
	alias := command{name: args[0], usage: "service " + args[0] + " [--config FILE]"}
	for _, a := range serviceActions {
		if a.name == args[0] {
			return serviceAlias(&alias, args[1:], out, errOut)
		}
	}
	fmt.Fprintf(errOut, "hotpatchd: there is no service %s\nusage: hotpatchd %s\n", args[0], c.usage)
	return exitUsage
}

// serviceAlias does the action that c is named for.
func serviceAlias(c *command, args []string, out, errOut io.Writer) int {
	for _, a := range serviceActions {
		if a.name == c.name {
			c.text = a.text
		}
	}
	f := c.flags(errOut)
	config := f.String("config", agent.DefaultConfigPath(), "")
	printOnly := false
	if c.name == "install" {
		f.BoolVar(&printOnly, "print", false, "") // the unit, for packages; nothing is touched
	}
	if code, done := c.parse(f, args); done {
		return code
	}
	path, err := filepath.Abs(*config)
	if err != nil {
		return failed(errOut, err)
	}
	exe, err := os.Executable()
	if err == nil {
		exe, err = filepath.EvalSymlinks(exe)
	}
	if err != nil {
		return failed(errOut, fmt.Errorf("cannot tell where this program lies: %w", err))
	}
	if printOnly {
		text, err := unitText(exe, path)
		if err != nil {
			return failed(errOut, err)
		}
		fmt.Fprint(out, text)
		return exitDone
	}
	for _, a := range serviceActions {
		if a.name != c.name {
			continue
		}
		text, err := a.do(installer{exe: exe, config: path, said: out})
		if err != nil {
			return failed(errOut, err)
		}
		fmt.Fprintln(out, text)
	}
	return exitDone
}

// definition is the service as kardianos/service knows it.
func (i installer) definition(arguments ...string) *service.Config {
	return &service.Config{
		Name: serviceName, DisplayName: "hotpatchd", Description: "Security fixes inside running Windows programs",
		Executable: i.exe, Arguments: append([]string{"run", "--config", i.config}, arguments...),
	}
}

// idle is the program that a service.Service wants where we only control it.
type idle struct{}

func (idle) Start(service.Service) error { return nil }
func (idle) Stop(service.Service) error  { return nil }

// firstConfig is written where there is no configuration yet. A test holds it
// to the keys that there are.
const firstConfig = `# Configuration of hotpatchd. Every key but format has a default, which the line with # shows.
# After a change: hotpatchd check-config, then restart the service.
format = "hotpatchd-config/1"
# state_dir = "%STATE%"

[repository]
# url = ""                  # https://…, or file:///… for a folder that holds metadata/ and targets/
# root = "%ROOT%"           # the first root of trust, root.json of the repository
# check_every = "5m"
# products = ["*"]
# images = ["*"]            # images of other names are left alone
# proxy = ""                # the next three are for https
# ca_file = ""
# client_cert = ""

[policy]
# file = "%POLICY%"         # the owner's word; without it the device is not enrolled

[control]
# socket = "%SOCKET%"
# group = "hotpatch"        # members may change things; "": nobody but the administrators of the system

[backend]
# name = "auto"
# scan_every = "2s"
# scene = ""                # with name = "sim" only

[eligibility]
# profile = "auto"
# facts = ""                # with the backend "sim" only

[metrics]
# listen = ""               # a loopback address and port
# textfile = ""

[report]
# url = ""                  # https://…, where the device reports how it stands
# every = "1h"
# proxy = ""
# ca_file = ""
# client_cert = ""
`

// writeConfig is how somebody whose system has no service manager begins.
func writeConfig(path string) string {
	return "write " + path + `; one line is enough to begin: format = "hotpatchd-config/1"`
}

// ensureConfig writes a first configuration where there is none, and never
// touches one that is there.
func (i installer) ensureConfig() error {
	if _, err := os.Lstat(i.config); err == nil {
		i.say("kept     %s", i.config)
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot look at the configuration: %w", err)
	}
	d := agent.DefaultConfig()
	text := strings.NewReplacer("%ROOT%", tomlPath(d.Repository.Root), "%POLICY%", tomlPath(d.Policy.File),
		"%STATE%", tomlPath(d.StateDir), "%SOCKET%", tomlPath(d.Control.Socket)).Replace(firstConfig)
	if err := os.MkdirAll(filepath.Dir(i.config), 0o755); err != nil {
		return fmt.Errorf("cannot write a first configuration: %w", err)
	}
	if err := replaceFile(i.config, []byte(text), 0o644); err != nil {
		return err
	}
	i.say("written  %s", i.config)
	return nil
}

// tomlPath writes a path inside a TOML basic string.
func tomlPath(p string) string { return strings.ReplaceAll(p, `\`, `\\`) }

// replaceFile puts a whole file in place of another: a reader sees the old or
// the new, after a crash too.
func replaceFile(path string, text []byte, mode os.FileMode) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot write %s: %w", path, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(text); err != nil {
		return err
	}
	if err = os.Chmod(f.Name(), mode); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
