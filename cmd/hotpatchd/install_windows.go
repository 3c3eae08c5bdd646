package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/kardianos/service"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/eventlog"
	"golang.org/x/sys/windows/svc/mgr"

	"hotpatchd/agent"
	"hotpatchd/agent/private"
)

const (
	// controlWait bounds a start or stop that a person waits for; the daemon
	// gives itself less (stopWait).
	controlWait = 60 * time.Second
	// goneWait bounds the wait for a removed service to leave the manager's
	// list: it stays there while anybody has it open.
	goneWait = 10 * time.Second
	// controlPause is between two looks at the service.
	controlPause = 100 * time.Millisecond
)

// arguments are what the service gets besides its configuration: also who
// installs, to whom the files may belong that the service obeys.
func (i installer) arguments() []string {
	args := []string{"--service", "--log-file", i.logFile()}
	if user, err := windows.GetCurrentProcessToken().GetTokenUser(); err == nil && !user.User.Sid.IsWellKnown(windows.WinLocalSystemSid) {
		args = append(args, "--installed-by", user.User.Sid.String())
	}
	return args
}

func (i installer) logFile() string { return filepath.Join(filepath.Dir(i.config), "hotpatchd.log") }

func (i installer) install() (string, error) {
	if err := inOurHands(i.exe); err != nil {
		return "", inTheirHands("program of a service", i.exe, err)
	}
	if err := i.protectHome(); err != nil {
		return "", err
	}
	if err := i.ensureConfig(); err != nil {
		return "", err
	}
	if err := i.commanders(); err != nil {
		return "", err
	}
	c := i.definition(i.arguments()...)
	c.Option = service.KeyValue{"StartType": "automatic"}
	kept := false
	err := withService(func(*mgr.Service) error { kept = true; return nil })
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		var s service.Service
		if s, err = service.New(idle{}, c); err == nil {
			err = patiently(s.Install)
		}
		if err == nil {
			err = listed()
		}
	}
	if err == nil {
		err = withService(func(s *mgr.Service) error { return i.mend(s, kept) })
	}
	if err == nil {
		err = withService(i.harden)
	}
	if err == nil && kept { // kardianos/service has done it for a new one
		err = eventlog.InstallAsEventCreate(serviceName, eventlog.Error|eventlog.Warning|eventlog.Info)
		if err != nil && strings.Contains(err.Error(), "exists") {
			err = nil
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot install the service: %w", err)
	}
	return "installed, starts with the system. Start it now with: hotpatchd service start", nil
}

// protectHome makes the folder of the configuration for SYSTEM and
// Administrators only. One that is there keeps its rights, unless it is the one
// in ProgramData, where anyone may make folders; it is refused if it belongs to
// anyone else, who could put his own configuration into it, or if it is a link:
// what it points to would get our rights.
func (i installer) protectHome() error {
	const sddl = "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)"
	dir := filepath.Dir(i.config)
	sd, err := windows.SecurityDescriptorFromString(sddl)
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", dir, err)
	}
	_, err = os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return fmt.Errorf("cannot make the folder of the configuration: %w", err)
		}
		name, err := windows.UTF16PtrFromString(dir)
		if err != nil {
			return fmt.Errorf("cannot make the folder of the configuration: %w", err)
		}
		sa := &windows.SecurityAttributes{SecurityDescriptor: sd}
		sa.Length = uint32(unsafe.Sizeof(*sa))
		if err := windows.CreateDirectory(name, sa); err != nil {
			return fmt.Errorf("cannot make the folder of the configuration: %w", &fs.PathError{Op: "mkdir", Path: dir, Err: err})
		}
		i.say("written  %s: for SYSTEM and Administrators only", dir)
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot look at the folder of the configuration: %w", err)
	}
	if strings.EqualFold(dir, filepath.Dir(agent.DefaultConfigPath())) {
		err = private.Protect(dir, sddl)
	} else {
		err = private.CheckOwner(dir)
	}
	if err != nil {
		return fmt.Errorf("cannot use %s for the configuration: %w", dir, err)
	}
	return nil
}

// commanders refuses a configuration, policy or root of trust in other hands.
// A configuration that cannot be read names no others, and starts nothing.
func (i installer) commanders() error {
	c, _, err := agent.LoadManagedConfig(i.config, management())
	if err != nil {
		if err := inOurHands(i.config); err != nil {
			return inTheirHands("configuration", i.config, err)
		}
		return nil
	}
	if err := commandersOf(c); err != nil {
		return err
	}
	if err := inOurHands(c.Policy.File); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return inTheirHands("policy", c.Policy.File, err)
	}
	return nil
}

