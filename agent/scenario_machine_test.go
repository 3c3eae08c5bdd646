package agent

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"hotpatchd/patcher/target/sim"
)

// process reads what run and exec say of a process.
func process(words []string) (sim.Process, error) {
	words, opts, err := options(words, "exe", "user", "uid", "image", "denied", "guard")
	if err != nil {
		return sim.Process{}, err
	}
	p := sim.Process{Exe: "/opt/acme/acme-server", User: opts["user"], Image: opts["image"], Denied: opts["denied"] == "true"}
	if v, ok := opts["exe"]; ok {
		p.Exe = v
	}
	if v, ok := opts["uid"]; ok {
		if p.UID, err = strconv.Atoi(v); err != nil {
			return p, err
		}
	}
	if v, ok := opts["guard"]; ok {
		p.Guards = []sim.Guard{{Code: v, Text: "guarded by the scenario"}}
	}
	for _, f := range words {
		p.Modules = append(p.Modules, sim.Module{File: f})
	}
	return p, nil
}

func (s *script) doRun(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	p, err := process(words[1:])
	if err != nil {
		return err
	}
	p.PID = pid
	_, err = s.m.Start(p)
	return err
}

func (s *script) doExec(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	p, err := process(words[1:])
	if err != nil {
		return err
	}
	_, err = s.m.Exec(pid, p)
	return err
}

func (s *script) doExit(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	code, signal := 0, 0
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("%s is no number", w)
		}
		switch key {
		case "code":
			code = n
		case "signal":
			signal = n
		default:
			return fmt.Errorf("%s is neither code= nor signal=", w)
		}
	}
	return s.m.ExitWith(pid, uint32(code), signal)
}

func (s *script) doFork(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	if len(words) != 2 {
		return errors.New("fork PID LABEL")
	}
	// A process whose threads we hold forks when they go on.
	return s.until(func() string {
		id, err := s.m.Fork(pid)
		if err != nil {
			return err.Error()
		}
		s.labels[words[1]] = id.PID
		return ""
	})
}

func (s *script) doLoad(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	words, opts, err := options(words, "base", "name")
	if err != nil {
		return err
	}
	x := sim.Module{File: arg(words, 1), Name: opts["name"]}
	if at, ok := opts["base"]; ok {
		x.Base = at
	}
	return s.until(func() string {
		if _, err := s.m.LoadModule(pid, x); err != nil {
			return err.Error()
		}
		return ""
	})
}

func (s *script) doUnload(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.until(func() string {
		if err := s.m.UnloadModule(pid, arg(words, 1)); err != nil {
			return err.Error()
		}
		return ""
	})
}

// doThread moves a thread: WHERE is a word of a scene, or $(FILE!EXPORT+N).
func (s *script) doThread(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	id, err := strconv.Atoi(arg(words, 1))
	if err != nil {
		return err
	}
	where, err := offsets(arg(words, 2))
	if err != nil {
		return err
	}
	return s.until(func() string { // not while it is held
		if err := s.m.MoveThread(pid, id, where); err != nil {
			return err.Error()
		}
		return ""
	})
}

func (s *script) doDeny(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.m.Deny(pid, arg(words, 1) == "true")
}
