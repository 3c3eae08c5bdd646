package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/kardianos/service"
	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc"
	"golang.org/x/sys/windows/svc/mgr"
)

const (
	// controlWait bounds a start or stop that a person waits for; the daemon
	// gives itself less (stopWait).
	controlWait = 60 * time.Second
	// pendingHint is what we tell the manager between two signs of life while
	// starting or stopping; over it, it takes us for dead.
	pendingHint = 20 * time.Second
	// failureReset is after how many quiet seconds failures are counted anew.
	failureReset = 3600
)

// underManager works as a Windows service. The installed command line says that
// it is one: asking the system (session 0) is wrong under Wine.
func underManager(work func(context.Context, func()) error) error {
	h := &serviceHandler{work: work}
	if err := svc.Run(serviceName, h); err != nil {
		return fmt.Errorf("cannot run as a service: %w", err)
	}
	return h.err
}

type serviceHandler struct {
	work func(context.Context, func()) error
	err  error
}

// Execute implements svc.Handler.
func (h *serviceHandler) Execute(_ []string, requests <-chan svc.ChangeRequest, status chan<- svc.Status) (bool, uint32) {
	const accepts = svc.AcceptStop | svc.AcceptShutdown | svc.AcceptPreShutdown
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- bounded(ctx, stopWait, func() error { return h.work(ctx, func() { close(ready) }) }) }()

	state, checkpoint := svc.StartPending, uint32(0)
	pending := func() {
		checkpoint++
		status <- svc.Status{State: state, CheckPoint: checkpoint, WaitHint: uint32(pendingHint.Milliseconds())}
	}
	pending()
	signs := time.NewTicker(pendingHint / 4)
	defer signs.Stop()
	for {
		select {
		case <-ready:
			ready, state = nil, svc.Running
			status <- svc.Status{State: state, Accepts: accepts}
		case <-signs.C:
			if state != svc.Running {
				pending()
			}
		case r := <-requests:
			switch r.Cmd {
			case svc.Interrogate:
				status <- r.CurrentStatus
			case svc.Stop, svc.Shutdown, svc.PreShutdown:
				cancel()
				ready, state, checkpoint = nil, svc.StopPending, 0
				pending()
			}
		case h.err = <-done:
			if h.err != nil {
				return true, 1 // counts as a failure: the recovery actions start us again
			}
			return false, 0
		}
	}
}

func (i installer) arguments() []string { return []string{"--service", "--log-file", i.logFile()} }

func (i installer) logFile() string { return filepath.Join(filepath.Dir(i.config), "hotpatchd.log") }

func (i installer) install() (string, error) {
	if err := i.ensureConfig(); err != nil {
		return "", err
	}
	c := i.definition(i.arguments()...)
	c.Option = service.KeyValue{"StartType": "automatic"}
	err := withService(func(s *mgr.Service) error { return i.mend(s) })
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		var s service.Service
		if s, err = service.New(idle{}, c); err == nil {
			err = s.Install()
		}
		if err == nil {
			i.say("written  service %s: %s", serviceName, i.commandLine())
		}
	}
	if err != nil {
		return "", fmt.Errorf("cannot install the service: %w", err)
	}
	// kardianos/service sets one action, for crashes only.
	err = withService(func(s *mgr.Service) error {
		again := func(d time.Duration) mgr.RecoveryAction {
			return mgr.RecoveryAction{Type: mgr.ServiceRestart, Delay: d}
		}
		if err := s.SetRecoveryActions([]mgr.RecoveryAction{again(2 * time.Second), again(10 * time.Second), again(time.Minute)}, failureReset); err != nil {
			return err
		}
		return s.SetRecoveryActionsOnNonCrashFailures(true)
	})
	if err != nil {
		return "", fmt.Errorf("cannot set what happens after a failure: %w", err)
	}
	return "installed, starts with the system. Start it now with: hotpatchd service start", nil
}

func (i installer) commandLine() string {
	words := append([]string{i.exe, "run", "--config", i.config}, i.arguments()...)
	return windows.ComposeCommandLine(words)
}

// mend makes an installed service start this program with this configuration.
func (i installer) mend(s *mgr.Service) error {
	c, err := s.Config()
	if err != nil {
		return err
	}
	if c.BinaryPathName == i.commandLine() {
		i.say("kept     service %s", serviceName)
		return nil
	}
	c.BinaryPathName = i.commandLine()
	if err := s.UpdateConfig(c); err != nil {
		return err
	}
	i.say("replaced service %s: %s", serviceName, c.BinaryPathName)
	return nil
}

func (i installer) uninstall() (string, error) {
	err := withService(func(s *mgr.Service) error {
		if err := stopService(s); err != nil {
			return err
		}
		return s.Delete()
	})
	if errors.Is(err, windows.ERROR_SERVICE_DOES_NOT_EXIST) {
		return "not installed; nothing to do", nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot uninstall the service: %w", err)
	}
	return "uninstalled. Configuration and state stay, and so does what is applied", nil
}

func (i installer) start() (string, error) {
	return i.control("start", "started", func(s *mgr.Service) error {
		if err := s.Start(); err != nil && !errors.Is(err, windows.ERROR_SERVICE_ALREADY_RUNNING) {
			return err
		}
		return awaitState(s, svc.Running)
	})
}

func (i installer) stop() (string, error) {
	return i.control("stop", "stopped; what is applied stays", stopService)
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
		return "", &hintedError{fmt.Errorf("cannot %s the service: %w", action, err), "the log is " + i.logFile()}
	}
	return done, nil
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

func stopService(s *mgr.Service) error {
	if _, err := s.Control(svc.Stop); err != nil && !errors.Is(err, windows.ERROR_SERVICE_NOT_ACTIVE) {
		return err
	}
	return awaitState(s, svc.Stopped)
}

// awaitState waits, with a bound, which kardianos/service does not.
func awaitState(s *mgr.Service, want svc.State) error {
	for deadline := time.Now().Add(controlWait); ; time.Sleep(100 * time.Millisecond) {
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