// checkHands refuses a link, and what somebody else owns or may write to.
func checkHands(path string, who ...string) error { return private.CheckHands(path, who...) }

// commandLine is what the manager starts. The program's path is quoted also
// where it need not be: unquoted, a later move below a folder with a space
// would let C:\Program.exe be started in its place.
func (i installer) commandLine() string {
	words := append([]string{"run", "--config", i.config}, i.arguments()...)
	return `"` + i.exe + `" ` + windows.ComposeCommandLine(words)
}

// mend makes the installed service start this program with this configuration.
func (i installer) mend(s *mgr.Service, kept bool) error {
	was, err := binaryPath(s)
	if err != nil {
		return err
	}
	want := i.commandLine()
	if was == want {
		i.say("kept     service %s", serviceName)
		return nil
	}
	p, err := windows.UTF16PtrFromString(want)
	if err != nil {
		return err
	}
	const same = windows.SERVICE_NO_CHANGE
	if err := windows.ChangeServiceConfig(s.Handle, same, windows.SERVICE_AUTO_START, same, p, nil, nil, nil, nil, nil, nil); err != nil {
		return err
	}
	if was, err = binaryPath(s); err != nil || was != want {
		return fmt.Errorf("the manager would start %s, not %s (%v)", was, want, err)
	}
	word := "written "
	if kept {
		word = "replaced"
	}
	i.say("%s service %s: %s", word, serviceName, want)
	return nil
}

// binaryPath is the command line that the manager has.
func binaryPath(s *mgr.Service) (string, error) {
	b := make([]byte, 8<<10) // the most that QueryServiceConfig wants
	p := (*windows.QUERY_SERVICE_CONFIG)(unsafe.Pointer(&b[0]))
	var n uint32
	if err := windows.QueryServiceConfig(s.Handle, p, uint32(len(b)), &n); err != nil {
		return "", err
	}
	return windows.UTF16PtrToString(p.BinaryPathName), nil
}

// harden sets what kardianos/service does not, and looks whether the manager
// has kept it.
func (i installer) harden(s *mgr.Service) error {
	for _, h := range hardenings {
		err := h.set(s)
		var kept bool
		if err == nil {
			kept, err = h.kept(s)
		}
		switch {
		case err == nil && kept:
		case err == nil:
			return fmt.Errorf("the service manager did not keep %s", h.what)
		case unknownToManager(err):
			i.say("note     this system's service manager does not know %s: %v", h.what, err)
		default:
			return fmt.Errorf("cannot set %s: %w", h.what, err)
		}
	}
	return nil
}

// unknownToManager tells whether the error is about the question, not the answer.
func unknownToManager(err error) bool {
	return errors.Is(err, windows.ERROR_INVALID_LEVEL) || errors.Is(err, windows.ERROR_CALL_NOT_IMPLEMENTED) || errors.Is(err, windows.ERROR_NOT_SUPPORTED)
}

func (i installer) uninstall() (string, error) {
	err := withService(func(s *mgr.Service) error {
		if err := stopService(s); err != nil {
			return err
		}
		return remove(s)
	})
	absent := errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST)
	if err != nil && !absent {
		return "", fmt.Errorf("cannot uninstall the service: %w", err)
	}
	// Also after an installation that was left half done.
	if err := eventlog.Remove(serviceName); err != nil && !errors.Is(err, windows.ERROR_FILE_NOT_FOUND) {
		return "", fmt.Errorf("cannot remove the source of events: %w", err)
	}
	if absent {
		return "not installed; nothing to do", nil
	}
	for deadline := time.Now().Add(goneWait); ; time.Sleep(controlPause) {
		err := withService(func(*mgr.Service) error { return nil })
		if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
			break
		}
		if time.Now().After(deadline) {
			i.say("note     the service is marked to be removed, and is while somebody has it open (services.msc?)")
			break
		}
	}
	return "uninstalled. Configuration and state stay, and so does what is applied", nil
}

// removable is *mgr.Service.
type removable interface{ Delete() error }

// remove removes a service. One that is marked to be removed is: it goes when
// the last who has it open closes it.
func remove(s removable) error {
	if err := patiently(s.Delete); err != nil && !errors.Is(err, windows.ERROR_SERVICE_MARKED_FOR_DELETE) {
		return err
	}
	return nil
}

