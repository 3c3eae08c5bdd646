package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/kardianos/service"
	"go.uber.org/zap"

	"hotpatchd/agent"
)

const (
	unitPath    = "/etc/systemd/system/" + serviceName + ".service"
	systemdRuns = "/run/systemd/system" // sd_booted(3)
	// systemctlWait bounds one call; a stop may take the unit's TimeoutStopSec.
	systemctlWait = 90 * time.Second
)

// underManager is for managers that call into the program; systemd does not.
func underManager(work func(context.Context, func()) error) error { return inForeground(work) }

// manager is systemd as kardianos/service sees it, or why there is none.
func (i installer) manager(unit string) (service.Service, error) {
	if _, err := os.Stat(systemdRuns); err != nil {
		return nil, &hintedError{errors.New("this system was not booted with systemd, so that there is no service to speak of"),
			i.withoutManager()}
	}
	if err := needRoot(os.Geteuid()); err != nil {
		return nil, err
	}
	c := i.definition()
	c.Option = service.KeyValue{"SystemdScript": unit}
	s, err := service.New(idle{}, c)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the service manager: %w", err)
	}
	if s.Platform() != "linux-systemd" {
		return nil, fmt.Errorf("cannot install: the service manager here is %s, only systemd is supported", s.Platform())
	}
	return s, nil
}

// withoutManager says how to begin on a system without systemd.
func (i installer) withoutManager() string {
	text := "let your own supervisor run: " + i.exe + " run --config " + i.config
	if _, err := os.Stat(i.config); errors.Is(err, fs.ErrNotExist) {
		text = writeConfig(i.config) + "; then " + text
	}
	return text
}

// needRoot says beforehand what systemd would refuse halfway.
func needRoot(euid int) error {
	if euid == 0 {
		return nil
	}
	return &hintedError{errors.New("the service belongs to root, and this user is not root"), "the same command with sudo"}
}

func (i installer) install() (string, error) {
	unit, err := unitText(i.exe, i.config)
	if err != nil {
		return "", err
	}
	s, err := i.manager(unit)
	if err != nil {
		return "", err
	}
	if err := i.ensureConfig(); err != nil {
		return "", err
	}
	switch old, err := os.ReadFile(unitPath); {
	case errors.Is(err, fs.ErrNotExist):
		if err := s.Install(); err != nil {
			return "", fmt.Errorf("cannot install the service: %w", err)
		}
		i.say("written  %s", unitPath)
	case err != nil:
		return "", fmt.Errorf("cannot install the service: %w", err)
	case bytes.Equal(old, []byte(unit)):
		i.say("kept     %s", unitPath)
	default: // an older version's, or another place of the program
		if err := replaceFile(unitPath, []byte(unit), 0o644); err != nil {
			return "", err
		}
		i.say("replaced %s", unitPath)
	}
	for _, args := range [][]string{{"daemon-reload"}, {"enable", "--quiet", serviceName + ".service"}} {
		if err := systemctl(args...); err != nil {
			return "", err
		}
	}
	return "installed and enabled. Start it with: hotpatchd service start", nil
}

func (i installer) uninstall() (string, error) {
	if _, err := i.manager(""); err != nil {
		return "", err
	}
	if _, err := os.Lstat(unitPath); errors.Is(err, fs.ErrNotExist) {
		if known, err := loaded(); err != nil || !known {
			return "not installed; nothing to do", err
		}
		return "", errors.New("the service came with a package: remove the package")
	}
	if err := systemctl("disable", "--quiet", "--now", serviceName+".service"); err != nil {
		return "", err
	}
	if err := os.Remove(unitPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("cannot remove the unit: %w", err)
	}
	i.say("removed  %s", unitPath)
	if err := systemctl("daemon-reload"); err != nil {
		return "", err
	}
	return "uninstalled. Configuration and state stay, and so does what is applied", nil
}

func (i installer) start() (string, error)   { return i.control("start", "started") }
func (i installer) stop() (string, error)    { return i.control("stop", "stopped; what is applied stays") }
func (i installer) restart() (string, error) { return i.control("restart", "restarted") }

func (i installer) control(action, done string) (string, error) {
	if _, err := i.manager(""); err != nil {
		return "", err
	}
	if known, err := loaded(); err != nil {
		return "", err
	} else if !known {
		return "", &hintedError{fmt.Errorf("cannot %s the service: it is not installed", action), "hotpatchd service install"}
	}
	if err := systemctl(action, serviceName+".service"); err != nil {
		return "", &hintedError{err, "systemctl status " + serviceName + "; journalctl -u " + serviceName}
	}
	return done, nil
}

// loaded tells whether systemd has a unit of our name, from us or from a package.
func loaded() (bool, error) {
	state, err := systemctlOutput("show", "--property=LoadState", "--value", serviceName+".service")
	return state != "not-found", err
}

func systemctl(args ...string) error {
	_, err := systemctlOutput(args...)
	return err
}

// systemctlOutput runs it with a bound, which kardianos/service does not.
func systemctlOutput(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), systemctlWait)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if ctx.Err() != nil {
		return "", fmt.Errorf("systemctl %s did not end within %s", strings.Join(args, " "), systemctlWait)
	}
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, nil
}

// firstOfAll is what main does before anything else: nothing here.
func firstOfAll() error { return nil }

// withEvents adds the system's event log where there is one: the supervisor
// collects what we write.
func withEvents(log *zap.Logger) *zap.Logger { return log }

// checkHands is a question for Windows: here the mode of a file is looked at.
func checkHands(string, ...string) error { return nil }

// management: there is no place here where device management speaks but the files.
func management() agent.Management { return nil }