func (i installer) start() (string, error) {
	return i.control("start", "started", func(s *mgr.Service) error { return startService(s) })
}

func (i installer) stop() (string, error) {
	return i.control("stop", "stopped; what is applied stays", func(s *mgr.Service) error { return stopService(s) })
}

func (i installer) restart() (string, error) {
	if _, err := i.stop(); err != nil {
		return "", err
	}
	_, err := i.start()
	return "restarted", err
}

func (i installer) control(action, done string, do func(*mgr.Service) error) (string, error) {
	err := withService(do)
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		return "", &hintedError{fmt.Errorf("cannot %s the service: it is not installed", action), "hotpatchd service install"}
	}
	if err != nil {
		return "", &hintedError{fmt.Errorf("cannot %s the service: %w", action, err), "the log is " + i.logInUse()}
	}
	return done, nil
}

// logInUse is the log of the installed service, which may have been installed
// with another configuration than this command was given.
func (i installer) logInUse() string {
	var line string
	err := withService(func(s *mgr.Service) (err error) { line, err = binaryPath(s); return err })
	if log := logOf(line); err == nil && log != "" {
		return log
	}
	return i.logFile()
}

// logOf is the log file that a command line names, "" for none.
func logOf(line string) string {
	words, err := windows.DecomposeCommandLine(line)
	if at := slices.Index(words, "--log-file") + 1; err == nil && at > 0 && at < len(words) {
		return words[at]
	}
	return ""
}

// listed waits until the manager knows a service that was just made: one that
// has begun a moment ago itself may still be reading its database.
func listed() error {
	for deadline := time.Now().Add(goneWait); ; time.Sleep(controlPause) {
		err := withService(func(*mgr.Service) error { return nil })
		if !errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) || time.Now().After(deadline) {
			return err
		}
	}
}

func withService(do func(*mgr.Service) error) error {
	m, err := mgr.Connect()
	if err != nil {
		return err
	}
	defer m.Disconnect()
	s, err := m.OpenService(serviceName)
	if err != nil {
		return err
	}
	defer s.Close()
	return do(s)
}

// controlled is what we do with an installed service: *mgr.Service.
type controlled interface {
	Start(args ...string) error
	Control(svc.Cmd) (svc.Status, error)
	Query() (svc.Status, error)
}

// startService starts a service, and comes back when it runs.
func startService(s controlled) error {
	err := patiently(func() error { return s.Start() })
	if err != nil && !errors.Is(err, windows.ERROR_SERVICE_ALREADY_RUNNING) {
		return err
	}
	return awaitState(s, svc.Running)
}

// stopService stops a service, and comes back when it has stopped. One that is
// on its way to start or stop takes no order: it is told again.
func stopService(s controlled) error {
	err := patiently(func() error {
		_, err := s.Control(svc.Stop)
		if now, qerr := s.Query(); err != nil && qerr == nil && now.State == svc.Stopped {
			return nil
		}
		return err
	})
	if err != nil && !errors.Is(err, windows.ERROR_SERVICE_NOT_ACTIVE) {
		return err
	}
	return awaitState(s, svc.Stopped)
}

// patiently tries again what the manager has no time for: another installer or
// a start holds its database (ERROR_SERVICE_DATABASE_LOCKED), or the service is
// between two states. Bounded by controlWait.
func patiently(do func() error) error {
	for deadline := time.Now().Add(controlWait); ; time.Sleep(controlPause) {
		err := do()
		passes := errors.Is(err, windows.ERROR_SERVICE_DATABASE_LOCKED) || errors.Is(err, windows.ERROR_SERVICE_CANNOT_ACCEPT_CTRL) ||
			errors.Is(err, windows.ERROR_INVALID_SERVICE_CONTROL)
		if !passes || time.Now().After(deadline) {
			return err
		}
	}
}

// awaitState waits, with a bound, which kardianos/service does not.
func awaitState(s controlled, want svc.State) error {
	for deadline := time.Now().Add(controlWait); ; time.Sleep(controlPause) {
		now, err := s.Query()
		if err != nil {
			return err
		}
		if now.State == want {
			return nil
		}
		if want == svc.Running && now.State == svc.Stopped {
			return errors.New("it ended at once")
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it did not get there within %s", controlWait)
		}
	}
}
